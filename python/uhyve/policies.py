"""Ready policies for a server for gdb, and how to combine them.

Most decide about stops; ``Combined`` asks several, and the first that does not say "report" decides::

    policy = Combined(OnlyVcpu(0), AfterHits(10))  # of vCPU 0, and not its first nine breakpoint hits
    server = dbg.serve_gdb(policy=policy)

Only stops by breakpoints and watchpoints are passed over: steps, interrupts, the guest's end and crashes are reported.
``Conditions`` and ``KeepOut`` decide about the breakpoints that gdb sets, ``HermitTasks`` names its threads. A hit that
a condition lets pass is much cheaper than a stop that a policy passes over, for which all vCPUs come to a halt.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod

from uhyve.errors import BreakpointError
from uhyve.gdb_policy import _ASKED, Accept, Decision, GdbPolicy, Refuse, _is_in
from uhyve.hermit_tasks import HermitTasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from uhyve.breakpoint import Breakpoint, Condition
    from uhyve.debugger import Debugger
    from uhyve.gdb_policy import BreakpointRequest, ThreadInfo
    from uhyve.stop import Stop

__all__ = [
    "AfterHits",
    "AnyOf",
    "Combined",
    "Conditions",
    "EveryNth",
    "HermitTasks",
    "InFunction",
    "KeepOut",
    "LogAndContinue",
    "OncePerVcpu",
    "OnlyVcpu",
    "StopOnFailure",
]


class _HitPolicy(GdbPolicy):
    """Decides about hits alone."""

    def on_stop(self, stop: Stop) -> Decision | None:
        """Reports what is no hit, and hits that ``wants()`` wants."""
        return Decision.REPORT if not _is_hit(stop) or self.wants(stop) else Decision.RESUME

    @abstractmethod
    def wants(self, stop: Stop) -> bool:
        """Whether a hit is reported."""


class LogAndContinue(_HitPolicy):
    """Gives each hit as a line of text to ``log`` and lets the guest go on.

    >>> from types import SimpleNamespace as Fake
    >>> LogAndContinue().on_stop(Fake(reason="breakpoint", vcpu=1)).name
    namespace(reason='breakpoint', vcpu=1)
    'RESUME'
    """

    def __init__(self, log: Callable[[str], object] = print) -> None:
        self._log = log

    def wants(self, stop: Stop) -> bool:
        """Logs, and never wants."""
        self._log(str(stop))
        return False


class OnlyVcpu(_HitPolicy):
    """Reports the hits of one vCPU.

    >>> from types import SimpleNamespace as Fake
    >>> policy = OnlyVcpu(1)
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=number)).name for number in (0, 1, 2)]
    ['RESUME', 'REPORT', 'RESUME']
    """

    def __init__(self, vcpu: int) -> None:
        self._vcpu = vcpu

    def wants(self, stop: Stop) -> bool:
        """Whether it is that vCPU's."""
        return stop.vcpu == self._vcpu


