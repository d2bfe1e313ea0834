"""Two reports beside each other, with verdicts that know noise."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from uhyve.bench.report import SCHEMA
from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from uhyve.bench.report import Report

__all__ = ["Change", "compare", "read"]

_MATTERS: Final = 0.03
"""What changes by less is called the same."""
_DRAWS: Final = 1000


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
    """The JSON of a report. Raises ``ConfigError`` if it is none, or of another format."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the other report is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        given = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise ConfigError(f"the other report has the format {given!r}, this is {SCHEMA!r}")
    return found


def compare(new: Report, old: dict[str, Any]) -> list[Change]:
    """The cases that both have; ``old`` is the JSON of a report. Raises ``ConfigError`` if it has another format."""
    if old.get("schema") != SCHEMA:
        raise ConfigError(f"the other report has the format {old.get('schema')!r}, this is {SCHEMA!r}")
    try:
        before = {result["name"]: _relative(result["rounds"], result["floors"]) for result in old["results"]}
        return [
            _change(result.name, _relative(result.rounds, result.floors), before[result.name])
            for result in new.results
            if result.name in before
        ]
    except (ArithmeticError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"the other report is damaged: {error!r}") from None


def _relative(rounds: list[float], floors: list[float]) -> list[float]:
    """The rounds as multiples of their floors, so that a slower machine is no slower program."""
    return [ours / floor for ours, floor in zip(rounds, floors, strict=True)] if floors else rounds


def _change(name: str, new: list[float], old: list[float]) -> Change:
    chance = random.Random(1)

    def drawn(values: list[float]) -> float:
        return statistics.median(chance.choices(values, k=len(values)))

    draws = sorted(drawn(new) / drawn(old) for _ in range(_DRAWS))
    interval = draws[_DRAWS * 25 // 1000], draws[_DRAWS * 975 // 1000 - 1]
    return Change(name, statistics.median(new) / statistics.median(old), interval)
