"""What of a machine matters for the numbers that were measured there."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from uhyve import _core

__all__ = ["facts"]


def facts() -> dict[str, Any]:
    """The CPU, the kernel, the kind of its KVM, mitigations, clock source and governor."""
    cpu = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    weak = Path("/sys/devices/system/cpu/vulnerabilities")
    return {
        "cpu": cpu[0] if cpu else "",
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "kvm": sorted(p.name for p in Path("/sys/module").glob("kvm*")),
        "auto": _core.choose_backend("auto")[1],
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "mitigations": {p.name: _read(str(p)) for p in sorted(weak.glob("*"))},
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
