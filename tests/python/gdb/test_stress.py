"""Random sessions of a client and Python together on several vCPUs, with a guest that counts all that happens.

The client is the tests' own, which says all that the protocol has, or the real gdb.

What either was told must agree with the guest's own counts: no stop is lost, reported twice or stale (``ledger.py``).
``UHYVE_STRESS_SEED`` and ``UHYVE_STRESS_SECONDS`` (of each back end and number of vCPUs) choose other sessions; a
failure names its seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytest

from gdb.gdb import DebuggerError, DebuggerTimeoutError, Gdb
from gdb.ledger import Interest, Ledger
from gdb.rsp import Rsp, RspTimeoutError
from uhyve import Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from uhyve import Breakpoint, Debugger, Hit, Stop
    from uhyve.gdb_server import GdbServer

pytestmark = [pytest.mark.vm, pytest.mark.flaky(reruns=0)]

SECONDS = float(os.environ.get("UHYVE_STRESS_SECONDS", "18"))
SEED = int(os.environ.get("UHYVE_STRESS_SEED", "4"))
GDB_EVERY = int(os.environ.get("UHYVE_STRESS_GDB", "40"))
"""One session in so many is the real gdb's."""
SOON = 30.0
RSI, REMAINDER, EQUAL, END = "260004", "08", "13", "27"
"""Of gdb's agent expressions: a register, the operators, the end."""


def remainder_is(divisor: int, rest: int) -> bytes:
    """``$rsi % divisor == rest`` as gdb would send it."""
    return bytes.fromhex(f"{RSI}22{divisor:02x}{REMAINDER}22{rest:02x}{EQUAL}{END}")


class Session(ABC):
    """One guest, its ledger, and breakpoints of Python's; a subclass has the client."""

    def __init__(self, dbg: Debugger, server: GdbServer, chance: random.Random) -> None:
        self.dbg, self.server, self.chance = dbg, server, chance
        self.cpus = len(dbg.vcpus)
        self.book = Ledger(dbg)
        self.number = dbg.stop.number
        self.called = [0] * self.cpus
        self.observers = [
            dbg.breakpoint("event", condition="False"),
            dbg.breakpoint("event_serial", condition=self.call),
        ]
        self.toggled: list[tuple[Breakpoint, Interest]] = []
        for place in ("event", "event_serial"):
            for enabled in (True, False, False):
                self.python_breakpoint(place, enabled)

    def call(self, hit: Hit) -> None:
        self.called[hit.vcpu] += 1

    def python_breakpoint(self, place: str, enabled: bool) -> None:
        divisor, vcpu = self.chance.randrange(5, 40), self.chance.choice([None, None, self.cpus - 1])
        rest = self.chance.randrange(divisor)
        condition: Any = f"arg1 % {divisor} == {rest}"
        if self.chance.random() < 0.5:
            condition = lambda hit: hit.arg(1) % divisor == rest  # noqa: E731
        made = self.dbg.breakpoint(place, condition=condition, vcpu=vcpu, enabled=enabled)

        def wants(cpu: int, number: int) -> bool:
            return number % divisor == rest and vcpu in (None, cpu)

        interest = self.book.add(place, wants, enabled=enabled)
        if not enabled:
            self.toggled.append((made, interest))

    def toggle(self, *, running: bool) -> None:
        """Switches one of Python's own, whose change is in force from some moment of the window."""
        made, interest = self.chance.choice(self.toggled)
        # Disabled it may be before it is known to be, and enabled as well.
        self.book.change(interest, interest.enabled, running=running)
        made.enabled = not made.enabled
        self.book.change(interest, made.enabled, running=running)

    def note(self, *, exactly: bool = True) -> Stop:
        """The world has stopped: enters it in the book. Unless ``exactly``, the client may have had stops by itself."""
        stop = self.dbg.stop
        assert stop.number == self.number + 1 or (not exactly and stop.number > self.number), (
            "too many or too few stops"
        )
        self.number = stop.number
        assert stop.reason in ("breakpoint", "watchpoint", "step", "interrupt", "exit"), stop
        report = None
        if stop.reason in ("breakpoint", "watchpoint"):
            registers = self.dbg.vcpus[stop.vcpu].registers
            assert registers.rip == stop.pc
            assert registers.rdi == stop.vcpu
            place = next(name for name in ("event", "event_serial", "event_written") if self.at(name) == stop.pc)
            report = (place, stop.vcpu, registers.rsi)
        self.book.look(report)
        return stop

    def at(self, name: str) -> int:
        return self.book.addresses[name]

    def finish(self, early: bool, count: int) -> None:
        """The guest has ended: its counts and ours agree."""
        if not early:
            assert all(self.book.total(place) == self.cpus * count for place in ("event", "event_serial"))
        for observer, place in zip(self.observers, ("event", "event_serial"), strict=True):
            done = self.book.total(place)
            standing = sum(stands for _, stands in self.book.numbers(place).values())
            assert done <= observer.reached <= done + standing
        assert sum(self.called) == self.observers[1].reached
        assert [observer.hits for observer in self.observers] == [0, 0]

    def run(self) -> Iterator[Stop]:
        """The stops, to the guest's end."""
        while True:
            stop = self.go()
            yield stop
            if stop.reason == "exit":
                return
            self.disturb()

    @abstractmethod
    def go(self) -> Stop:
        """Lets the guest run to its next stop."""

    @abstractmethod
    def disturb(self) -> None:
        """What else is done at a stop."""

    @abstractmethod
    def close(self) -> None:
        """Ends the client."""


