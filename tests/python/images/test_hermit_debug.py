"""The debugger on real images: file opens stopped by a condition and redirected, calls counted over a whole boot."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from uhyve import Vm

if TYPE_CHECKING:
    from pathlib import Path

    from uhyve import Hit

pytestmark = pytest.mark.vm

LIMIT = 100


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "hostname").write_text("the-mapped-host\n")
    (tmp_path / "other").write_text("another-file\n")
    return {"/etc/hostname": tmp_path / "hostname", "/etc/hostn4me": tmp_path / "other"}


def test_file_open_stopped_by_a_condition_is_redirected_by_a_changed_path(
    hermit_060: Path, files: dict[str, Path]
) -> None:
    with Vm(hermit_060 / "hello_c", files=files).debug() as dbg:
        opens = dbg.breakpoint("sys_open", condition="u32[arg0] == 0x6374652f")

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.breakpoint, stop.symbol) == ("breakpoint", opens, "sys_open")
        path = stop.frame.registers.rdi
        assert dbg.memory.read_cstring(path) == b"/etc/hostname"
        dbg.memory.write(path + len("/etc/hostn"), b"4")
        end = dbg.cont(timeout=LIMIT)
        assert (end.reason, end.code) == ("exit", 0)
        assert "another-file" in dbg.output
        assert "the-mapped-host" not in dbg.output


def test_file_open_whose_path_a_callback_changes_needs_no_stop(hermit_060: Path, files: dict[str, Path]) -> None:
    with Vm(hermit_060 / "hello_c", files=files).debug() as dbg:

        @dbg.breakpoint("sys_open")
        def redirect(hit: Hit) -> None:
            if hit.memory.read_cstring(hit.arg(0)) == b"/etc/hostname":
                hit.memory.write_u8(hit.arg(0) + 10, ord("4"))

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert redirect.reached >= 1
        assert "another-file" in dbg.output


@pytest.mark.parametrize("image", ["hello_world", "hello_c"])
def test_calls_counted_over_a_whole_boot_are_the_same_by_condition_and_by_callable(
    hermit_060: Path, files: dict[str, Path], image: str
) -> None:
    counts: list[int] = []
    outputs: list[str] = []
    for _ in range(2):
        called: list[int] = []
        with Vm(hermit_060 / image, files=files, aslr=False).debug() as dbg:
            by_condition = dbg.breakpoint("sys_malloc" if image == "hello_world" else "sys_write", condition="False")
            by_callable = dbg.breakpoint(by_condition.address, condition=lambda hit, called=called: called.append(1))
            assert dbg.cont(timeout=LIMIT).reason == "exit"
            assert by_condition.reached == by_callable.reached == len(called) > 0
            assert by_condition.hits == 0
            counts.append(by_condition.reached)
            outputs.append(re.sub(r"\d+", "", dbg.output))

    assert counts[0] == counts[1]
    assert "Hello World!" in outputs[0]


def test_writes_of_the_guest_pass_a_condition_on_their_length(hermit_060: Path) -> None:
    with Vm(hermit_060 / "hello_world").debug() as dbg:
        writes = dbg.breakpoint("sys_write", condition="arg2 > 8")
        texts = []
        while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
            texts.append(dbg.memory.read(stop.frame.registers.rsi, stop.frame.registers.rdx))

        assert stop.code == 0
        assert len(texts) == writes.hits <= writes.reached
        for text in texts:
            assert text.decode() in dbg.output


def test_mangled_name_of_the_kernel_is_found_by_its_path(hermit_060: Path) -> None:
    with Vm(hermit_060 / "hello_world").debug() as dbg:
        breakpoint_ = dbg.breakpoint("hermit::__sys_malloc", temporary=True)

        stop = dbg.cont(timeout=LIMIT)

        assert stop.pc == breakpoint_.address
        assert stop.frame.function is not None
        assert "__sys_malloc" in stop.frame.function


def test_steps_of_a_booting_kernel_and_its_end_are_as_without(hermit_060: Path) -> None:
    with Vm(hermit_060 / "hello_world").debug() as dbg:
        assert dbg.step(200, timeout=LIMIT).reason == "step"

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert "Hello World!" in dbg.output


def test_detached_kernel_boots_to_its_end(hermit_060: Path) -> None:
    dbg = Vm(hermit_060 / "hello_world").debug()
    dbg.breakpoint("sys_write")
    dbg.cont(timeout=LIMIT)

    result = dbg.detach().wait(LIMIT)

    assert result.code == 0
    assert "Hello World!" in result.output


def test_thread_pointer_of_a_running_program_is_known_to_conditions_and_readable(hermit_060: Path) -> None:
    with Vm(hermit_060 / "hello_world").debug() as dbg:
        assert dbg.registers.fs_base == 0
        dbg.breakpoint("main", condition="fs_base != 0 and u64[fs_base] != 0")

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.message) == ("breakpoint", None)
        assert dbg.memory.read_u64(dbg.registers.fs_base) != 0