class OncePerVcpu(_HitPolicy):
    """Reports the first hit of each vCPU.

    >>> from types import SimpleNamespace as Fake
    >>> policy = OncePerVcpu()
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=number)).name for number in (0, 0, 1)]
    ['REPORT', 'RESUME', 'REPORT']
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def wants(self, stop: Stop) -> bool:
        """Whether the vCPU has not been seen."""
        is_new = stop.vcpu not in self._seen
        self._seen.add(stop.vcpu)
        return is_new


class AfterHits(_HitPolicy):
    """Reports hits from the ``count``-th on.

    >>> from types import SimpleNamespace as Fake
    >>> policy = AfterHits(3)
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=0)).name for _ in range(4)]
    ['RESUME', 'RESUME', 'REPORT', 'REPORT']
    """

    def __init__(self, count: int) -> None:
        self._left = _positive("count", count)

    def wants(self, stop: Stop) -> bool:  # noqa: ARG002
        """Whether enough have gone by."""
        self._left = max(0, self._left - 1)
        return self._left == 0


class EveryNth(_HitPolicy):
    """Reports every ``n``-th hit: a sample.

    >>> from types import SimpleNamespace as Fake
    >>> policy = EveryNth(2)
    >>> [policy.on_stop(Fake(reason="watchpoint", vcpu=0)).name for _ in range(4)]
    ['RESUME', 'REPORT', 'RESUME', 'REPORT']
    """

    def __init__(self, n: int) -> None:
        self._n = _positive("n", n)
        self._count = 0

    def wants(self, stop: Stop) -> bool:  # noqa: ARG002
        """Whether it is the one in n."""
        self._count += 1
        return self._count % self._n == 0


class StopOnFailure(_HitPolicy):
    """Lets all hits pass but those in a function that a failing guest comes through (``word`` in its name).

    When a client attaches, breakpoints are set at those of ``places`` that the image has. The guest's end and crashes
    are always reported.

    >>> from types import SimpleNamespace as Fake
    >>> policy = StopOnFailure()
    >>> [policy.on_stop(Fake(reason="breakpoint", symbol=name)).name for name in ("main", "rust_begin_panic", None)]
    ['RESUME', 'REPORT', 'RESUME']
    """

    def __init__(
        self, word: str = "panic", places: Iterable[str] = ("rust_panic", "core::panicking::panic_fmt")
    ) -> None:
        self._word = word
        self._places = tuple(places)
        self._set: list[Breakpoint] = []

    def on_attach(self, client: str) -> None:  # noqa: ARG002
        """Sets the breakpoints that are not there."""
        there = {known.location for known in self._set if not known.deleted}
        for place in self._places:
            if place not in there:
                # Not every image has every one.
                with contextlib.suppress(BreakpointError):
                    self._set.append(self.debugger.breakpoint(place, name="failure"))

    def wants(self, stop: Stop) -> bool:
        """Whether it is in such a function."""
        return stop.symbol is not None and self._word in stop.symbol


class Conditions(GdbPolicy):
    """Puts conditions on the breakpoints that gdb sets, by the function that they are in.

    ``conditions`` maps names, in which ``*`` and ``?`` stand for any characters, to text in the language of
    ``uhyve.condition`` or to callables, as for ``Debugger.breakpoint()``.

    >>> from uhyve.gdb_policy import BreakpointRequest
    >>> policy = Conditions({"malloc": "arg0 > 4096"})
    >>> policy.on_insert(BreakpointRequest("breakpoint", 0x1004, symbol="malloc+0x4"))
    Accept(condition='arg0 > 4096', name=None, ignore=0, vcpu=None)
    >>> policy.on_insert(BreakpointRequest("breakpoint", 0x2000, symbol="free"))
    """

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        self._conditions = dict(conditions)

    def on_insert(self, request: BreakpointRequest) -> Accept | None:
        """The condition of the first name that fits."""
        fitting = (condition for pattern, condition in self._conditions.items() if request.is_in(pattern))
        condition = next(fitting, None)
        return None if condition is None else Accept(condition)


class KeepOut(GdbPolicy):
    """Refuses breakpoints in functions of these names, in which ``*`` and ``?`` stand for any characters.

    >>> from uhyve.gdb_policy import BreakpointRequest
    >>> KeepOut("*::interrupts::*").on_insert(BreakpointRequest("breakpoint", 0x1000, symbol="hermit::interrupts::on"))
    Refuse(reason='hermit::interrupts::on is off limits')
    """

    def __init__(self, *patterns: str) -> None:
        self._patterns = patterns

    def on_insert(self, request: BreakpointRequest) -> Refuse | None:
        """A refusal, if one of the names fits."""
        is_refused = any(request.is_in(pattern) for pattern in self._patterns)
        return Refuse(f"{request.symbol} is off limits") if is_refused else None


class _Several(GdbPolicy):
    """Several policies as one. Subclasses say how they decide about stops."""

    def __init__(self, *policies: GdbPolicy) -> None:
        self._policies = policies

    def on_remove(self, request: BreakpointRequest) -> None:
        """All hear of it."""
        for policy in self._policies:
            policy.on_remove(request)

    def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
        """Those of the first policy that has its own."""
        chosen = next((policy for policy in self._policies if "threads" in policy._asked()), None)
        return super().threads(debugger) if chosen is None else chosen.threads(debugger)

    def on_attach(self, client: str) -> None:
        """All hear of it."""
        for policy in self._policies:
            policy.on_attach(client)

    def on_detach(self, client: str) -> None:
        """All hear of it."""
        for policy in self._policies:
            policy.on_detach(client)

    def on_disconnect(self, client: str) -> Decision | None:
        """The first decision that is no report; all are asked."""
        return _first([policy.on_disconnect(client) for policy in self._policies])

    def monitor(self, command: str, arguments: str) -> str | None:
        """The first policy's answer that has one; its own commands come first."""
        answer = super().monitor(command, arguments)
        answers = (policy.monitor(command, arguments) for policy in self._policies)
        return answer if answer is not None else next((found for found in answers if found is not None), None)

    def callables(self) -> Mapping[str, Callable[..., object]]:
        """Those of all policies; of one name, the first's."""
        found: dict[str, Callable[..., object]] = dict(super().callables())
        for policy in reversed(self._policies):
            found |= policy.callables()
        return found

    def _bind(self, debugger: Debugger) -> None:
        super()._bind(debugger)
        for policy in self._policies:
            policy._bind(debugger)

    def _asked(self) -> set[str]:
        # What a class of this module overrides only hands on.
        own = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        changed = {name for name in _ASKED if getattr(type(self), name) is not getattr(own, name) or name in vars(self)}
        if self._overrides("on_hit") or self._marked("_hit_patterns"):
            changed.add("on_insert")
        if super()._commands():
            changed.add("monitor")
        return changed.union(*(policy._asked() for policy in self._policies))

    def _wishes(self, request: BreakpointRequest) -> list[Accept | Refuse]:
        parts = [policy for policy in self._policies if "on_insert" in policy._asked()]
        return [*super()._wishes(request), *(wish for policy in parts for wish in policy._wishes(request))]

    def _commands(self) -> dict[str, Callable[[str], str | None]]:
        found: dict[str, Callable[[str], str | None]] = {}
        for policy in reversed(self._policies):
            found |= policy._commands()
        return found | super()._commands()


