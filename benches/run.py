"""Runs all benchmarks of the project and keeps their figures, with the facts of the machine, in benches/results/.

    python benches/run.py [--full] [--only PART,…]

Parts: core (criterion), border (pytest-benchmark), exits-kvm and exits-soft (`uhyve bench`), footprint. What
`benches/report.py` makes of them is docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from uhyve import bench
from uhyve.bench.facts import facts

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"
HAS_KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)


def core(full: bool) -> dict[str, Any]:
    """Nanoseconds by criterion: the median and its interval of 95 %."""
    kept = ROOT / "target" / "criterion"
    shutil.rmtree(kept, ignore_errors=True)
    command = ["cargo", "bench", "--quiet", "--bench", "core", "--", *([] if full else ["--quick"])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for file in sorted(kept.glob("**/new/estimates.json")):
        estimate = json.loads(file.read_text())["median"]
        name = json.loads((file.parent / "benchmark.json").read_text())["full_id"]
        interval = estimate["confidence_interval"]
        found[name] = [estimate["point_estimate"], interval["lower_bound"], interval["upper_bound"]]
    return found


def border(full: bool) -> dict[str, Any]:
    """Nanoseconds by pytest-benchmark: the median, the least, and the hits that it is for."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "border.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benches/border.py"]
        time = "1.0" if full else "0.2"
        more = [f"--benchmark-json={file}", f"--benchmark-max-time={time}"]
        subprocess.run([*command, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(file.read_text())
    return {
        entry["name"]: {
            "median": entry["stats"]["median"] * 1e9,
            "min": entry["stats"]["min"] * 1e9,
            **entry["extra_info"],
        }
        for entry in report["benchmarks"]
    }


def exits(backend: str, full: bool) -> dict[str, Any]:
    """A report of `uhyve bench`, without its histograms."""
    report = bench.run(backend=backend, quick=not full).as_dict()
    for result in report["results"]:
        del result["histogram"], result["exits"]
    return report


def footprint(_: bool) -> dict[str, Any]:
    """Import, memory, and sampling."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ["kvm", "soft"] if HAS_KVM else ["soft"]:
            file = pathlib.Path(folder, backend)
            command = [
                sys.executable,
                str(ROOT / "benches" / "footprint.py"),
                "--backend",
                backend,
                "--json",
                str(file),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found |= json.loads(file.read_text())
    return found


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "core": core,
    "border": border,
    "exits-soft": lambda full: exits("soft", full),
    "footprint": footprint,
}
if HAS_KVM:
    PARTS["exits-kvm"] = lambda full: exits("kvm", full)


def rounded(value: Any) -> Any:
    """Numbers as a file for people keeps them: of four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="minutes for a part, for figures to publish")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    RESULTS.mkdir(exist_ok=True)
    if not HAS_KVM:
        print("exits-kvm: skipped, /dev/kvm can't be opened")
    for name in chosen:
        print(f"{name} …", flush=True)
        figures = {"machine": facts(), "full": options.full, "figures": PARTS[name](options.full)}
        (RESULTS / f"{name}.json").write_text(json.dumps(rounded(figures), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
