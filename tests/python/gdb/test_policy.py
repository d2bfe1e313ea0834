"""Policies in Python beside the real gdb: decisions, threads, monitor commands, lost clients, and what they raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gdb.rsp import ErrorReplyError
from uhyve.errors import VmStateError
from uhyve.gdb_policy import (
    Accept,
    BreakpointRequest,
    Decision,
    GdbPolicy,
    ThreadInfo,
    hit_hook,
    monitor_command,
)
from uhyve.gdb_server import Bridge
from uhyve.policies import AnyOf, Combined, Conditions, EveryNth, InFunction, KeepOut, OnlyVcpu, StopOnFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gdb.conftest import Served
    from uhyve import Debugger, Hit, Stop

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


BRIDGED = ("on_stop", "on_insert", "on_remove", "threads", "on_attach", "on_detach", "on_disconnect", "monitor")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policy's methods for which the server has entered Python, in the order of the calls."""
    calls: list[str] = []

    def counted(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(bridge: Bridge, *arguments: object) -> object:
            calls.append(name)
            return method(bridge, *arguments)

        return call

    for name in BRIDGED:
        monkeypatch.setattr(Bridge, name, counted(name, getattr(Bridge, name)))
    return calls


def _session(served: Served) -> None:
    """All that a client can make a policy hear of."""
    client = served.rsp()
    address = served.dbg.symbol("work")
    for _ in range(3):
        client.expect_ok(f"Z0,{address:x},1")
        client.cont(30)
        client.expect_ok(f"z0,{address:x},1")
    client.threads()
    client.monitor("vm")
    client.detach()
    client.close()
    served.dbg.interrupt()
    served.dbg.wait(30)
    served.rsp().close()


@pytest.mark.parametrize("policy", [GdbPolicy(), Combined(GdbPolicy(), GdbPolicy()), AnyOf()])
def test_methods_that_are_not_overridden_never_enter_python(
    serve: Callable[..., Served], entered: list[str], policy: GdbPolicy
) -> None:
    served = serve("loop", defines=("COUNT=1000000",), policy=policy)

    _session(served)

    assert entered == []


def test_only_the_methods_that_are_overridden_enter_python_and_each_once_an_event(
    serve: Callable[..., Served], entered: list[str], wait_until: Callable[..., bool]
) -> None:
    class Hears(GdbPolicy):
        def on_insert(self, request: BreakpointRequest) -> Accept | None:
            return None

        def on_remove(self, request: BreakpointRequest) -> None:
            pass

        def on_detach(self, client: str) -> None:
            pass

        def on_disconnect(self, client: str) -> Decision | None:
            return None

    served = serve("loop", defines=("COUNT=1000000",), policy=Hears())

    _session(served)

    assert wait_until(lambda: served.server.client is None)
    assert entered == ["on_insert", "on_detach", "on_remove", "on_disconnect"]


def test_policy_is_asked_once_for_a_breakpoint_that_gdb_sets_again_at_each_stop(serve: Callable[..., Served]) -> None:
    requests: list[tuple[str, BreakpointRequest]] = []

    class Watching(GdbPolicy):
        def on_insert(self, request: BreakpointRequest) -> Accept:
            requests.append(("set", request))
            return Accept(name="mine")

        def on_remove(self, request: BreakpointRequest) -> None:
            requests.append(("gone", request))

    served = serve("loop", policy=Watching())

    shown = served.script(
        *(
            "hbreak *work",
            "continue",
            "continue",
            "monitor breakpoints",
            "delete",
            "break *work if $rdi == 5",
            "continue",
        )
    )

    work = served.dbg.symbol("work")
    hardware = BreakpointRequest("hardware", work, 1, False, "work")
    software = BreakpointRequest("breakpoint", work, 1, True, "work")
    assert requests == [("set", hardware), ("set", software), ("gone", hardware), ("gone", software)]
    assert "mine" in shown.output + shown.errors


def test_refused_breakpoint_is_not_set_and_its_reason_is_shown(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=KeepOut("wo*"))
    client = served.rsp()
    address = served.dbg.symbol("work")

    with pytest.raises(ErrorReplyError):
        client.request(f"Z0,{address:x},1")

    assert "work is off limits" in client.monitor("breakpoints")
    assert client.cont(30).kind == "W"


def test_client_that_reads_errors_is_told_in_words_why_a_breakpoint_is_refused(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=KeepOut("wo*"))
    client = served.rsp("multiprocess+;swbreak+;hwbreak+;vContSupported+;error-message+")
    address = served.dbg.symbol("work")

    client.send(f"Z0,{address:x},1")

    reply = client.receive()
    assert reply.startswith(b"E.uhyve: the policy refuses"), reply
    assert reply.endswith(b"work is off limits"), reply
    client.expect_ok(f"Z0,{served.dbg.symbol('guest_main'):x},1")


def test_gdb_says_that_it_can_not_insert_a_refused_breakpoint(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=KeepOut("work"))

    shown = served.script(
        "break *work", "python exec(\"try: gdb.execute('continue')\\nexcept gdb.error as error: print(error)\")"
    )

    assert "Cannot insert breakpoint 1" in shown.output + shown.errors
    assert "exited" not in shown.output


def test_conditions_of_a_policy_hold_beside_gdb_s_own_and_cost_no_stop(serve: Callable[..., Served]) -> None:
    policy = Combined(Conditions({"work": "arg0 > 10"}), Conditions({"w*": lambda hit: hit.arg(0) % 7 == 0}))
    served = serve("loop", policy=policy)

    shown = served.script("break *work if $rdi > 20", "continue", "print $rdi", "continue", "print $rdi")

    assert "$1 = 21" in shown.output
    assert "$2 = 28" in shown.output
    end = served.dbg.wait(30)
    assert end.number == 5, "entry, a hit, the step over it, a hit, the end"


def test_hit_hooks_decide_at_the_breakpoints_of_their_functions(serve: Callable[..., Served]) -> None:
    class Hooked(GdbPolicy):
        seen: list[int]

        @hit_hook("work", "other")
        def hundredth(self, hit: Hit) -> bool:
            self.seen.append(hit.arg(0))
            return hit.arg(0) == 100

        @hit_hook("nothing_*")
        def never(self, hit: Hit) -> bool:
            raise AssertionError("another function's")

    policy = Hooked()
    policy.seen = []
    served = serve("loop", policy=policy)
    client = served.rsp()
    client.expect_ok(f"Z0,{served.dbg.symbol('work'):x},1")

    stop = client.cont(30)

    assert stop.kind == "T"
    assert served.dbg.registers.rdi == 100
    assert policy.seen == list(range(101))


def test_on_hit_that_raises_stops_the_guest_is_shown_and_is_raised_once(serve: Callable[..., Served]) -> None:
    class Failing(GdbPolicy):
        def on_hit(self, hit: Hit) -> bool:
            raise LookupError(f"no idea of {hit.arg(0)}")

    served = serve("loop", policy=Failing())
    client = served.rsp()
    client.expect_ok(f"Z0,{served.dbg.symbol('work'):x},1")

    stop = client.cont(30)

    assert stop.kind == "T"
    assert "LookupError: no idea of 0" in client.console
    with pytest.raises(LookupError, match="no idea of 0") as caught:
        served.server.wait(0)
    assert any("breakpoint 1 on vCPU 0" in note for note in caught.value.__notes__)
    served.dbg.wait(0)


def test_exception_of_a_hit_is_kept_for_python_while_gdb_goes_on(serve: Callable[..., Served]) -> None:
    class Failing(GdbPolicy):
        def on_hit(self, hit: Hit) -> bool:
            if hit.arg(0) in (3, 5):
                raise LookupError(f"no idea of {hit.arg(0)}")
            return False

    served = serve("loop", policy=Failing())
    client = served.rsp()
    client.expect_ok(f"Z0,{served.dbg.symbol('work'):x},1")

    assert [client.cont(30).kind for _ in range(3)] == ["T", "T", "W"]

    for number in (3, 5):
        with pytest.raises(LookupError, match=f"no idea of {number}"):
            served.dbg.wait(0)
    served.server.wait(0)


@pytest.mark.parametrize("method", ["on_insert", "on_remove", "threads", "on_attach", "on_detach", "on_disconnect"])
def test_each_method_that_raises_leaves_the_guest_stopped_and_is_raised_in_python(
    serve: Callable[..., Served], wait_until: Callable[..., bool], method: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise LookupError(f"no idea of {method}")

    served = serve("loop", policy=type("Failing", (GdbPolicy,), {method: refuse})())
    work = served.dbg.symbol("work")

    client = served.rsp()
    if method == "on_insert":
        with pytest.raises(ErrorReplyError):
            client.request(f"Z0,{work:x},1")
    elif method == "on_remove":
        client.expect_ok(f"Z0,{work:x},1")
        client.cont(30)
        client.expect_ok(f"z0,{work:x},1")
        assert client.cont(30).kind == "T"
        assert "no idea of on_remove" in client.console
    elif method == "on_detach":
        client.detach()
    elif method == "on_disconnect":
        client.close()
    if method in ("on_insert", "threads", "on_attach"):
        assert f"no idea of {method}" in client.monitor("vm")

    assert wait_until(lambda: served.server.client is None or not method.endswith(("detach", "disconnect")))
    assert served.dbg.stop.reason == ("breakpoint" if method == "on_remove" else "entry")
    with pytest.raises(LookupError, match=f"no idea of {method}"):
        served.server.wait(0)


def test_monitor_command_that_raises_is_shown_and_raised_in_python(serve: Callable[..., Served]) -> None:
    class Failing(GdbPolicy):
        @monitor_command
        def broken(self, arguments: str) -> str:
            raise LookupError(arguments)

    served = serve("loop", policy=Failing())

    assert "LookupError: nothing" in served.rsp().monitor("broken nothing")

    with pytest.raises(LookupError, match="nothing"):
        served.server.wait(0)


@pytest.mark.parametrize(
    ("threads", "says"),
    [
        (lambda: [ThreadInfo(5, vcpu=0), ThreadInfo(5, vcpu=1)], "two threads have the id 5"),
        (lambda: [ThreadInfo(5, vcpu=2)], "of a vCPU that there is not"),
        (lambda: [ThreadInfo(0)], "gdb takes 1 to"),
        (lambda: [ThreadInfo(5, registers={"nonsense": 1})], "nonsense"),
        (lambda: [7], "'int' object has no attribute"),
    ],
)
def test_threads_that_gdb_can_not_have_are_an_error_and_the_vcpus_are_shown(
    serve: Callable[..., Served], threads: Callable[[], list[ThreadInfo]], says: str
) -> None:
    class Wrong(GdbPolicy):
        def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
            return threads()

    served = serve("smp", cpus=2, policy=Wrong())
    client = served.rsp()

    assert set(client.thread_names().values()) == {"vCPU 0", "vCPU 1"}
    with pytest.raises((ValueError, AttributeError), match=says):
        served.server.wait(0)


def test_default_threads_tell_what_each_vcpu_does(serve: Callable[..., Served]) -> None:
    class Same(GdbPolicy):
        def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
            return super().threads(debugger)

    for policy in (None, Same()):
        served = serve("loop", cpus=2, policy=policy)
        served.dbg.breakpoint("work", ignore=500)
        served.dbg.cont(30)

        shown = served.script("info threads").output

        assert '"vCPU 0" (stopped: breakpoint)' in shown
        assert '"vCPU 1" (halted)' in shown or '"vCPU 1" (running)' in shown


def test_threads_come_in_the_order_of_the_policy_but_the_stopped_one_first(serve: Callable[..., Served]) -> None:
    class Backwards(GdbPolicy):
        def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
            return [ThreadInfo(number + 10, vcpu=number) for number in (2, 0, 1)]

    served = serve("smp", cpus=3, policy=Backwards())
    served.dbg.breakpoint("tick", vcpu=1)
    served.dbg.cont(30)

    assert [thread.rpartition(".")[2] for thread in served.rsp().threads()] == ["b", "c", "a"]


def test_client_s_comings_and_goings_are_told(serve: Callable[..., Served], wait_until: Callable[..., bool]) -> None:
    class Listening(GdbPolicy):
        def __init__(self) -> None:
            self.heard: list[tuple[str, str]] = []

        def on_attach(self, client: str) -> None:
            self.heard.append(("attach", client))
            assert self.debugger.stop.reason in ("entry", "interrupt")

        def on_detach(self, client: str) -> None:
            self.heard.append(("detach", client))

        def on_disconnect(self, client: str) -> Decision:
            self.heard.append(("disconnect", client))
            return Decision.RESUME

    policy = Listening()
    served = serve("busy", policy=policy)

    served.rsp().detach()
    assert wait_until(lambda: served.dbg.running)
    served.rsp().close()
    assert wait_until(lambda: len(policy.heard) == 4)

    assert [what for what, _ in policy.heard] == ["attach", "detach", "attach", "disconnect"]
    assert all("127.0.0.1" in client for _, client in policy.heard)
    assert wait_until(lambda: served.dbg.running), "the guest runs on without its client"


def test_disconnect_may_end_the_vm(serve: Callable[..., Served], wait_until: Callable[..., bool]) -> None:
    class Ending(GdbPolicy):
        def on_disconnect(self, client: str) -> Decision:
            return Decision.END

    served = serve("busy", policy=Ending())

    served.rsp().close()

    assert served.server.wait(30)
    with pytest.raises(VmStateError):
        served.dbg.cont(1)


def test_step_decision_executes_one_instruction_and_asks_again(serve: Callable[..., Served]) -> None:
    class Stepping(GdbPolicy):
        def __init__(self) -> None:
            self.places: list[tuple[str, int]] = []

        def on_stop(self, stop: Stop) -> Decision:
            self.places.append((stop.reason, stop.pc))
            return Decision.STEP if len(self.places) < 4 else Decision.REPORT

    policy = Stepping()
    served = serve("steps", policy=policy)
    served.dbg.breakpoint("step_1", temporary=True)

    stop = served.rsp().cont(30)

    assert stop.kind == "T"
    assert [reason for reason, _ in policy.places] == ["breakpoint", "step", "step", "step"]
    places = [pc for _, pc in policy.places]
    assert sorted(set(places)) == places


def test_policy_for_one_function_leaves_other_breakpoints_alone(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=InFunction("work", AnyOf(EveryNth(4))))
    served.dbg.breakpoint("guest_main")
    work = served.dbg.breakpoint("work")
    client = served.rsp()

    client.cont(30)
    assert served.dbg.stop.symbol == "guest_main"
    client.cont(30)

    assert work.hits == 4


def test_stop_on_failure_sets_its_breakpoints_when_a_client_attaches(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=StopOnFailure("work", places=["work", "no_such_function"]))
    served.dbg.breakpoint("guest_main")

    stop = served.rsp().cont(30)

    assert stop.kind == "T"
    assert served.dbg.stop.symbol == "work"
    assert [(point.location, point.name) for point in served.dbg.breakpoints][1:] == [("work", "failure")]


def test_combined_policies_have_all_monitor_commands(serve: Callable[..., Served]) -> None:
    class First(GdbPolicy):
        @monitor_command
        def one(self, arguments: str) -> str:
            """the first"""
            return f"1 in {len(self.debugger.vcpus)}"

    class Second(GdbPolicy):
        @monitor_command
        def two(self, arguments: str) -> str:
            """the second"""
            return "2"

    served = serve("loop", policy=Combined(First(), AnyOf(Second())))
    client = served.rsp()

    assert client.monitor("one") == "1 in 1\n"
    assert client.monitor("two") == "2\n"
    assert "the first" in (listed := client.monitor("help"))
    assert "the second" in listed


def test_breakpoint_that_python_deletes_is_set_again_when_gdb_asks(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    client = served.rsp()
    place = f"0,{served.dbg.symbol('work'):x},1"
    client.expect_ok(f"Z{place}")
    client.cont(30)
    client.expect_ok(f"z{place}")
    served.dbg.breakpoints[0].delete()

    client.expect_ok(f"Z{place}")

    assert client.cont(30).kind == "T"


def test_monitor_condition_on_gdb_s_own_breakpoint_stays_when_gdb_sets_it_again(serve: Callable[..., Served]) -> None:
    served = serve("loop")

    shown = served.script("break *work", "continue", "monitor condition 1 arg0 == 9", "continue", "print $rdi")

    assert "$1 = 9" in shown.output


def test_combined_policies_report_what_all_want(serve: Callable[..., Served]) -> None:
    served = serve("loop", policy=Combined(OnlyVcpu(0), EveryNth(3)))
    client = served.rsp()
    work = served.dbg.breakpoint("work")

    client.cont(30)

    assert work.hits == 3
