"""Why a guest stands still, and the functions that it is in."""

from __future__ import annotations

from uhyve.errors import VmStateError
from uhyve.result import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Self, TypeAlias

    from uhyve import _core
    from uhyve._core import Machine, Memory, Registers
    from uhyve.breakpoint import Breakpoint
    from uhyve.errors import GuestCrashError

    StopReason: TypeAlias = Literal[
        "entry", "breakpoint", "watchpoint", "step", "interrupt", "timeout", "exit", "crash", "exception"
    ]

__all__ = ["Frame", "Stop"]


class Frame:
    """A function that a vCPU is in: the one that it executes, or one that has called."""

    __slots__ = ("_machine", "_parts", "_vcpu", "level", "pc")

    level: int
    """0 for the innermost frame, 1 for the one that it returns to, or was inlined into, and so on."""
    pc: int
    """The address of the next instruction; behind the call, in a frame that has called."""

    def __init__(
        self, machine: Machine, vcpu: int, pc: int, level: int = 0, parts: _core._FrameParts | None = None
    ) -> None:
        self._machine = machine
        self._vcpu = vcpu
        self._parts = parts
        self.level = level
        self.pc = pc

    def _known(self) -> _core._FrameParts:
        if self._parts is None:
            self._parts = self._machine.describe(self.pc)[0]
        return self._parts

    @property
    def function(self) -> str | None:
        """The name of the function, by debug information or symbol; of code that was inlined, its own function."""
        return self._known()[2]

    @property
    def symbol(self) -> str | None:
        """``"symbol+0x10"`` for ``pc``, if known: the function that the code was inlined into."""
        found = self._known()[3]
        return None if found is None else f"{found[0]}+{found[1]:#x}" if found[1] else found[0]

    @property
    def offset(self) -> int | None:
        """Bytes from the symbol's start to ``pc``."""
        found = self._known()[3]
        return None if found is None else found[1]

    @property
    def file(self) -> str | None:
        """The source file, as the compiler wrote it, if the image has debug information."""
        found = self._known()[4]
        return None if found is None else found[0]

    @property
    def line(self) -> int | None:
        """The line in ``file``, from 1; 0 for code that the compiler made up."""
        found = self._known()[4]
        return None if found is None else found[1]

    @property
    def inlined(self) -> bool:
        """Whether this function's code is a part of the next frame's."""
        return self._known()[5]

    @property
    def cfa(self) -> int | None:
        """The canonical frame address: the stack pointer before the call. Of a frame of ``backtrace()``, if known."""
        return self._known()[1]

    @property
    def registers(self) -> Registers:
        """The registers of the vCPU."""
        return self._machine.registers(self._vcpu)

    @property
    def memory(self) -> Memory:
        """Guest memory as the vCPU sees it."""
        return self._machine.memory(self._vcpu)

    def __str__(self) -> str:
        """One line for people, as of a backtrace."""
        source = _source(self._known()[4])
        name = self.function or "?"
        place = f" at {source}" if source else ""
        return f"#{self.level} {self.pc:#x} in {name}{place}{' (inlined)' if self.inlined else ''}"

    def __repr__(self) -> str:
        return f"<Frame of vCPU {self._vcpu} at {symbol_at(self._machine, self.pc) or format(self.pc, '#x')}>"


