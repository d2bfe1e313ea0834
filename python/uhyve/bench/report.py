"""What was measured, as data and as JSON."""

from __future__ import annotations

import math
import operator
import re
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from uhyve.bench.cases import CASES_BY_NAME
from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "ENOUGH",
    "SCHEMA",
    "Exits",
    "Report",
    "Result",
    "Summary",
    "Verdict",
    "checked",
    "coarse",
    "holds",
    "parsed",
    "quantile",
    "summarize",
]

SCHEMA: Final = "uhyve-bench-2"
"""The name of the JSON format; the number rises with each change that a reader would notice."""
Buckets = list[tuple[float, int]]
Summary = dict[str, float]
_MOVED: Final = 0.10
ENOUGH: Final = 3
"""Rounds that a verdict takes."""
_DECADE: Final = 50
"""Buckets for a power of ten in reports."""


def quantile(buckets: Buckets, part: float) -> float:
    """The value that this part of what was recorded does not exceed.

    >>> quantile([(1.0, 5), (2.0, 5)], 0.5), quantile([(1.0, 5), (2.0, 5)], 0.6)
    (1.0, 2.0)
    """
    wanted = part * sum(count for _, count in buckets)
    seen = 0
    for value, count in buckets:
        seen += count
        if seen >= wanted:
            return value
    return buckets[-1][0] if buckets else 0.0


def summarize(buckets: Buckets) -> Summary:
    """Count, min, p50, p90, p99, p999, max and mean, in nanoseconds."""
    count = sum(n for _, n in buckets)
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
    return {
        "count": count,
        "min": buckets[0][0] if buckets else 0.0,
        **{name: quantile(buckets, part) for name, part in parts.items()},
        "max": buckets[-1][0] if buckets else 0.0,
        "mean": sum(value * n for value, n in buckets) / count if count else 0.0,
    }


def coarse(buckets: Buckets) -> Buckets:
    """The same in buckets that are some 5 % wide, by their upper ends, as a report keeps it.

    >>> coarse([(100.0, 1), (101.0, 2), (200.0, 1)])
    [(100.0, 1), (104.7, 2), (208.9, 1)]
    """
    found: dict[float, int] = {}
    for value, count in buckets:
        end = round(10 ** (math.ceil(_DECADE * math.log10(max(value, 1.0)) - 1e-9) / _DECADE), 1)
        found[end] = found.get(end, 0) + count
    return sorted(found.items())


@dataclass
class Verdict:
    """A bar, and what was measured."""

    what: str
    """``ratio``, ``more_ns``, ``p50_ns`` or ``tail``, as in ``Bar``."""
    value: float
    limit: float
    interval: tuple[float, float]
    """Its bootstrap interval, 95 %."""
    rounds: int
    """How many it is of."""

    @property
    def held(self) -> bool:
        """Whether the value does not exceed the limit."""
        return self.value <= self.limit

    @property
    def verdict(self) -> str:
        """``held``, ``NOT held``, or ``unclear`` if it is not, but noise or too few rounds allow that it could be."""
        if self.held:
            return "held"
        return "NOT held" if self.rounds >= ENOUGH and self.interval[0] > self.limit else "unclear"

    def __str__(self) -> str:
        words = {"ratio": "ratio ", "more_ns": "", "p50_ns": "", "tail": "p99/p50 "}[self.what]
        unit, sign = self.what.endswith("_ns"), "+" if self.what == "more_ns" else ""
        value, limit = (f"{_plain(n / 1000, sign)} µs" if unit else f"{n:.3g}" for n in (self.value, self.limit))
        return f"{self.verdict}: {words}{value} ≤ {limit}"


@dataclass
class Exits:
    """The timed exits of one vCPU by one reason."""

    vcpu: int
    reason: str
    summary: Summary
    parts: dict[str, Summary]
    histogram: Buckets


