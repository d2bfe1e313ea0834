"""What a breakpoint hit costs that does not stop: bare, by a false compiled condition, by a false Python callable.

Each round boots the test guest `loop` once per kind, with the same breakpoint on `work`; the figures are medians of the
rounds, per call of `work`, and ratios to a breakpoint that only counts (its ignore count is never used up).

    python benches/hits.py [rounds]
"""

from __future__ import annotations

import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import uhyve

CALLS = 20_000


def _guest() -> pathlib.Path:
    path = pathlib.Path(__file__).parent.parent / "tests" / "guests" / "build.py"
    spec = importlib.util.spec_from_file_location("guest_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guest_build"] = module
    spec.loader.exec_module(module)
    image: pathlib.Path = module.build("loop", defines=(f"COUNT={CALLS}",))
    return image


def _run(image: pathlib.Path, set_breakpoint: Callable[[uhyve.Debugger], uhyve.Breakpoint] | None) -> float:
    with uhyve.Vm(image, aslr=False).debug() as dbg:
        point = set_breakpoint(dbg) if set_breakpoint else None
        start = time.perf_counter()
        stop = dbg.cont(timeout=300)
        took = time.perf_counter() - start
        assert stop.reason == "exit", stop
        assert point is None or point.reached == CALLS, point
    return took


def main() -> None:
    """Prints a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    image = _guest()
    kinds: dict[str, Callable[[uhyve.Debugger], uhyve.Breakpoint] | None] = {
        "no breakpoint": None,
        "bare hit": lambda dbg: dbg.breakpoint("work", ignore=10**12),
        "false condition": lambda dbg: dbg.breakpoint("work", condition="arg0 == 1 and arg1 == 1"),
        "false condition with memory": lambda dbg: dbg.breakpoint("work", condition="u64[total] == 1"),
        "false callable": lambda dbg: dbg.breakpoint("work", condition=lambda _: False),
        "false callable that reads an argument": lambda dbg: dbg.breakpoint(
            "work", condition=lambda hit: hit.arg(0) < 0
        ),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, set_breakpoint in kinds.items():
            times[kind].append(_run(image, set_breakpoint))
    base = statistics.median(times["no breakpoint"])
    bare = statistics.median(times["bare hit"]) - base
    print(f"{CALLS} hits a run, median of {rounds} rounds; the guest's own time is taken off")
    for kind, values in times.items():
        cost = statistics.median(values) - base
        print(f"  {kind:40} {cost / CALLS * 1e6:8.2f} µs   {cost / bare:6.2f} × a bare hit")


if __name__ == "__main__":
    main()
