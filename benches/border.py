"""What the border between Python and the core costs: a callback, reads of attributes, and a round trip of `cont`.

python -m pytest benches/border.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import uhyve

HITS = 500


@pytest.fixture
def debugger() -> Iterator[uhyve.Debugger]:
    """A guest that calls `work` for ever, on the software CPU: what the CPU does is the least of it."""
    vm = uhyve.Vm(uhyve.Image.bench(), args=["work", str(1 << 40), "0"], backend="soft", output="none", sampling=0)
    with vm.debug() as dbg:
        yield dbg


def test_cont_to_the_next_breakpoint(benchmark: Any, debugger: uhyve.Debugger) -> None:
    debugger.breakpoint("work")

    stop = benchmark(debugger.cont, timeout=30)

    assert stop.reason == "breakpoint"


def test_step_of_one_instruction(benchmark: Any, debugger: uhyve.Debugger) -> None:
    stop = benchmark(debugger.step, timeout=30)

    assert stop.reason == "step"


@pytest.mark.parametrize("condition", ["none", "compiled", "callable", "callable that reads an argument"])
def test_hit(benchmark: Any, debugger: uhyve.Debugger, condition: str) -> None:
    """The figure is for so many hits and one stop behind them."""
    conditions: dict[str, Any] = {
        "none": None,
        "compiled": "arg0 > 1 << 39",
        "callable": lambda _: False,
        "callable that reads an argument": lambda hit: hit.arg(0) < 0,
    }
    point = debugger.breakpoint("work", condition=conditions[condition], ignore=HITS if condition == "none" else 0)
    last = debugger.breakpoint("work", ignore=HITS)

    def hits() -> None:
        point.ignore = HITS if condition == "none" else 0
        last.ignore = HITS
        debugger.cont(timeout=30)

    benchmark.pedantic(hits, rounds=20, warmup_rounds=2)
    benchmark.extra_info["hits"] = HITS


@pytest.mark.parametrize("what", ["pc", "registers", "registers.rdi", "frame.function", "memory.read_u64", "stop"])
def test_read_of(benchmark: Any, debugger: uhyve.Debugger, what: str) -> None:
    debugger.breakpoint("work")
    debugger.cont(timeout=30)
    vcpu, address = debugger.vcpus[0], debugger.symbol("watched")
    reads: dict[str, Any] = {
        "pc": lambda: vcpu.pc,
        "registers": lambda: vcpu.registers,
        "registers.rdi": lambda: vcpu.registers.rdi,
        "frame.function": lambda: debugger.stop.frame.function,
        "memory.read_u64": lambda: debugger.memory.read_u64(address),
        "stop": lambda: debugger.stop,
    }

    benchmark(reads[what])


def test_clock_that_times_all_this(benchmark: Any) -> None:
    benchmark(time.perf_counter_ns)