class Combined(_Several):
    """Asks several policies about a stop, in turn; the first that does not say ``Decision.REPORT`` decides.

    A hit is reported that all of them would report; one that an earlier policy passes over is not shown to later ones.
    Of the rest, each has its part: all hear of clients, all have their ``monitor`` commands, what any of them wishes
    for a breakpoint holds, and the first with threads of its own gives the threads.

    >>> from types import SimpleNamespace as Fake
    >>> policy = Combined(OnlyVcpu(0), EveryNth(2))
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=number)).name for number in (0, 1, 0, 0)]
    ['RESUME', 'RESUME', 'REPORT', 'RESUME']
    """

    def on_stop(self, stop: Stop) -> Decision | None:
        """The first decision that is no report."""
        for policy in self._policies:
            decision = policy.on_stop(stop)
            if decision not in (None, Decision.REPORT):
                return decision
        return Decision.REPORT


class AnyOf(_Several):
    """Reports a stop that at least one of several policies would report; all are asked about each.

    Otherwise the first decides. All else is as for ``Combined``.

    >>> from types import SimpleNamespace as Fake
    >>> policy = AnyOf(OncePerVcpu(), EveryNth(3))
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=number)).name for number in (0, 0, 0, 1, 1)]
    ['REPORT', 'RESUME', 'REPORT', 'REPORT', 'RESUME']
    """

    def on_stop(self, stop: Stop) -> Decision | None:
        """A report, if there is one among the decisions."""
        decisions = [policy.on_stop(stop) for policy in self._policies]
        is_wanted = any(decision in (None, Decision.REPORT) for decision in decisions)
        return Decision.REPORT if is_wanted or not decisions else decisions[0]


class InFunction(_Several):
    """Lets a policy decide about the hits in a function, and about gdb's breakpoints there; it is not asked of others.

    ``pattern`` is the function's name; ``*`` and ``?`` stand for any characters.

    >>> from types import SimpleNamespace as Fake
    >>> policy = InFunction("malloc", EveryNth(2))
    >>> [policy.on_stop(Fake(reason="breakpoint", symbol=name)).name for name in ("malloc", "free", "malloc", "malloc")]
    ['RESUME', 'REPORT', 'REPORT', 'RESUME']
    """

    def __init__(self, pattern: str, policy: GdbPolicy) -> None:
        super().__init__(policy)
        self._pattern = pattern

    def on_stop(self, stop: Stop) -> Decision | None:
        """The policy's decision, if it is a hit in the function."""
        is_its = not _is_hit(stop) or _is_in(stop.symbol, self._pattern)
        return self._policies[0].on_stop(stop) if is_its else Decision.REPORT

    def on_remove(self, request: BreakpointRequest) -> None:
        """Hands on what is in the function."""
        if request.is_in(self._pattern):
            super().on_remove(request)

    def _wishes(self, request: BreakpointRequest) -> list[Accept | Refuse]:
        return super()._wishes(request) if request.is_in(self._pattern) else [Accept()]


def _is_hit(stop: Stop) -> bool:
    return stop.reason in ("breakpoint", "watchpoint")


def _first(decisions: list[Decision | None]) -> Decision:
    """The first that is no report."""
    return next((decision for decision in decisions if decision not in (None, Decision.REPORT)), Decision.REPORT)


def _positive(what: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{what} is {number}; it must be 1 or more")
    return number
