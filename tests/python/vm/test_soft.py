"""What only the software back end promises: repeatable runs, virtual time, an idle guest that costs nothing."""

from __future__ import annotations

import hashlib
import struct
import time
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LIMIT = 60


def fingerprint(image: Path, seed: int, cpus: int) -> str:
    """All registers, all of RAM and the counts of instructions at the guest's end."""
    with Vm(image, seed=seed, cpus=cpus, memory="16MiB").debug() as dbg:
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        start, size = dbg._machine.ram
        digest = hashlib.sha256(dbg.memory.physical.read(start, size))
        for vcpu in dbg.vcpus:
            assert vcpu.instructions
            digest.update(f"{vcpu.instructions} {vcpu.registers.to_dict()}".encode())
        return digest.hexdigest()


@pytest.mark.parametrize("cpus", [1, 4])
def test_twenty_boots_of_one_seed_end_in_one_state(guest: Callable[..., Path], cpus: int) -> None:
    image = guest("smp", defines=["COUNT=3000"])

    assert len({fingerprint(image, 7, cpus) for _ in range(20)}) == 1


def test_another_seed_is_another_execution(guest: Callable[..., Path]) -> None:
    image = guest("smp", defines=["COUNT=3000"])

    assert len({fingerprint(image, seed, 2) for seed in range(5)}) == 5


def test_real_kernel_with_a_seed_ends_in_one_state(hermit_060: Path) -> None:
    assert len({fingerprint(hermit_060 / "hello_world", 3, 1) for _ in range(3)}) == 1


def test_seeds_show_both_outcomes_of_a_race_and_each_again(guest: Callable[..., Path]) -> None:
    vms = [Vm(guest("race"), cpus=2, seed=seed) for seed in range(20)]

    outcomes = [vm.run(LIMIT).output for vm in vms]

    assert set(outcomes) == {"winner=0\n", "winner=1\n"}
    assert [vm.run(LIMIT).output for vm in vms] == outcomes


def test_sleep_of_a_guest_takes_no_time_on_the_virtual_clock_and_its_own_on_the_hosts(
    guest: Callable[..., Path],
) -> None:
    image = guest("timer", defines=["COUNT=20", "PERIOD=20000000"])

    virtual, host = Vm(image, backend="soft").run(LIMIT), Vm(image, clock="host").run(LIMIT)

    assert virtual.output == host.output == "timer ticks=20\n"
    assert virtual.seconds < 0.3 < 0.38 < host.seconds < 2


def test_guest_that_nothing_can_wake_uses_no_cpu_and_is_closed_at_once(guest: Callable[..., Path]) -> None:
    with Vm(guest("halt"), backend="soft", cpus=4) as vm:
        vm.start()
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.05
        closing = time.monotonic()
        vm.close()
        assert time.monotonic() - closing < 1


def test_a_small_quantum_and_a_large_one_run_the_same_guest(guest: Callable[..., Path]) -> None:
    for quantum in (50, 10_000_000):
        result = Vm(guest("smp"), cpus=3, quantum=quantum).run(LIMIT)

        assert (result.backend, result.output.splitlines()[-1]) == ("soft", "all=3000")


def test_seed_quantum_and_clock_are_refused_where_they_mean_nothing(guest: Callable[..., Path]) -> None:
    for vm in (Vm(guest("hello"), backend="kvm", seed=1), Vm(guest("hello"), backend="kvm", clock="host")):
        with pytest.raises(ConfigError, match="soft"):
            vm.run(LIMIT)
    for options in ({"clock": "sun"}, {"quantum": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            Vm(guest("hello"), **options)  # type: ignore[arg-type]


def test_watched_and_counted_runs_of_a_debugger_repeat(guest: Callable[..., Path]) -> None:
    def stops(seed: int) -> list[tuple[int, int, int | None]]:
        with Vm(guest("smp", defines=["COUNT=200"]), cpus=3, seed=seed).debug() as dbg:
            dbg.breakpoint("tick", condition="arg1 % 37 == 0")
            found = []
            while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
                found.append((stop.vcpu, stop.pc, dbg.vcpus[stop.vcpu].instructions))
            return found

    assert len(stops(5)) == 18
    assert stops(5) == stops(5)


def test_way_into_compatibility_mode_ends_with_a_crash_that_says_so(guest: Callable[..., Path]) -> None:
    with Vm(guest("halt"), backend="soft").debug() as dbg:
        registers = dbg.registers
        pc, table = registers.rip, registers.gdt_base
        frame = table + 0x800
        dbg.memory.write(table + 0x18, struct.pack("<Q", 0x00CF_9B00_0000_FFFF))
        dbg.memory.write(frame, struct.pack("<5Q", pc, 0x18, 2, frame, 0x10))
        dbg.memory.write(pc, b"\x48\xcf")
        registers.gdt_limit, registers.rsp = 0x1F, frame

        stop = dbg.cont(timeout=LIMIT)

    assert (stop.reason, stop.pc) == ("crash", pc)
    assert all(text in str(stop) for text in ("no compatibility mode", "iretq", "48 cf", f"rsp {frame:016x}"))
