"""What comes out of a run: the guest's exit code, its output, and what its vCPUs did."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, ClassVar

    from uhyve._core import Machine

__all__ = ["Record", "VcpuStats", "VmResult", "VmStats"]


class Record:
    """A value with named fields that can't be changed, compares by them, and can be pickled.

    This is what ``dataclasses`` would make, without the time that importing it takes.
    """

    __slots__ = ()
    _fields: ClassVar[tuple[str, ...]] = ()

    def _fill(self, *values: object) -> None:
        for name, value in zip(self._fields, values, strict=True):
            object.__setattr__(self, name, value)

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self._fields)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} can't be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} can't be changed")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()


class VcpuStats(Record):
    """What one vCPU did."""

    __slots__ = ("exits", "hypercalls")
    __match_args__ = _fields = ("exits", "hypercalls")

    exits: dict[str, int]
    """How many times it left the guest, by reason; hypercalls are not among them."""
    hypercalls: dict[str, int]
    """How many hypercalls it made, by name."""

    def __init__(self, exits: dict[str, int], hypercalls: dict[str, int]) -> None:
        self._fill(exits, hypercalls)


class VmStats(Record):
    """What a VM did, vCPU by vCPU. ``str()`` gives a table for people."""

    __slots__ = ("backend", "latencies", "seconds", "vcpus")
    __match_args__ = _fields = ("vcpus", "backend", "seconds", "latencies")

    vcpus: tuple[VcpuStats, ...]
    """The counters of each vCPU, by number."""
    backend: str
    """What the vCPUs ran on: ``"kvm"`` or ``"soft"``."""
    seconds: float
    """Time from the start to the end of the run, or to now."""

    latencies: tuple[dict[str, dict[str, dict[str, float]]], ...]
    """How long each vCPU's exits took, of a sample (the keyword ``sampling`` of ``Vm``): by reason, and by part.

    ``run`` is the time in the guest, ``vmm`` outside of it; that is ``dispatch``, ``handler`` and ``script``. Each has
    ``count``, ``min``, ``p50``, ``p90``, ``p99``, ``p999``, ``max`` and ``mean``, in nanoseconds.
    """

    def __init__(
        self,
        vcpus: Iterable[VcpuStats],
        backend: str,
        seconds: float,
        latencies: Iterable[dict[str, dict[str, dict[str, float]]]] = (),
    ) -> None:
        self._fill(tuple(vcpus), backend, seconds, tuple(latencies))

    @property
    def exits(self) -> dict[str, int]:
        """Exits of all vCPUs together, by reason."""
        return _sum(vcpu.exits for vcpu in self.vcpus)

    @property
    def hypercalls(self) -> dict[str, int]:
        """Hypercalls of all vCPUs together, by name."""
        return _sum(vcpu.hypercalls for vcpu in self.vcpus)

    @property
    def total(self) -> int:
        """How many times any vCPU left the guest, hypercalls included."""
        return sum(self.exits.values()) + sum(self.hypercalls.values())

    def __str__(self) -> str:
        lines = [f"{self.total:,} exits in {self.seconds:.3f} s on {self.backend}"]
        heads = [f"vCPU {number}" for number in range(len(self.vcpus))]
        for title, counters in (
            ("exits", [vcpu.exits for vcpu in self.vcpus]),
            ("hypercalls", [vcpu.hypercalls for vcpu in self.vcpus]),
        ):
            total = _sum(counters)
            if total:
                columns = [*counters, total] if len(counters) > 1 else counters
                lines.append(f"{title:<24}" + "".join(f"{head:>12}" for head in [*heads, "total"][: len(columns)]))
                lines += [
                    f"  {name:<22}" + "".join(f"{column.get(name, 0):>12,}" for column in columns) for name in total
                ]
        timed = [
            (f"  vCPU {number} {reason}", parts["vmm"])
            for number, reasons in enumerate(self.latencies)
            for reason, parts in reasons.items()
        ]
        if timed:
            width = max(24, *(len(title) for title, _ in timed))
            names = "".join(f"{name:>12}" for name in ("p50", "p99", "max", "timed"))
            lines.append(f"{'µs outside of the guest':<{width}}{names}")
            for title, found in timed:
                times = "".join(f"{found[name] / 1000:>12.2f}" for name in ("p50", "p99", "max"))
                lines.append(f"{title:<{width}}{times}{found['count']:>12,.0f}")
        return "\n".join(lines)


class VmResult(Record):
    """How a guest ended itself, and what it left. An exit code that isn't 0 is a result like any other."""

    __slots__ = ("code", "output_bytes", "stats", "truncated")
    _fields = ("code", "output_bytes", "truncated", "stats")
    __match_args__ = ("code", "output", "stats")

    code: int
    """The guest's exit code."""
    output_bytes: bytes
    """What the guest wrote to its console, if it was captured; else empty."""
    truncated: bool
    """Whether the guest wrote more than ``output_limit`` bytes, and the rest was dropped."""
    stats: VmStats
    """Counters of the run."""

    def __init__(self, code: int, output_bytes: bytes, truncated: bool, stats: VmStats) -> None:
        self._fill(code, output_bytes, truncated, stats)

    @property
    def output(self) -> str:
        """``output_bytes`` as text; what isn't UTF-8 is replaced."""
        return self.output_bytes.decode(errors="replace")

    @property
    def backend(self) -> str:
        """What the vCPUs ran on."""
        return self.stats.backend

    @property
    def seconds(self) -> float:
        """How long the run took."""
        return self.stats.seconds

    def __repr__(self) -> str:
        text = self.output
        shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}… ({len(self.output_bytes)} bytes)"
        return f"VmResult(code={self.code}, output={shown}, backend={self.backend!r}, seconds={self.seconds:.3f})"


def _sum(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counter in counters:
        for name, count in counter.items():
            total[name] = total.get(name, 0) + count
    return total


def stats_of(machine: Machine) -> VmStats:
    """The counters of a machine, running or not."""
    counters = (VcpuStats(vcpu["exits"], vcpu["hypercalls"]) for vcpu in machine.stats())
    return VmStats(counters, machine.backend, machine.elapsed, machine.latencies())


def result_of(machine: Machine, code: int) -> VmResult:
    """The result of a machine whose guest has ended with ``code``."""
    output, truncated = machine.output()
    return VmResult(code, output, truncated, stats_of(machine))


def text_of(machine: Machine) -> str:
    """What a machine's console has captured."""
    return machine.output()[0].decode(errors="replace")
