"""A scriptable hypervisor and debugger for the Hermit unikernel.

Run a guest and look at what it left::

    import uhyve

    result = uhyve.Vm("hello_world", memory="64MiB").run(timeout=10)
    print(result.code, result.output)

Or let Python decide where it stops::

    with uhyve.Vm("app", cpus=4).debug() as dbg:
        dbg.breakpoint("handle_request", condition="arg1 > 4096 and u32[arg0 + 8] != 0")
        stop = dbg.cont(timeout=5)

The language of conditions is described in ``uhyve.condition``; the command ``uhyve`` in ``uhyve --help``.
"""

from __future__ import annotations

from uhyve._core import Hit, Image, Memory, Registers, __version__
from uhyve.breakpoint import Breakpoint
from uhyve.debugger import Debugger, Vcpu
from uhyve.errors import (
    BreakpointError,
    ConditionError,
    ConfigError,
    GdbConnectionError,
    GuestCrashError,
    GuestFaultError,
    HypervisorError,
    HypervisorUnavailableError,
    ImageError,
    TimeoutExpired,
    UhyveError,
    VmStateError,
)
from uhyve.result import VcpuStats, VmResult, VmStats
from uhyve.stop import Frame, Stop
from uhyve.vm import Vm

__all__ = [
    "Breakpoint",
    "BreakpointError",
    "ConditionError",
    "ConfigError",
    "Debugger",
    "Frame",
    "GdbConnectionError",
    "GuestCrashError",
    "GuestFaultError",
    "Hit",
    "HypervisorError",
    "HypervisorUnavailableError",
    "Image",
    "ImageError",
    "Memory",
    "Registers",
    "Stop",
    "TimeoutExpired",
    "UhyveError",
    "Vcpu",
    "VcpuStats",
    "Vm",
    "VmResult",
    "VmStateError",
    "VmStats",
    "__version__",
]
