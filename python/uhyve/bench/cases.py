"""The cases: what the guest does, by which reason its exits are known, and which floor they stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One way to leave the guest."""

    name: str
    """Its name in reports and in ``--fail-if``."""
    title: str
    """The same for people."""
    loop: str
    """What the guest is told to do."""
    reason: str = ""
    """The exit that is meant, if exits are timed."""
    floor: str = ""
    """The kind of the floor, if the case is one exit a time."""
    size: int = 0
    """Bytes a call."""
    cpus: int = 1
    """vCPUs that it takes."""
    how: str = "exits"
    """Who measures: ``exits`` (the host, by reason), ``told`` (the guest), ``stop`` (of the world), ``hit``."""
    part: str = ""
    """Of a stop: ``kick``, ``stop`` or ``resume``; of a hit, its condition: ``bare``, ``compiled`` or ``callable``."""
    firmware: bool = False
    """Accesses to the firmware area must leave the guest."""
    limit: float = 0.0
    """The ratio to the floor that it should not exceed; 0: none."""


def _transfers(loop: str, reason: str) -> list[Case]:
    sizes = {"1": 1, "4k": 4096, "64k": 65536, "1m": 1 << 20}
    return [
        Case(f"{loop}_{name}", f"file {loop}, {size} bytes", loop, reason, size=size) for name, size in sizes.items()
    ]


CASES: Final[tuple[Case, ...]] = (
    Case("pio", "port out", "port_out", "port_write", "port_out", limit=1.05),
    Case("pio_in", "port in", "port_in", "port_read", "port_in", limit=1.05),
    Case("mmio_read", "memory-mapped read", "mmio_read", "mmio_read", "mmio_read", firmware=True, limit=1.10),
    Case("mmio_write", "memory-mapped write", "mmio_write", "mmio_write", "mmio_write", firmware=True, limit=1.10),
    Case("serial_byte", "serial byte", "serial_byte", "serial_write_byte", "hypercall", limit=1.15),
    Case("serial_buffer", "serial buffer, 64 bytes", "serial_buffer", "serial_write_buffer", "hypercall", size=64),
    *_transfers("write", "file_write"),
    *_transfers("read", "file_read"),
    Case("open", "file open", "open_close", "file_open"),
    Case("close", "file close", "open_close", "file_close"),
    Case("wake", "wake-up from HLT by another vCPU", "wake", cpus=2, how="told"),
    Case("ipi", "interrupt to a running vCPU", "ipi", cpus=2, how="told"),
    Case("timer", "timer interrupt, how late", "timer", how="told"),
    Case("kick", "kick to park", "spin", how="stop", part="kick"),
    *(
        Case(f"stop_{n}", f"stop of the world, {n} vCPUs", "spin", how="stop", part="stop", cpus=n)
        for n in (1, 2, 4, 8)
    ),
    *(Case(f"resume_{n}", f"its resume, {n} vCPUs", "spin", how="stop", part="resume", cpus=n) for n in (1, 4)),
    Case("hit", "breakpoint that never stops", "work", how="hit", part="bare"),
    Case("hit_compiled", "false compiled condition", "work", how="hit", part="compiled"),
    Case("hit_callable", "false Python callable", "work", how="hit", part="callable"),
)
"""All of them, in the order of reports."""
