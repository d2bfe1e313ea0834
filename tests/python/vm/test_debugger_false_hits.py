"""Hits that stop nobody, by the thousand: on a KVM that emulates the guest's kernel, and elsewhere where that pays,
they are judged within stays of the software CPU, and everything has to be as if each were an exit."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from uhyve import Debugger, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from uhyve import Hit

pytestmark = pytest.mark.vm

LIMIT = 60
CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
COUNT = 1500
"""Calls of each vCPU: more hits than one stay has."""


@pytest.fixture
def loop(guest: Callable[..., Path]) -> Path:
    return guest("loop", defines=[f"COUNT={COUNT}"])


@pytest.fixture
def smp(guest: Callable[..., Path]) -> Path:
    return guest("smp", defines=[f"COUNT={COUNT}"])


def word(dbg: Debugger, name: str, index: int = 0) -> int:
    return dbg.memory.read_u64(dbg.symbol(name) + 8 * index)


def counts(dbg: Debugger) -> list[int]:
    """What the guest has counted: each vCPU's calls, and all of them, atomically."""
    return [*(word(dbg, "ticks", vcpu.number) for vcpu in dbg.vcpus), word(dbg, "all_ticks")]


def finish(dbg: Debugger) -> None:
    stop = dbg.cont(timeout=LIMIT)
    assert (stop.reason, stop.code) == ("exit", 0)


def halt(dbg: Debugger) -> None:
    dbg.interrupt()
    stop = dbg.wait(timeout=LIMIT)
    assert stop is not None
    assert stop.reason == "interrupt"


@CPUS
def test_false_hits_of_all_vcpus_are_counted_exactly(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        never = dbg.breakpoint("tick", condition="arg0 == 99")
        other = dbg.breakpoint("tick", condition=lambda hit: hit.arg(1) > COUNT)

        finish(dbg)

        assert counts(dbg) == [COUNT] * cpus + [COUNT * cpus]
        assert [(b.reached, b.hits) for b in (never, other)] == [(COUNT * cpus, 0)] * 2


def test_false_hits_leave_no_exits_on_a_kvm_that_emulates_ring_0(loop: Path, cpu_kind: str) -> None:
    if cpu_kind != "PVM":
        pytest.skip("how many hits are exits depends on what an exit costs, or none is")
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition="arg0 == 2 * arg1 + 1")

        finish(dbg)

        assert breakpoint_.reached == COUNT
        assert sum(dbg.stats.exits.values()) < COUNT / 10


@CPUS
def test_true_hits_between_false_ones_stop_once_each_with_true_registers(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition="arg1 % 250 == 7")
        met = []

        while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
            registers = dbg.vcpus[stop.vcpu].registers
            assert (registers.rip, registers.rdi) == (breakpoint_.address, stop.vcpu)
            assert word(dbg, "ticks", stop.vcpu) == registers.rsi
            met.append((stop.vcpu, registers.rsi))

        assert stop.reason == "exit"
        assert sorted(met) == [(vcpu, i) for vcpu in range(cpus) for i in range(7, COUNT, 250)]
        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT * cpus, len(met))
        assert counts(dbg) == [COUNT] * cpus + [COUNT * cpus]


@CPUS
def test_callable_sees_each_hit_once_and_in_order(smp: Path, cpus: int) -> None:
    seen: list[list[int]] = [[] for _ in range(cpus)]

    def note(hit: Hit) -> bool:
        assert hit.pc == hit.registers.rip
        assert hit.memory.read_u64(ticks + 8 * hit.vcpu) == hit.arg(1)
        seen[hit.vcpu].append(hit.arg(1))
        return False

    with Vm(smp, cpus=cpus).debug() as dbg:
        ticks = dbg.symbol("ticks")
        dbg.breakpoint("tick", condition=note)

        finish(dbg)

    assert seen == [list(range(COUNT))] * cpus


