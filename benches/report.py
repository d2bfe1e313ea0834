"""Makes docs/performance.md of the figures in benches/results/, so that no number in it was typed.

python benches/report.py
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
HEAD = """# What it costs

Made by `python benches/report.py` of the figures in `benches/results/`, which `make bench` measures, and not edited by
hand. Times are of the machine that each section names, and of a moment: what holds elsewhere are the ratios, which
compare rounds that alternate in one run. `uhyve bench` measures the same on any machine.
"""
TITLES = {"kvm": "Exits, stops and hits on KVM", "soft": "Exits, stops and hits on the software CPU"}

Row = list[str]


def document() -> str:
    """The whole text."""
    parts = [HEAD]
    for backend, title in TITLES.items():
        if found := _read(f"exits-{backend}"):
            parts += _section(title, found, _exits(found["figures"]))
    for name, title, table in [
        ("footprint", "Import, memory, sampling", _footprint),
        ("border", "Between Python and the core", _border),
        ("core", "Parts of the core", _core),
        ("peers", "Beside others", _peers),
    ]:
        if found := _read(name):
            parts += _section(title, found, table(found["figures"]))
    return "\n".join(parts)


def _read(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _section(title: str, found: dict[str, Any], lines: list[str]) -> list[str]:
    machine = found["machine"]
    kvm = ", ".join(name for name in machine["kvm"] if name != "kvm") or "no KVM"
    place = f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, {kvm}, Python {machine['python']}"
    return [f"## {title}", "", f"{place}; load {machine['load']:g}.", "", *lines, ""]


def _table(heads: Row, rows: list[Row]) -> list[str]:
    numbers = "|".join("---" if place == 0 else "--:" for place in range(len(heads)))
    return [f"| {' | '.join(heads)} |", f"|{numbers}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _time(ns: float) -> str:
    for limit, unit in ((1e3, "ns"), (1e6, "µs"), (1e9, "ms")):
        if ns < limit:
            return f"{ns / limit * 1e3:.3g} {unit}"
    return f"{ns / 1e9:.3g} s"


def _exits(report: dict[str, Any]) -> list[str]:
    rows = []
    for result in report["results"]:
        numbers = [_time(result["summary"][name]) for name in ("p50", "p99")]
        parts = [
            _time(result["parts"][p]["p50"]) if p in result["parts"] else ""
            for p in ("run", "dispatch", "handler", "script")
        ]
        ratio = ""
        if result["ratio"] is not None:
            low, high = result["interval"]
            ratio = f"{result['ratio']:.3g} ({low:.3g}–{high:.3g}) × {result['floor_name']}"
        bars = "; ".join(f"{bar['verdict']}: {_bar(bar)}" for bar in result["bars"])
        rows.append([f"{result['title']} (`{result['name']}`)", *numbers, *parts, ratio, bars])
    lines = _table(["case", "p50", "p99", "in KVM_RUN", "dispatch", "handler", "script", "ratio (95 %)", "bar"], rows)
    reading = report["clock"]["cost_p50_ns"]
    lines += ["", f"The clock costs {reading:.3g} ns a reading; an exit whose parts are shown has two."]
    lines += [f"Skipped `{name}`: {reason}." for name, reason in report["skipped"].items()]
    return lines + [f"Doubtful: {text}." for text in report["warnings"]]


def _bar(bar: dict[str, Any]) -> str:
    match bar["what"]:
        case "more_ns":
            return f"+{_time(max(bar['value'], 0.0))} ≤ +{_time(bar['limit'])}"
        case "p50_ns":
            return f"{_time(bar['value'])} ≤ {_time(bar['limit'])}"
        case "tail":
            return f"p99 / p50 {bar['value']:.3g} ≤ {bar['limit']:.3g}"
    return f"{bar['value']:.3g} ≤ {bar['limit']:.3g}"


def _footprint(figures: dict[str, Any]) -> list[str]:
    rows = [
        [
            figure["name"],
            backend,
            f"{figure['value']:.4g} {figure['unit']}",
            f"≤ {figure['bound']:g}",
            "held" if figure["holds"] else "NOT held",
        ]
        for backend, found in figures.items()
        for figure in found
    ]
    return _table(["", "back end", "value", "bar", ""], rows)


def _border(figures: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in figures.items():
        hits = entry.get("hits", 1)
        text = name.removeprefix("test_").replace("_", " ") + (" (one of them)" if hits > 1 else "")
        rows.append([text, _time(entry["median"] / hits), _time(entry["min"] / hits)])
    return _table(["on the software CPU", "median", "least"], rows)


def _core(figures: dict[str, Any]) -> list[str]:
    rows = [[name, _time(median), f"{_time(low)}–{_time(high)}"] for name, (median, low, high) in figures.items()]
    return _table(["", "median", "95 %"], rows)


def _peers(figures: dict[str, Any]) -> list[str]:
    rows = [[entry["what"], entry["who"], entry["value"]] for part in figures.values() for entry in part["found"]]
    lines = _table(["", "who", "value"], rows)
    skipped = [f"Skipped {who}: {why}." for part in figures.values() for who, why in part["skipped"].items()]
    return [*lines, "", *skipped]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
