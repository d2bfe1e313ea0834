"""Rounds of cases that alternate with what they are compared with."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from uhyve import __version__, _core
from uhyve.bench.cases import CASES, CASES_BY_NAME, Case, named
from uhyve.bench.facts import facts
from uhyve.bench.report import ENOUGH, Exits, Report, Result, Verdict, coarse, quantile, summarize
from uhyve.bench.ways import Round, Ways, floor
from uhyve.errors import UhyveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uhyve.bench.cases import Bar
    from uhyve.bench.report import Buckets

__all__ = ["run"]

_MOST: Final = 20_000
_SLOW: Final = 50_000
"""Nanoseconds of an exit on a machine that is emulated itself: there a few samples have to do."""
_QUICK, _FULL = 12.0, 240.0
"""Seconds after which no round begins, but, of a full run, for each case's first."""
_NO_TIME: Final = "no time was left for it: name it, or leave out --quick"
_PROBE: Final = 200
"""Exits of the floor at a time, by which a machine that has changed is known."""
_PROBE_EVERY: Final = 8
"""Cases between two of these."""

Pool = dict[float, int]


def run(
    cases: Iterable[str] = (),
    *,
    backend: str = "auto",
    quick: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measures these cases, all if none are named, on a back end. ``progress`` is told what comes next.

    Raises ``ConfigError`` for a name that no case has, ``HypervisorUnavailableError`` where that back end can't run.
    """
    start = time.monotonic()
    backend = os.environ.get("UHYVE_BACKEND") or backend if backend == "auto" else backend
    name = _core.choose_backend(backend)[0]
    wanted = named(cases)
    report = Report(__version__, name, quick, 0.0, facts(), _core.bench_clock())
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        data = Path(folder, "data")
        data.write_bytes(bytes(1 << 20))
        chosen = [case for case in CASES if case.name in wanted]
        bench = _Bench(name, data, quick, chosen, report)
        bench.run(start + (_QUICK if quick else _FULL), progress)
    report.seconds = time.monotonic() - start
    return report


class _Bench:
    """Passes over all cases: each pass is one round of each, so that what changes with time changes for all."""

    def __init__(self, backend: str, data: Path, quick: bool, cases: list[Case], report: Report) -> None:
        self._backend, self._report = backend, report
        self._cpu = min(os.sched_getaffinity(0))
        self._ways = Ways(backend, self._cpu, data, 4 if quick else 10)
        self._batch, self._rounds = (0.02, 5) if quick else (0.2, 15)
        self._books = {case.name: _Book(case) for case in cases}
        self._seen: dict[str, Round] = {}
        self._probe()
        self._exit_ns = max(report.floor[0], 1.0)
        self._least = 50
        if self._exit_ns > _SLOW:
            self._least, self._ways.few = 20, 2

    def run(self, end: float, progress: Callable[[str], object]) -> None:
        """All passes; what was measured goes to the report."""
        passes = self._passes()
        for number, names in enumerate(passes):
            self._seen.clear()
            self._ways.forget()
            for place, name in enumerate(names):
                book = self._books.get(name)
                if book is None or (time.monotonic() > end and (book.has_rounds or self._report.quick)):
                    continue
                progress(f"{number + 1}/{len(passes)} {book.case.title}")
                if place % _PROBE_EVERY == _PROBE_EVERY - 1:
                    self._probe()
                self._round(book)
        for name in [name for name, book in self._books.items() if not book.has_rounds]:
            self._skip(CASES_BY_NAME[name], _NO_TIME)
        self._probe()
        self._report.results = [book.result(self._backend) for book in self._books.values()]

    def _passes(self) -> list[list[str]]:
        """What each pass measures: with little time on a slow machine, first what bars are about, until judged."""
        everything = list(self._books)
        if not self._report.quick or self._exit_ns <= _SLOW:
            return [everything] * self._rounds
        barred = [book.case for book in self._books.values() if book.case.bars]
        first = {case.name for case in barred} | {case.base for case in barred}
        return [[name for name in everything if name in first]] * ENOUGH + [everything] * self._rounds

    def _round(self, book: _Book) -> None:
        """One round of a case, behind one of what it is compared with."""
        try:
            beside = self._beside(book.case)
            book.take(self._measured(book.case), beside)
        except (UhyveError, OSError, subprocess.SubprocessError) as error:
            self._skip(book.case, str(error))

    def _skip(self, case: Case, why: str) -> None:
        self._report.skipped[case.name] = why
        del self._books[case.name]

    def _measured(self, case: Case) -> Round:
        if case.name not in self._seen:
            self._seen[case.name] = self._ways.round(case, self._count(case))
        return self._seen[case.name]

    def _beside(self, case: Case) -> Buckets | None:
        if case.floor:
            return floor(self._backend, case.floor, self._count(case), self._cpu)
        if case.base:
            return self._measured(CASES_BY_NAME[case.base]).parts["total"]
        return None

    def _count(self, case: Case) -> int:
        return min(_MOST, max(self._least, int(self._batch * 1e9 / (self._exit_ns * (1 + case.size / 4096)))))

    def _probe(self) -> None:
        self._report.floor.append(quantile(floor(self._backend, "port_out", _PROBE, self._cpu), 0.5))


class _Book:
    """The samples of all rounds of a case together."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._rounds: list[float] = []
        self._tails: list[float] = []
        self._floors: list[float] = []
        self._parts: dict[str, Pool] = {}
        self._exits: dict[tuple[int, str], dict[str, Pool]] = {}

    @property
    def has_rounds(self) -> bool:
        """Whether it has been measured."""
        return bool(self._rounds)

    def take(self, found: Round, beside: Buckets | None) -> None:
        """A round, and what stands beside it."""
        if beside is not None:
            self._floors.append(quantile(beside, 0.5))
            _pour(self._parts.setdefault("floor", {}), beside)
        median = quantile(found.parts["total"], 0.5)
        self._rounds.append(median)
        self._tails.append(quantile(found.parts["total"], 0.99) / max(median, 1.0))
        for part, buckets in found.parts.items():
            _pour(self._parts.setdefault(part, {}), buckets)
        for vcpu, reasons in enumerate(found.exits):
            for reason, parts in reasons.items():
                pools = self._exits.setdefault((vcpu, reason), {})
                for part, buckets in parts.items():
                    _pour(pools.setdefault(part, {}), buckets)

    def result(self, backend: str) -> Result:
        """All of it."""
        total = sorted(self._parts["total"].items())
        case, rounds, floors = self.case, self._rounds, self._floors
        result = Result(case.name, case.title, summarize(total), rounds=rounds, floors=floors, histogram=coarse(total))
        result.floor_name = case.base or case.floor
        result.parts = {part: _summary(pool) for part, pool in self._parts.items() if part != "total"}
        for (vcpu, reason), parts in sorted(self._exits.items()):
            summaries = {part: _summary(pool) for part, pool in parts.items()}
            histogram = coarse(sorted(parts["total"].items()))
            result.exits.append(Exits(vcpu, reason, summaries.pop("total"), summaries, histogram))
        if floors:
            ratios = [ours / max(floor, 1e-3) for ours, floor in zip(rounds, floors, strict=True)]
            result.ratio, result.interval = statistics.median(ratios), bootstrap(ratios)
        if backend == "kvm":
            result.bars = [_judged(bar, result, self._tails) for bar in case.bars]
        return result


def _pour(pool: Pool, buckets: Buckets) -> None:
    for value, seen in buckets:
        pool[value] = pool.get(value, 0) + seen


def _summary(pool: Pool) -> dict[str, float]:
    return summarize(sorted(pool.items()))


def _judged(bar: Bar, result: Result, tails: list[float]) -> Verdict:
    """A bar beside what was measured."""
    if bar.what == "ratio" and result.ratio is not None and result.interval is not None:
        return Verdict(bar.what, result.ratio, bar.limit, result.interval, len(result.rounds))
    if bar.what == "tail":
        values = tails
    else:
        floors = result.floors if bar.what == "more_ns" else [0.0] * len(result.rounds)
        values = [ours - floor for ours, floor in zip(result.rounds, floors, strict=True)]
    return Verdict(bar.what, statistics.median(values), bar.limit, bootstrap(values), len(values))


def bootstrap(values: list[float], draws: int = 1000) -> tuple[float, float]:
    """The interval that holds the median of 95 % of samples drawn from these values.

    >>> bootstrap([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws * 25 // 1000], medians[draws * 975 // 1000 - 1]