@CPUS
def test_ignored_hits_are_counted_to_the_last_one(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", ignore=COUNT * cpus - 3)
        stops = 0

        while dbg.cont(timeout=LIMIT).reason == "breakpoint":
            stops += 1

        assert (stops, breakpoint_.reached, breakpoint_.hits, breakpoint_.ignore) == (3, COUNT * cpus, 3, 0)


def test_breakpoints_of_one_vcpu_and_for_one_stop_keep_to_that(smp: Path) -> None:
    with Vm(smp, cpus=2).debug() as dbg:
        only = dbg.breakpoint("tick", vcpu=1, condition="False")
        once = dbg.breakpoint("tick", vcpu=0, condition=f"arg1 == {COUNT - 2}", temporary=True)

        assert dbg.cont(timeout=LIMIT).breakpoint is once
        finish(dbg)

        assert (only.reached, once.reached, once.hits) == (COUNT, COUNT - 1, 1)


@CPUS
def test_interrupts_among_false_hits_stop_at_once_and_lose_nothing(guest: Callable[..., Path], cpus: int) -> None:
    image = guest("smp", defines=["COUNT=1000000000"])
    with Vm(image, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition="arg0 == 99")
        last = 0
        for pause in range(12):
            dbg.cont(wait=False)
            time.sleep(0.002 * pause)
            halt(dbg)

            *each, together = counts(dbg)
            behind = [vcpu.pc - breakpoint_.address for vcpu in dbg.vcpus]
            # Nobody is left where gdb takes the breakpoint for asked; who stands behind it has been counted.
            assert 0 not in behind
            assert 0 <= breakpoint_.reached - sum(each) <= sum(0 < at < 0x40 for at in behind)
            assert 0 <= sum(each) - together <= cpus
            assert breakpoint_.reached >= last
            last = breakpoint_.reached


@CPUS
def test_breakpoints_that_another_thread_sets_and_removes_hold_and_are_gone(
    guest: Callable[..., Path], cpus: int
) -> None:
    image = guest("smp", defines=["COUNT=1000000000"])
    with Vm(image, cpus=cpus).debug() as dbg:
        always = dbg.breakpoint("tick", condition="arg0 == 99")
        dbg.cont(wait=False)

        for _ in range(15):
            before = always.reached
            added = dbg.breakpoint("tick", condition="arg0 == 98")
            after = always.reached
            while added.reached < 20:
                time.sleep(0.0005)
            added.enabled = False
            met, still = added.reached, always.reached
            time.sleep(0.002)
            assert added.reached == met, "a disabled one is not met"
            added.delete()
            assert before <= after <= still

        # From its insertion on, every arrival is its own as well.
        halt(dbg)
        start, other = always.reached, dbg.breakpoint("tick", condition="arg0 == 98")
        dbg.cont(wait=False)
        while other.reached == 0:
            time.sleep(0.001)
        halt(dbg)
        assert other.reached == always.reached - start


def test_condition_that_another_thread_changes_counts_for_the_next_hit(guest: Callable[..., Path]) -> None:
    with Vm(guest("smp", defines=["COUNT=1000000000"]), cpus=2).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition="arg0 == 99")
        dbg.cont(wait=False)
        while breakpoint_.reached < 2000:
            time.sleep(0.0005)

        breakpoint_.condition = "arg0 == 1"

        stop = dbg.wait(timeout=LIMIT)
        assert (stop.reason, stop.vcpu, stop.frame.registers.rdi) == ("breakpoint", 1, 1)


def test_what_a_callable_writes_is_what_the_guest_goes_on_with(loop: Path) -> None:
    ret = b"\xc3"

    def change(hit: Hit) -> bool:
        i = hit.arg(0)
        if i == COUNT - 100:
            hit.registers.rsi = 1_000_000
        if i == COUNT - 50:
            # The code beneath the breakpoint: from here on the function does nothing.
            hit.memory.write(hit.pc, ret)
        return False

    with Vm(loop).debug() as dbg:
        code = dbg.memory.read(dbg.symbol("work"), 1)
        breakpoint_ = dbg.breakpoint("work", condition=change)

        finish(dbg)

        assert breakpoint_.reached == COUNT
        assert word(dbg, "calls") == COUNT - 50
        assert word(dbg, "total") == sum(3 * i for i in range(COUNT - 50)) + 1_000_000 - 2 * (COUNT - 100)
        assert (code, dbg.memory.read(breakpoint_.address, 1)) != (ret, code)


