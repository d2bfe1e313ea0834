"""The exceptions of this package.

All derive from ``UhyveError``, and from the built-in exception that fits, so that ``except ValueError`` or
``except TimeoutError`` work too. The facts behind the text are attributes: an address, a register, an errno. A guest
that ends itself, with whatever code, is a result and not an exception.

>>> try:
...     raise GuestFaultError("guest virtual address 0x10 (+8 bytes) is not mapped", address=0x10, length=8, vcpu=0)
... except UhyveError as error:
...     print(hex(error.address), error.vcpu)
0x10 0
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` would be a third of the time that importing this package takes
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, ClassVar

__all__ = [
    "BreakpointError",
    "ConditionError",
    "ConfigError",
    "GdbConnectionError",
    "GuestCrashError",
    "GuestFaultError",
    "HypervisorError",
    "HypervisorUnavailableError",
    "ImageError",
    "TimeoutExpired",
    "UhyveError",
    "VmStateError",
]


class UhyveError(Exception):
    """What all exceptions of this package have in common."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __repr__(self) -> str:
        fields = [f"{name}={value!r}" for name in self._fields if (value := getattr(self, name)) is not None]
        return f"{type(self).__name__}({', '.join([repr(self.args[0] if self.args else ''), *fields])})"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in self._fields}
        return _restore, (type(self), self.args[0] if self.args else "", fields), self.__dict__


def _restore(kind: type[UhyveError], message: str, fields: dict[str, Any]) -> UhyveError:
    return kind(message, **fields)


class ConfigError(UhyveError, ValueError):
    """A parameter of a VM is out of range, or contradicts another one or the image."""


class ImageError(UhyveError, ValueError):
    """The image can't be read, or is no Hermit image that this version can load."""


class HypervisorError(UhyveError, OSError):
    """A system call of the hypervisor failed."""

    _fields = ("errno", "ioctl")

    errno: int | None
    """The system's error number."""
    ioctl: str | None
    """The ioctl or system call."""

    def __init__(self, message: str = "", *, errno: int | None = None, ioctl: str | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.ioctl = ioctl


class HypervisorUnavailableError(HypervisorError):
    """There is no usable hypervisor on this machine, or no permission for it. The text says what to do."""


class GuestFaultError(UhyveError):
    """Guest memory that isn't there: not mapped (virtual), or not RAM (physical)."""

    _fields = ("address", "length", "vcpu")

    def __init__(
        self, message: str = "", *, address: int | None = None, length: int | None = None, vcpu: int | None = None
    ) -> None:
        super().__init__(message)
        self.address = address
        """The first guest address that failed."""
        self.length = length
        """How many bytes were asked for from there."""
        self.vcpu = vcpu
        """The vCPU whose page tables were used."""


class GuestCrashError(UhyveError):
    """The guest did something that no machine survives, such as a triple fault."""

    _fields = ("vcpu", "reason", "registers", "symbol", "output")

    def __init__(
        self,
        message: str = "",
        *,
        vcpu: int | None = None,
        reason: str = "",
        registers: Mapping[str, int] | None = None,
        symbol: str | None = None,
        output: str = "",
    ) -> None:
        super().__init__(message)
        self.vcpu = vcpu
        """The vCPU that crashed."""
        self.reason = reason
        """Why, in words."""
        self.registers: dict[str, int] = dict(registers or {})
        """Its general registers, ``rip`` and ``rflags`` at that moment."""
        self.symbol = symbol
        """``name+offset`` of its program counter, if known."""
        self.output = output
        """What was captured of the guest's console until then."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vcpu={self.vcpu!r}, reason={self.reason!r}, symbol={self.symbol!r}, "
            f"rip={self.registers.get('rip', 0):#x})"
        )


class VmStateError(UhyveError, RuntimeError):
    """The call doesn't fit the state that the VM is in."""


class BreakpointError(UhyveError):
    """A breakpoint can't be set, or its location isn't known."""


class ConditionError(UhyveError, ValueError):
    """A breakpoint's condition isn't valid."""

    _fields = ("expression", "column")

    def __init__(self, message: str = "", *, expression: str | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.expression = expression
        """The condition as it was written."""
        self.column = column
        """Where in it the error is; the first character is 1."""


class GdbConnectionError(UhyveError, ConnectionError):
    """A connection to a gdb client can't be made, or broke."""


class TimeoutExpired(UhyveError, TimeoutError):  # noqa: N818 – as `subprocess` calls it
    """The time that a call was given is over, and what it waited for has not happened."""

    _fields = ("timeout", "output")

    def __init__(self, message: str = "", *, timeout: float | None = None, output: str = "") -> None:
        super().__init__(message)
        self.timeout = timeout
        """The limit in seconds."""
        self.output = output
        """What was captured of the guest's console until then."""
