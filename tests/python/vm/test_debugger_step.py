"""Single steps: one instruction at a time, of every kind, with and without breakpoints in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve import Breakpoint, Debugger, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 30
TRAP_FLAG = 0x100
CARRY_FLAG = 0x1
INTERRUPT_FLAG = 0x200
INTERFACES = pytest.mark.parametrize("interface", [1, 2])


def at(dbg: Debugger, label: str) -> None:
    """Lets the guest run to a label, with a breakpoint that is gone afterwards."""
    dbg.breakpoint(label, temporary=True)
    stop = dbg.cont(timeout=LIMIT)
    assert (stop.reason, stop.pc) == ("breakpoint", dbg.symbol(label))


def step(dbg: Debugger) -> int:
    """One step; gives the new pc."""
    stop = dbg.step(timeout=LIMIT)
    assert (stop.reason, stop.vcpu, stop.breakpoint) == ("step", 0, None)
    assert stop.pc == dbg.registers.rip
    return stop.pc


def label(number: int) -> str:
    return f"step_{number}"


def finish(dbg: Debugger) -> None:
    stop = dbg.cont(timeout=LIMIT)
    assert (stop.reason, stop.code) == ("exit", 0), dbg.output
    assert dbg.output == "steps=5\n"


@INTERFACES
def test_step_through_the_sequence_passes_each_label_in_turn(guest: Callable[..., Path], interface: int) -> None:
    with Vm(guest("steps", interface=interface)).debug() as dbg:
        names = {dbg.symbol(label(n)): n for n in range(1, 29)} | {dbg.symbol("step_callee"): 0}
        at(dbg, "step_1")
        passed = [1]
        numbers = [dbg.stop.number]
        while passed[-1] != 28:
            pc = step(dbg)
            numbers.append(dbg.stop.number)
            if pc in names and passed[-1] != names[pc]:
                passed.append(names[pc])

        assert passed == [
            *range(1, 10), 0, *range(10, 16), 16 if interface == 1 else 17, *range(18, 27), *[25, 26] * 4, 27, 28
        ]  # fmt: skip
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        finish(dbg)


@INTERFACES
def test_step_leaves_no_trap_flag_in_the_flags_or_on_the_stack(guest: Callable[..., Path], interface: int) -> None:
    with Vm(guest("steps", interface=interface)).debug() as dbg:
        at(dbg, "step_18")

        assert step(dbg) == dbg.symbol("step_19")
        assert dbg.memory.read_u64(dbg.registers.rsp) & TRAP_FLAG == 0, "what pushfq has pushed"
        assert dbg.memory.read_u64(dbg.registers.rsp) & 2
        for number in (20, 21, 22):
            assert step(dbg) == dbg.symbol(label(number))
            assert dbg.registers.rflags & TRAP_FLAG == 0
        finish(dbg)


def test_step_over_popf_sets_the_flags_that_were_popped(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_20")
        assert dbg.memory.read_u64(dbg.registers.rsp) & CARRY_FLAG

        assert step(dbg) == dbg.symbol("step_21")

        assert dbg.registers.rflags & (CARRY_FLAG | TRAP_FLAG) == CARRY_FLAG
        finish(dbg)


def test_step_over_sti_and_cli_changes_the_interrupt_flag(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_22")

        assert step(dbg) == dbg.symbol("step_23")
        assert dbg.registers.rflags & INTERRUPT_FLAG
        assert step(dbg) == dbg.symbol("step_24")
        assert not dbg.registers.rflags & INTERRUPT_FLAG
        finish(dbg)


def test_step_into_a_call_and_out_of_it_moves_the_stack(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_9")
        stack = dbg.registers.rsp

        assert step(dbg) == dbg.symbol("step_callee")
        assert (dbg.registers.rsp, dbg.memory.read_u64(stack - 8)) == (stack - 8, dbg.symbol("step_10"))
        step(dbg)
        assert step(dbg) == dbg.symbol("step_10")
        assert (dbg.registers.rsp, dbg.registers.rax) == (stack, 43)
        finish(dbg)


def test_step_over_rep_movsb_ends_behind_it_and_copies_everything(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_14")
        left = [dbg.registers.rcx]
        while step(dbg) != dbg.symbol("step_15"):
            assert dbg.registers.rip == dbg.symbol("step_14"), "in the middle of it"
            left.append(dbg.registers.rcx)
        assert left == list(range(16, 0, -1))

        assert dbg.memory.read(dbg.symbol("steps_target"), 16) == b"sixteen letters\0"
        assert dbg.registers.rcx == 0
        finish(dbg)


@INTERFACES
def test_step_over_output_writes_once(guest: Callable[..., Path], interface: int) -> None:
    with Vm(guest("steps", interface=interface)).debug() as dbg:
        at(dbg, "step_16" if interface == 1 else "step_17")
        assert dbg.output == ""

        step(dbg)

        assert dbg.output == "s"
        finish(dbg)


def test_step_over_a_loop_instruction_goes_back_until_the_count_is_over(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_25")

        counts = []
        while step(dbg) != dbg.symbol("step_27"):
            counts.append((dbg.registers.rax, dbg.registers.rcx))

        assert counts == [(1, 5), (1, 4), (2, 4), (2, 3), (3, 3), (3, 2), (4, 2), (4, 1), (5, 1)]
        finish(dbg)


def test_step_with_a_count_is_that_many_instructions_and_stops(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_1")
        number = dbg.stop.number

        stop = dbg.step(8, timeout=LIMIT)

        assert (stop.pc, stop.number) == (dbg.symbol("step_9"), number + 8)
        with pytest.raises(ValueError, match="at least one"):
            dbg.step(0)
        with pytest.raises(ValueError, match="at least one"):
            dbg.step(-1)
        finish(dbg)


def test_steps_from_the_entry_reach_the_first_call(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        pcs = [dbg.stop.pc, *(step(dbg) for _ in range(10))]

        assert len(set(pcs)) == 11
        assert all((dbg.symbolize(pc) or "").startswith("_start") for pc in pcs)
        finish(dbg)


# Breakpoints in the way.


@pytest.mark.parametrize("hardware", [False, True])
def test_step_onto_a_breakpoint_is_its_stop_and_counts_once(guest: Callable[..., Path], hardware: bool) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_3")
        breakpoint_ = dbg.breakpoint("step_4", hardware=hardware)

        stop = dbg.step(timeout=LIMIT)

        assert (stop.reason, stop.pc, stop.breakpoint) == ("breakpoint", breakpoint_.address, breakpoint_)
        assert breakpoint_.reached == 1
        assert step(dbg) == dbg.symbol("step_5")
        assert breakpoint_.reached == 1
        finish(dbg)
        assert (breakpoint_.reached, breakpoint_.hits) == (1, 1)


@pytest.mark.parametrize("hardware", [False, True])
def test_step_onto_a_breakpoint_whose_condition_is_false_is_a_step_and_counts_once(
    guest: Callable[..., Path], hardware: bool
) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_3")
        breakpoint_ = dbg.breakpoint("step_4", condition="False", hardware=hardware)

        assert step(dbg) == breakpoint_.address
        finish(dbg)

        assert (breakpoint_.reached, breakpoint_.hits) == (1, 0)


def test_step_of_a_count_ends_early_at_a_breakpoint(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        at(dbg, "step_1")
        dbg.breakpoint("step_5")

        stop = dbg.step(100, timeout=LIMIT)

        assert (stop.reason, stop.symbol) == ("breakpoint", "step_5")
        finish(dbg)


@pytest.mark.parametrize("hardware", [False, True])
def test_step_from_under_a_breakpoint_executes_its_instruction(guest: Callable[..., Path], hardware: bool) -> None:
    with Vm(guest("steps")).debug() as dbg:
        breakpoints = {n: dbg.breakpoint(label(n), hardware=hardware) for n in (1, 9, 14, 20)}
        for number, breakpoint_ in breakpoints.items():
            stop = dbg.cont(timeout=LIMIT)
            assert (stop.reason, stop.breakpoint) == ("breakpoint", breakpoint_)
            pc = step(dbg)
            while pc == breakpoint_.address:
                pc = step(dbg)
            after = {1: "step_2", 9: "step_callee", 14: "step_15", 20: "step_21"}
            assert pc == dbg.symbol(after[number])

        finish(dbg)
        assert [b.reached for b in breakpoints.values()] == [1, 1, 1, 1]


@INTERFACES
def test_breakpoint_on_every_instruction_is_met_once_for_each_execution(
    guest: Callable[..., Path], interface: int
) -> None:
    expected = {n: 1 for n in range(1, 29) if n != (17 if interface == 1 else 16)} | {25: 5, 26: 5}
    with Vm(guest("steps", interface=interface)).debug() as dbg:
        breakpoints: dict[int, Breakpoint] = {n: dbg.breakpoint(label(n), condition="False") for n in range(1, 29)}

        finish(dbg)

        assert {n: b.reached for n, b in breakpoints.items() if b.reached} == expected


@INTERFACES
def test_breakpoint_on_every_instruction_stops_at_each_in_turn(guest: Callable[..., Path], interface: int) -> None:
    with Vm(guest("steps", interface=interface)).debug() as dbg:
        for n in range(1, 29):
            dbg.breakpoint(label(n))
        numbers = {dbg.symbol(label(n)): n for n in range(1, 29)}
        passed = []
        while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
            assert dbg.registers.rflags & TRAP_FLAG == 0
            passed.append(numbers[stop.pc])

        assert (stop.reason, dbg.output) == ("exit", "steps=5\n")
        assert passed == [*range(1, 16), 16 if interface == 1 else 17, *range(18, 27), *[25, 26] * 4, 27, 28]


@pytest.mark.parametrize("number", [*range(1, 16), *range(17, 29)])
def test_step_over_each_instruction_under_a_breakpoint_of_its_own_does_the_same(
    guest: Callable[..., Path], number: int
) -> None:
    """Where the covered instruction is emulated by one call and executed by the other."""
    with Vm(guest("steps", interface=2)).debug() as plain, Vm(guest("steps", interface=2)).debug() as covered:
        names = ("rax", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "rip")
        for dbg in (plain, covered):
            at(dbg, label(number))
        covered.breakpoint(label(number), condition="False")
        next_ = plain.registers.rip
        while next_ == plain.registers.rip:
            step(plain)
        covered.breakpoint(plain.registers.rip - plain.load_bias + covered.load_bias, temporary=True)
        covered.cont(timeout=LIMIT)

        def relative(dbg: Debugger) -> list[int]:
            values = [getattr(dbg.registers, name) for name in names]
            start = dbg.load_bias
            return [value - start if 0 <= value - start < 1 << 24 else value for value in values]

        assert relative(covered) == relative(plain)
        assert (covered.registers.rflags ^ plain.registers.rflags) & ~0x10000 == 0
        finish(plain)
        finish(covered)


# Interrupts, exceptions, halts.


def test_step_with_a_timer_running_never_enters_its_handler(guest: Callable[..., Path]) -> None:
    with Vm(guest("timer", defines=["COUNT=200", "PERIOD=200000"])).debug() as dbg:
        at(dbg, "on_timer_tick")
        ticks = dbg.symbol("timer_ticks")
        # Out of the handler first: it runs with interrupts masked.
        while not dbg.registers.rflags & INTERRUPT_FLAG:
            if dbg.step(timeout=1).reason == "timeout":
                break
            if (dbg.symbolize(dbg.registers.rip) or "").startswith("guest_main"):
                break
        before = dbg.memory.read_u64(ticks)
        seen = set()
        for _ in range(60):
            if dbg.step(timeout=0.2).reason != "step":
                break
            seen.add((dbg.symbolize(dbg.registers.rip) or "").split("+")[0])

        assert "on_timer_tick" not in seen
        assert dbg.memory.read_u64(ticks) - before <= 1
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output == "timer ticks=200\n"


def test_step_over_hlt_ends_and_the_halted_vcpu_can_be_interrupted(guest: Callable[..., Path]) -> None:
    with Vm(guest("halt")).debug() as dbg:
        dbg.cont(timeout=0.2)
        halted = dbg.stop.pc
        code = dbg.memory.read(halted - 1, 1)
        assert code == b"\xf4", "a halted vCPU stands behind its hlt"

        stop = dbg.step(timeout=0.1)

        assert stop.reason in ("step", "timeout")
        assert dbg.cont(timeout=0.05).reason == "timeout"


def test_step_onto_and_over_hlt_comes_behind_it(guest: Callable[..., Path]) -> None:
    with Vm(guest("hang")).debug() as dbg:
        at(dbg, "guest_main")
        for _ in range(3000):
            if dbg.memory.read_u8(dbg.registers.rip) == 0xF4:
                break
            step(dbg)
        hlt = dbg.registers.rip
        assert dbg.memory.read_u8(hlt) == 0xF4

        stop = dbg.step(timeout=0.5)

        assert stop.reason in ("step", "timeout")
        assert dbg.registers.rip == hlt + 1


def test_breakpoint_on_hlt_is_met_and_the_interrupt_wakes_the_vcpu(guest: Callable[..., Path]) -> None:
    with Vm(guest("timer", defines=["COUNT=5"])).debug() as dbg:
        at(dbg, "on_timer_tick")
        base = dbg.symbol("guest_main")
        code = dbg.memory.read(base, 400)
        hlt = base + code.index(b"\xfb\xf4") + 1

        breakpoint_ = dbg.breakpoint(hlt, condition="False")

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output == "timer ticks=5\n"
        assert breakpoint_.reached >= 3


def test_step_over_an_int3_of_the_guest_comes_no_further_than_its_handler(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        at(dbg, "on_breakpoint")
        words = [dbg.memory.read_u64(dbg.registers.rsp + 8 * n) for n in range(40)]
        [behind, *_] = [w for w in words if (dbg.symbolize(w) or "").startswith(("guest_main", "test_breakpoints"))]
        # The second of three: set by its address, left by a step.
        dbg.breakpoint(behind, temporary=True)
        assert dbg.cont(timeout=LIMIT).pc == behind
        assert dbg.memory.read_u8(behind) == 0xCC
        count = dbg.memory.read_u64(dbg.symbol("breakpoints"))
        assert count == 1

        stop = dbg.step(timeout=LIMIT)

        assert stop.reason == "step"
        assert stop.pc != behind
        assert dbg.memory.read_u64(dbg.symbol("breakpoints")) == 1
        assert dbg.registers.rflags & TRAP_FLAG == 0
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.memory.read_u64(dbg.symbol("breakpoints")) == 3
        assert dbg.output.endswith("faults ok\n")


def test_step_over_a_faulting_instruction_goes_to_the_handler(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        dbg.breakpoint("on_page_fault", temporary=True)
        dbg.cont(timeout=LIMIT)
        assert dbg.registers.cr2 == 0x5000_0000_1230
        for _ in range(400):
            before = dbg.registers.rip
            assert dbg.step(timeout=LIMIT).reason == "step", before
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output.endswith("faults ok\n")


@pytest.mark.parametrize("code", [b"\x0f\x0b", b"\x48\xf7\xf1"], ids=["ud2", "div"])
def test_step_over_an_instruction_that_faults_leaves_no_trap_flag_in_the_handlers_frame(
    guest: Callable[..., Path], code: bytes
) -> None:
    with Vm(guest("faults")).debug() as dbg:
        base = dbg.symbol("guest_main")
        dbg.breakpoint(base + dbg.memory.read(base, 2000).index(code), temporary=True)
        assert dbg.cont(timeout=LIMIT).reason == "breakpoint"

        stop = dbg.step(timeout=LIMIT)

        assert stop.reason == "step"
        assert (dbg.symbolize(stop.pc) or "").startswith("exception_")
        assert dbg.registers.rflags & TRAP_FLAG == 0
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output.endswith("faults ok\n")


def test_step_to_the_exit_ends_with_the_exit_stop(guest: Callable[..., Path]) -> None:
    with Vm(guest("hello", defines=["EXIT_CODE=9"])).debug() as dbg:
        at(dbg, "guest_exit")

        stop = dbg.step(1000, timeout=LIMIT)

        assert (stop.reason, stop.code) == ("exit", 9)


def test_step_into_a_crash_ends_with_the_crash_stop(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=triple"])).debug() as dbg:
        at(dbg, "crash_triple")

        stop = dbg.step(10, timeout=LIMIT)

        assert (stop.reason, stop.vcpu) == ("crash", 0)


def test_step_over_sse_that_the_host_must_emulate_executes_it(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=sse"])).debug() as dbg:
        at(dbg, "sse_instruction")

        stop = dbg.step(timeout=LIMIT)

        assert (stop.reason, stop.pc) == ("step", dbg.symbol("sse_instruction") + 4)
        assert dbg.registers.xmm0 == 0x4008000000000000_4000000000000000
        assert (dbg.cont(timeout=LIMIT).code, dbg.output) == (0, "crash sse\nsse ok\n")


def test_whole_guest_step_by_step_does_what_it_does_alone(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop", defines=["COUNT=20"])).debug() as dbg:
        work = dbg.symbol("work")
        calls = 0
        for _ in range(20_000):
            stop = dbg.step(timeout=LIMIT)
            if stop.reason == "exit":
                break
            calls += stop.pc == work
        assert (stop.reason, stop.code, calls) == ("exit", 0, 20)
        assert dbg.output == f"calls=20 total={3 * sum(range(20))}\n"
