"""What a debugger must have seen of the guest ``events``, held against what the guest has counted.

A *passage* is one execution of a place by one vCPU, with a number. The ledger looks at the guest at each stop: how many
passages each vCPU has behind it, and whether it stands at a place. When a vCPU has left a place, the passage is judged:
it must have been reported, exactly once, if a breakpoint that was there all the time wanted it; it must not have been,
if none wanted it. What changed while the vCPU came or stood there may go either way. A report is believed only if its
vCPU stands where it says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from uhyve import Debugger

PLACES = {
    "event": ("calls", "event_counted"),
    "event_serial": ("serials", "serial_counted"),
    "event_written": ("writes", "written_counted"),
}
"""Each place with its counter in the guest, and the label behind the instruction that counts."""


@dataclass
class Interest:
    """A breakpoint as the ledger knows it."""

    place: str
    wants: Callable[[int, int], bool]
    """By vCPU and number, whether it stops."""
    enabled: bool
    changed: dict[int, int]
    """The window of each vCPU in which it last changed."""


@dataclass
class Ledger:
    """The book of one guest."""

    dbg: Debugger
    window: int = 0
    """Counts the stops: a window is what lies between two."""
    interests: list[Interest] = field(default_factory=list)
    reported: set[tuple[str, int, int]] = field(default_factory=set)
    passed: dict[tuple[str, int], int] = field(default_factory=dict)
    arrived: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """The number at which a vCPU stands, and the window in which it came there."""
    stops: int = 0
    judged: int = 0

    def __post_init__(self) -> None:
        self.cpus = len(self.dbg.vcpus)
        self.addresses = {
            name: self.dbg.symbol(name) for place, (_, behind) in PLACES.items() for name in (place, behind)
        }
        self.arrays = {counter: self.dbg.symbol(counter) for counter, _ in PLACES.values()}
        self.passed = {(place, vcpu): 0 for place in PLACES for vcpu in range(self.cpus)}

    def add(self, place: str, wants: Callable[[int, int], bool], *, enabled: bool = True) -> Interest:
        """A breakpoint is set, at a stop."""
        interest = Interest(place, wants, enabled, {})
        self.interests.append(interest)
        self.change(interest, enabled)
        return interest

    def change(
        self, interest: Interest, enabled: bool, *, running: bool = False, vcpus: set[int] | None = None
    ) -> None:
        """It was enabled or disabled, at a stop or while the guest ran; for one vCPU's step, for that one alone."""
        interest.enabled = enabled
        window = self.window if running else self.window - 1
        interest.changed.update(dict.fromkeys(range(self.cpus) if vcpus is None else vcpus, window))

    def numbers(self, place: str) -> dict[int, tuple[int, bool]]:
        """For each vCPU the passages behind it, and whether it stands at the place."""
        counter, behind = PLACES[place]
        start, end = self.addresses[place], self.addresses[behind]
        found = {}
        for vcpu in self.dbg.vcpus:
            counted, pc = self.dbg.memory.read_u64(self.arrays[counter] + 8 * vcpu.number), vcpu.pc
            found[vcpu.number] = (counted + (start < pc < end), pc == start)
        return found

    def look(self, report: tuple[str, int, int] | None) -> None:
        """The world has stopped, for a passage or for something else."""
        self.stops += 1
        now = {place: self.numbers(place) for place in PLACES}
        if report is not None:
            place, vcpu, number = report
            assert now[place][vcpu] == (number, True), f"stale: {report}, but the vCPU is at {now[place][vcpu]}"
            fresh = any(i.changed[vcpu] >= self.arrived.get((place, vcpu), (0, 0))[1] for i in self._at(place))
            assert report not in self.reported or fresh, f"reported twice: {report}"
            assert any(i.wants(vcpu, number) for i in self._at(place)), f"nobody asked for {report}"
            self.reported.add(report)
        for place, numbers in now.items():
            for vcpu, (number, stands) in numbers.items():
                self._advance(place, vcpu, number, stands)
        self.window += 1

    def _at(self, place: str) -> list[Interest]:
        return [interest for interest in self.interests if interest.place == place]

    def _advance(self, place: str, vcpu: int, number: int, stands: bool) -> None:
        before = self.passed[place, vcpu]
        assert number >= before, f"vCPU {vcpu} at {place} has gone back from {before} to {number}"
        for passage in range(before, number):
            came = self.arrived.get((place, vcpu), (-1, 0))
            self._judge(place, vcpu, passage, came[1] if came[0] == passage else self.window)
        self.passed[place, vcpu] = number
        if stands and self.arrived.get((place, vcpu), (-1, 0))[0] != number:
            self.arrived[place, vcpu] = (number, self.window)

    def _judge(self, place: str, vcpu: int, number: int, came: int) -> None:
        self.judged += 1
        was_reported = (place, vcpu, number) in self.reported
        wanting = [i for i in self._at(place) if i.wants(vcpu, number)]
        steady = [i for i in wanting if i.changed[vcpu] < came]
        if any(i.enabled for i in steady):
            assert was_reported, f"lost: vCPU {vcpu} has passed {place} for the {number}th time"
        may = any(i.enabled or i.changed[vcpu] >= came for i in wanting)
        assert may or not was_reported, f"reported {place} {number} of vCPU {vcpu}, which nobody wanted then"

    def total(self, place: str) -> int:
        """All passages so far."""
        return sum(self.passed[place, vcpu] for vcpu in range(self.cpus))
