"""The server for gdb and LLDB, beside a debugger in Python."""

from __future__ import annotations

import atexit
import contextlib
from weakref import WeakSet

from uhyve import _core
from uhyve.errors import VmStateError
from uhyve.gdb_policy import Accept, BreakpointRequest, Decision, GdbPolicy, Refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from uhyve._core import Hit
    from uhyve.debugger import Debugger
    from uhyve.gdb_policy import RequestKind

    Wish = tuple[
        str | None,
        str | None,
        tuple[str, bytes, list[int]] | None,
        Callable[[Hit], object] | None,
        int,
        int | None,
    ]

__all__ = ["GdbServer"]

_serving: WeakSet[GdbServer] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes the servers that are still there when the interpreter ends: their threads need it to end."""
    for server in list(_serving):
        server.close()


class GdbServer:
    """Listens for gdb or LLDB. Made by ``Debugger.serve_gdb()``; as a context manager it closes itself.

    One client at a time, which controls the guest while it is there: it may attach, detach and come back any number of
    times, at any time.
    """

    def __init__(self, debugger: Debugger, address: str, policy: GdbPolicy | None) -> None:
        policy = GdbPolicy() if policy is None else policy
        if not isinstance(policy, GdbPolicy):
            raise TypeError(f"policy must be a GdbPolicy, not {policy!r}")
        policy._bind(debugger)
        self._debugger = debugger
        self._policy = policy
        self._core = _core.GdbServer(debugger._machine, address, Bridge(debugger, policy), policy._asked())
        _serving.add(self)

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

        Returns False if ``timeout`` seconds are over before. Raises, once and the oldest first, what the policy or a
        callback has raised meanwhile.
        """
        over = self._core.wait(timeout)
        self._raise_failure()
        with contextlib.suppress(VmStateError):
            self._debugger._raise_of_stop()
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
        while (failure := self._core.take_failure()) is not None:
            error, stop = failure
            # One that made a stop may have been raised for that.
            if stop is None or stop != self._debugger._reported:
                self._debugger._reported = stop or self._debugger._reported
                raise error


class Bridge:
    """What the server asks: a policy in values that the core knows."""

    def __init__(self, debugger: Debugger, policy: GdbPolicy) -> None:
        self._debugger = debugger
        self._policy = policy

    def on_stop(self) -> str:
        """The decision about the stop that the world is in."""
        stop = self._debugger._settled()
        return "report" if stop is None else _word(self._policy.on_stop(stop))

    def on_insert(self, kind: RequestKind, address: int, size: int, conditional: bool) -> Wish:
        """What becomes of a breakpoint that the client sets."""
        return self._merged(self._policy._wishes(self._request(kind, address, size, conditional)))

    def on_remove(self, kind: RequestKind, address: int, size: int, conditional: bool) -> None:
        """A breakpoint of the client's is gone."""
        self._policy.on_remove(self._request(kind, address, size, conditional))

    def _request(self, kind: RequestKind, address: int, size: int, conditional: bool) -> BreakpointRequest:
        return BreakpointRequest(kind, address, size, conditional, self._debugger.symbolize(address))

    def _merged(self, wishes: list[Accept | Refuse]) -> Wish:
        """Several wishes as one: all of them hold."""
        from uhyve.breakpoint import condition_parts

        for wish in wishes:
            if isinstance(wish, Refuse):
                return wish.reason, None, None, None, 0, None
        accepted = [wish for wish in wishes if isinstance(wish, Accept)]
        texts = [wish.condition for wish in accepted if isinstance(wish.condition, str)]
        text = " and ".join(f"({text})" for text in texts) if len(texts) > 1 else "".join(texts) or None
        compiled, _ = condition_parts(self._debugger._machine, text)
        chosen = {wish.vcpu for wish in accepted if wish.vcpu is not None}
        if len(chosen) > 1:
            raise ValueError(f"a breakpoint is for one vCPU or for all, not for {sorted(chosen)}")
        callables = [wish.condition for wish in accepted if callable(wish.condition)]
        return (
            None,
            next((wish.name for wish in accepted if wish.name is not None), None),
            compiled,
            _all_of(callables),
            max(wish.ignore for wish in accepted),
            chosen.pop() if chosen else None,
        )

    def threads(self) -> list[tuple[int, str, str, int, list[tuple[str, int]]]]:
        """The threads as tuples."""
        threads = list(self._policy.threads(self._debugger))
        cpus = len(self._debugger.vcpus)
        if wrong := [thread for thread in threads if not 0 <= thread.vcpu < cpus]:
            raise ValueError(f"{wrong[0]!r} is of a vCPU that there is not: the machine has {cpus}")
        seen: set[int] = set()
        for thread in threads:
            if thread.id in seen:
                raise ValueError(f"two threads have the id {thread.id}")
            seen.add(thread.id)
        return [(t.id, t.name, t.extra, t.vcpu, list(t.registers.items())) for t in threads]

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


def _all_of(callables: list[Callable[[Hit], object]]) -> Callable[[Hit], object] | None:
    """A callable that is true where all are; asked in turn, until one is not."""
    if len(callables) < 2:
        return callables[0] if callables else None
    return lambda hit: all(each(hit) for each in callables)


def _word(decision: Decision | None) -> str:
    if decision is None:
        return "report"
    if not isinstance(decision, Decision):
        raise TypeError(f"a policy decides by a Decision or None, not {decision!r}")
    return str(decision.value)
