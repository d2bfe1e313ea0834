"""Source-level steps: over calls, into them, out of them, to a line; with recursion and with other vCPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uhyve import BreakpointError, Debugger, Stop, Vm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.vm

LIMIT = 30
SOURCE = Path(__file__).resolve().parents[2] / "guests" / "frames.c"


def line(words: str) -> int:
    """The line of frames.c that a comment names."""
    lines = SOURCE.read_text().splitlines()
    [number] = [n for n, text in enumerate(lines, 1) if f"/* line: {words} */" in text]
    return number


def to(dbg: Debugger, where: str, condition: str | None = None, vcpu: int | None = None) -> Stop:
    dbg.breakpoint(where, condition=condition, temporary=True, vcpu=vcpu)
    stop = dbg.cont(timeout=LIMIT)
    assert stop.reason == "breakpoint", stop
    return stop


def place(stop: Stop) -> tuple[str, str | None, int | None]:
    return stop.reason, stop.frame.function, stop.frame.line


@pytest.fixture
def frames(guest: Callable[..., Path]) -> Vm:
    return Vm(guest("frames"))


def test_next_goes_over_calls_line_by_line(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, f"frames.c:{line('calls outer')}")
        for words in ("calls factorial", "calls no_frame"):
            stop = dbg.next(timeout=LIMIT)
            assert place(stop) == ("step", "shapes", line(words))
        assert dbg.breakpoints == []
        assert dbg.memory.read_u64(dbg.symbol("sink")) == 120


def test_next_over_a_recursive_call_returns_to_the_same_frame(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, f"frames.c:{line('factorial calls')}", "1")
        depth = len(dbg.backtrace())
        stop = dbg.next(timeout=LIMIT)
        assert place(stop) == ("step", "factorial", line("factorial multiplies"))
        assert len(dbg.backtrace()) == depth


def test_next_over_a_loop_in_one_line_is_one_stop(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, f"frames.c:{line('calls spin')}")
        number = dbg.stop.number
        stop = dbg.next(timeout=LIMIT)
        assert place(stop) == ("step", "shapes", line("after spins"))
        assert stop.number - number <= 4


def test_step_line_goes_into_functions_and_out_again(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, f"frames.c:{line('in outer')}")
        stop = dbg.step_line(timeout=LIMIT)
        assert stop.frame.function == "middle"
        seen = {stop.frame.function}
        for _ in range(20):
            stop = dbg.step_line(timeout=LIMIT)
            assert stop.reason == "step"
            if stop.frame.function == "outer":
                break
            seen.add(stop.frame.function)
        assert stop.frame.function == "outer"
        assert {"middle", "leaf"} <= seen


def test_finish_returns_the_value_of_this_very_call(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "factorial", "arg0 == 3")
        depth = len(dbg.backtrace())
        stop = dbg.finish(timeout=LIMIT)
        assert (stop.reason, stop.value, stop.frame.function) == ("step", 6, "factorial")
        assert len(dbg.backtrace()) == depth - 1
        assert dbg.finish(timeout=LIMIT).value == 24
        assert dbg.finish(timeout=LIMIT).value == 120


def test_finish_ends_at_a_breakpoint_on_the_way_and_leaves_none_of_its_own(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "outer")
        met = dbg.breakpoint("leaf")
        stop = dbg.finish(timeout=LIMIT)
        assert (stop.reason, stop.breakpoint, stop.value) == ("breakpoint", met, None)
        met.delete()
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_breakpoint_where_finish_ends_is_what_stops(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "middle")
        back = dbg.backtrace()[1].pc
        met = dbg.breakpoint(back)
        stop = dbg.finish(timeout=LIMIT)
        assert (stop.breakpoint, stop.pc, met.hits) == (met, back, 1)


def test_until_ends_at_the_place_or_where_the_function_returns(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "outer")
        stop = dbg.until(f"frames.c:{line('after middle')}", timeout=LIMIT)
        assert place(stop) == ("step", "outer", line("after middle"))
        stop = dbg.until("fib", timeout=LIMIT)
        assert stop.frame.function == "shapes"
        assert stop.frame.line == line("calls outer")


def test_finish_without_a_caller_is_refused(frames: Vm) -> None:
    with frames.debug() as dbg:
        dbg.registers.rsp = 8
        dbg.registers.rbp = 0
        with pytest.raises(BreakpointError, match="caller"):
            dbg.finish()


@pytest.mark.parametrize("cpus", [2, 3])
def test_next_and_finish_are_for_their_vcpu_while_others_run_the_same_code(
    guest: Callable[..., Path], cpus: int
) -> None:
    vm = Vm(guest("frames", defines=("DEPTH=9",)), cpus=cpus)
    with vm.debug() as dbg:
        last = cpus - 1
        to(dbg, f"frames.c:{line('fib left')}", vcpu=last)
        depth = len(dbg.backtrace(last))
        for words in ("fib right", "fib adds"):
            stop = dbg.next(vcpu=last, timeout=LIMIT)
            assert (stop.vcpu, *place(stop)) == (last, "step", "fib", line(words))
            assert len(dbg.backtrace(last)) == depth
        stop = dbg.finish(vcpu=last, timeout=LIMIT)
        assert (stop.vcpu, stop.value, stop.frame.function) == (last, 34, "guest_main")
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output == "frames ok\n"


def test_steps_by_lines_end_with_the_guest_and_with_the_time(guest: Callable[..., Path], frames: Vm) -> None:
    with Vm(guest("hang")).debug() as dbg:
        assert dbg.next(50, timeout=0.3).reason in ("timeout", "step")
    with frames.debug() as dbg:
        to(dbg, f"frames.c:{line('calls fib')}")
        stop = dbg.next(100, timeout=LIMIT)
        assert stop.reason in ("exit", "step")
        with pytest.raises(ValueError, match="count is 0"):
            dbg.next(0)
