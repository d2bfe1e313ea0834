"""Breakpoints and watchpoints as a script holds them, and conditions as the core takes them."""

from __future__ import annotations

from uhyve.errors import BreakpointError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, Literal, Self, TypeAlias

    from uhyve import _core
    from uhyve._core import Hit, Machine

    Callback: TypeAlias = Callable[[Hit], object]
    Condition: TypeAlias = str | Callback | None
    Access: TypeAlias = Literal["write", "read", "access"]

__all__ = ["Breakpoint"]

# Of a code object's flags: generator, coroutine, asynchronous generator.
_SUSPENDS: Final = 0x20 | 0x80 | 0x200


class Breakpoint:
    """A place in the guest, and a decision which arrivals there stop it.

    Made by ``Debugger.breakpoint()``, for code, and by ``Debugger.watch()``, for data.
    """

    __slots__ = ("_core", "_machine")

    def __init__(self, machine: Machine, core: _core.Breakpoint) -> None:
        self._machine = machine
        self._core = core

    @property
    def id(self) -> int:
        """Its number; the first one is 1."""
        return self._core.id

    @property
    def location(self) -> str:
        """The place as it was given."""
        return self._core.location

    @property
    def address(self) -> int:
        """The guest-virtual address; of a source line with several, the lowest."""
        return self._core.address

    @property
    def addresses(self) -> list[int]:
        """All its addresses: a source line may have code in several functions."""
        return self._core.addresses

    @property
    def name(self) -> str | None:
        """A name for messages."""
        return self._core.name

    @property
    def enabled(self) -> bool:
        """Whether it is looked at. Disabled, it costs the guest nothing. Can be set."""
        return self._core.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._core.enabled = bool(enabled)

    @property
    def condition(self) -> Condition:
        """The condition, text or callable, as it was given. Can be set; the next hit is judged by the new one."""
        return self._core.condition

    @condition.setter
    def condition(self, condition: Condition) -> None:
        compiled, predicate = condition_parts(self._machine, condition)
        self._machine.set_condition(self._core, compiled, predicate)

    @property
    def ignore(self) -> int:
        """How many hits will pass before the condition is asked. Can be set."""
        return self._core.ignore

    @ignore.setter
    def ignore(self, count: int) -> None:
        self._core.ignore = unsigned("ignore", count)

    @property
    def temporary(self) -> bool:
        """Whether it is deleted when it has stopped the guest once."""
        return self._core.temporary

    @property
    def vcpu(self) -> int | None:
        """The only vCPU that it is for; None: all."""
        return self._core.vcpu

    @property
    def reached(self) -> int:
        """How many times a vCPU that it is for has met it."""
        return self._core.reached

    @property
    def hits(self) -> int:
        """How many of these times its conditions let through."""
        return self._core.hits

    @property
    def size(self) -> int | None:
        """Bytes that a watchpoint watches; None for a breakpoint."""
        return self._core.size

    @property
    def access(self) -> Access | None:
        """What fires a watchpoint: "write", "read" or "access"; None for a breakpoint."""
        return self._core.access

    @property
    def kind(self) -> str | None:
        """How the guest is made to leave: "int3", "debug register" or "single-step"; None while disabled."""
        return self._core.kind

    @property
    def deleted(self) -> bool:
        """Whether it is gone."""
        return self._core.deleted

    def delete(self) -> None:
        """Deletes it; the guest's code is as it was. Doing so twice is the same as once."""
        self._core.delete()

    def _move(self, machine: Machine, condition: Condition) -> None:
        """Sets it again in a fresh machine."""
        core = self._core
        compiled, predicate = condition_parts(machine, condition)
        wishes: dict[str, Any] = {
            "location": core.location,
            "compiled": compiled,
            "predicate": predicate,
            "ignore": core.ignore,
            "temporary": core.temporary,
            "vcpu": core.vcpu,
            "enabled": core.enabled,
            "name": core.name,
        }
        access, size = core.access, core.size
        if access is None or size is None:
            hardware = core.kind == "debug register"
            self._core = machine.add_breakpoint(machine.resolve_place(core.location), **wishes, hardware=hardware)
        else:
            self._core = machine.add_watchpoint(machine.resolve(core.location), size, access, **wishes)
        self._machine = machine

    def __call__(self, condition: Callback) -> Self:
        """Makes a callable the condition: ``@dbg.breakpoint("main")``."""
        self.condition = condition
        return self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Breakpoint):
            return self._core == other._core
        return self._core == other

    def __hash__(self) -> int:
        return hash(self._core)

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        place = self.location if self.location == f"{self.address:#x}" else f"{self.location} ({self.address:#x})"
        condition = self.condition
        wish = "" if condition is None else f" if {condition if isinstance(condition, str) else repr(condition)}"
        state = "" if self.enabled else ", deleted" if self.deleted else ", disabled"
        watched = "" if self.size is None else f", {self.access} of {self.size} bytes"
        kind = "Breakpoint" if self.size is None else "Watchpoint"
        return f"<{kind} {self.id}{name} at {place}{watched}{wish}: {self.hits} of {self.reached} hits{state}>"


def condition_parts(
    machine: Machine, condition: Condition
) -> tuple[tuple[str, bytes, list[int]] | None, Callback | None]:
    """A condition as the core takes it."""
    if condition is None:
        return None, None
    if isinstance(condition, str):
        # Loads the compiler of conditions (and `ast`) only for those who use it.
        from uhyve.condition import compile_condition

        parts = compile_condition(condition, machine.resolve)
        return (parts.expression, parts.code, list(parts.constants)), None
    if callable(condition):
        if getattr(getattr(condition, "__code__", None), "co_flags", 0) & _SUSPENDS:
            raise TypeError(f"a condition is called and done: {condition!r} only makes something to await or iterate")
        return None, condition
    raise TypeError(f"a condition is text, a callable or None, not {condition!r}")


def unsigned(what: str, value: int, bits: int = 64) -> int:
    """``value`` if it is an integer that ``bits`` bits hold; else ``TypeError`` or ``BreakpointError``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    number = value.__index__()
    if not 0 <= number < 1 << bits:
        raise BreakpointError(f"{what} is {number}; it must be an unsigned number of {bits} bits")
    return number
