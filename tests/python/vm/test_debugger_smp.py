"""Several vCPUs: a stop is a stop of all, no hit is lost or counted twice, whatever happens at the same moment."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from uhyve import Breakpoint, Debugger, Stop, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from uhyve import Hit

pytestmark = pytest.mark.vm

LIMIT = 60
CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
COUNT = 60


@pytest.fixture
def smp(guest: Callable[..., Path]) -> Path:
    return guest("smp", defines=[f"COUNT={COUNT}"])


class Numbers:
    """Asserts that no stop is lost, repeated or stale: each has the next number."""

    def __init__(self, dbg: Debugger) -> None:
        self.last = dbg.stop.number

    def check(self, stop: Stop) -> Stop:
        assert stop.number == self.last + 1
        self.last = stop.number
        return stop


def counter(dbg: Debugger, name: str) -> int:
    return dbg.memory.read_u64(dbg.symbol(name))


def ticks(dbg: Debugger) -> list[int]:
    """The ticks of each vCPU, as the guest counts them."""
    start = dbg.symbol("ticks")
    return [dbg.memory.read_u64(start + 8 * vcpu.number) for vcpu in dbg.vcpus]


def state(dbg: Debugger) -> list[object]:
    """All that must not change while the world stands still."""
    return [[vcpu.registers.to_dict() for vcpu in dbg.vcpus], ticks(dbg)]


# All-stop.


@CPUS
def test_world_at_every_stop_stands_still_and_can_be_read_at_once(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        dbg.breakpoint("tick", condition="arg1 % 5 == 0")
        stops = 0

        while dbg.cont(timeout=LIMIT).reason == "breakpoint":
            stops += 1
            before = state(dbg)
            total = counter(dbg, "all_ticks")
            for _ in range(3):
                assert state(dbg) == before
            assert counter(dbg, "all_ticks") == total
            assert abs(sum(ticks(dbg)) - total) < cpus
        assert stops == cpus * COUNT // 5


@CPUS
def test_world_after_an_interrupt_does_not_count_on(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("busy"), cpus=cpus).debug() as dbg:
        values = []
        for _ in range(10):
            dbg.cont(timeout=0.01)
            value = counter(dbg, "spin_counter")
            for _ in range(100):
                assert counter(dbg, "spin_counter") == value
            values.append(value)
        assert len(set(values)) > 1, "it does count in between"


@CPUS
def test_reading_every_vcpu_at_a_stop_never_waits(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("halt"), cpus=cpus).debug() as dbg:
        for _ in range(10):
            dbg.cont(timeout=0.01)
            begin = time.monotonic()
            pcs = [vcpu.pc for vcpu in dbg.vcpus]
            assert time.monotonic() - begin < 1
            assert all(dbg.symbolize(pc) for pc in pcs)


# Counting.


@CPUS
def test_each_tick_is_reached_once_with_a_condition_that_is_false(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        first = dbg.breakpoint("tick", condition="False")
        second = dbg.breakpoint("tick+7", condition=lambda hit: False)

        stop = numbers.check(dbg.cont(timeout=LIMIT))

        assert (stop.reason, stop.code) == ("exit", 0)
        assert (first.reached, second.reached) == (cpus * COUNT, cpus * COUNT)
        assert (first.hits, second.hits) == (0, 0)
        assert ticks(dbg) == [COUNT] * cpus
        assert counter(dbg, "all_ticks") == cpus * COUNT


def kicks(dbg: Debugger) -> list[int]:
    """How often each vCPU was made to leave the guest."""
    return [vcpu.exits.get("interrupted", 0) for vcpu in dbg.stats.vcpus]


def test_step_over_a_rejected_hit_of_one_vcpu_makes_none_of_the_others_leave_the_guest(
    guest: Callable[..., Path],
) -> None:
    count, cpus = 300, 4
    with Vm(guest("smp", defines=[f"COUNT={count}"]), cpus=cpus).debug() as dbg:
        rejected = dbg.breakpoint("tick", condition="arg1 < 0")
        before, ticked = kicks(dbg), ticks(dbg)

        assert dbg.cont(timeout=LIMIT).reason == "exit"

        assert rejected.reached == cpus * count
        assert ticks(dbg) == [ticks_before + count for ticks_before in ticked]
        # The stop at the exit kicks each once. Had the others been held, each step would have kicked three of them.
        assert sum(kicks(dbg)) - sum(before) <= 4 * cpus


@CPUS
def test_each_tick_of_every_vcpu_is_one_stop_in_its_order(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        breakpoint_ = dbg.breakpoint("tick")
        seen: list[list[int]] = [[] for _ in range(cpus)]

        while (stop := numbers.check(dbg.cont(timeout=LIMIT))).reason == "breakpoint":
            registers = dbg.vcpus[stop.vcpu].registers
            assert stop.breakpoint is breakpoint_
            assert (stop.pc, registers.rip, registers.rdi) == (breakpoint_.address, breakpoint_.address, stop.vcpu)
            assert ticks(dbg)[stop.vcpu] == registers.rsi, "the vCPU stands before its count"
            seen[stop.vcpu].append(registers.rsi)

        assert (stop.reason, stop.code) == ("exit", 0)
        assert seen == [list(range(COUNT))] * cpus
        assert (breakpoint_.reached, breakpoint_.hits) == (cpus * COUNT, cpus * COUNT)
        assert counter(dbg, "all_ticks") == cpus * COUNT


@CPUS
def test_rounds_of_a_token_are_stops_in_turn(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("lockstep", defines=["COUNT=20"]), cpus=cpus).debug() as dbg:
        dbg.breakpoint("pass")

        for passes, (round_, cpu) in enumerate(itertools.product(range(20), range(cpus))):
            stop = dbg.cont(timeout=LIMIT)
            assert (stop.reason, stop.vcpu, stop.frame.registers.rsi) == ("breakpoint", cpu, round_)
            assert (counter(dbg, "passes"), counter(dbg, "token")) == (passes, passes)

        assert dbg.cont(timeout=LIMIT).reason == "exit"


@CPUS
def test_breakpoint_in_an_interrupt_handler_of_every_vcpu_is_met_each_time(
    guest: Callable[..., Path], cpus: int
) -> None:
    with Vm(guest("ipi"), cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("on_ipi")
        targets = range(1, cpus) if cpus > 1 else [0]

        for cpu, n in itertools.product(targets, (1, 2, 3)):
            stop = dbg.cont(timeout=LIMIT)
            assert (stop.reason, stop.vcpu) == ("breakpoint", cpu)
            assert (stop.frame.registers.rdi, stop.frame.registers.rsi) == (cpu, n)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.reached == 3 * len(targets)


@CPUS
def test_stops_by_callables_on_several_vcpus_are_all_reported(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        breakpoint_ = dbg.breakpoint("tick", condition=lambda hit: hit.arg(1) % 3 == 0)
        seen: list[list[int]] = [[] for _ in range(cpus)]

        while (stop := numbers.check(dbg.cont(timeout=LIMIT))).reason == "breakpoint":
            seen[stop.vcpu].append(stop.frame.registers.rsi)

        assert seen == [list(range(0, COUNT, 3))] * cpus
        assert (breakpoint_.reached, breakpoint_.hits) == (cpus * COUNT, sum(map(len, seen)))


@CPUS
def test_callbacks_of_several_vcpus_run_side_by_side(smp: Path, cpus: int) -> None:
    meeting = threading.Barrier(cpus)
    threads: list[set[int]] = [set() for _ in range(cpus)]

    def meet(hit: Hit) -> None:
        threads[hit.vcpu].add(threading.get_ident())
        if hit.arg(1) < 10:
            meeting.wait(LIMIT)

    with Vm(smp, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition=meet)

        assert dbg.cont(timeout=LIMIT).reason == "exit"

        assert breakpoint_.reached == cpus * COUNT
        assert [len(idents) for idents in threads] == [1] * cpus
        assert len(set.union(*threads)) == cpus


# Pending hits.


def both_pending(smp: Path) -> tuple[Debugger, Breakpoint]:
    """Two vCPUs that hit at one moment: the hit of one is reported, the hit of the other waits."""
    meeting = threading.Barrier(2)

    def together(hit: Hit) -> bool:
        if hit.arg(1) == 5:
            meeting.wait(LIMIT)
            return True
        return False

    dbg = Vm(smp, cpus=2).debug()
    breakpoint_ = dbg.breakpoint("tick", condition=together)
    stop = dbg.cont(timeout=LIMIT)
    assert (stop.reason, stop.frame.registers.rsi) == ("breakpoint", 5)
    assert [vcpu.pc for vcpu in dbg.vcpus] == [breakpoint_.address] * 2
    assert [vcpu.registers.rsi for vcpu in dbg.vcpus] == [5, 5]
    return dbg, breakpoint_


@pytest.mark.parametrize("attempt", range(5))
def test_second_of_two_simultaneous_hits_is_the_next_stop_and_nothing_runs_between(smp: Path, attempt: int) -> None:
    dbg, breakpoint_ = both_pending(smp)
    with dbg:
        first, before = dbg.stop, ticks(dbg)

        second = dbg.cont(timeout=LIMIT)

        assert (second.reason, second.number) == ("breakpoint", first.number + 1)
        assert {first.vcpu, second.vcpu} == {0, 1}
        assert ticks(dbg) == before
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, breakpoint_.hits) == (2 * COUNT, 2)


def test_pending_hit_of_a_breakpoint_that_is_deleted_meanwhile_is_dropped(smp: Path) -> None:
    dbg, breakpoint_ = both_pending(smp)
    with dbg:
        breakpoint_.delete()

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert ticks(dbg) == [COUNT, COUNT]


def test_pending_hit_of_a_breakpoint_that_is_disabled_meanwhile_is_dropped(smp: Path) -> None:
    dbg, breakpoint_ = both_pending(smp)
    with dbg:
        breakpoint_.enabled = False

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.hits == 2


def test_pending_hit_of_a_vcpu_that_is_moved_away_is_dropped(smp: Path) -> None:
    dbg, breakpoint_ = both_pending(smp)
    with dbg:
        other = dbg.vcpus[1 - dbg.stop.vcpu]
        other.registers.rip = dbg.symbol("tick+7")
        other.registers.rdx = dbg.symbol("ticks")

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert ticks(dbg) == [COUNT, COUNT]
        assert breakpoint_.reached == 2 * COUNT


def test_pending_hit_is_reported_by_a_step_before_anything_moves(smp: Path) -> None:
    dbg, _ = both_pending(smp)
    with dbg:
        first, before = dbg.stop, [vcpu.pc for vcpu in dbg.vcpus]

        second = dbg.step()

        assert (second.reason, second.vcpu) == ("breakpoint", 1 - first.vcpu)
        assert [vcpu.pc for vcpu in dbg.vcpus] == before
        assert dbg.step().reason == "step"


def test_interrupt_and_timeout_with_a_pending_hit_report_the_hit(smp: Path) -> None:
    dbg, _ = both_pending(smp)
    with dbg:
        first = dbg.stop

        second = dbg.cont(timeout=0)

        assert (second.reason, second.vcpu) == ("breakpoint", 1 - first.vcpu)


def test_detach_with_a_pending_hit_lets_the_guest_end(smp: Path) -> None:
    for _ in range(5):
        dbg, _ = both_pending(smp)

        result = dbg.detach().wait(LIMIT)

        assert (result.code, result.output.splitlines()[-1]) == (0, f"all={2 * COUNT}")


def test_close_with_a_pending_hit_leaves_no_thread(
    smp: Path, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    dbg, _ = both_pending(smp)

    dbg.close()

    assert wait_until(lambda: no_leftovers() == [], LIMIT)


def test_two_simultaneous_failures_of_callbacks_are_both_raised(smp: Path) -> None:
    meeting = threading.Barrier(2)

    def fail(hit: Hit) -> None:
        if hit.arg(1) == 3:
            meeting.wait(LIMIT)
            raise ValueError(f"vCPU {hit.vcpu}")

    with Vm(smp, cpus=2).debug() as dbg:
        dbg.breakpoint("tick", condition=fail)
        caught = []
        for _ in range(2):
            with pytest.raises(ValueError, match="vCPU") as error:
                dbg.cont(timeout=LIMIT)
            assert (dbg.stop.reason, dbg.stop.exception) == ("exception", error.value)
            caught.append(str(error.value))

        assert sorted(caught) == ["vCPU 0", "vCPU 1"]
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert ticks(dbg) == [COUNT, COUNT]


@pytest.mark.parametrize("failing", range(4))
def test_callback_that_raises_on_one_vcpu_stops_all_and_the_guest_can_go_on(smp: Path, failing: int) -> None:
    def fail(hit: Hit) -> None:
        if hit.vcpu == failing and hit.arg(1) == 10:
            raise LookupError("on purpose")

    with Vm(smp, cpus=4).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition=fail)

        with pytest.raises(LookupError, match="on purpose") as caught:
            dbg.cont(timeout=LIMIT)

        assert f"on vCPU {failing}" in caught.value.__notes__[0]
        assert (dbg.stop.reason, dbg.stop.vcpu, dbg.stop.breakpoint) == ("exception", failing, breakpoint_)
        before = state(dbg)
        assert state(dbg) == before
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.reached == 4 * COUNT


# Interrupts.


@CPUS
def test_storm_of_interrupts_loses_no_tick_and_makes_no_stop_of_its_own(guest: Callable[..., Path], cpus: int) -> None:
    count = 300
    over = threading.Event()
    with Vm(guest("smp", defines=[f"COUNT={count}"]), cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        compiled = dbg.breakpoint("tick", condition="False")
        asked = dbg.breakpoint("tick+7", condition="arg1 % 50 == 0")

        def storm() -> None:
            while not over.is_set():
                dbg.interrupt()

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            reasons = {"interrupt": 0, "breakpoint": 0}
            deadline = time.monotonic() + LIMIT / 4
            while (stop := numbers.check(dbg.cont(timeout=LIMIT))).reason != "exit":
                reasons[stop.reason] += 1
                if reasons["interrupt"] == 500 or time.monotonic() > deadline:
                    over.set()
        finally:
            over.set()
            thread.join(LIMIT)

        assert ticks(dbg) == [count] * cpus
        assert (compiled.reached, asked.reached) == (cpus * count, cpus * count)
        assert asked.hits == reasons["breakpoint"] == cpus * count // 50


@CPUS
def test_interrupts_by_several_threads_are_one_stop(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("busy"), cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        for _ in range(10):
            dbg.cont(wait=False)
            threads = [threading.Thread(target=dbg.interrupt) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert numbers.check(dbg.wait(LIMIT)).reason == "interrupt"


# Breakpoints that come and go while the guest runs.


def toggled_in_a_callback(dbg: Debugger, cpu: int) -> tuple[Breakpoint, Breakpoint, list[int]]:
    """A breakpoint that the callback of another one enables at tick 10 and disables at tick 40 of one vCPU."""
    inner = dbg.breakpoint("tick+7", condition="False", enabled=False)
    seen: list[int] = []

    def toggle(hit: Hit) -> None:
        if hit.vcpu == cpu and hit.arg(1) in (10, 40):
            seen.append(outer.reached)
            inner.enabled = hit.arg(1) == 10
            seen.append(outer.reached)

    outer = dbg.breakpoint("tick", condition=toggle)
    return outer, inner, seen


@CPUS
def test_breakpoint_enabled_by_a_callback_holds_on_every_vcpu_when_that_returns(smp: Path, cpus: int) -> None:
    for _ in range(5):
        with Vm(smp, cpus=cpus).debug() as dbg:
            outer, inner, seen = toggled_in_a_callback(dbg, cpus - 1)

            assert dbg.cont(timeout=LIMIT).reason == "exit"

            assert outer.reached == cpus * COUNT
            before_on, after_on, before_off, after_off = seen
            # Who was counted at the outer one may have been in front of the inner one, or past it.
            assert before_off - after_on - cpus <= inner.reached <= after_off - before_on + cpus
            if cpus == 1:
                assert inner.reached == 30


@CPUS
def test_breakpoints_set_and_deleted_while_the_guest_runs_disturb_no_count(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        counted = dbg.breakpoint("tick", condition="False")
        dbg.cont(wait=False)

        while dbg.running:
            try:
                others = [dbg.breakpoint(f"tick+{offset:#x}", condition="False") for offset in (0, 7, 0xB)]
                for other in others:
                    other.delete()
            except VmStateError:
                break

        assert dbg.wait(LIMIT).reason == "exit"
        assert counted.reached == cpus * COUNT
        assert ticks(dbg) == [COUNT] * cpus
        assert dbg.output.endswith(f"all={cpus * COUNT}\n")


# Steps.


@pytest.mark.parametrize("cpus", [2, 4])
@pytest.mark.parametrize("chosen", [0, 1])
def test_step_of_one_vcpu_holds_the_others(guest: Callable[..., Path], cpus: int, chosen: int) -> None:
    with Vm(guest("busy"), cpus=cpus).debug() as dbg:
        everywhere = dbg.breakpoint("spin", vcpu=chosen)
        dbg.cont(timeout=LIMIT)
        everywhere.delete()
        others = [vcpu for vcpu in dbg.vcpus if vcpu.number != chosen]
        before = [vcpu.registers.to_dict() for vcpu in others]
        counted = counter(dbg, "spin_counter")

        for i in range(40):
            stop = dbg.step(vcpu=chosen)
            assert (stop.reason, stop.vcpu) == ("step", chosen)
            assert counter(dbg, "spin_counter") == counted + (i + 2) // 4 if i % 4 == 2 else True

        assert counter(dbg, "spin_counter") == counted + 10
        assert [vcpu.registers.to_dict() for vcpu in others] == before


@pytest.mark.parametrize("cpus", [2, 4])
def test_steps_of_the_vcpus_in_turn_move_only_their_own(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        numbers = Numbers(dbg)
        for _ in range(5):
            for vcpu in dbg.vcpus:
                before = [other.pc for other in dbg.vcpus]
                stop = numbers.check(dbg.step(vcpu=vcpu.number))
                after = [other.pc for other in dbg.vcpus]
                assert (stop.reason, stop.vcpu, stop.pc) == ("step", vcpu.number, after[vcpu.number])
                assert after[vcpu.number] != before[vcpu.number]
                assert [pc for n, pc in enumerate(after) if n != vcpu.number] == [
                    pc for n, pc in enumerate(before) if n != vcpu.number
                ]
        assert dbg.cont(timeout=LIMIT).reason == "exit"


@pytest.mark.parametrize("cpus", [2, 4])
def test_steps_over_a_breakpoint_let_no_other_vcpu_slip_past_it(smp: Path, cpus: int) -> None:
    with Vm(smp, cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick")
        stops = 0

        while dbg.cont(timeout=LIMIT).reason == "breakpoint":
            stops += 1
            if stops % 3 == 0:
                after = dbg.step()
                # A hit that waited comes first.
                stops += after.reason == "breakpoint"

        assert stops == breakpoint_.hits == breakpoint_.reached == cpus * COUNT
        assert ticks(dbg) == [COUNT] * cpus


# The end.


@CPUS
def test_exit_while_others_hit_is_reported_once_and_last(guest: Callable[..., Path], cpus: int) -> None:
    for _ in range(5):
        with Vm(guest("smp", defines=["COUNT=3"]), cpus=cpus).debug() as dbg:
            numbers = Numbers(dbg)
            dbg.breakpoint("tick", condition=lambda hit: True)
            reasons = []

            while (stop := numbers.check(dbg.cont(timeout=LIMIT))).reason == "breakpoint":
                reasons.append(stop.vcpu)

            assert sorted(reasons) == sorted(list(range(cpus)) * 3)
            assert stop.reason == "exit"
            with pytest.raises(VmStateError):
                dbg.cont()


def test_exit_of_one_vcpu_in_the_middle_stops_the_others(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=ap_exit"]), cpus=4).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.code, stop.vcpu) == ("exit", 5, 1)
        before = [vcpu.registers.to_dict() for vcpu in dbg.vcpus]
        assert [vcpu.registers.to_dict() for vcpu in dbg.vcpus] == before


@CPUS
def test_close_while_callbacks_run_waits_for_them(
    smp: Path, cpus: int, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    inside, leave = threading.Event(), threading.Event()
    returned: list[int] = []

    def slow(hit: Hit) -> bool:
        inside.set()
        assert leave.wait(LIMIT)
        returned.append(hit.vcpu)
        return True

    dbg = Vm(smp, cpus=cpus).debug()
    dbg.breakpoint("tick", condition=slow)
    dbg.cont(wait=False)
    assert inside.wait(LIMIT)
    closing = threading.Thread(target=dbg.close)
    closing.start()
    leave.set()
    closing.join(LIMIT)

    assert not closing.is_alive()
    assert returned
    assert wait_until(lambda: no_leftovers() == [], LIMIT)


# Anything at any time.

SECONDS = float(os.environ.get("UHYVE_STRESS_SECONDS", "30"))
SEED = int(os.environ.get("UHYVE_STRESS_SEED", "20261"))


class Stress:
    """Random commands on the smp guest. A model of what must have been counted is held against the guest's counters."""

    def __init__(self, dbg: Debugger, chance: random.Random) -> None:
        self.dbg = dbg
        self.chance = chance
        self.numbers = Numbers(dbg)
        self.cpus = len(dbg.vcpus)
        self.counted = dbg.breakpoint("tick", condition="False")
        self.called = 0
        self.lock = threading.Lock()
        self.caller = dbg.breakpoint("tick+0x7", condition=self.call)
        self.stopping = [
            dbg.breakpoint("tick", condition=f"arg1 % {chance.randrange(7, 40)} == 0", enabled=False),
            dbg.breakpoint("tick+0x7", condition=lambda hit: hit.arg(1) % 11 == 3, enabled=False),
            dbg.breakpoint("tick+0xb", condition="arg1 % 13 == 0", vcpu=self.cpus - 1, enabled=False),
            dbg.breakpoint("tick+0x18", ignore=5, condition="vcpu == 0 and arg1 & 8", enabled=False),
        ]
        self.stops: dict[str, int] = {}
        self.reported: dict[Breakpoint, int] = dict.fromkeys(self.stopping, 0)

    def call(self, hit: Hit) -> bool:
        with self.lock:
            self.called += 1
        return False

    def report(self, stop: Stop) -> Stop:
        self.numbers.check(stop)
        self.stops[stop.reason] = self.stops.get(stop.reason, 0) + 1
        assert stop.reason in ("breakpoint", "interrupt", "timeout", "step", "exit"), stop
        if stop.breakpoint is not None:
            assert stop.breakpoint in self.reported
            self.reported[stop.breakpoint] += 1
            assert self.dbg.vcpus[stop.vcpu].pc == stop.pc == stop.breakpoint.address
        before = state(self.dbg)
        self.check_counts(exact=False)
        assert state(self.dbg) == before
        return stop

    def check_counts(self, exact: bool) -> None:
        done = sum(ticks(self.dbg))
        slack = 0 if exact else self.cpus
        assert done <= self.counted.reached <= done + slack
        assert done <= self.caller.reached <= done + slack
        assert self.called == self.caller.reached
        for breakpoint_, reported in self.reported.items():
            # Beyond what was reported: hits that wait, or that were dropped with a breakpoint that was disabled.
            assert reported <= breakpoint_.hits <= breakpoint_.reached

    def go(self) -> Stop:
        """Lets the guest run to a stop, in one of several ways."""
        match self.chance.randrange(6):
            case 0:
                return self.dbg.cont(timeout=self.chance.random() / 500)
            case 1:
                self.dbg.cont(wait=False)
                self.dbg.interrupt()
                return self.dbg.wait(LIMIT)
            case 2:
                # One that is halted does nothing.
                return self.dbg.step(vcpu=self.chance.randrange(self.cpus), timeout=0.1)
            case 3:
                self.dbg.cont(wait=False)
                thread = threading.Thread(target=self.dbg.interrupt)
                thread.start()
                stop = self.dbg.wait(LIMIT)
                thread.join(LIMIT)
                return stop
            case 4:
                self.dbg.cont(wait=False)
                try:
                    self.toggle()
                except VmStateError:
                    pytest.fail("a breakpoint can be changed while the guest runs")
                self.dbg.interrupt()
                return self.dbg.wait(LIMIT)
            case _:
                return self.dbg.cont(timeout=self.chance.random() / 50)

    def toggle(self) -> None:
        breakpoint_ = self.chance.choice(self.stopping)
        breakpoint_.enabled = not breakpoint_.enabled

    def run(self) -> None:
        while self.report(self.go()).reason != "exit":
            if self.chance.random() < 0.3:
                self.toggle()
            if self.chance.random() < 0.05:
                extra = self.dbg.breakpoint(f"tick+{self.chance.choice((0, 7, 0xB, 0x13)):#x}", condition="False")
                self.report(self.go()) if self.dbg.stop.reason != "exit" else None
                extra.delete()
                if self.dbg.stop.reason == "exit":
                    break
        self.check_counts(exact=True)


