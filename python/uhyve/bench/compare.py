"""Two reports beside each other, with verdicts that know noise."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from uhyve.bench.report import SCHEMA
from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from uhyve.bench.report import Report

__all__ = ["Change", "compare", "moved", "read"]

_MATTERS: Final = 0.03
"""What changes by less is called the same."""
_DRAWS: Final = 1000
_LEAST, _MOST = 1e-3, 1e15
"""Nanoseconds that a round can take: more than none, and less than some days."""


@dataclass(frozen=True)
class Change:
    """What became of one case."""

    name: str
    change: float
    """New by old: of the ratios to the floor where there are such, else of the times."""
    interval: tuple[float, float]
    """Its bootstrap interval, 95 %."""

    @property
    def verdict(self) -> str:
        """``slower``, ``faster``, ``same``, or ``unclear`` if the noise allows for more than one of these."""
        low, high = self.interval
        if low > 1 + _MATTERS:
            return "slower"
        if high < 1 - _MATTERS:
            return "faster"
        return "same" if low >= 1 - _MATTERS and high <= 1 + _MATTERS else "unclear"

    def __str__(self) -> str:
        return f"{self.name:<16} × {self.change:.3f} ({self.interval[0]:.3f}–{self.interval[1]:.3f})  {self.verdict}"


def read(text: str) -> dict[str, Any]:
    """The JSON of a report. Raises ``ConfigError`` if it is none, of another format, or damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the other report is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the other report is a {type(found).__name__}, not an object")
    _measured(found)
    return found


def compare(new: Report, old: dict[str, Any]) -> list[Change]:
    """The cases that both have; ``old`` is the JSON of a report.

    Raises ``ConfigError`` if it has another format, or is damaged.
    """
    before = _measured(old)
    return [
        _change(result.name, *_alike(_Rounds(result.rounds, result.floors, result.floor_name), before[result.name]))
        for result in new.results
        if result.name in before
    ]


def moved(new: Report, old: dict[str, Any]) -> list[str]:
    """What of the machine is another than in ``old``, the JSON of a report: not only the program has changed."""
    machine = old.get("machine")
    before = (machine if isinstance(machine, dict) else {}) | {"backend": old.get("backend")}
    now = new.machine | {"backend": new.backend}
    return [
        f"{name} is {now[name]!r}, in the other report {before.get(name)!r}"
        for name in ("backend", "cpu", "cpus", "kernel", "kvm")
        if name in now and now[name] != before.get(name)
    ]


class _Rounds(NamedTuple):
    """The medians of a case's rounds, and of what stands beside them."""

    rounds: list[float]
    floors: list[float]
    floor_name: str


def _measured(report: dict[str, Any]) -> dict[str, _Rounds]:
    """The rounds of each case in the JSON of a report."""
    if report.get("schema") != SCHEMA:
        raise ConfigError(f"the other report has the format {report.get('schema')!r}, this is {SCHEMA!r}")
    try:
        results = [(r["name"], _Rounds(r["rounds"], r["floors"], r["floor_name"])) for r in report["results"]]
        found = dict(results)
        if len(found) < len(results):
            raise ValueError("a case is there twice")
        for name, (rounds, floors, _) in results:
            if not rounds or (floors and len(floors) != len(rounds)):
                raise ValueError(f"{name} has {len(rounds)} rounds and {len(floors)} beside them")
            if not all(_LEAST <= value <= _MOST for value in (*rounds, *floors)):
                raise ValueError(f"a time of {name} can't be")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the other report is damaged: {error!r}") from None
    return found


def _alike(new: _Rounds, old: _Rounds) -> tuple[list[float], list[float]]:
    """The rounds as multiples of their floors, so that a slower machine is no slower program, if both have the same."""
    if new.floors and old.floors and new.floor_name == old.floor_name:
        return _ratios(new), _ratios(old)
    return new.rounds, old.rounds


def _ratios(found: _Rounds) -> list[float]:
    return [ours / floor for ours, floor in zip(found.rounds, found.floors, strict=True)]


def _change(name: str, new: list[float], old: list[float]) -> Change:
    chance = random.Random(1)

    def drawn(values: list[float]) -> float:
        return statistics.median(chance.choices(values, k=len(values)))

    draws = sorted(drawn(new) / drawn(old) for _ in range(_DRAWS))
    interval = draws[_DRAWS * 25 // 1000], draws[_DRAWS * 975 // 1000 - 1]
    return Change(name, statistics.median(new) / statistics.median(old), interval)
