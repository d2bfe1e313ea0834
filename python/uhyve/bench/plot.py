"""A report as a picture: how often an exit takes how long, and where the time goes. Matplotlib draws it."""

from __future__ import annotations

import html
import importlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uhyve.bench.cases import CASES, Case
from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from uhyve.bench.report import Report, Result

__all__ = ["check", "save"]

_FORMATS: Final = (".svg", ".png", ".html")
_PARTS: Final = {"run": "#4477aa", "dispatch": "#ccbb44", "handler": "#228833", "script": "#aa3377"}
"""Colours that can be told apart by all."""
_PANELS: Final = ("exits", "file calls", "interrupts and stops", "debugging", "lives of a VM")
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} svg {{ max-width: 100%; height: auto }}</style></head>
<body><h1>{title}</h1>
{picture}
<pre>{table}</pre></body></html>
"""


def check(path: Path) -> None:
    """Raises ``ConfigError`` if no picture can be made there: before anything is measured for it."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"a plot is an {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file, not {path.name!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"the plot {str(path)!r} can't be written: its directory is missing, or not writable")
    _figure()


def save(report: Report, path: Path) -> None:
    """Draws it into the file, in the format that its name tells. Raises ``ConfigError`` without matplotlib."""
    check(path)
    figure = _drawn(report)
    if path.suffix == ".html":
        path.write_text(_page(report, figure), encoding="utf-8")
    else:
        figure.savefig(path, format=path.suffix[1:])


def _figure() -> Any:
    """The class of matplotlib's figures; nothing of it needs a display."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'uhyve[plot]'") from None


def _page(report: Report, figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    picture = text.getvalue()
    # The prologue of a file of its own has no place within a page.
    return _PAGE.format(
        title=html.escape(_title(report)), picture=picture[picture.index("<svg") :], table=html.escape(str(report))
    )


def _title(report: Report) -> str:
    return f"uhyve bench {report.version}: {report.backend} on {report.machine.get('cpu', '')}"


def _drawn(report: Report) -> Any:
    """Panels of distributions, and below them a bar for each case whose parts are known."""
    split = [result for result in report.results if any(part in result.parts for part in _PARTS)]
    panels = {name: [r for r in report.results if _panel(r.name) == name] for name in _PANELS}
    panels = {name: results for name, results in panels.items() if results}
    rows = (len(panels) + 1) // 2
    heights = [3.2] * rows + ([0.8 + 0.26 * len(split)] if split else [])
    figure = _figure()(figsize=(13, sum(heights) + 1), layout="constrained")
    figure.suptitle(_title(report), parse_math=False)
    grid = figure.add_gridspec(max(len(heights), 1), 2, height_ratios=heights or [1])
    for place, (name, results) in enumerate(panels.items()):
        _distributions(figure.add_subplot(grid[place // 2, place % 2]), name, results)
    if split:
        axes = figure.add_subplot(grid[rows, :])
        _bars(axes, split)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _panel(name: str) -> str:
    case = next((case for case in CASES if case.name == name), Case(name, name))
    if case.how == "exits":
        return "exits" if case.floor else "file calls"
    panels = {"told": 2, "stop": 2, "crowd": 2, "hit": 3, "step": 3, "gdb": 3}
    return _PANELS[panels.get(case.how, 4)]


def _distributions(axes: Any, name: str, results: list[Result]) -> None:
    """Which part of the samples takes how long at most."""
    for number, result in enumerate(results):
        count = sum(n for _, n in result.histogram)
        seen, times, parts = 0, [result.summary["min"] / 1000], [0.0]
        for end, n in result.histogram:
            seen += n
            times.append(end / 1000)
            parts.append(seen / count)
        axes.step(times, parts, where="post", label=result.name, linestyle=("-", "--", ":")[number // 10 % 3])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(axis="x", labelsize="small")
    axes.set_title(name)
    axes.set_xlabel("µs")
    axes.set_ylabel("part of the samples")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right", ncols=2)


def _bars(axes: Any, results: list[Result]) -> None:
    """Medians of the parts of an exit, one behind the other; the floor is a line across its bar."""
    names = [result.name for result in results]
    left = [0.0] * len(results)
    for part, colour in _PARTS.items():
        widths = [result.parts.get(part, {}).get("p50", 0.0) / 1000 for result in results]
        label = "in KVM_RUN, the guest's own code included" if part == "run" else part
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    floors = [(n, r.parts["floor"]["p50"] / 1000) for n, r in enumerate(results) if "floor" in r.parts]
    if floors:
        axes.plot([x for _, x in floors], [n for n, _ in floors], "k|", markersize=11, label="what it is compared with")
    axes.invert_yaxis()
    shown = 1.05 * _typical(left)
    axes.set_xlim(0, shown)
    axes.set_title("where the time goes (medians)" + (", bars that are longer are cut" if max(left) > shown else ""))
    axes.set_xlabel("µs")


def _typical(widths: list[float]) -> float:
    """Bars of transfers of a MiB would leave no room for the others: they are cut at four times the median."""
    ordered = sorted(widths)
    return min(ordered[-1], 4 * ordered[len(ordered) // 2]) or 1.0
