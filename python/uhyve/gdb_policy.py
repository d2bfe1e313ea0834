"""What Python decides while a gdb client is attached.

A policy is a class to subclass. Each method has a default that is taken in Rust; only what a subclass overrides enters
Python. This one hides the stops in one function, and has a command for ``monitor``:

    >>> class CountMalloc(GdbPolicy):
    ...     count = 0
    ...
    ...     def on_stop(self, stop):
    ...         if stop.symbol != "malloc":
    ...             return Decision.REPORT
    ...         self.count += 1
    ...         return Decision.RESUME
    ...
    ...     @monitor_command
    ...     def counted(self, arguments):
    ...         "how often malloc was called"
    ...         return f"{self.count} calls"
    >>> policy = CountMalloc()  # for dbg.serve_gdb(policy=policy)
    >>> from types import SimpleNamespace as Fake
    >>> policy.on_stop(Fake(symbol="malloc")).name, policy.on_stop(Fake(symbol="free")).name
    ('RESUME', 'REPORT')
    >>> policy.monitor("counted", "")
    '1 calls'

``on_hit`` and functions marked by ``hit_hook`` run on the thread of the vCPU that met a breakpoint, with the others
running; everything else on the server's thread, with the guest stopped. What one raises is shown on gdb's console (at
the next stop, or the next ``monitor`` command: gdb listens at no other time), leaves the guest stopped, and is raised
by ``GdbServer.wait()`` or by the debugger's next call that waits or lets the guest run; what a ``monitor`` command
raises changes nothing for the guest.
"""

from __future__ import annotations

import enum
import fnmatch
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Literal, TypeAlias, TypeVar

    from uhyve._core import Hit
    from uhyve.breakpoint import Condition
    from uhyve.debugger import Debugger, Vcpu
    from uhyve.stop import Stop

    Command = TypeVar("Command", bound=Callable[..., str | None])
    Hook = TypeVar("Hook", bound=Callable[..., object])
    RequestKind: TypeAlias = Literal["breakpoint", "hardware", "write", "read", "access"]

__all__ = [
    "Accept",
    "BreakpointRequest",
    "Decision",
    "GdbPolicy",
    "Refuse",
    "ThreadInfo",
    "hit_hook",
    "monitor_command",
]


class Decision(enum.Enum):
    """What becomes of a stop, or of a guest whose client is lost."""

    REPORT = "report"
    """Tell the client. Of a lost client: keep the guest stopped and wait for the next one."""
    RESUME = "resume"
    """Go on as the client last asked. Of a lost client: let the guest run."""
    STEP = "step"
    """One instruction on the vCPU that stopped; then ``on_stop`` is asked again. Of a lost client: as ``REPORT``."""
    END = "end"
    """End the VM."""


