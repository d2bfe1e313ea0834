"""A report as tables for people: by rich on a terminal that has it, else as plain text. Times are microseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from uhyve.bench.report import Report, Result, Summary

__all__ = ["plain", "show"]

_PERCENTILES: Final = ("min", "p50", "p90", "p99", "p999", "max", "mean")
_PARTS: Final = ("run", "dispatch", "handler", "script")
_DISPENSABLE: Final = (
    "p99.9", "p999", "min", "mean", "p90", "max", "script", "handler", "to", "dispatch", "run", "ratio (95 %)", "p99",
    "vCPU", "count",
)  # fmt: skip
"""Columns that a narrow terminal does without, in this order."""
_NARROW: Final = 16
"""Characters that a column of words has at least, if its words need them."""

Rows = list[list[str]]


def plain(report: Report, exits: bool = False) -> str:
    """The whole report; with ``exits`` every reason of every vCPU, too."""
    lines = _aligned(_rows(report))
    if exits:
        lines += ["", *_aligned(_exit_rows(report))]
    return "\n".join([*lines, *_remarks(report)])


def show(report: Report, stream: TextIO, exits: bool = False) -> None:
    """Prints it: in colour if the stream is a terminal and rich is there."""
    if stream.isatty():
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            pass
        else:
            console = Console(file=stream)
            for full in [_rows(report), *([_exit_rows(report)] if exits else [])]:
                (heads, *rows), missing = _fitting(full, console.width)
                table = Table(box=None, header_style="bold", pad_edge=False)
                for place, head in enumerate(heads):
                    is_number = 0 < place < len(heads) - 1
                    table.add_column(head, justify="right" if is_number else "left", no_wrap=is_number)
                for row in rows:
                    style = "red" if "NOT held" in row[-1] else None
                    table.add_row(*(escape(cell) for cell in row), style=style)
                console.print(table)
                if missing:
                    console.print(
                        f"no room for {', '.join(missing)}: a wider terminal has it, or a pipe", highlight=False
                    )
            for line in _remarks(report):
                console.print(escape(line), style="yellow" if line.startswith("doubtful") else None, highlight=False)
            return
    stream.write(plain(report, exits) + "\n")


def _rows(report: Report) -> Rows:
    """The heads, and a row for each case; parts are medians."""
    heads = ["case, µs", "p50", "p90", "p99", "p99.9", "max", *_PARTS, "ratio (95 %)", "to", "bar"]
    return [heads, *(_row(result) for result in report.results)]


def _row(result: Result) -> list[str]:
    numbers = [_microseconds(result.summary[name]) for name in ("p50", "p90", "p99", "p999", "max")]
    parts = [_microseconds(result.parts[part]["p50"]) if part in result.parts else "" for part in _PARTS]
    ratio = ""
    if result.ratio is not None and result.interval is not None:
        ratio = f"{result.ratio:.3f} ({result.interval[0]:.3f}–{result.interval[1]:.3f})"
    return [result.title, *numbers, *parts, ratio, result.floor_name, "; ".join(str(bar) for bar in result.bars)]


def _exit_rows(report: Report) -> Rows:
    heads = ["case", "vCPU", "count", *_PERCENTILES, *_PARTS, "reason"]
    return [
        heads,
        *(
            [
                result.name,
                str(found.vcpu),
                f"{found.summary['count']:.0f}",
                *(_microseconds(found.summary[name]) for name in _PERCENTILES),
                *(_median(found.parts, part) for part in _PARTS),
                found.reason,
            ]
            for result in report.results
            for found in result.exits
        ),
    ]


def _median(parts: dict[str, Summary], part: str) -> str:
    return _microseconds(parts[part]["p50"]) if part in parts else ""


def _microseconds(ns: float) -> str:
    return f"{ns / 1000:.2f}" if ns < 100_000 else f"{ns / 1000:.0f}"


def _fitting(rows: Rows, width: int) -> tuple[Rows, list[str]]:
    """The columns that a terminal has room for, numbers whole, words broken if need be; and those missing."""
    heads = rows[0]
    kept = list(range(len(heads)))
    blank = [head for head, *cells in zip(*rows, strict=True) if not any(cells)]

    def needed(place: int) -> int:
        widest = max(len(row[place]) for row in rows)
        if 0 < place < len(heads) - 1:
            return widest
        return min(widest, max(_NARROW, *(len(word) for row in rows for word in row[place].split())))

    for head in (*blank, *_DISPENSABLE):
        if sum(needed(place) for place in kept) + 2 * (len(kept) - 1) <= width:
            break
        kept = [place for place in kept if heads[place] != head]
    missing = [head for place, head in enumerate(heads) if place not in kept and head not in blank]
    return [[row[place] for place in kept] for row in rows], missing


def _aligned(rows: Rows) -> list[str]:
    """Columns as wide as they need to be: words to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _remarks(report: Report) -> list[str]:
    """What was left out, what is doubtful, and by which clock."""
    lines = [f"skipped {name}: {reason}" for name, reason in report.skipped.items()]
    lines += [f"doubtful: {text}" for text in report.warnings()]
    cost, source = report.clock["cost_p50_ns"], report.clock["source"]
    if report.clock.get("tried"):
        source += ", tried on each CPU"
    lines.append(
        f"{report.backend}, {report.seconds:.1f} s, clock {source}"
        f" ({cost:.0f} ns a reading; an exit whose parts are shown has two)"
    )
    return lines