class RspSession(Session):
    """The client is the tests' own: it says all that the protocol has."""

    def __init__(self, dbg: Debugger, server: GdbServer, chance: random.Random) -> None:
        super().__init__(dbg, server, chance)
        self.own: dict[tuple[str, int], Interest] = {}
        self.conditions: dict[tuple[str, int], list[bytes]] = {}
        self.attach()

    def attach(self) -> None:
        self.stub = Rsp.tcp("127.0.0.1", int(self.server.address.rpartition(":")[2]))
        self.stub.handshake()

    def close(self) -> None:
        self.stub.close()

    # What the client sets.

    def packet(self, key: tuple[str, int]) -> dict[str, Any]:
        place, number = key
        watches = number == 2
        return {
            "address": self.dbg.symbol("word") if watches else self.at(place),
            "type": number,
            "kind": 8 if watches else 1,
        }

    def change_own(self) -> None:
        key = self.chance.choice([("event", 0), ("event_serial", 0), ("event", 1), ("event_written", 2)])
        if key in self.own:
            self.stub.remove(**self.packet(key))
            self.book.change(self.own.pop(key), False)
            return
        divisor = self.chance.randrange(3, 20)
        rest = self.chance.randrange(divisor)
        conditions = self.conditions[key] = [] if key[1] == 2 else [remainder_is(divisor, rest)]
        self.stub.insert(**self.packet(key), conditions=conditions)
        self.own[key] = self.book.add(key[0], lambda _, number: not conditions or number % divisor == rest)

    # How it runs.

    def wait(self, timeout: float = SOON) -> Stop:
        reply = self.stub.wait(timeout)
        stop = self.note()
        if reply.thread is not None:
            assert int(reply.thread.rpartition(".")[2], 16) == stop.vcpu + 1
            assert self.stub.threads()[0] == f"p1.{stop.vcpu + 1:x}"
        assert (reply.kind == "W") == (stop.reason == "exit")
        return stop

    def step(self, actions: str) -> Stop:
        """A step, of a vCPU that may sleep."""
        self.stub.resume(actions)
        try:
            stop = self.wait(0.2)
        except RspTimeoutError:
            self.stub.interrupt()
            stop = self.wait()
        if ";" not in actions:
            assert stop.vcpu == int(actions.rpartition("p1.")[2], 16) - 1, "a stop of a vCPU that held"
        return stop

    def go(self) -> Stop:
        thread = f"p1.{self.chance.randrange(self.cpus) + 1:x}"
        match self.chance.randrange(10):
            case 0:
                return self.step(f"s:{thread}")
            case 1:
                return self.step(f"s:{thread};c")
            case 2:
                start = self.chance.choice(["event", "event_serial"])
                return self.step(f"r{self.at(start):x},{self.at('written_counted'):x}:{thread};c")
            case 3:
                return self.step_over(thread)
            case 4:
                return self.leave_and_come_back()
            case 5:
                self.stub.resume()
                with contextlib.suppress(VmStateError):
                    self.toggle(running=True)
                self.stub.interrupt()
                return self.wait()
            case 6:
                self.stub.resume()
                storm = [threading.Thread(target=self.dbg.interrupt) for _ in range(2)]
                for thread_ in storm:
                    thread_.start()
                for _ in range(self.chance.randrange(4)):
                    self.stub.interrupt()
                for thread_ in storm:
                    thread_.join()
                self.stub.interrupt()
                return self.wait()
            case _:
                self.stub.resume()
                time.sleep(self.chance.random() ** 3 / 30)
                self.stub.interrupt()
                return self.wait()

    def step_over(self, thread: str) -> Stop:
        """As gdb does it: without its breakpoints, the others held. Watchpoints gdb leaves; others may not."""
        own = {int(thread[3:], 16) - 1}
        keeps = self.chance.random() < 0.5
        lifted = {key: interest for key, interest in self.own.items() if key[1] != 2 or not keeps}
        for key, interest in lifted.items():
            self.stub.remove(**self.packet(key))
            self.book.change(interest, False, vcpus=own)
        stop = self.step(f"s:{thread}")
        if stop.reason != "exit":
            for key, interest in lifted.items():
                self.stub.insert(**self.packet(key), conditions=self.conditions[key])
                self.book.change(interest, True, vcpus=own)
        return stop

    def leave_and_come_back(self) -> Stop:
        """Detaches, and attaches to a guest that runs, or has stopped meanwhile."""
        for interest in self.own.values():
            self.book.change(interest, False, running=True)
        self.own.clear()
        self.stub.detach()
        self.stub.close()
        time.sleep(self.chance.random() / 100)
        self.attach()
        return self.note()

    def look_around(self) -> None:
        """All registers and stacks, twice: nothing moves."""
        seen = []
        for _ in range(2):
            for thread in sorted(self.stub.threads()):
                self.stub.select_thread(thread)
                stack = int.from_bytes(bytes.fromhex(self.stub.request("p7").decode()), "little")
                seen.append((self.stub.request("g"), self.stub.read_memory(stack, 64)))
        assert seen[: self.cpus] == seen[self.cpus :]

    def disturb(self) -> None:
        if self.chance.random() < 0.2:
            self.toggle(running=False)
        if self.chance.random() < 0.15:
            self.change_own()
        if self.chance.random() < 0.1:
            self.look_around()


