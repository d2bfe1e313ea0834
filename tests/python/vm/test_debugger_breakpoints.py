"""Breakpoints: where they can be set, what they let pass, what they count, and that the guest does not notice them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from uhyve import BreakpointError, ConditionError, Debugger, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from uhyve import Hit

pytestmark = pytest.mark.vm

LIMIT = 30
CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
COUNT = 40


@pytest.fixture
def loop(guest: Callable[..., Path]) -> Path:
    return guest("loop", defines=[f"COUNT={COUNT}"])


def counter(dbg: Debugger, name: str) -> int:
    return dbg.memory.read_u64(dbg.symbol(name))


def to_the_end(dbg: Debugger) -> list[int]:
    """Lets the guest run to its exit; gives the first argument at each stop on the way."""
    arguments = []
    while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
        arguments.append(stop.frame.registers.rdi)
    assert (stop.reason, stop.code) == ("exit", 0)
    return arguments


# Places.


def test_breakpoint_by_symbol_stops_at_each_call_before_the_function_runs(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work")

        for i in range(COUNT):
            stop = dbg.cont(timeout=LIMIT)

            assert (stop.reason, stop.vcpu, stop.pc, stop.symbol) == ("breakpoint", 0, breakpoint_.address, "work")
            assert (stop.number, stop.hits) == (i + 2, i + 1)
            assert (dbg.registers.rdi, dbg.registers.rsi, counter(dbg, "calls")) == (i, 2 * i, i)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, COUNT)
        assert dbg.output == f"calls={COUNT} total={3 * sum(range(COUNT))}\n"


def test_breakpoint_by_address_is_the_same_place_as_by_symbol(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        address = dbg.symbol("work")

        by_number, by_text = dbg.breakpoint(address), dbg.breakpoint(f"*{address:#x}")

        assert by_number.address == by_text.address == address
        assert by_number.location == f"{address:#x}"
        assert to_the_end(dbg) == list(range(COUNT))
        assert (by_number.hits, by_text.hits) == (COUNT, COUNT)


def test_breakpoint_by_symbol_and_offset_stops_in_the_function(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work+0x12", condition="arg0 == 3")

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.pc, stop.symbol) == (dbg.symbol("work") + 0x12, "work+0x12")
        assert counter(dbg, "calls") == 4, "the call was counted before this instruction"
        assert breakpoint_.location == "work+0x12"


@pytest.mark.parametrize("where", ["wrok", "", "work+", "work+0xzz", "nothing::here", "0x", "work-0xffffffffffffffff"])
def test_breakpoint_at_a_missing_place_is_refused(loop: Path, where: str) -> None:
    with Vm(loop).debug() as dbg:
        with pytest.raises(BreakpointError):
            dbg.breakpoint(where)

        assert dbg.breakpoints == []


def test_breakpoint_at_a_misspelt_symbol_suggests_the_right_one(loop: Path) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(BreakpointError, match=r"did you mean .*guest_main"):
        dbg.breakpoint("guest_mian")


@pytest.mark.parametrize("where", [-1, 2**64])
def test_breakpoint_at_a_number_that_is_no_address_is_refused(loop: Path, where: int) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(BreakpointError, match="unsigned number of 64 bits"):
        dbg.breakpoint(where)


@pytest.mark.parametrize("where", [1.5, None, b"work", True])
def test_breakpoint_at_what_is_no_place_is_a_type_error(loop: Path, where: Any) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(TypeError, match="address"):
        dbg.breakpoint(where)


def test_breakpoint_at_an_unmapped_address_is_refused_or_waits_in_a_debug_register(
    loop: Path, capabilities: dict[str, Any]
) -> None:
    nowhere = 0x5000_0000_0000
    with Vm(loop).debug() as dbg:
        if capabilities["int3"] == "not intercepted":
            dbg.breakpoint(nowhere)
        else:
            with pytest.raises(BreakpointError, match="not mapped"):
                dbg.breakpoint(nowhere)
        assert dbg.breakpoint(nowhere, hardware=True).kind == "debug register"

        assert to_the_end(dbg) == []


def test_breakpoint_at_the_entry_stops_before_the_first_instruction_on_every_vcpu(guest: Callable[..., Path]) -> None:
    with Vm(guest("smp", defines=["COUNT=3"]), cpus=4).debug() as dbg:
        breakpoint_ = dbg.breakpoint("_start")

        stops = [dbg.cont(timeout=LIMIT) for _ in range(4)]

        assert sorted(stop.vcpu for stop in stops) == [0, 1, 2, 3]
        assert {stop.pc for stop in stops} == {breakpoint_.address}
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.hits == 4


def test_breakpoints_at_one_address_are_all_asked_and_the_first_names_the_stop(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        never = dbg.breakpoint("work", condition="False")
        odd = dbg.breakpoint("work", condition="arg0 & 1")
        third = dbg.breakpoint("work", condition="arg0 % 3 == 0")

        stops = []
        while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
            stops.append((stop.frame.registers.rdi, stop.breakpoint))

        assert stops == [(i, odd if i & 1 else third) for i in range(COUNT) if i & 1 or i % 3 == 0]
        assert (never.reached, odd.reached, third.reached) == (COUNT, COUNT, COUNT)
        assert (never.hits, odd.hits, third.hits) == (0, COUNT // 2, len(range(0, COUNT, 3)))


def test_breakpoint_beside_a_deleted_one_at_the_same_address_still_holds(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        first, second = dbg.breakpoint("work"), dbg.breakpoint("work")
        assert dbg.cont(timeout=LIMIT).breakpoint is first

        first.delete()

        assert dbg.cont(timeout=LIMIT).breakpoint is second
        second.delete()
        assert dbg.cont(timeout=LIMIT).reason == "exit"


@pytest.mark.parametrize("number", [5, 8])
def test_more_breakpoints_than_debug_registers_all_hold_and_count(
    loop: Path, number: int, capabilities: dict[str, Any]
) -> None:
    with Vm(loop).debug() as dbg:
        offsets = (0x0, 0x7, 0xB, 0x12, 0x19, 0x1C, 0x1F, 0x26)[:number]
        breakpoints = [dbg.breakpoint(f"work+{offset:#x}", condition=f"arg0 == {COUNT - 1}") for offset in offsets]

        places = capabilities["hardware_breakpoints"]
        if capabilities["int3"] == "not intercepted":
            assert [b.kind for b in breakpoints] == ["debug register"] * min(number, places) + ["single-step"] * max(
                0, number - places
            )
        else:
            assert {b.kind for b in breakpoints} == {"int3"}
        stops = [dbg.cont(timeout=LIMIT) for _ in range(number)]
        assert [stop.breakpoint for stop in stops] == breakpoints
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert [(b.reached, b.hits) for b in breakpoints] == [(COUNT, 1)] * number
        assert dbg.output == f"calls={COUNT} total={3 * sum(range(COUNT))}\n"


def test_hardware_breakpoints_use_debug_registers_and_the_fifth_falls_back(
    loop: Path, capabilities: dict[str, Any]
) -> None:
    fifth = "single-step" if capabilities["hardware_breakpoints"] <= 4 else "debug register"
    with Vm(loop).debug() as dbg:
        offsets = (0x0, 0x7, 0xB, 0x12, 0x19)
        breakpoints = [dbg.breakpoint(f"work+{offset:#x}", hardware=True) for offset in offsets]

        assert [b.kind for b in breakpoints] == ["debug register"] * 4 + [fifth]
        stops = [dbg.cont(timeout=LIMIT) for _ in range(10)]
        assert [stop.breakpoint for stop in stops] == breakpoints * 2
        breakpoints[0].delete()
        assert dbg.breakpoint("work", hardware=True).kind == "debug register"


def test_hardware_breakpoint_on_every_vcpu_counts_each_call_once(guest: Callable[..., Path]) -> None:
    with Vm(guest("smp", defines=[f"COUNT={COUNT}"]), cpus=4).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", condition="False", hardware=True)

        assert dbg.cont(timeout=LIMIT).reason == "exit"

        assert (breakpoint_.kind, breakpoint_.reached, breakpoint_.hits) == ("debug register", 4 * COUNT, 0)
        assert counter(dbg, "all_ticks") == 4 * COUNT


# Conditions.


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("arg0 == 7", [7]),
        ("arg0 >= 30 and arg1 % 4 == 0", list(range(30, COUNT, 2))),
        ("u64[calls] == 5 or u64[calls] == 6", [5, 6]),
        ("u64[total] > 3 * 39 * 19", [i for i in range(COUNT) if 3 * i * (i - 1) // 2 > 3 * 39 * 19]),
        ("rdi in (1, 2, 39) and rip == work", [1, 2, 39]),
        ("hits < 3", [0, 1, 2]),
        ("reached == 11", [10]),
        ("vcpu", []),
        ("not vcpu and i64[calls] - 2 < 0", [0, 1]),
        ("0x10 <= arg0 < 0x12", [16, 17]),
    ],
)
def test_compiled_condition_stops_where_it_holds_and_nowhere_else(
    loop: Path, condition: str, expected: list[int]
) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=condition)

        assert to_the_end(dbg) == expected

        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, len(expected))
        assert breakpoint_.condition == condition


def test_condition_that_does_not_compile_names_the_column_and_sets_nothing(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        with pytest.raises(ConditionError) as caught:
            dbg.breakpoint("work", condition="arg0 == nonsense")

        assert (caught.value.column, caught.value.expression) == (9, "arg0 == nonsense")
        assert dbg.breakpoints == []


def test_condition_that_is_neither_text_nor_callable_is_a_type_error(loop: Path) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(TypeError, match="a condition is"):
        dbg.breakpoint("work", condition=3)


def test_condition_that_would_have_to_be_awaited_or_iterated_is_a_type_error(loop: Path) -> None:
    async def awaited(hit: Hit) -> bool:
        return hit.arg(0) == 2

    def iterated(hit: Hit) -> Iterator[bool]:
        yield hit.arg(0) == 2

    with Vm(loop).debug() as dbg:
        for condition in (awaited, iterated):
            with pytest.raises(TypeError, match="await or iterate"):
                dbg.breakpoint("work", condition=condition)
        assert dbg.breakpoints == []


@pytest.mark.parametrize("condition", ["u8[0x500000000000] == 1", "arg0 // (arg0 - 2) > 100", "1 << arg1 - 4 > 9999"])
def test_condition_without_a_value_stops_and_says_why(loop: Path, condition: str) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=condition)

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.breakpoint) == ("breakpoint", breakpoint_)
        assert stop.message
        assert stop.message in str(stop)
        breakpoint_.condition = "False"
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_condition_that_is_replaced_judges_the_next_hit(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition="arg0 == 3")
        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 3

        breakpoint_.condition = lambda hit: hit.arg(0) == 9
        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 9
        breakpoint_.condition = None
        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 10
        with pytest.raises(ConditionError):
            breakpoint_.condition = "=="
        assert breakpoint_.condition is None
        breakpoint_.condition = "False"
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, 3)


@pytest.mark.parametrize("truth", [True, 1, "yes", [0]])
def test_callable_that_returns_something_true_stops(loop: Path, truth: object) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=lambda hit: truth if hit.arg(1) == 10 else None)

        assert to_the_end(dbg) == [5]
        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, 1)


def test_decorator_makes_a_function_the_condition_and_gives_the_breakpoint(loop: Path) -> None:
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work", name="every tenth")
        def tenth(hit: Hit) -> bool:
            return hit.arg(0) % 10 == 0

        assert to_the_end(dbg) == [0, 10, 20, 30]
        assert (tenth.name, tenth.reached, tenth.hits) == ("every tenth", COUNT, 4)
        assert "every tenth" in repr(tenth)
        assert "4 of 40 hits" in repr(tenth)


def test_hit_shows_the_vcpu_at_its_breakpoint(loop: Path) -> None:
    seen: list[object] = []
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work", condition=None)
        def look(hit: Hit) -> None:
            if hit.arg(0) == 4:
                seen.extend([hit.vcpu, hit.pc, hit.symbol, hit.arg(1), hit.registers.rdi])
                seen.append(hit.memory.read_u64(dbg.symbol("calls")))
                seen.append(hit.breakpoint == look)
                with pytest.raises(IndexError):
                    hit.arg(6)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert seen == [0, dbg.symbol("work"), "work", 8, 4, 4, True]


# Ignore counts, temporary breakpoints, vCPUs.


@pytest.mark.parametrize("ignore", [0, 1, COUNT - 1, COUNT, 2**64 - 1])
def test_ignore_lets_that_many_arrivals_pass(loop: Path, ignore: int) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", ignore=ignore)

        assert to_the_end(dbg) == list(range(min(ignore, COUNT), COUNT))

        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, max(0, COUNT - ignore))
        assert breakpoint_.ignore == max(0, ignore - COUNT)


def test_ignore_is_counted_before_the_condition_is_asked(loop: Path) -> None:
    asked: list[int] = []
    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", ignore=COUNT - 3, condition=lambda hit: asked.append(hit.arg(0)))

        assert to_the_end(dbg) == []
        assert asked == [COUNT - 3, COUNT - 2, COUNT - 1]


def test_ignore_that_is_set_at_a_stop_lets_that_many_more_pass(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work")
        dbg.cont(timeout=LIMIT)

        breakpoint_.ignore = 5

        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 6
        with pytest.raises(BreakpointError):
            breakpoint_.ignore = -1


def test_ignore_is_shared_by_all_vcpus(guest: Callable[..., Path]) -> None:
    with Vm(guest("smp", defines=[f"COUNT={COUNT}"]), cpus=4).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", ignore=4 * COUNT - 10)
        stops = 0

        while dbg.cont(timeout=LIMIT).reason == "breakpoint":
            stops += 1

        assert stops == 10
        assert (breakpoint_.reached, breakpoint_.hits, breakpoint_.ignore) == (4 * COUNT, 10, 0)


def test_temporary_breakpoint_is_gone_once_it_has_stopped_the_guest(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", temporary=True, condition="arg0 == 5")

        assert to_the_end(dbg) == [5]

        assert (breakpoint_.deleted, breakpoint_.enabled, breakpoint_.hits, breakpoint_.reached) == (True, False, 1, 6)
        assert dbg.breakpoints == []
        with pytest.raises(BreakpointError, match="deleted"):
            breakpoint_.enabled = True


def test_temporary_breakpoint_whose_stop_nobody_waited_for_is_gone_too(
    loop: Path, wait_until: Callable[..., bool]
) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", temporary=True)
        dbg.cont(wait=False)
        assert wait_until(lambda: not dbg.running, LIMIT)
        assert dbg.stop.breakpoint is breakpoint_

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, breakpoint_.deleted) == (1, True)


@CPUS
def test_temporary_breakpoint_that_several_vcpus_meet_at_once_stops_once(guest: Callable[..., Path], cpus: int) -> None:
    for _ in range(10):
        with Vm(guest("smp", defines=[f"COUNT={COUNT}"]), cpus=cpus).debug() as dbg:
            dbg.breakpoint("tick", temporary=True)

            assert dbg.cont(timeout=LIMIT).reason == "breakpoint"
            assert dbg.cont(timeout=LIMIT).reason == "exit"
            assert counter(dbg, "all_ticks") == COUNT * cpus


@pytest.mark.parametrize("chosen", range(4))
def test_breakpoint_for_one_vcpu_lets_the_others_pass(guest: Callable[..., Path], chosen: int) -> None:
    with Vm(guest("smp", defines=[f"COUNT={COUNT}"]), cpus=4).debug() as dbg:
        breakpoint_ = dbg.breakpoint("tick", vcpu=chosen)

        for i in range(COUNT):
            stop = dbg.cont(timeout=LIMIT)
            assert (stop.reason, stop.vcpu) == ("breakpoint", chosen)
            assert (stop.frame.registers.rdi, stop.frame.registers.rsi) == (chosen, i)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, breakpoint_.hits) == (COUNT, COUNT)
        assert counter(dbg, "all_ticks") == 4 * COUNT


# Enable, disable, delete.


def test_disabled_breakpoint_neither_stops_nor_counts_nor_has_a_site(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", enabled=False)

        assert breakpoint_.kind is None
        assert to_the_end(dbg) == []
        assert (breakpoint_.reached, breakpoint_.hits, breakpoint_.deleted) == (0, 0, False)


def test_breakpoint_toggled_at_stops_counts_only_while_enabled(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        every, toggled = dbg.breakpoint("work"), dbg.breakpoint("work+7", condition="False")

        for i in range(COUNT):
            assert dbg.cont(timeout=LIMIT).breakpoint is every
            toggled.enabled = i % 3 == 0

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (every.hits, toggled.reached) == (COUNT, len(range(0, COUNT, 3)))


def test_breakpoint_disabled_at_its_own_stop_lets_the_guest_go_on(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work")
        dbg.cont(timeout=LIMIT)

        breakpoint_.enabled = False

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.reached == 1
        assert counter(dbg, "calls") == COUNT


def test_breakpoint_disabled_and_enabled_at_its_own_stop_is_not_met_again(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work")
        dbg.cont(timeout=LIMIT)

        breakpoint_.enabled = False
        breakpoint_.enabled = True

        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 1
        assert breakpoint_.reached == 2


def test_breakpoint_set_where_the_vcpu_stands_after_an_interrupt_is_met_at_once(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")).debug() as dbg:
        dbg.cont(timeout=0.05)
        before = counter(dbg, "spin_counter")

        breakpoint_ = dbg.breakpoint(dbg.registers.rip)
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.breakpoint) == ("breakpoint", breakpoint_)
        assert counter(dbg, "spin_counter") in (before, before + 1)


@CPUS
def test_breakpoint_set_while_the_guest_runs_holds_when_it_returns(
    guest: Callable[..., Path], cpus: int, backend: str
) -> None:
    # So that on the software CPU each vCPU comes to its turn before a thousand stops.
    quantum = 100 if backend == "soft" else None
    with Vm(guest("busy"), cpus=cpus, quantum=quantum).debug() as dbg:
        for _ in range(20):
            dbg.cont(wait=False)

            breakpoint_ = dbg.breakpoint("spin")

            seen = {dbg.wait(LIMIT).vcpu}
            while len(seen) < cpus:
                stop = dbg.cont(timeout=LIMIT)
                assert (stop.reason, stop.breakpoint) == ("breakpoint", breakpoint_)
                seen.add(stop.vcpu)
            breakpoint_.delete()


@CPUS
def test_breakpoint_toggled_while_the_guest_runs_leaves_it_running(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("busy"), cpus=cpus).debug() as dbg:
        breakpoint_ = dbg.breakpoint("spin", condition="False", enabled=False)
        dbg.cont(wait=False)

        reached = 0
        for _ in range(50):
            breakpoint_.enabled = True
            breakpoint_.enabled = False
            reached, before = breakpoint_.reached, reached
            assert reached >= before
        assert dbg.running
        after = breakpoint_.reached
        dbg.interrupt()
        dbg.wait(LIMIT)
        assert breakpoint_.reached == after, "a disabled breakpoint is not met"


def test_breakpoint_deleted_while_the_guest_runs_lets_it_end(guest: Callable[..., Path]) -> None:
    for _ in range(20):
        with Vm(guest("smp", defines=["COUNT=300"]), cpus=2).debug() as dbg:
            breakpoints = [dbg.breakpoint(f"tick+{offset}", condition="False") for offset in (0, 7, 0xB)]
            dbg.cont(wait=False)

            for breakpoint_ in breakpoints:
                breakpoint_.delete()
                breakpoint_.delete()

            assert dbg.wait(LIMIT).reason == "exit"
            assert dbg.output.endswith("all=600\n")


def test_deleted_breakpoint_is_not_listed_and_stays_deleted(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        first, second = dbg.breakpoint("work"), dbg.breakpoint("_start+3")

        first.delete()
        first.delete()

        assert dbg.breakpoints == [second]
        assert (first.deleted, first.enabled, first.kind) == (True, False, None)
        assert "deleted" in repr(first)
        assert (first.id, second.id, dbg.breakpoint("work").id) == (1, 2, 3)


def test_breakpoints_of_two_machines_are_never_equal(loop: Path) -> None:
    with Vm(loop).debug() as one, Vm(loop).debug() as two:
        assert one.breakpoint("work") != two.breakpoint("work")
        assert len({*one.breakpoints, *one.breakpoints}) == 1


def test_breakpoint_from_another_thread_while_the_guest_runs_holds(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy"), cpus=2).debug() as dbg:
        made = threading.Event()

        def make() -> None:
            dbg.breakpoint("spin", vcpu=1)
            made.set()

        dbg.cont(wait=False)
        thread = threading.Thread(target=make)
        thread.start()
        stop = dbg.wait(LIMIT)
        thread.join(LIMIT)

        assert made.is_set()
        assert (stop.reason, stop.vcpu) == ("breakpoint", 1)


# The guest's memory.


def test_memory_never_shows_a_planted_byte_and_is_restored_exactly(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        work = dbg.symbol("work")
        physical = dbg.memory.translate(work)
        assert physical is not None
        before = dbg.memory.read(work - 64, 256)

        breakpoints = [dbg.breakpoint(work + offset) for offset in (0, 7, 0xB, 0x12)]

        for at in range(-64, 64, 7):
            assert dbg.memory.read(work + at, 40) == before[64 + at : 104 + at]
            assert dbg.memory.physical.read(physical + at, 40) == before[64 + at : 104 + at]
        assert [dbg.memory.read_u8(work + n) for n in range(16)] == list(before[64:80])
        dbg.cont(timeout=LIMIT)
        assert dbg.memory.read(work - 64, 256) == before
        for breakpoint_ in breakpoints:
            breakpoint_.delete()
        assert dbg.memory.read(work - 64, 256) == before
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.memory.read(work - 64, 256) == before
        assert counter(dbg, "calls") == COUNT


def test_memory_that_the_guest_reads_is_its_own_once_the_breakpoint_is_gone(guest: Callable[..., Path]) -> None:
    with Vm(guest("selfmod", defines=["ROUNDS=2"])).debug() as dbg:
        planted = dbg.breakpoint("patched")
        planted.delete()

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output.endswith("selfmod ok\n"), "the guest copies this function and runs the copy"


def test_write_over_a_breakpoint_goes_beneath_it(loop: Path) -> None:
    nops = b"\x90" * 7
    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition="arg0 == 2")
        dbg.cont(timeout=LIMIT)
        work = dbg.symbol("work")
        original = dbg.memory.read(work, 7)

        dbg.memory.write(work, nops)

        assert dbg.memory.read(work, 7) == nops
        breakpoint_.condition = "arg0 == 4"
        dbg.registers.rax = 1000
        assert dbg.cont(timeout=LIMIT).frame.registers.rdi == 4
        assert breakpoint_.reached == 5, "it holds over the new code"
        breakpoint_.delete()
        assert dbg.memory.read(work, 7) == nops
        dbg.memory.write(work, original)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert counter(dbg, "calls") != COUNT, "the load of the counter was a nop for two calls"


def test_write_of_part_of_an_instruction_under_a_breakpoint_takes_effect(guest: Callable[..., Path]) -> None:
    with Vm(guest("selfmod", defines=["ROUNDS=3"])).debug() as dbg:
        breakpoint_ = dbg.breakpoint("patched", hardware=True)
        dbg.cont(timeout=LIMIT)

        dbg.memory.write_u32(dbg.symbol("patched") + 1, 7777)
        dbg.step()

        assert dbg.registers.rax == 7777
        assert breakpoint_.reached == 1


def test_breakpoint_in_code_that_the_guest_patches_and_copies_is_met_each_time(guest: Callable[..., Path]) -> None:
    with Vm(guest("selfmod")).debug() as dbg:
        patched = dbg.breakpoint("patched", condition="False", hardware=True)
        loaded = dbg.breakpoint("loaded_code", condition="False", hardware=True)
        called = dbg.breakpoint("on_patched")

        rounds = [dbg.cont(timeout=LIMIT).frame.registers.rdi for _ in range(5)]

        assert rounds == [1, 2, 3, 4, 5]
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (patched.reached, loaded.reached, called.hits) == (5, 5, 5)
        assert dbg.output.endswith("selfmod ok\n")


def test_breakpoint_over_code_that_was_loaded_since_holds_after_the_next_stop(guest: Callable[..., Path]) -> None:
    with Vm(guest("selfmod")).debug() as dbg:
        inner = dbg.breakpoint("loaded_code", condition="False", enabled=False)
        outer = dbg.breakpoint("on_patched", temporary=True)
        assert dbg.cont(timeout=LIMIT).breakpoint is outer
        code = dbg.memory.read(dbg.symbol("loaded_code"), 8)

        inner.enabled = True

        assert dbg.memory.read(dbg.symbol("loaded_code"), 8) == code
        dbg.registers.rip = dbg.symbol("loaded_code")
        dbg.step()
        assert (inner.reached, dbg.registers.rax) == (1, 101)


def test_guest_with_its_own_int3_gets_them_all_and_no_stop_is_reported(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        mine = dbg.breakpoint("on_breakpoint", condition="False")

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.code) == ("exit", 0)
        assert (mine.reached, counter(dbg, "breakpoints")) == (3, 3)
        assert dbg.output.endswith("faults ok\n")


def test_breakpoint_on_a_guests_own_int3_stops_and_the_guest_gets_it_afterwards(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        dbg.breakpoint("on_breakpoint", temporary=True)
        dbg.cont(timeout=LIMIT)
        frame = dbg.registers.rsp
        words = [dbg.memory.read_u64(frame + 8 * n) for n in range(40)]
        [second, *_] = [
            word for word in words if (dbg.symbolize(word) or "").startswith(("guest_main", "test_breakpoints"))
        ]
        assert dbg.memory.read(second, 2)[:1] == b"\xcc"

        breakpoint_ = dbg.breakpoint(second)
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.pc, counter(dbg, "breakpoints")) == ("breakpoint", second, 1)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (breakpoint_.reached, counter(dbg, "breakpoints")) == (1, 3)
        assert dbg.output.endswith("faults ok\n")


def test_breakpoint_in_an_exception_handler_is_met(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        breakpoint_ = dbg.breakpoint("on_page_fault")

        first = dbg.cont(timeout=LIMIT)
        assert (first.frame.registers.rdi, first.frame.registers.rsi) == (0x5000_0000_1230, 2)
        second = dbg.cont(timeout=LIMIT)
        assert (second.frame.registers.rdi, second.frame.registers.rsi) == (0x5000_0000_3000, 0x11)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.hits == 2


def test_breakpoint_on_an_instruction_that_faulted_is_met_when_it_is_done_again(
    guest: Callable[..., Path], capabilities: dict[str, Any]
) -> None:
    with Vm(guest("faults")).debug() as dbg:
        dbg.breakpoint("on_page_fault", temporary=True)
        dbg.cont(timeout=LIMIT)
        frame = [dbg.memory.read_u64(dbg.registers.rsp + 8 * n) for n in range(40)]
        [faulting, *_] = [
            word for word in frame if (dbg.symbolize(word) or "").startswith(("guest_main", "test_page_fault"))
        ]
        breakpoint_ = dbg.breakpoint(faulting)
        # A fault sets RF in the flags that it saves, which keeps debug registers quiet for that instruction.
        met = 0 if capabilities["int3"] == "not intercepted" and capabilities["hardware_breakpoints"] <= 4 else 1

        stops = [dbg.cont(timeout=LIMIT) for _ in range(met)]

        assert [(stop.reason, stop.pc) for stop in stops] == [("breakpoint", faulting)] * met
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.reached == met
        assert dbg.output.endswith("faults ok\n")


def test_breakpoint_in_an_interrupt_handler_counts_every_interrupt(guest: Callable[..., Path]) -> None:
    with Vm(guest("timer", defines=["COUNT=10"])).debug() as dbg:
        breakpoint_ = dbg.breakpoint("on_timer_tick", condition="arg0 % 5 == 0")

        assert to_the_end(dbg) == [5, 10]

        # One more may come before the guest looks.
        assert 10 <= breakpoint_.reached == counter(dbg, "timer_ticks") < 15
        assert breakpoint_.hits == 2


def test_breakpoint_after_close_raises(loop: Path) -> None:
    dbg = Vm(loop).debug()
    breakpoint_ = dbg.breakpoint("work")
    dbg.close()

    with pytest.raises(VmStateError, match="closed"):
        breakpoint_.delete()
    assert breakpoint_.hits == 0
