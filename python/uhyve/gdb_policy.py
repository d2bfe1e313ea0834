"""What Python decides while a gdb client is attached.

A policy is a class to subclass. Each method has a default that is taken in Rust; only what a subclass overrides enters
Python::

    class CountMalloc(GdbPolicy):
        def on_stop(self, stop):
            return Decision.RESUME if stop.symbol == "malloc" else Decision.REPORT

        @monitor_command
        def hello(self, arguments):
            "greet"
            return f"hello {arguments}"

    with uhyve.Vm("app").debug() as dbg:
        server = dbg.serve_gdb(policy=CountMalloc())

Methods run on the server's thread. What one raises is shown on gdb's console, leaves the guest stopped, and is raised
by ``GdbServer.wait()`` or the debugger's next call.
"""

from __future__ import annotations

import enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeVar

    from uhyve.debugger import Debugger
    from uhyve.stop import Stop

    Command = TypeVar("Command", bound=Callable[..., str | None])

__all__ = ["Decision", "GdbPolicy", "ThreadInfo", "monitor_command"]


class Decision(enum.Enum):
    """What becomes of a stop, or of a guest whose client is lost."""

    REPORT = "report"
    """Tell the client. Of a lost client: keep the guest stopped and wait for the next one."""
    RESUME = "resume"
    """Go on as the client last asked. Of a lost client: let the guest run."""
    STEP = "step"
    """One instruction on the vCPU that stopped; then ``on_stop`` is asked again."""
    END = "end"
    """End the VM."""


class ThreadInfo:
    """What gdb sees as a thread.

    ``id`` is its number (1 to 2**31 - 1), ``name`` its name, ``extra`` what ``info threads`` adds. Its registers and
    memory are those of ``vcpu``; ``registers`` holds those that differ, of a task that is not running: such a thread
    can be looked at, and a step of it steps the vCPU.
    """

    __slots__ = ("extra", "id", "name", "registers", "vcpu")

    def __init__(
        self, id: int, name: str = "", extra: str = "", vcpu: int = 0, registers: Mapping[str, int] | None = None
    ) -> None:
        self.id = id
        self.name = name or f"thread {id}"
        self.extra = extra or self.name
        self.vcpu = vcpu
        self.registers = dict(registers or {})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ThreadInfo):
            return NotImplemented
        return all(getattr(self, slot) == getattr(other, slot) for slot in self.__slots__)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        registers = f", registers={self.registers!r}" if self.registers else ""
        return f"ThreadInfo({self.id}, {self.name!r}, {self.extra!r}, vcpu={self.vcpu}{registers})"


def monitor_command(command: Command) -> Command:
    """Makes a method a command of ``monitor`` in gdb: its name, its docstring's first line as help.

    It is called with the text behind its name, and returns what gdb prints.
    """
    command.__dict__["_is_monitor_command"] = True
    return command


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

    def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
        """Gives the threads that gdb sees, asked once at each stop. vCPUs that are not among them are added.

        The default is one for each vCPU, with its number + 1 for an id.
        """
        return [ThreadInfo(vcpu.number + 1, f"vCPU {vcpu.number}", vcpu=vcpu.number) for vcpu in debugger.vcpus]

    def on_attach(self, client: str) -> None:
        """A client has attached; the guest stands still."""

    def on_detach(self, client: str) -> None:
        """A client has detached; the guest is about to run on."""

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

    def _commands(self) -> dict[str, Callable[[str], str | None]]:
        names = [name for name in dir(type(self)) if hasattr(getattr(type(self), name), "_is_monitor_command")]
        return {name: getattr(self, name) for name in names}