class GdbSession(Session):
    """The client is the real gdb. It steps over its breakpoints by itself, in stops that only it sees."""

    def __init__(self, dbg: Debugger, server: GdbServer, chance: random.Random) -> None:
        super().__init__(dbg, server, chance)
        self.gdb = Gdb()
        self.gdb.console(f"target remote {server.address}")
        divisor = chance.randrange(3, 20)
        self.gdb.console(f"break *(char *)event if $rsi % {divisor} == 1")
        self.own = [self.book.add("event", lambda _, number: number % divisor == 1)]
        self.gdb.console("break *(char *)event_serial if $rdi == 0 && $rsi % 7 == 2")
        self.own.append(self.book.add("event_serial", lambda vcpu, number: vcpu == 0 and number % 7 == 2))

    def close(self) -> None:
        self.gdb.close()

    def go(self) -> Stop:
        match self.chance.randrange(6):
            case 0:
                self.gdb.console(f"set scheduler-locking {self.chance.choice(['on', 'off', 'step'])}")
                self.gdb.console(f"thread {self.chance.randrange(self.cpus) + 1}")
                self.resume("-exec-step-instruction", 0.3)
                # Of a guest that has ended gdb can't say.
                with contextlib.suppress(DebuggerError):
                    self.gdb.console("set scheduler-locking replay")
            case 1:
                assert self.gdb.console("thread apply all bt 3").count("Thread ") >= self.cpus
                self.resume("-exec-continue --all", self.chance.random() ** 2 / 20)
            case _:
                self.resume("-exec-continue --all", self.chance.random() ** 2 / 20)
        return self.note(exactly=False)

    def note(self, *, exactly: bool = True) -> Stop:
        """Where a vCPU stands at a breakpoint of gdb's, which it has come to when it was interrupted, gdb takes it for
        one that was reported, and steps over it.
        """
        stop = super().note(exactly=exactly)
        for interest in self.own:
            standing = {vcpu for vcpu, (_, stands) in self.book.numbers(interest.place).items() if stands}
            self.book.change(interest, True, vcpus=standing)
        return stop

    def resume(self, command: str, patience: float) -> None:
        """Lets the guest run for so long, or to a stop of its own."""
        self.gdb.resume(command)
        try:
            self.gdb.wait_stop(patience)
        except DebuggerTimeoutError:
            with contextlib.suppress(DebuggerError):
                self.gdb.interrupt()
            self.gdb.wait_stop(SOON)

    def disturb(self) -> None:
        if self.chance.random() < 0.2:
            self.toggle(running=False)


def one_session(guest: Callable[..., Path], seed: str, cpus: int, kind: type[Session]) -> Session:
    """A session from the guest's entry to its end."""
    chance = random.Random(seed)
    count, early = chance.choice([30, 60, 120, 240]), chance.random() < 0.3
    if kind is GdbSession:
        # Its stops take ten times as long.
        count = min(count, 40)
    defines = [f"COUNT={count}", *["EARLY"] * early, *["WITHOUT_NAPS"] * (chance.random() < 0.5)]
    with Vm(guest("events", defines=defines), cpus=cpus).debug() as dbg, dbg.serve_gdb() as server:
        session = kind(dbg, server, chance)
        try:
            for _ in session.run():
                pass
            session.finish(early, count)
        finally:
            session.close()
    return session


@pytest.mark.real_gdb
@pytest.mark.timeout(SECONDS * 2 + 180)
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_random_sessions_lose_repeat_and_invent_no_stop(guest: Callable[..., Path], cpus: int, backend: str) -> None:
    end = time.monotonic() + SECONDS
    rounds = stops = judged = 0
    while rounds < 2 or time.monotonic() < end:
        seed = f"{SEED + rounds} {backend} {cpus}"
        try:
            session = one_session(guest, seed, cpus, GdbSession if rounds % GDB_EVERY == 0 else RspSession)
        except BaseException:
            sys.stderr.write(f"session {rounds} failed; again, alone: UHYVE_STRESS_SEED={SEED + rounds}\n")
            raise
        rounds, stops, judged = rounds + 1, stops + session.book.stops, judged + session.book.judged
    print(f"{backend}, {cpus} vCPUs: {rounds} sessions, {stops} stops, {judged} passages judged, seeds from {SEED}")