@CPUS
def test_random_commands_on_a_small_guest_keep_every_count(guest: Callable[..., Path], cpus: int) -> None:
    chance = random.Random(SEED + cpus)
    with Vm(guest("smp", defines=["COUNT=100"]), cpus=cpus).debug() as dbg:
        stress = Stress(dbg, chance)

        stress.run()

        assert ticks(dbg) == [100] * cpus
        assert stress.counted.reached == stress.caller.reached == 100 * cpus


@pytest.mark.slow
@pytest.mark.flaky(reruns=0)
@pytest.mark.timeout(SECONDS * 4 + 120)
@CPUS
def test_random_commands_for_a_long_time_keep_every_count(guest: Callable[..., Path], cpus: int, backend: str) -> None:
    # The software CPU makes a session in a fraction of the time.
    end = time.monotonic() + (SECONDS / 5 if backend == "soft" else SECONDS)
    seed = SEED
    while time.monotonic() < end:
        seed += 1
        chance = random.Random(f"{seed} {cpus}")
        with Vm(guest("smp", defines=["COUNT=400"]), cpus=cpus).debug() as dbg:
            stress = Stress(dbg, chance)

            stress.run()

            assert ticks(dbg) == [400] * cpus, f"seed {seed}"
            assert stress.counted.reached == stress.caller.reached == 400 * cpus, f"seed {seed}"