class Stop(Record):
    """Why the guest stands still, and where.

    It works with ``match``::

        match dbg.cont():
            case Stop("breakpoint", vcpu, pc): ...
            case Stop(reason="exit", code=code): ...

    It can be pickled, for another process; there it has no ``breakpoint`` and no ``frame``: they stay with the machine.
    """

    __slots__ = (
        "_machine",
        "access",
        "address",
        "breakpoint",
        "code",
        "crash",
        "exception",
        "hits",
        "message",
        "new",
        "number",
        "old",
        "pc",
        "reason",
        "symbol",
        "value",
        "vcpu",
    )
    __match_args__ = _fields = (
        "reason",
        "vcpu",
        "pc",
        "breakpoint",
        "code",
        "symbol",
        "message",
        "number",
        "hits",
        "exception",
        "crash",
        "address",
        "access",
        "old",
        "new",
        "value",
    )

    reason: StopReason
    """One of "entry", "breakpoint", "watchpoint", "step", "interrupt", "timeout", "exit", "crash" or "exception"."""
    vcpu: int
    """The number of the vCPU that it is about."""
    pc: int
    """The address of that vCPU's next instruction."""
    breakpoint: Breakpoint | None
    """The breakpoint or watchpoint that stopped it, or whose callback raised."""
    code: int | None
    """The exit code of a guest that ended itself."""
    symbol: str | None
    """``"symbol+0x10"`` for ``pc``, if known."""
    message: str | None
    """More in words: what a crash was, or why a condition has no value."""
    number: int
    """Counts the stops of a machine, from 1."""
    hits: int | None
    """The breakpoint's ``hits`` then."""
    exception: BaseException | None
    """What a callback raised."""
    crash: GuestCrashError | None
    """How the guest crashed."""
    address: int | None
    """Of a watchpoint: the first watched byte that was accessed, as far as that is known."""
    access: Literal["write", "read"] | None
    """Of a watchpoint: what was done."""
    old: int | bytes | None
    """Of a watchpoint: what was there before; a number of up to 8 bytes, else bytes; None if it was not mapped."""
    new: int | bytes | None
    """Of a watchpoint: what is there now, as ``old``."""
    value: int | None
    """After ``finish()``, what the function returned in RAX."""
    _machine: Machine

    def __init__(
        self,
        reason: StopReason,
        vcpu: int,
        pc: int,
        breakpoint: Breakpoint | None = None,
        code: int | None = None,
        symbol: str | None = None,
        message: str | None = None,
        number: int = 0,
        hits: int | None = None,
        exception: BaseException | None = None,
        crash: GuestCrashError | None = None,
        address: int | None = None,
        access: Literal["write", "read"] | None = None,
        old: int | bytes | None = None,
        new: int | bytes | None = None,
        value: int | None = None,
    ) -> None:
        self._fill(
            *(reason, vcpu, pc, breakpoint, code, symbol, message, number, hits, exception, crash),
            *(address, access, old, new, value),
        )

    @property
    def frame(self) -> Frame:
        """The place of the vCPU, its registers and memory. These can be used until the guest runs again."""
        machine = getattr(self, "_machine", None)
        if machine is None:
            raise VmStateError("this stop comes from elsewhere, and its machine is not here")
        return Frame(machine, self.vcpu, self.pc)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        values = dict(zip(self._fields, self._values(), strict=True))
        return type(self), tuple({**values, "breakpoint": None}.values())

    def __str__(self) -> str:
        """One line for people, or more if the guest crashed."""
        if self.reason == "exit":
            return f"the guest has ended with code {self.code}"
        if self.reason == "crash":
            return f"the guest has crashed: {self.message}"
        place = f"{self.symbol} ({self.pc:#x})" if self.symbol else f"{self.pc:#x}"
        if source := _source(self._source()):
            place += f", {source}"
        return f"vCPU {self.vcpu} stopped at {place}: {self._why()}"

    def _source(self) -> tuple[str, int] | None:
        machine = getattr(self, "_machine", None)
        if machine is None:
            return None
        try:
            found: tuple[str, int] | None = machine.describe(self.pc)[0][4]
        except VmStateError:
            # In a forked child.
            return None
        return found

    def _why(self) -> str:
        if self.breakpoint is None:
            return self.reason
        title = f"{'breakpoint' if self.breakpoint.size is None else 'watchpoint'} {self.breakpoint.id}"
        if self.breakpoint.name:
            title += f" ({self.breakpoint.name})"
        if self.exception is not None:
            return f"the callback of {title} raised {type(self.exception).__name__}: {self.exception}"
        if self.message is not None:
            return f"{title}: {self.message}"
        hit = f"{title}, hit {self.hits}"
        if self.address is None:
            return hit
        if self.old == self.new:
            return f"{hit}: {self.access} at {self.address:#x}, value {_value(self.new)}"
        return f"{hit}: {self.access} at {self.address:#x}, {_value(self.old)} → {_value(self.new)}"


def _source(found: tuple[str, int] | None) -> str | None:
    """``file.c:123``, without directories."""
    return None if found is None else f"{found[0].rpartition('/')[2]}:{found[1]}"


def _value(watched: int | bytes | None) -> str:
    if isinstance(watched, int):
        return f"{watched:#x}"
    return "not mapped" if watched is None else f"0x{watched.hex()}" if len(watched) <= 16 else f"{len(watched)} bytes"


def symbol_at(machine: Machine, address: int) -> str | None:
    """``"symbol+0x10"`` for an address of the guest, if known."""
    found = machine.symbolize(address)
    if found is None:
        return None
    name, offset = found
    return f"{name}+{offset:#x}" if offset else name
