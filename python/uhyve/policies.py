"""Ready policies for a server for gdb, and how to combine them.

Each decides about stops; ``Combined`` asks several, and the first that does not say "report" decides::

    policy = Combined(OnlyVcpu(0), AfterHits(10))  # of vCPU 0, and not its first nine breakpoint hits
    server = dbg.serve_gdb(policy=policy)

Only stops by breakpoints and watchpoints are passed over: steps, interrupts, the guest's end and crashes are reported.
"""

from __future__ import annotations

from abc import abstractmethod

from uhyve.gdb_policy import Decision, GdbPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from uhyve.stop import Stop

__all__ = ["AfterHits", "Combined", "EveryNth", "LogAndContinue", "OncePerVcpu", "OnlyVcpu", "StopOnFailure"]


class _HitPolicy(GdbPolicy):
    """Decides about hits alone."""

    def on_stop(self, stop: Stop) -> Decision:
        """Reports what is no hit, and hits that ``wants()`` wants."""
        is_hit = stop.reason in ("breakpoint", "watchpoint")
        return Decision.REPORT if not is_hit or self.wants(stop) else Decision.RESUME

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
    """Lets all hits pass but those in a function that a failing guest comes through (``panic`` in its name).

    With a breakpoint at the guest's panic handler, only that is reported; the guest's end and crashes always are.

    >>> from types import SimpleNamespace as Fake
    >>> policy = StopOnFailure()
    >>> [policy.on_stop(Fake(reason="breakpoint", symbol=name)).name for name in ("main", "rust_begin_panic", None)]
    ['RESUME', 'REPORT', 'RESUME']
    """

    def __init__(self, word: str = "panic") -> None:
        self._word = word

    def wants(self, stop: Stop) -> bool:
        """Whether it is in such a function."""
        return stop.symbol is not None and self._word in stop.symbol


class Combined(GdbPolicy):
    """Asks several policies about a stop, in turn; the first that does not say ``Decision.REPORT`` decides.

    >>> from types import SimpleNamespace as Fake
    >>> policy = Combined(OnlyVcpu(0), EveryNth(2))
    >>> [policy.on_stop(Fake(reason="breakpoint", vcpu=number)).name for number in (0, 1, 0, 0)]
    ['RESUME', 'RESUME', 'REPORT', 'RESUME']
    """

    def __init__(self, *policies: GdbPolicy) -> None:
        self._policies = policies

    def on_stop(self, stop: Stop) -> Decision:
        """The first decision that is no report."""
        for policy in self._policies:
            decision = policy.on_stop(stop)
            if decision not in (None, Decision.REPORT):
                return decision
        return Decision.REPORT

    def monitor(self, command: str, arguments: str) -> str | None:
        """The first policy's answer that has one."""
        for policy in self._policies:
            answer = policy.monitor(command, arguments)
            if answer is not None:
                return answer
        return super().monitor(command, arguments)


def _positive(what: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{what} is {number}; it must be 1 or more")
    return number
