"""What was measured, as data, as JSON, and as a table."""

from __future__ import annotations

import operator
import re
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from uhyve.errors import ConfigError

__all__ = ["SCHEMA", "Report", "Result", "Summary", "holds", "quantile", "summarize"]

SCHEMA: Final = "uhyve-bench-1"
"""The name of the JSON format; the number rises with each change that a reader would notice."""
Buckets = list[tuple[float, int]]
Summary = dict[str, float]
_MOVED: Final = 0.10


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


@dataclass
class Result:
    """One case."""

    name: str
    title: str
    summary: Summary
    """Of the whole exit, all rounds together, in nanoseconds."""
    parts: dict[str, Summary] = field(default_factory=dict)
    """Of its parts: ``run`` (in KVM_RUN), ``dispatch``, ``handler``, ``script``."""
    rounds: list[float] = field(default_factory=list)
    """The median of each round."""
    floors: list[float] = field(default_factory=list)
    """The floor's median beside each round."""
    ratio: float | None = None
    """Median of the rounds' ratios to the floor."""
    interval: tuple[float, float] | None = None
    """Its bootstrap interval, 95 %."""
    limit: float = 0.0
    """The ratio that it should not exceed."""

    @property
    def held(self) -> bool | None:
        """Whether the ratio is within the limit; None without either."""
        return self.ratio <= self.limit if self.ratio is not None and self.limit else None

    @property
    def floor_moved(self) -> float:
        """How much the floor of the second half of the rounds differs from the first half's."""
        half = len(self.floors) // 2
        if not half:
            return 0.0
        first, second = statistics.median(self.floors[:half]), statistics.median(self.floors[-half:])
        return abs(second / first - 1)


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
        return [
            f"{r.name}: the floor moved by {r.floor_moved:.0%} between the halves of the run"
            for r in self.results
            if r.floor_moved > _MOVED
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in the types of JSON."""
        results = [asdict(r) | {"held": r.held, "floor_moved": r.floor_moved} for r in self.results]
        return {"schema": SCHEMA, **asdict(self), "results": results, "warnings": self.warnings()}

    def __str__(self) -> str:
        """A table for people, in microseconds."""
        heads = ("case", "p50 µs", "p90", "p99", "p99.9", "ratio to floor", "")
        lines = [f"{heads[0]:<34}" + "".join(f"{head:>10}" for head in heads[1:5]) + f"{heads[5]:>26}"]
        for r in self.results:
            numbers = "".join(f"{r.summary[name] / 1000:>10.2f}" for name in ("p50", "p90", "p99", "p999"))
            ratio = ""
            if r.ratio is not None and r.interval is not None:
                ratio = f"{r.ratio:.3f} ({r.interval[0]:.3f}–{r.interval[1]:.3f})"
            verdict = {True: f"  held ≤ {r.limit}", False: f"  NOT held ≤ {r.limit}", None: ""}[r.held]
            lines.append(f"{r.title:<34}{numbers}{ratio:>26}{verdict}")
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"doubtful: {text}" for text in self.warnings()]
        cost = self.clock["cost_p50_ns"]
        lines.append(f"{self.backend}, {self.seconds:.1f} s, clock {self.clock['source']} ({cost:.0f} ns a reading)")
        return "\n".join(lines)


_OPERATORS: Final = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def holds(report: Report, expression: str) -> bool:
    """Whether an expression such as ``"pio.ratio>1.1"`` is true. Raises ``ConfigError`` if it is none."""
    found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([0-9.]+)\s*", expression)
    if found is None:
        raise ConfigError(f"{expression!r} is no comparison such as 'pio.ratio>1.1'")
    name, relation, number = found.groups()
    return bool(_OPERATORS[relation](report.metric(name), float(number)))