def test_callable_that_sets_and_deletes_breakpoints_meets_them_from_then_on(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        within = dbg.symbol("work") + 7

        def change(hit: Hit) -> bool:
            if hit.arg(0) == 700:
                added.append(dbg.breakpoint(within, condition="False"))
            elif hit.arg(0) == 1400:
                added[0].delete()
            return False

        added: list = []
        every = dbg.breakpoint("work", condition=change)

        finish(dbg)

        assert (every.reached, added[0].reached) == (COUNT, 700)


def test_failing_callable_among_false_hits_stops_there(loop: Path) -> None:
    def fail(hit: Hit) -> bool:
        if hit.arg(0) == 1234:
            raise KeyError("among them")
        return False

    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=fail)

        with pytest.raises(KeyError, match="among them"):
            dbg.cont(timeout=LIMIT)

        assert (breakpoint_.reached, dbg.registers.rdi) == (1235, 1234)
        finish(dbg)
        assert (breakpoint_.reached, word(dbg, "calls")) == (COUNT, COUNT)


@CPUS
def test_timer_interrupts_are_taken_among_false_hits(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("ticker"), cpus=cpus).debug() as dbg:
        turn = dbg.breakpoint("turn", condition="arg0 == 99")
        tick = dbg.breakpoint("on_tick", condition="arg0 == 98")
        dbg.cont(wait=False)
        deadline = time.monotonic() + LIMIT

        while tick.reached < 40 * cpus and time.monotonic() < deadline:
            time.sleep(0.001)

        halt(dbg)
        ticks = [word(dbg, "timer_ticks", vcpu) for vcpu in range(cpus)]
        turns = [word(dbg, "turns", vcpu) for vcpu in range(cpus)]
        assert 0 <= tick.reached - sum(ticks) <= cpus
        assert 0 <= turn.reached - sum(turns) <= cpus
        assert sum(ticks) >= 39 * cpus


def test_watchpoint_set_among_false_hits_sees_every_write(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition="arg0 >= 1450")
        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 1450
        breakpoint_.condition = "False"
        watch = dbg.watch("calls", size=8, access="write", condition="False")

        finish(dbg)

        assert (breakpoint_.reached, watch.reached) == (COUNT, 50)


@CPUS
def test_threads_that_read_counters_meanwhile_never_see_them_fall(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition="arg0 == 99")
        over, falls = threading.Event(), []

        def read() -> None:
            last = 0
            while not over.is_set():
                now = breakpoint_.reached
                if now < last:
                    falls.append((last, now))
                last = now

        reader = threading.Thread(target=read)
        reader.start()
        try:
            finish(dbg)
        finally:
            over.set()
            reader.join()

        assert falls == []
        assert breakpoint_.reached == COUNT * cpus


@pytest.mark.parametrize("hardware", [False, True])
def test_breakpoint_on_a_repeated_port_output_is_reached_once(guest: Callable[..., Path], hardware: bool) -> None:
    with Vm(guest("ports", defines=["KIND=outsb", "COUNT=300"])).debug() as dbg:
        code = dbg.memory.read(dbg.symbol("run_outsb"), 64)
        breakpoint_ = dbg.breakpoint(
            dbg.symbol("run_outsb") + code.index(b"\xf3\x6e"), condition="rcx == 0", hardware=hardware
        )
        behind = dbg.breakpoint(breakpoint_.address + 2, condition="rcx > 0", hardware=hardware)

        finish(dbg)

        assert (breakpoint_.reached, behind.reached) == (1, 1)
