"""Rounds of guests that alternate with the floor."""

from __future__ import annotations

import os
import platform
import random
import statistics
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uhyve import Image, Vm, __version__, _core
from uhyve.bench.cases import CASES, Case
from uhyve.bench.report import Report, Result, quantile, summarize
from uhyve.errors import UhyveError, VmStateError
from uhyve.vm import _Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uhyve.bench.report import Buckets
    from uhyve.debugger import Debugger

__all__ = ["facts", "run"]

_LONGEST: Final = 60.0
_LEAST, _MOST = 50, 20_000
_SELF_TIMED: Final = 50
_STOPS: Final = 10
_HITS: Final = 2000
_FEWEST: Final = 3
"""Rounds of a case, however slow the machine is."""
_QUICK, _FULL = 12.0, 300.0
"""Seconds for all cases together, before those that take longer than their share."""


def run(
    cases: Iterable[str] = (),
    *,
    backend: str = "auto",
    quick: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measures these cases, all if none are named, on a back end. ``progress`` is told what comes next.

    Raises ``HypervisorUnavailableError`` where that back end can't run.
    """
    start = time.monotonic()
    backend = os.environ.get("UHYVE_BACKEND") or backend if backend == "auto" else backend
    name = _core.choose_backend(backend)[0]
    wanted = set(cases)
    cpu = min(os.sched_getaffinity(0))
    report = Report(__version__, name, quick, 0.0, facts(), _core.bench_clock())
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        data = Path(folder, "data")
        data.write_bytes(bytes(1 << 20))
        bench = _Bench(name, cpu, data, 0.02 if quick else 0.2, 5 if quick else 15)
        chosen = [case for case in CASES if not wanted or case.name in wanted]
        end = start + (_QUICK if quick else _FULL)
        for place, case in enumerate(chosen):
            progress(case.title)
            now = time.monotonic()
            try:
                report.results.append(bench.measure(case, now + (end - now) / (len(chosen) - place)))
            except (UhyveError, OSError) as error:
                report.skipped[case.name] = str(error)
    report.seconds = time.monotonic() - start
    return report


class _Bench:
    """One back end, one host CPU, so many seconds a batch, so many rounds."""

    def __init__(self, backend: str, cpu: int, data: Path, batch: float, rounds: int) -> None:
        self.backend, self.cpu, self.data, self.batch, self.rounds = backend, cpu, data, batch, rounds
        probe = _core.bench_floor(backend, "port_out", 200, 50, cpu)
        self.exit_ns = max(quantile(probe, 0.5), 1.0)

    def measure(self, case: Case, end: float) -> Result:
        """The rounds of a case: three at least, and none that begins after ``end``."""
        count = min(_MOST, max(_LEAST, int(self.batch * 1e9 / (self.exit_ns * (1 + case.size / 4096)))))
        # The limits are KVM's: the software CPU leaves in less time than a dispatch takes.
        result = Result(case.name, case.title, {}, limit=case.limit if self.backend == "kvm" else 0.0)
        pooled: dict[str, dict[float, int]] = {}
        for number in range(self.rounds):
            if number >= _FEWEST and time.monotonic() > end:
                break
            if case.floor:
                floor = _core.bench_floor(self.backend, case.floor, count, count // 10, self.cpu)
                result.floors.append(quantile(floor, 0.5))
            parts = self._round(case, count)
            result.rounds.append(quantile(parts["total"], 0.5))
            for part, buckets in parts.items():
                pool = pooled.setdefault(part, {})
                for value, seen in buckets:
                    pool[value] = pool.get(value, 0) + seen
        summaries = {part: summarize(sorted(pool.items())) for part, pool in pooled.items()}
        result.summary = summaries.pop("total")
        result.parts = summaries
        if case.floor:
            ratios = [ours / floor for ours, floor in zip(result.rounds, result.floors, strict=True)]
            result.ratio = statistics.median(ratios)
            result.interval = _bootstrap(ratios)
        return result

    def _round(self, case: Case, count: int) -> dict[str, Buckets]:
        match case.how:
            case "told":
                return {"total": self._told(case)}
            case "stop":
                return {"total": self._stops(case)}
            case "hit":
                return self._hits(case, min(count, _HITS))
            case _:
                return self._exits(case, count)

    def _debugged(self, case: Case, count: int) -> Debugger:
        words = [case.loop, str(count), "0"]
        vm = Vm(Image.bench(), args=words, cpus=case.cpus, backend=self.backend, output="none", sampling=1)
        return vm.debug()

    def _stops(self, case: Case) -> Buckets:
        """Stops of a world of which every vCPU runs."""
        with self._debugged(case, 1) as dbg:
            dbg._machine.time_stops(1, 0.02)
            place = {"kick": 1, "stop": 2, "resume": 3}[case.part]
            return [
                (found[place], 1) for found in sorted(dbg._machine.time_stops(_STOPS, 0.001), key=lambda t: t[place])
            ]

    def _hits(self, case: Case, count: int) -> dict[str, Buckets]:
        """A breakpoint that is met again and again and lets all go on."""
        conditions: dict[str, Any] = {"bare": None, "compiled": "arg0 > 1000000000", "callable": lambda _: False}
        with self._debugged(case, count) as dbg:
            ignore = 1 << 40 if case.part == "bare" else 0
            point = dbg.breakpoint("work", condition=conditions[case.part], ignore=ignore)
            dbg._machine.restart_sampling(1, 10)
            stop = dbg.cont(_LONGEST)
            if stop.reason != "exit" or point.reached != count:
                raise VmStateError(f"the breakpoint was met {point.reached} times of {count}: {stop}")
            found = dbg._machine.latency_buckets()[0]
        seen = [found[reason] for reason in ("debug", "unemulated") if reason in found]
        return max(seen, key=lambda parts: sum(n for _, n in parts["total"]))

    def _exits(self, case: Case, count: int) -> dict[str, Buckets]:
        skip = count // 10 + 10
        found, _ = self._run(case, count + skip, skip)
        if case.reason not in found:
            raise VmStateError(f"{self.backend} answers this itself: no exit {case.reason} was seen")
        return found[case.reason]

    def _told(self, case: Case) -> Buckets:
        """What the guest has timed itself."""
        _, output = self._run(case, _SELF_TIMED, 0)
        khz, *ticks = struct.unpack(f"<{len(output) // 8}Q", output)
        return [(tick * 1e6 / khz, 1) for tick in sorted(ticks)]

    def _run(self, case: Case, count: int, skip: int) -> tuple[dict[str, dict[str, Buckets]], bytes]:
        """A VM from its start to its end: what its first vCPU's exits took, and what it printed."""
        clock: dict[str, Any] = {"clock": "host"} if self.backend == "soft" and not case.reason else {}
        vm = Vm(
            Image.bench(),
            args=[case.loop, str(count), str(case.size)],
            cpus=case.cpus,
            backend=self.backend,
            files={"/bench/data": self.data},
            affinity=[self.cpu] if case.cpus == 1 else None,
            output="none" if case.reason else "capture",
            sampling=1,
            **clock,
        )
        started = _Run(debugging=False)
        try:
            machine = vm._launch(started, {"sampling_skip": skip, "firmware_exits": case.firmware})
            status = machine.wait(_LONGEST)
            if status is None or status["ended"] != 0:
                raise VmStateError(f"the guest ended with {status}")
            machine.close()
            return machine.latency_buckets()[0], machine.output()[0]
        finally:
            vm._release(started)


def _bootstrap(values: list[float], draws: int = 1000) -> tuple[float, float]:
    """The interval that holds the median of 95 % of samples drawn from these values."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws * 25 // 1000], medians[draws * 975 // 1000 - 1]


def facts() -> dict[str, Any]:
    """What of the machine matters for the numbers."""
    cpu = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    weak = Path("/sys/devices/system/cpu/vulnerabilities")
    return {
        "cpu": cpu[0] if cpu else "",
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "kvm": sorted(p.name for p in Path("/sys/module").glob("kvm*")),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "mitigations": {p.name: _read(str(p)) for p in sorted(weak.glob("*"))},
        "python": platform.python_version(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
