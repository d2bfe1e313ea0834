"""What the package costs besides exits: its import, the memory of an idle VM, and sampling that is left on.

python benches/footprint.py [--backend kvm|soft] [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import uhyve

ROUNDS = 9
DEFAULT = inspect.signature(uhyve.Vm).parameters["sampling"].default
RESIDENT = """
import pathlib
def resident():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])
before = resident()
import uhyve
vm = uhyve.Vm(uhyve.Image.bench(), args=["spin", "1"], memory="64MiB", backend={backend!r}, output="none")
with vm.debug() as dbg:
    dbg.cont(0.2)
    print((resident() - before) / 1024)
"""
IMPORTED = """
import time
start = time.process_time_ns()
import uhyve
print((time.process_time_ns() - start) / 1e6)
"""


def told(program: str, environment: dict[str, str]) -> float:
    """The number that a fresh interpreter prints."""
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def exits(backend: str, sampling: int, count: int) -> float:
    """CPU seconds of a run of port exits: of all threads, so that a loaded host adds nothing."""
    words = ["port_out", str(count), "0"]
    vm = uhyve.Vm(
        uhyve.Image.bench(),
        args=words,
        backend=backend,
        output="none",
        sampling=sampling,
        affinity=[min(os.sched_getaffinity(0))],
    )
    start = time.process_time()
    vm.run(timeout=300)
    return time.process_time() - start


def sampling(backend: str) -> float:
    """A run with the default sampling by one without: the least of many short runs of each, in turn."""
    count = 5_000 if backend == "kvm" else 40_000
    least = {every: min(exits(backend, every, count) for _ in range(3)) for every in (0, DEFAULT)}
    for number in range(20 * ROUNDS):
        for every in (0, DEFAULT) if number % 2 else (DEFAULT, 0):
            least[every] = min(least[every], exits(backend, every, count))
    return least[DEFAULT] / least[0]


def measure(backend: str) -> list[dict[str, Any]]:
    """Figures with their bars."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        told(IMPORTED, environment)
        imported = statistics.median(told(IMPORTED, environment) for _ in range(ROUNDS))
        resident = statistics.median(told(RESIDENT.format(backend=backend), environment) for _ in range(3))
    found = [
        ("import uhyve, CPU time", imported, 30.0, "ms"),
        ("idle VM of 64 MiB beyond the interpreter, resident", resident, 12.0, "MiB"),
        ("port exits with sampling on by off, CPU time", sampling(backend), 1.02, "x"),
    ]
    return [
        {"name": name, "value": value, "bound": bound, "unit": unit, "holds": value <= bound}
        for name, value, bound, unit in found
    ]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=("kvm", "soft"), default="kvm" if os.access("/dev/kvm", os.W_OK) else "soft"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures = measure(options.backend)
    print(f"{options.backend}:")
    for figure in figures:
        held = "ok  " if figure["holds"] else "FAIL"
        print(f"{held} {figure['name']:52} {figure['value']:8.3f} {figure['unit']} (<= {figure['bound']:g})")
    if options.json:
        options.json.write_text(json.dumps({options.backend: figures}, indent=1))


if __name__ == "__main__":
    main()
