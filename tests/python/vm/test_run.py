"""Runs of guests to their end: every kind of image, exit codes, interrupts, several cpus."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, ImageError, Vm, VmResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Literal

pytestmark = pytest.mark.vm

LIMIT = 60
GREETING = "Hello from a test guest\nand a line by the buffer\n"


@pytest.mark.parametrize("aslr", [True, False])
@pytest.mark.parametrize("entry_version", [3, 4])
@pytest.mark.parametrize("pie", [True, False])
@pytest.mark.parametrize("interface", [1, 2, 3])
def test_run_of_every_kind_of_image_greets_and_ends_with_0(
    guest: Callable[..., Path], interface: int, pie: bool, entry_version: int, aslr: bool, backend: str
) -> None:
    vm = Vm(guest("hello", interface=interface, pie=pie, entry_version=entry_version), aslr=aslr)

    result = vm.run(LIMIT)

    assert (result.code, result.output, result.truncated) == (0, GREETING, False)
    assert result.backend == backend
    assert 0 < result.seconds < LIMIT
    assert (vm.image.interface, vm.image.entry_version, vm.image.relocatable) == (interface, entry_version, pie)


@pytest.mark.parametrize(
    ("interface", "options"),
    [
        (1, {"hermit_version": (0, 13, 2)}),
        (3, {"hermit_version": (0, 13, 2)}),
        (2, {"symbolic": True}),
        (1, {"optimize": "-O0"}),
        (2, {"pie": False, "link_address": 0x1_0080_0000}),
        (1, {"pie": False, "link_address": 0x20_0000}),
        (1, {"announced_interface": 1}),
        (3, {"announced_interface": 2}),
        (1, {"osabi": 0}),
    ],
)
def test_run_of_images_with_other_traits_greets(guest: Callable[..., Path], interface: int, options: dict) -> None:
    result = Vm(guest("hello", interface=interface, **options)).run(LIMIT)

    assert (result.code, result.output) == (0, GREETING)


def test_image_with_abi_tag_tells_its_hermit_version(guest: Callable[..., Path]) -> None:
    assert Vm(guest("hello", hermit_version=(0, 13, 2))).image.hermit_version == "0.13.2"
    assert Vm(guest("hello")).image.hermit_version is None


# Memory.


@pytest.mark.parametrize("aslr", [True, False])
@pytest.mark.parametrize("memory", ["16MiB", "18MiB", "64MiB", "1GiB", "2.5GiB", 3 * 2**30 - 2 * 2**20])
@pytest.mark.parametrize("interface", [1, 2, 3])
def test_run_with_memory_below_the_gap_greets(
    guest: Callable[..., Path], interface: int, memory: str | int, aslr: bool
) -> None:
    result = Vm(guest("hello", interface=interface), memory=memory, aslr=aslr).run(LIMIT)

    assert (result.code, result.output) == (0, GREETING)


@pytest.mark.parametrize("memory", ["3GiB", "3.5GiB", "4GiB", "4098MiB", "8GiB"])
@pytest.mark.parametrize(("interface", "pie"), [(2, True), (3, True), (3, False)])
def test_run_with_memory_past_the_gap_greets(
    guest: Callable[..., Path], interface: int, pie: bool, memory: str
) -> None:
    image = guest("hello", interface=interface, pie=pie, **({} if pie else {"link_address": 0x1_0080_0000}))

    result = Vm(image, memory=memory).run(LIMIT)

    assert (result.code, result.output) == (0, GREETING)


@pytest.mark.parametrize(
    ("options", "memory", "why"),
    [
        ({"interface": 1}, "8GiB", r"memory size 8192 MiB: an image with interface version 1 can have at most 3072"),
        ({"interface": 1}, 3 * 2**30 + 2 * 2**20, "at most 3072 MiB"),
        ({"interface": 1, "pie": False}, "4GiB", "at most 3072 MiB"),
        ({"interface": 3, "pie": False}, "8GiB", "an image linked below 3 GiB can have at most 3072 MiB"),
        ({"interface": 1, "pie": False, "link_address": 0x400_0000}, "16MiB", r"needs 0x4000000\.\..* at least 66 MiB"),
        ({"interface": 1, "pie": False, "link_address": 0x1000}, "64MiB", "the kernel is linked at 0x1000; boot data"),
    ],
)
def test_start_with_memory_that_the_image_cant_have_says_so(
    guest: Callable[..., Path], options: dict, memory: str | int, why: str
) -> None:
    image = guest("hello", **options)

    with pytest.raises((ImageError, ConfigError), match=why) as caught:
        Vm(image, memory=memory).run(LIMIT)

    assert image.name in str(caught.value)


@pytest.mark.parametrize(
    "memory",
    [
        *("0", "14MiB", "16MB1", "17MiB", "sixteen", "", "64 QiB", "-64MiB", "1e9", "1.0000001GiB"),
        *("99999999T", "9" * 400 + ".0", 1, -1, 0, 2**63),
    ],
)
def test_vm_with_a_bad_memory_size_is_refused(memory: str | int) -> None:
    with pytest.raises(ConfigError):
        Vm.demo(memory=memory)


def test_start_with_memory_beyond_the_address_space_says_so(guest: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="at most 1020 GiB"):
        Vm(guest("hello", interface=3), memory="2TiB").run(LIMIT)


# Exit codes.


@pytest.mark.parametrize("code", [0, 1, 42, 255, 256, 65_537, 2**31 - 1, -1, -2, -256, -(2**31)])
@pytest.mark.parametrize("interface", [1, 3])
def test_run_gives_the_exit_code_as_a_signed_32_bit_number(
    guest: Callable[..., Path], interface: int, code: int
) -> None:
    result = Vm(guest("hello", interface=interface, defines=[f"EXIT_CODE=({code})"])).run(LIMIT)

    assert (result.code, result.output) == (code, GREETING)


def test_run_ended_by_an_application_processor_gives_its_code(guest: Callable[..., Path]) -> None:
    result = Vm(guest("crash", defines=["KIND=ap_exit"]), cpus=2).run(LIMIT)

    assert (result.code, result.output) == (5, "crash ap_exit\n")
    assert result.stats.vcpus[1].hypercalls == {"exit": 1}


# Results and runs of one Vm.


def test_run_twice_gives_equal_results_of_separate_machines(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("loop", defines=["COUNT=10"]))

    first, second = vm.run(LIMIT), vm.run(LIMIT)

    assert first.output == second.output == "calls=10 total=135\n"
    assert first.stats is not second.stats


def test_result_matches_by_code_and_output(guest: Callable[..., Path]) -> None:
    match Vm(guest("hello")).run(LIMIT):
        case VmResult(0, output):
            assert output == GREETING
        case other:
            pytest.fail(f"no match: {other}")


def test_demo_needs_no_image_and_ends_with_0() -> None:
    result = Vm.demo().run(LIMIT)

    assert result.code == 0
    assert result.output


def test_image_given_as_bytes_or_image_runs_like_its_path(guest: Callable[..., Path]) -> None:
    path = guest("hello")
    vm = Vm(path)

    results = [Vm(image).run(LIMIT) for image in (str(path), path.read_bytes(), vm.image)]

    assert [result.output for result in results] == [GREETING] * 3


def test_image_removed_after_it_was_read_still_runs(guest: Callable[..., Path], tmp_path: Path) -> None:
    copy = tmp_path / "hello"
    copy.write_bytes(guest("hello").read_bytes())
    vm = Vm(copy)
    copy.unlink()

    assert vm.run(LIMIT).output == GREETING


@pytest.mark.parametrize(
    "keywords",
    [
        {"thp": True},
        {"ksm": True},
        {"pit": True},
        {"cpu_pm": True},
        {"affinity": [0]},
        {"file_isolation": "normal"},
        {"io_mode": "sync"},
        {"output_limit": 0},
    ],
)
def test_run_with_an_option_of_the_host_ends_as_without(guest: Callable[..., Path], keywords: dict) -> None:
    result = Vm(guest("hello"), **keywords).run(LIMIT)

    assert result.code == 0
    assert result.output == ("" if "output_limit" in keywords else GREETING)


# What guests do.


@pytest.mark.parametrize("interface", [1, 3])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_smp_guest_counts_on_every_cpu(guest: Callable[..., Path], cpus: int, interface: int) -> None:
    result = Vm(guest("smp", interface=interface, defines=["COUNT=200"]), cpus=cpus).run(LIMIT)

    lines = [*(f"cpu {number}: 200" for number in range(cpus)), f"all={200 * cpus}"]
    assert result.output.splitlines() == lines
    assert len(result.stats.vcpus) == cpus


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_lockstep_guest_passes_its_token_round(guest: Callable[..., Path], cpus: int) -> None:
    result = Vm(guest("lockstep", defines=["COUNT=20"]), cpus=cpus).run(LIMIT)

    assert result.output == f"lockstep cpus={cpus} rounds=20 passes={20 * cpus}\n"


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_ipi_guest_wakes_its_cpus(guest: Callable[..., Path], cpus: int) -> None:
    result = Vm(guest("ipi"), cpus=cpus).run(LIMIT)

    woken = [0] if cpus == 1 else range(1, cpus)
    assert result.output.splitlines() == [*(f"ipi cpu {number}: 3" for number in woken), "ipi ok"]


@pytest.mark.parametrize("defines", [(), ("ONE_SHOT",)])
def test_timer_guest_gets_all_its_interrupts(guest: Callable[..., Path], defines: tuple[str, ...]) -> None:
    assert Vm(guest("timer", defines=defines)).run(LIMIT).output == "timer ticks=20\n"


def test_tsc_guest_waits_as_long_as_the_host_sees(guest: Callable[..., Path], backend: str) -> None:
    # By the software CPU's own clock it waits for instructions.
    clock: Literal["host"] | None = "host" if backend == "soft" else None
    result = Vm(guest("tsc", defines=["MILLISECONDS=200"]), clock=clock).run(LIMIT)

    assert result.output.endswith("waited 200 ms\n")
    # The frequency that the guest was told is right if its wait was neither shorter nor far longer.
    assert 0.19 < result.seconds < 2


def test_calls_guest_computes(guest: Callable[..., Path]) -> None:
    assert Vm(guest("calls")).run(LIMIT).output == "descend=1275\nfibonacci=610\napply=9 5 14\n"


def test_selfmod_guest_executes_what_it_wrote(guest: Callable[..., Path]) -> None:
    lines = Vm(guest("selfmod")).run(LIMIT).output.splitlines()

    assert lines == [*(f"round {n}: patched {n} loaded {100 + n}" for n in range(1, 6)), "selfmod ok"]


def test_steps_guest_executes_its_sequence(guest: Callable[..., Path]) -> None:
    assert Vm(guest("steps")).run(LIMIT).output == "steps=5\n"


def test_faults_guest_handles_its_own_exceptions(guest: Callable[..., Path]) -> None:
    lines = Vm(guest("faults")).run(LIMIT).output.splitlines()

    assert lines == [
        "page fault 0x500000001230 error 0x2",
        "no execute error 0x11",
        "undefined instruction",
        "breakpoints 3",
        "divide error",
        "general protection",
        "faults ok",
    ]


def test_faults_guest_uses_its_own_debug_registers(guest: Callable[..., Path]) -> None:
    lines = Vm(guest("faults", defines=["WITH_DEBUG_REGISTERS"])).run(LIMIT).output.splitlines()

    assert lines[-3:] == ["debug register 1", "steps 4", "faults ok"]


@pytest.mark.parametrize(("kind", "code", "output"), [("double", 96, "double fault\n"), ("sse", 0, "sse ok\n")])
def test_guest_that_survives_its_trouble_ends_itself(
    guest: Callable[..., Path], kind: str, code: int, output: str
) -> None:
    result = Vm(guest("crash", defines=[f"KIND={kind}"])).run(LIMIT)

    assert (result.code, result.output) == (code, f"crash {kind}\n{output}")


@pytest.mark.parametrize(
    ("kind", "code", "pattern"),
    [("check", 97, r"FAIL: on purpose\n"), ("exception", 98, r"unexpected exception 6 error 0x0 rip 0x[0-9a-f]+ .*\n")],
)
def test_guest_that_reports_its_own_failure_gives_its_code(
    guest: Callable[..., Path], kind: str, code: int, pattern: str
) -> None:
    result = Vm(guest("crash", defines=[f"KIND={kind}"])).run(LIMIT)

    assert result.code == code
    assert re.fullmatch(rf"crash {kind}\n{pattern}", result.output)
