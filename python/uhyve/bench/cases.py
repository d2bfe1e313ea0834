"""The cases: what the guest does, by which reason its exits are known, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CASES", "CASES_BY_NAME", "Bar", "Case", "named"]


@dataclass(frozen=True)
class Bar:
    """What a case should not exceed. Bars are for KVM: the software CPU leaves in less time than a dispatch takes."""

    what: Literal["ratio", "more_ns", "p50_ns", "tail"]
    """``ratio`` to what stands beside it, ``more_ns`` than that at the median, ``p50_ns``, or ``tail``: p99 by p50.

    Each is the median of the rounds.
    """
    limit: float


@dataclass(frozen=True)
class Case:
    """One way to leave the guest, or one thing that a VMM does."""

    name: str
    """Its name in reports and in ``--fail-if``."""
    title: str
    """The same for people."""
    loop: str = ""
    """What the guest is told to do."""
    how: Literal["exits", "told", "stop", "crowd", "hit", "step", "gdb", "life", "boot", "process"] = "exits"
    """Who measures: the host's sampler by reason (``exits``, ``hit``), the guest (``told``), or the caller's clock."""
    reason: str = ""
    """The exit that is meant, if exits are timed."""
    floor: str = ""
    """The kind of the floor that stands beside it, if the case is one exit a time."""
    base: str = ""
    """The case that stands beside it, if that is what it is compared with."""
    size: int = 0
    """Bytes a call."""
    cpus: int = 1
    """vCPUs that it takes."""
    part: str = ""
    """Of several things, the one that is meant; of a hit, its condition; of gdb, who judges."""
    place: Literal["software", "hardware", "watch"] = "software"
    """How a hit comes about."""
    transport: Literal["tcp", "unix"] = "tcp"
    """How gdb's packets come."""
    firmware: bool = False
    """Accesses to the firmware area must leave the guest."""
    bars: tuple[Bar, ...] = ()
    """What it should not exceed."""


def _ratio(limit: float) -> tuple[Bar, ...]:
    return (Bar("ratio", limit),)


def _transfers(loop: str, reason: str) -> list[Case]:
    sizes = {"1": 1, "4k": 4096, "64k": 65536, "1m": 1 << 20}
    return [
        Case(f"{loop}_{name}", f"file {loop}, {size} bytes", loop, reason=reason, size=size)
        for name, size in sizes.items()
    ]


def _exits() -> list[Case]:
    def exit_of(name: str, title: str, loop: str, reason: str, limit: float, firmware: bool = False) -> Case:
        return Case(name, title, loop, reason=reason, floor=loop, firmware=firmware, bars=_ratio(limit))

    call = "hypercall"
    return [
        exit_of("pio", "port out", "port_out", "port_write", 1.05),
        exit_of("pio_in", "port in", "port_in", "port_read", 1.05),
        exit_of("mmio_read", "memory-mapped read", "mmio_read", "mmio_read", 1.10, firmware=True),
        exit_of("mmio_write", "memory-mapped write", "mmio_write", "mmio_write", 1.10, firmware=True),
        Case("serial_byte", "serial byte", "serial_byte", reason="serial_write_byte", floor=call, bars=_ratio(1.15)),
        Case(
            "serial_buffer", "serial buffer, 64 B", "serial_buffer", reason="serial_write_buffer", floor=call, size=64
        ),
        *_transfers("write", "file_write"),
        *_transfers("read", "file_read"),
        Case("open", "file open", "open_close", reason="file_open"),
        Case("close", "file close", "open_close", reason="file_close"),
    ]


def _stops() -> list[Case]:
    return [
        Case("kick", "kick to park", "spin", "stop", part="kick"),
        *(
            Case(
                f"stop_{n}",
                f"stop of the world, {n} vCPUs",
                "spin",
                "stop",
                part="stop",
                cpus=n,
                base="kick" if n == 4 else "",
                bars=_ratio(4) if n == 4 else (),
            )
            for n in (1, 2, 4, 8)
        ),
        *(
            Case(f"crowd_{n}", f"bare threads in KVM_RUN, kicked together, {n}", how="crowd", cpus=n, base="kick")
            for n in (1, 4)
        ),
        *(Case(f"resume_{n}", f"its resume, {n} vCPUs", "spin", "stop", part="resume", cpus=n) for n in (1, 2, 4, 8)),
    ]


def _hits() -> list[Case]:
    called = (Bar("more_ns", 2000), Bar("tail", 2))
    return [
        Case("step", "single step, asked for and reported", "work", "step"),
        Case("hit", "software breakpoint that lets go on", "work", "hit", part="bare"),
        Case("hit_compiled", "false compiled condition", "work", "hit", part="compiled", base="hit", bars=_ratio(1.5)),
        Case("hit_callable", "false Python callable", "work", "hit", part="callable", base="hit", bars=called),
        Case("hit_hardware", "hardware breakpoint", "work", "hit", part="bare", place="hardware", base="hit"),
        Case("watch", "watchpoint that lets go on", "work", "hit", part="bare", place="watch", base="hit"),
    ]


def _remote() -> list[Case]:
    sides = {"client": "judged by the client", "target": "judged in the target"}
    return [
        Case(
            f"gdb_{transport}_{part}",
            f"false hit, gdb by {transport}, {text}",
            "work",
            "gdb",
            part=part,
            transport=transport,
            base="hit",
        )
        for transport in ("tcp", "unix")
        for part, text in sides.items()
    ]


CASES: Final[tuple[Case, ...]] = (
    *_exits(),
    Case("wake", "wake-up from HLT by another vCPU", "wake", "told", cpus=2),
    Case("ipi", "interrupt to a running vCPU", "ipi", "told", cpus=2),
    Case("timer", "timer interrupt, how late", "timer", "told"),
    *_stops(),
    *_hits(),
    *_remote(),
    Case("create", "VM create", "exit", "life", part="create"),
    Case("first", "boot to the first instruction", "exit", "life", part="first"),
    Case("close_vm", "close of a stopped VM", "exit", "life", part="close"),
    Case("process", "whole process that boots once", "exit", "process", part="whole"),
    Case("import", "import uhyve, CPU time", "exit", "process", part="import", bars=(Bar("p50_ns", 30e6),)),
    Case("boot", "boot to exit, Vm.run() once more", "exit", "boot", base="process", bars=_ratio(0.2)),
)
"""All of them, in the order of reports."""

CASES_BY_NAME: Final = {case.name: case for case in CASES}


def named(names: Iterable[str]) -> set[str]:
    """These cases' names, or all if there are none. Raises ``ConfigError`` for a name that no case has."""
    wanted = {names} if isinstance(names, str) else set(names)
    if unknown := wanted - CASES_BY_NAME.keys():
        raise ConfigError(f"there is no case {min(unknown)!r}; there are {', '.join(CASES_BY_NAME)}")
    return wanted or set(CASES_BY_NAME)
