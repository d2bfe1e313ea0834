"""The server for gdb and LLDB, beside a debugger in Python."""

from __future__ import annotations

from uhyve import _core
from uhyve.gdb_policy import Decision, GdbPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from uhyve.debugger import Debugger

__all__ = ["GdbServer"]

_ASKED = ("on_stop", "threads", "on_attach", "on_detach", "on_disconnect", "monitor")


class GdbServer:
    """Listens for gdb or LLDB. Made by ``Debugger.serve_gdb()``; as a context manager it closes itself.

    One client at a time, which controls the guest while it is there: it may attach, detach and come back any number of
    times, at any time.
    """

    def __init__(self, debugger: Debugger, address: str, policy: GdbPolicy | None) -> None:
        policy = GdbPolicy() if policy is None else policy
        if not isinstance(policy, GdbPolicy):
            raise TypeError(f"policy must be a GdbPolicy, not {policy!r}")
        policy.debugger = debugger
        self._policy = policy
        self._core = _core.GdbServer(debugger._machine, address, Bridge(debugger, policy), _overridden(policy))

    @property
    def address(self) -> str:
        """Where it listens, with the port that was chosen: what ``target remote`` takes."""
        return self._core.address

    @property
    def client(self) -> str | None:
        """The client that is attached, if any."""
        return self._core.client

    @property
    def policy(self) -> GdbPolicy:
        """The policy that decides."""
        return self._policy

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the guest has ended and no client is attached, or the server is closed.

        Returns False if ``timeout`` seconds are over before. Raises what the policy has raised meanwhile.
        """
        over = self._core.wait(timeout)
        self._raise_failure()
        return over

    def close(self) -> None:
        """Stops listening and drops the client; the guest stays as it is. Doing so twice is the same as once."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        client = self.client
        return f"<GdbServer at {self.address}: {'no client' if client is None else f'{client} is attached'}>"

    def _raise_failure(self) -> None:
        failure = self._core.take_failure()
        if failure is not None:
            raise failure


def _overridden(policy: GdbPolicy) -> set[str]:
    kind = type(policy)
    names = {name for name in _ASKED if getattr(kind, name) is not getattr(GdbPolicy, name) or name in vars(policy)}
    return names | ({"monitor"} if policy._commands() else set())


class Bridge:
    """What the server asks: a policy in values that the core knows."""

    def __init__(self, debugger: Debugger, policy: GdbPolicy) -> None:
        self._debugger = debugger
        self._policy = policy

    def on_stop(self) -> str:
        """The decision about the stop that the world is in."""
        stop = self._debugger._settled()
        return "report" if stop is None else _word(self._policy.on_stop(stop))

    def threads(self) -> list[tuple[int, str, str, int, list[tuple[str, int]]]]:
        """The threads as tuples."""
        return [
            (thread.id, thread.name, thread.extra, thread.vcpu, list(thread.registers.items()))
            for thread in self._policy.threads(self._debugger)
        ]

    def on_attach(self, client: str) -> None:
        """A client has attached."""
        self._policy.on_attach(client)

    def on_detach(self, client: str) -> None:
        """A client has detached."""
        self._policy.on_detach(client)

    def on_disconnect(self, client: str) -> str:
        """The decision about a guest whose client is lost."""
        return _word(self._policy.on_disconnect(client))

    def monitor(self, command: str, arguments: str) -> str | None:
        """The answer to a command."""
        return self._policy.monitor(command, arguments)

    def monitor_commands(self) -> list[tuple[str, str]]:
        """The policy's own commands and their help."""
        methods = sorted(self._policy._commands().items())
        return [(name, (method.__doc__ or "").strip().split("\n")[0]) for name, method in methods]

    def callable(self, name: str) -> Callable[..., object]:
        """The function of that name."""
        known = self._policy.callables()
        if name in known:
            return known[name]
        names = ", ".join(sorted(known)) or "none"
        raise LookupError(f"there is no function {name!r} (known: {names})")

    def compile(self, text: str) -> Any:
        """A condition's text as the core takes it."""
        from uhyve.breakpoint import condition_parts

        return condition_parts(self._debugger._machine, text)[0]

    def restart(self, arguments: list[str] | None) -> _core.Machine:
        """A fresh machine in the place of the debugger's."""
        return self._debugger._restart(arguments)


def _word(decision: Decision | None) -> str:
    if decision is None:
        return "report"
    if not isinstance(decision, Decision):
        raise TypeError(f"a policy decides by a Decision or None, not {decision!r}")
    return str(decision.value)
