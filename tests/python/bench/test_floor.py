"""The tool's floor against a program in C that knows nothing of the tool."""

import os
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

from uhyve import _core
from uhyve.bench.report import quantile

SOURCE = Path(__file__).with_name("floor.c")
COUNT, SKIP = 3000, 300
PAIRS, TRIES = 5, 8


@pytest.fixture
def program(tmp_path):
    """Medians of bare KVM_RUN loops, by the C program."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    built = tmp_path / "floor"
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", str(SOURCE), "-o", str(built)], check=True, timeout=60)
    return built


@pytest.mark.kvm
def test_floor_agrees_with_an_independent_program_within_5_percent(program):
    cpu = min(os.sched_getaffinity(0))

    def ours():
        return quantile(_core.bench_floor("kvm", "port_out", COUNT, SKIP, cpu), 0.5)

    def theirs():
        command = [str(program), str(cpu), str(COUNT), str(SKIP)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)

    # A loaded host changes its speed between two loops: of several tries in turn one must find it steady.
    ratios = []
    for _ in range(TRIES):
        ratios.append(statistics.median(ours() / theirs() for _ in range(PAIRS)))
        if abs(ratios[-1] - 1) <= 0.05:
            return
    pytest.fail(f"the medians of {PAIRS} pairs are {ratios}")
