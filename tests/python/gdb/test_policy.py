"""Policies in Python beside the real gdb: decisions, threads, monitor commands, lost clients, and what they raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve.gdb_policy import Decision, GdbPolicy, ThreadInfo, monitor_command
from uhyve.policies import Combined, EveryNth, OnlyVcpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gdb.conftest import Served
    from uhyve import Debugger, Stop

pytestmark = [pytest.mark.vm]


class Deciding(GdbPolicy):
    def __init__(self, decide: Callable[[Stop], Decision | None]) -> None:
        self.decide = decide
        self.seen: list[str] = []

    def on_stop(self, stop: Stop) -> Decision | None:
        self.seen.append(stop.reason)
        return self.decide(stop)


def test_policy_that_resumes_hides_hits_from_the_client(serve: Callable[..., Served]) -> None:
    policy = Deciding(lambda stop: Decision.RESUME if stop.reason == "breakpoint" else Decision.REPORT)
    served = serve("loop", policy=policy)
    client = served.rsp()
    served.dbg.breakpoint("work")

    stop = client.cont(30)

    assert stop.kind == "W"
    assert policy.seen.count("breakpoint") > 1
    assert policy.seen[-1] == "exit"


def test_policy_that_raises_is_shown_leaves_the_guest_stopped_and_is_raised_in_python(
    serve: Callable[..., Served],
) -> None:
    def refuse(stop: Stop) -> Decision:
        raise LookupError("no idea")

    served = serve("loop", policy=Deciding(refuse))
    client = served.rsp()
    served.dbg.breakpoint("work")

    stop = client.cont(30)

    assert stop.kind == "T"
    with pytest.raises(LookupError, match="no idea"):
        served.server.wait(0)


def test_policy_that_ends_the_vm_tells_the_client(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=Deciding(lambda stop: Decision.END))
    client = served.rsp()
    served.dbg.breakpoint("work")

    assert client.cont(30).kind == "X"


def test_threads_of_a_policy_are_what_the_client_sees(serve: Callable[..., Served]) -> None:
    class Tasks(GdbPolicy):
        def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
            yield ThreadInfo(100, "boot", "the boot CPU", vcpu=0)
            yield ThreadInfo(7, "sleeper", "asleep", vcpu=0, registers={"rip": 0x1234, "rsp": 0x5678})

    served = serve("smp", cpus=2, policy=Tasks())

    shown = served.script("info threads", "thread 2", "print $pc", "print $sp")

    assert '"boot" (the boot CPU)' in shown.output
    assert '"vCPU 1"' in shown.output, "a vCPU that the policy forgot"
    assert "0x1234" in shown.output
    assert "0x5678" in shown.output


def test_monitor_command_of_a_policy_is_listed_and_answers(serve: Callable[..., Served]) -> None:
    class Greeting(GdbPolicy):
        @monitor_command
        def hello(self, arguments: str) -> str:
            """greet somebody"""
            return f"hello {arguments}"

    served = serve("loop", policy=Greeting())

    shown = served.script("monitor hello world", "monitor help")

    said = shown.output + shown.errors
    assert "hello world" in said
    assert "greet somebody" in said


def test_methods_that_are_not_overridden_are_never_called(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("Python was entered")

    for name in ("on_stop", "threads", "on_attach", "on_detach", "on_disconnect", "monitor"):
        monkeypatch.setattr(GdbPolicy, name, refuse)
    served = serve("loop")

    served.script("info threads", "break work", "continue", "monitor vm", "detach")

    served.server.wait(0)


def test_combined_policies_report_what_all_want(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=Combined(OnlyVcpu(0), EveryNth(3)))
    client = served.rsp()
    work = served.dbg.breakpoint("work")

    client.cont(30)

    assert work.hits == 3
