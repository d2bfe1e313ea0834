"""The ways to measure a case once: by the core's sampler, by the guest, or by the clock of the one who asked."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from uhyve import Image, Vm, _core
from uhyve.bench.rsp import Client, never
from uhyve.errors import VmStateError
from uhyve.vm import _Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from uhyve.bench.cases import Case
    from uhyve.bench.report import Buckets
    from uhyve.breakpoint import Breakpoint
    from uhyve.debugger import Debugger

__all__ = ["Round", "Ways"]

_LONGEST: Final = 60.0
"""Seconds that nothing of this takes."""
_HITS: Final = 2000
_ABOVE: Final = 1_000_000_000
"""What no argument of a hit is above."""
_BEYOND_FIRMWARE: Final = 16 << 20
"""Where RAM begins that is not by chance where the firmware area is."""
_WHOLE: Final = """
import time
start = time.process_time_ns()
import uhyve
imported = time.process_time_ns() - start
uhyve.Vm(uhyve.Image.bench(), args=["exit", "1"], backend={backend!r}, output="none").run(60)
print(imported)
"""

Parts = dict[str, "Buckets"]


@dataclass
class Round:
    """What one round of a case gave, in nanoseconds."""

    parts: Parts
    """The samples: ``total``, and what of it is told apart."""
    exits: list[dict[str, Parts]] = field(default_factory=list)
    """All timed exits of each vCPU, by reason."""


@dataclass
class Ways:
    """One back end on one host CPU, with a file of a MiB for the guest, and so many samples of what is slow."""

    backend: str
    cpu: int
    data: Path
    few: int
    _shared: dict[tuple[str, int], dict[str, Buckets]] = field(default_factory=dict)
    """What was measured together for several cases of this pass."""

    def forget(self) -> None:
        """A new pass: nothing is shared with the one before."""
        self._shared.clear()

    def round(self, case: Case, count: int) -> Round:
        """Measures a case once, with ``count`` samples if they are quick ones."""
        match case.how:
            case "exits":
                return self._exits(case, count)
            case "told":
                return self._told(case)
            case "stop":
                return self._together(case, self._stops)
            case "crowd":
                return self._crowd(case)
            case "hit":
                return self._hits(case, min(count, _HITS))
            case "step":
                return self._steps(case)
            case "gdb":
                return self._remote(case, min(count, _HITS))
            case "life":
                return self._together(case, self._life)
            case "boot":
                return self._boot(case)
            case "process":
                return self._together(case, self._process)

    # Exits

    def _exits(self, case: Case, count: int) -> Round:
        skip = count // 10 + 10
        found, _ = self._run(case, count + skip, skip)
        if case.reason not in found[0]:
            raise VmStateError(f"{self.backend} answers this itself: no exit {case.reason} was seen")
        return Round(found[0][case.reason], found)

    def _told(self, case: Case) -> Round:
        """What the guest has timed itself."""
        found, output = self._run(case, 5 * self.few, 0)
        khz, *ticks = struct.unpack(f"<{len(output) // 8}Q", output)
        return Round({"total": [(tick * 1e6 / khz, 1) for tick in sorted(ticks)]}, found)

    def _run(self, case: Case, count: int, skip: int) -> tuple[list[dict[str, Parts]], bytes]:
        """A VM from its start to its end: what its exits took, and what it printed."""
        clock: dict[str, Any] = {"clock": "host"} if self.backend == "soft" and case.how == "told" else {}
        vm = self._vm(
            case,
            count,
            files={"/bench/data": self.data},
            affinity=[self.cpu] if case.cpus == 1 else None,
            output="capture" if case.how == "told" else "none",
            **clock,
        )
        started = _Run(debugging=False)
        try:
            changed: dict[str, object] = {"sampling_skip": skip, "firmware_exits": case.firmware}
            if case.firmware:
                changed["guest_address"] = _BEYOND_FIRMWARE
            machine = vm._launch(started, changed)
            status = machine.wait(_LONGEST)
            if status is None or status["ended"] != 0:
                raise VmStateError(f"the guest ended with {status}")
            machine.close()
            return machine.latency_buckets(), machine.output()[0]
        finally:
            vm._release(started)

    def _vm(self, case: Case, count: int, **more: Any) -> Vm:
        words = [case.loop, str(count), str(case.size)]
        return Vm(Image.bench(), args=words, cpus=case.cpus, backend=self.backend, sampling=1, **more)

    # Debugging

    def _debugged(self, case: Case, count: int) -> Debugger:
        return self._vm(case, count, output="none").debug()

    def _together(self, case: Case, measure: Callable[[Case], dict[str, Buckets]]) -> Round:
        """One part of what is measured together."""
        key = case.how, case.cpus
        if key not in self._shared:
            self._shared[key] = measure(case)
        return Round({"total": self._shared[key][case.part]})

    def _stops(self, case: Case) -> dict[str, Buckets]:
        """Stops of a world of which every vCPU runs."""
        with self._debugged(case, 1) as dbg:
            dbg._machine.time_stops(1, 0.02)
            found = dbg._machine.time_stops(self.few, 0.001)
        return {part: _rising(timing[n] for timing in found) for n, part in enumerate(("kick", "stop", "resume"), 1)}

    def _crowd(self, case: Case) -> Round:
        """The floor under stops."""
        if self.backend != "kvm":
            raise VmStateError(f"{self.backend} has no KVM_RUN to leave")
        return Round({"total": _rising(_core.bench_crowd(case.cpus, self.few))})

    def _hits(self, case: Case, count: int) -> Round:
        """A breakpoint that is met again and again and lets all go on."""
        with self._debugged(case, count) as dbg:
            point = self._point(dbg, case)
            dbg._machine.restart_sampling(1, 10)
            start = time.perf_counter_ns()
            stop = dbg.cont(_LONGEST)
            took = time.perf_counter_ns() - start
            if stop.reason != "exit" or point.reached != count:
                raise VmStateError(f"the breakpoint was met {point.reached} times of {count}: {stop}")
            return _of_hits(dbg, count, took)

    @staticmethod
    def _point(dbg: Debugger, case: Case) -> Breakpoint:
        conditions: dict[str, Any] = {"bare": None, "compiled": f"arg0 > {_ABOVE}", "callable": lambda _: False}
        ignore = 1 << 40 if case.part == "bare" else 0
        if case.place == "watch":
            return dbg.watch("watched", 8, "write", ignore=ignore)
        return dbg.breakpoint("work", condition=conditions[case.part], ignore=ignore, hardware=case.place == "hardware")

    def _steps(self, case: Case) -> Round:
        with self._debugged(case, 1 << 30) as dbg:
            dbg.step(timeout=_LONGEST)
            return Round({"total": _rising(_timed(lambda: dbg.step(timeout=_LONGEST)) for _ in range(10 * self.few))})

    def _remote(self, case: Case, count: int) -> Round:
        """False hits of a breakpoint of gdb's, by the packets that gdb sends."""
        address = "127.0.0.1:0" if case.transport == "tcp" else f"unix:{self.data.parent / 'gdb'}"
        count = count if case.part == "target" else 10 * self.few
        with (
            self._debugged(case, count) as dbg,
            dbg.serve_gdb(address) as server,
            Client(server.address, _LONGEST) as client,
        ):
            work = dbg.symbol("work")
            place = b"Z0,%x,1" % work
            if case.part == "client":
                client.order(place)
                client.judge(work, _ABOVE)
                return Round({"total": _rising(_timed(lambda: client.judge(work, _ABOVE)) for _ in range(count - 1))})
            expression = never(_ABOVE)
            client.order(place + b";X%x,%s" % (len(expression), expression.hex().encode()))
            dbg._machine.restart_sampling(1, 10)
            start = time.perf_counter_ns()
            reply = client.request(b"vCont;c")
            took = time.perf_counter_ns() - start
            if reply[:3] != b"W00":
                raise VmStateError(f"the guest did not come to its end: {reply.decode(errors='replace')}")
            return _of_hits(dbg, count, took)

    # From the beginning to the end

    def _life(self, case: Case) -> dict[str, Buckets]:
        lives = [self._one_life(case) for _ in range(self.few)]
        return {part: _rising(life[n] for life in lives) for n, part in enumerate(("create", "first", "close"))}

    def _one_life(self, case: Case) -> tuple[int, int, int]:
        vm, started = self._vm(case, 1, output="none"), _Run(debugging=True)
        before = time.perf_counter_ns()
        try:
            machine = vm._launch(started)
            created = time.perf_counter_ns()
            machine.wait(_LONGEST)
            there = time.perf_counter_ns()
        finally:
            closing = time.perf_counter_ns()
            vm._release(started)
        return created - before, there - before, time.perf_counter_ns() - closing

    def _boot(self, case: Case) -> Round:
        def run() -> None:
            self._vm(case, 1, output="none").run(_LONGEST)

        run()
        return Round({"total": _rising(_timed(run) for _ in range(self.few))})

    def _process(self, _: Case) -> dict[str, Buckets]:
        """A fresh interpreter: its whole time, and the CPU time of the import in it."""
        compiled = self.data.parent / "compiled"
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(compiled)}
        if not compiled.exists():
            _fresh("import uhyve", environment)
        start = time.perf_counter_ns()
        printed = _fresh(_WHOLE.format(backend=self.backend), environment)
        whole = time.perf_counter_ns() - start
        return {"whole": _rising([whole]), "import": _rising([int(printed)])}


def _fresh(program: str, environment: dict[str, str]) -> str:
    """What a program prints that has an interpreter of its own."""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_LONGEST, env=environment)
    if done.returncode != 0:
        why = done.stderr.strip().rpartition("\n")[2]
        raise VmStateError(f"an interpreter of its own ends with {done.returncode}: {why}")
    return done.stdout


def _of_hits(dbg: Debugger, count: int, took: int) -> Round:
    """Hits by the sampler. Where each instruction is stepped there are no exits: then their share of the time."""
    exits = dbg._machine.latency_buckets()
    seen = [exits[0][reason] for reason in ("debug", "unemulated") if reason in exits[0]]
    met = max(seen, key=lambda parts: sum(n for _, n in parts["total"]), default=None)
    if met is None or sum(n for _, n in met["total"]) < count // 2:
        return Round({"total": [(took / count, count)]}, exits)
    return Round(met, exits)


def _timed(work: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start


def _rising(values: Iterable[int | float]) -> Buckets:
    return [(float(value), 1) for value in sorted(values)]


def floor(backend: str, kind: str, count: int, cpu: int) -> Buckets:
    """The bare loop under an exit of that kind."""
    return _core.bench_floor(backend, kind, count, count // 10 + 10, cpu)