@dataclass
class Result:
    """One case."""

    name: str
    title: str
    summary: Summary
    """Of the whole exit, all rounds together, in nanoseconds."""
    parts: dict[str, Summary] = field(default_factory=dict)
    """``run`` (in KVM_RUN), ``dispatch``, ``handler``, ``script``; and ``floor``: what stands beside it."""
    rounds: list[float] = field(default_factory=list)
    """The median of each round."""
    floors: list[float] = field(default_factory=list)
    """The median of what stands beside each round."""
    floor_name: str = ""
    """What that is: a kind of the floor, or a case."""
    ratio: float | None = None
    """Median of the rounds' ratios to it."""
    interval: tuple[float, float] | None = None
    """Its bootstrap interval, 95 %."""
    bars: list[Verdict] = field(default_factory=list)
    """What it should not exceed here."""
    histogram: Buckets = field(default_factory=list)
    """The upper ends of buckets in nanoseconds, and how many lie in each."""
    exits: list[Exits] = field(default_factory=list)
    """All exits that were timed meanwhile, by vCPU and reason."""

    @property
    def held(self) -> bool | None:
        """Whether all bars are; None without any."""
        return all(bar.held for bar in self.bars) if self.bars else None

    @property
    def floor_moved(self) -> float:
        """How much what stands beside the second half of the rounds differs from the first half's."""
        return _moved(self.floors)


@dataclass
class Report:
    """All cases on one machine."""

    version: str
    backend: str
    quick: bool
    seconds: float
    machine: dict[str, Any]
    clock: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Cases that this machine can't do, and why."""
    floor: list[float] = field(default_factory=list)
    """The bare loop's median at the beginning, before every eighth case, and at the end, in nanoseconds."""

    def metric(self, name: str) -> float:
        """A number by its name, such as ``pio.ratio`` or ``timer.p99``. Raises ``ConfigError`` if there is none."""
        case, _, what = name.partition(".")
        for result in self.results:
            if result.name == case:
                value = result.ratio if what == "ratio" else result.summary.get(what)
                if value is not None:
                    return value
        raise ConfigError(f"there is no metric {name!r}" + (f": {self.skipped[case]}" if case in self.skipped else ""))

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        found = [
            f"{r.name}: {r.floor_name or 'the floor'} moved by {r.floor_moved:.0%} between the halves of its rounds"
            for r in self.results
            if r.floor_moved > _MOVED
        ]
        if _moved(self.floor) > _MOVED:
            found.append(f"the floor moved by {_moved(self.floor):.0%} between the halves of the run")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything, in the types of JSON."""
        results = [
            asdict(r)
            | {"held": r.held, "floor_moved": r.floor_moved}
            | {"bars": [asdict(bar) | {"held": bar.held, "verdict": bar.verdict} for bar in r.bars]}
            for r in self.results
        ]
        return {"schema": SCHEMA, **asdict(self), "results": results, "warnings": self.warnings()}

    def __str__(self) -> str:
        """A table for people, in microseconds."""
        from uhyve.bench.table import plain

        return plain(self)


def _plain(value: float, sign: str) -> str:
    """Four digits that count, without an exponent."""
    return f"{float(f'{value:.4g}'):{sign}.15g}"


def _moved(floors: list[float]) -> float:
    half = len(floors) // 2
    if not half:
        return 0.0
    first, second = statistics.median(floors[:half]), statistics.median(floors[-half:])
    return abs(second / first - 1) if first else 0.0


_OPERATORS: Final = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def parsed(expression: str) -> tuple[str, str, float]:
    """The parts of an expression such as ``"pio.ratio>1.1"``. Raises ``ConfigError`` if it is none."""
    found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]+)?)\s*", expression)
    if found is None:
        raise ConfigError(f"{expression!r} is no comparison such as 'pio.ratio>1.1'")
    name, relation, number = found.groups()
    return name, relation, float(number)


def checked(expression: str, names: Collection[str]) -> None:
    """Raises ``ConfigError`` if it is no comparison, or of a number that a report of these cases can't have."""
    metric, _, _ = parsed(expression)
    name, _, what = metric.partition(".")
    if name not in names:
        raise ConfigError(f"{expression!r}: no case {name!r} is measured")
    case = CASES_BY_NAME[name]
    known = [*(["ratio"] if case.floor or case.base else []), *summarize([])]
    if what not in known:
        raise ConfigError(f"{expression!r}: {name} has no {what!r}, but {', '.join(known)}")


def holds(report: Report, expression: str) -> bool:
    """Whether an expression such as ``"pio.ratio>1.1"`` is true. Raises ``ConfigError`` if it is none."""
    name, relation, number = parsed(expression)
    return bool(_OPERATORS[relation](report.metric(name), number))