class _Values:
    """Equality and ``repr()`` of a class by its slots."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, slot) == getattr(other, slot) for slot in self.__slots__)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{slot}={getattr(self, slot)!r}' for slot in self.__slots__)})"


class ThreadInfo(_Values):
    """What gdb sees as a thread.

    ``id`` is its number (1 to 2**31 - 1), ``name`` its name, ``extra`` what ``info threads`` adds in parentheses. Its
    registers and memory are those of ``vcpu``; ``registers`` holds those that differ, of a task that is not running:
    such a thread can be looked at, and a step of it lets the vCPU run.

    Raises ``ValueError`` for a number that gdb can't show.

    >>> ThreadInfo(7, "idle", "asleep", vcpu=1, registers={"rip": 0x1000})
    ThreadInfo(id=7, name='idle', extra='asleep', vcpu=1, registers={'rip': 4096})
    """

    __slots__ = ("id", "name", "extra", "vcpu", "registers")  # noqa: RUF023

    def __init__(
        self, id: int, name: str = "", extra: str = "", vcpu: int = 0, registers: Mapping[str, int] | None = None
    ) -> None:
        if not 1 <= id < 1 << 31:
            raise ValueError(f"a thread's number is {id}; gdb takes 1 to 2**31 - 1")
        self.id = id
        self.name = name or f"thread {id}"
        self.extra = extra or self.name
        self.vcpu = vcpu
        self.registers = dict(registers or {})


class BreakpointRequest(_Values):
    """A breakpoint or watchpoint that gdb sets, or has taken away.

    ``kind`` is "breakpoint", "hardware" (``hbreak``), "write" (``watch``), "read" (``rwatch``) or "access"
    (``awatch``), of ``size`` bytes at ``address``. ``symbol`` is ``"symbol"`` or ``"symbol+0x10"`` there, if known.
    ``conditional``: it comes with a condition of gdb's that the target evaluates.
    """

    __slots__ = ("kind", "address", "size", "conditional", "symbol")  # noqa: RUF023

    def __init__(
        self, kind: RequestKind, address: int, size: int = 1, conditional: bool = False, symbol: str | None = None
    ) -> None:
        self.kind = kind
        self.address = address
        self.size = size
        self.conditional = conditional
        self.symbol = symbol

    def is_in(self, pattern: str) -> bool:
        """Whether it lies in a function, or in data, of that name; ``*`` and ``?`` stand for any characters.

        >>> BreakpointRequest("breakpoint", 0x1004, symbol="sys_open+0x4").is_in("sys_*")
        True
        """
        return _is_in(self.symbol, pattern)


class Accept(_Values):
    """The answer of ``GdbPolicy.on_insert()`` that lets gdb have its breakpoint, with wishes besides gdb's own.

    ``condition``, ``ignore`` and ``vcpu`` are as for ``Debugger.breakpoint()``: a hit that they let pass is not seen by
    gdb and costs no stop. ``name`` is for messages and for ``monitor breakpoints``.
    """

    __slots__ = ("condition", "name", "ignore", "vcpu")  # noqa: RUF023

    def __init__(
        self, condition: Condition = None, name: str | None = None, ignore: int = 0, vcpu: int | None = None
    ) -> None:
        self.condition = condition
        self.name = name
        self.ignore = ignore
        self.vcpu = vcpu


class Refuse(_Values):
    """The answer of ``GdbPolicy.on_insert()`` that denies a breakpoint: gdb says that it can't insert it.

    ``reason`` is shown on gdb's console when gdb next listens.
    """

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def monitor_command(command: Command) -> Command:
    """Makes a method a command of ``monitor`` in gdb: its name, its docstring's first line as help.

    It is called with the text behind its name, and returns what gdb prints.
    """
    command.__dict__["_is_monitor_command"] = True
    return command


def hit_hook(*patterns: str) -> Callable[[Hook], Hook]:
    """Makes a method decide about each hit of a breakpoint that gdb sets in a function of one of these names.

    ``*`` and ``?`` stand for any characters. The method is called with the ``Hit``; something true stops the guest, and
    gdb hears of it.

    >>> class Big(GdbPolicy):
    ...     @hit_hook("malloc", "calloc")
    ...     def is_big(self, hit):
    ...         return hit.arg(0) > 4096
    >>> [hook.__name__ for hook in Big()._hooks(BreakpointRequest("breakpoint", 0x1000, symbol="malloc+0x4"))]
    ['is_big']
    """
    if not patterns:
        raise ValueError("hit_hook() takes the names of functions")

    def mark(hook: Hook) -> Hook:
        hook.__dict__["_hit_patterns"] = patterns
        return hook

    return mark


class GdbPolicy:
    """Decides for a server. Subclass it and override what you want decided.

    ``debugger`` is the debugger whose ``serve_gdb()`` it was given to.
    """

    debugger: Debugger

    def on_stop(self, stop: Stop) -> Decision | None:  # noqa: ARG002
        """Decides what becomes of a stop of the world; None is ``Decision.REPORT``. All vCPUs stand still.

        It may read and write the guest by ``self.debugger``, not let it run.
        """
        return Decision.REPORT

    def on_insert(self, request: BreakpointRequest) -> Accept | Refuse | None:  # noqa: ARG002
        """Decides about a breakpoint or watchpoint that gdb sets; None is ``Accept()``. The guest stands still.

        gdb sends its breakpoints when it is about to let the guest run, takes them away at each stop, and sends them
        again: this is asked once, until one is gone. Those that gdb needs for itself (for ``finish``, ``until``, calls
        in ``next``) come here, too. Raising refuses the breakpoint.
        """
        return None

    def on_remove(self, request: BreakpointRequest) -> None:
        """A breakpoint of gdb's is gone: the guest is about to run without it, or the client has left.

        Raising keeps the guest stopped.
        """

    def on_hit(self, hit: Hit) -> object:  # noqa: ARG002
        """Decides about a hit of a breakpoint or watchpoint of gdb's: something true stops the guest.

        It is called on the thread of the vCPU that met it, with the others running, after the conditions that the
        target evaluates. ``uhyve.debugger`` says what a ``Hit`` is.
        """
        return True

    def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
        """Gives the threads that gdb sees, asked once at each stop. vCPUs that are not among them are added.

        gdb is shown them in this order, the one that the stop is about first. The default is one for each vCPU, with
        its number + 1 for an id, and "running", "halted" or "stopped: REASON" besides its name. Two with one id, or a
        vCPU that the machine does not have, are a ``ValueError``.
        """
        stop = debugger._settled()
        return [
            ThreadInfo(vcpu.number + 1, f"vCPU {vcpu.number}", vcpu_state(vcpu, stop), vcpu=vcpu.number)
            for vcpu in debugger.vcpus
        ]

    def on_attach(self, client: str) -> None:
        """A client has attached; the guest stands still."""

    def on_detach(self, client: str) -> None:
        """A client has detached; the guest is about to run on, unless this raises."""

    def on_disconnect(self, client: str) -> Decision | None:  # noqa: ARG002
        """Decides what becomes of the guest when the connection is lost; None is ``Decision.REPORT``."""
        return Decision.REPORT

    def monitor(self, command: str, arguments: str) -> str | None:
        """Answers a ``monitor`` command; None leaves it to the server's own.

        The default calls the ``monitor_command`` of that name.
        """
        method = self._commands().get(command)
        return None if method is None else method(arguments) or ""

    def callables(self) -> Mapping[str, Callable[..., object]]:
        """Gives the functions that ``monitor python NAME`` may make a breakpoint's condition, by name.

        The default gives the public names of the module ``__main__`` that are callable.
        """
        import __main__

        public = {name: value for name, value in vars(__main__).items() if not name.startswith("_")}
        return {name: value for name, value in public.items() if callable(value) and not isinstance(value, type)}

    # What the server asks; a policy that is made of others answers for them.

    def _bind(self, debugger: Debugger) -> None:
        self.debugger = debugger

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(GdbPolicy, name) or name in vars(self)

    def _asked(self) -> set[str]:
        """The methods for which the server enters Python."""
        asked = {name for name in _ASKED if self._overrides(name)}
        if self._overrides("on_hit") or self._marked("_hit_patterns"):
            asked.add("on_insert")
        return asked | ({"monitor"} if self._commands() else set())

    def _wishes(self, request: BreakpointRequest) -> list[Accept | Refuse]:
        """What becomes of a breakpoint: all of it holds together."""
        answer = self.on_insert(request)
        if not isinstance(answer, Accept | Refuse | None):
            raise TypeError(f"on_insert() answers by Accept(), Refuse() or None, not {answer!r}")
        return [Accept() if answer is None else answer, *(Accept(hook) for hook in self._hooks(request))]

    def _hooks(self, request: BreakpointRequest) -> list[Callable[[Hit], object]]:
        marked = [getattr(self, name) for name in self._marked("_hit_patterns")]
        hooks = [hook for hook in marked if any(request.is_in(pattern) for pattern in hook._hit_patterns)]
        return [*hooks, self.on_hit] if self._overrides("on_hit") else hooks

    def _marked(self, mark: str) -> list[str]:
        return [name for name in dir(type(self)) if hasattr(getattr(type(self), name, None), mark)]

    def _commands(self) -> dict[str, Callable[[str], str | None]]:
        return {name: getattr(self, name) for name in self._marked("_is_monitor_command")}


_ASKED = ("on_stop", "on_insert", "on_remove", "threads", "on_attach", "on_detach", "on_disconnect", "monitor")


def vcpu_state(vcpu: Vcpu, stop: Stop | None) -> str:
    """What a vCPU did when the world stopped: "running", "halted", or "stopped: REASON" if ``stop`` is about it."""
    if stop is not None and stop.vcpu == vcpu.number:
        return f"stopped: {stop.reason}"
    return "halted" if vcpu.halted else "running"


def _is_in(symbol: str | None, pattern: str) -> bool:
    # Rust's names have brackets and plus signs of their own.
    name = re.sub(r"\+0x[0-9a-f]+$", "", symbol or "")
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
