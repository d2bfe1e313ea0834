"""What graphical front ends ask gdb for, in its machine interface: variables, registers, memory, code and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(100)]


def test_variables_are_listed_followed_and_changed(serve: Callable[..., Served]) -> None:
    gdb = serve("scenario", build={"optimize": "-O0"}).gdb()
    gdb.command("-break-insert -t -c 1 scenario")
    gdb.cont()
    gdb.command('-var-create number * "number"')
    gdb.command('-var-create fraction * "fraction"')

    for _ in range(3):
        gdb.run("-exec-next")
    changed = gdb.command("-var-update --all-values *").results["changelist"]
    assert {change["name"]: change["value"] for change in changed} == {"number": "5", "fraction": "3.5"}
    gdb.command('-var-assign number "6"')
    gdb.command('-var-assign fraction "4.5"')
    listed = gdb.command("-stack-list-variables --simple-values").results["variables"]
    assert {"name": "number", "type": "int", "value": "6"} in listed
    gdb.command('-break-insert -t "scenario.c:mark"')
    assert gdb.cont().results["frame"]["func"] == "mark"
    assert gdb.run("-exec-finish").results["frame"]["func"] == "scenario"
    gdb.command("-gdb-set var $rcx = 5")
    end = gdb.cont().results
    assert end["reason"] == "exited-normally"


def test_memory_code_and_registers_are_read_and_written(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    gdb = served.gdb()
    work, calls = served.dbg.symbol("work"), served.dbg.symbol("calls")
    gdb.command("-break-insert work")
    gdb.cont()

    [memory] = gdb.command(f"-data-read-memory-bytes {work:#x} 32").results["memory"]
    assert bytes.fromhex(memory["contents"]) == served.dbg.memory.read(work, 32)
    gdb.command(f"-data-write-memory-bytes {calls:#x} 8877665544332211")
    assert served.word("calls") == 0x1122_3344_5566_7788
    code = gdb.command(f"-data-disassemble -s {work:#x} -e {work + 16:#x} -- 0").results["asm_insns"]
    assert int(code[0]["address"], 16) == work
    assert code[0]["func-name"] == "work"
    names = gdb.command("-data-list-register-names").results["register-names"]
    shown = gdb.command("-data-list-register-values --skip-unavailable x").results["register-values"]
    values = {names[int(register["number"])]: register["value"] for register in shown}
    registers = served.dbg.vcpus[0].registers.to_dict()
    assert {name: int(values[name], 16) for name in ("rax", "rdi", "rip", "cr3", "fs_base")} == {
        name: registers[name] for name in ("rax", "rdi", "rip", "cr3", "fs_base")
    }
    assert len(values) > 60


@pytest.mark.parametrize("cpus", [1, 4])
def test_threads_are_told_with_state_name_core_and_frame(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    gdb = served.gdb()
    gdb.command("-break-insert tick")
    gdb.cont()

    told = gdb.command("-thread-info").results["threads"]

    assert sorted(thread["name"] for thread in told) == [f"vCPU {number}" for number in range(cpus)]
    assert {thread["state"] for thread in told} == {"stopped"}
    assert sorted(thread["core"] for thread in told) == [str(number) for number in range(cpus)]
    for thread in told:
        frame = gdb.command(f"-stack-info-frame --thread {thread['id']} --frame 0").results["frame"]
        assert int(frame["addr"], 16) == served.dbg.vcpus[int(thread["core"])].pc


def test_detach_and_the_front_ends_exit_let_the_guest_run(
    serve: Callable[..., Served], wait_until: Callable[..., bool]
) -> None:
    served = serve("busy", cpus=2)
    for farewell in (["-target-detach", "-gdb-exit"], ["-gdb-exit"]):
        gdb = served.gdb()
        for command in farewell:
            gdb.command(command)
        assert wait_until(lambda: served.dbg.running)
        assert gdb.process.wait(20) == 0
