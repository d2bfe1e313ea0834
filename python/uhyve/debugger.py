"""A debugger in Python: it decides where the guest stops, looks at it while it stands still, and lets it go on.

All vCPUs stop together and go on together. While they run, callbacks of breakpoints look at the vCPU that met one, with
the others running on. Whatever is raised in a callback is raised by the call that let the guest run.
"""

from __future__ import annotations

import time

from uhyve.breakpoint import Breakpoint, condition_parts, unsigned
from uhyve.errors import BreakpointError, TimeoutExpired, VmStateError
from uhyve.result import result_of, stats_of, text_of
from uhyve.stop import Frame, Stop, symbol_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Literal, Self, overload

    from uhyve import _core
    from uhyve._core import Machine, Memory, Registers
    from uhyve.breakpoint import Access, Condition
    from uhyve.errors import GuestCrashError
    from uhyve.gdb_policy import GdbPolicy
    from uhyve.gdb_server import GdbServer
    from uhyve.result import VmResult, VmStats
    from uhyve.vm import Vm
else:

    def overload(function):
        """Stands for ``typing.overload``."""
        return function


__all__ = ["Debugger", "Vcpu"]


class Debugger:
    """Controls one machine, from before its first instruction to its end. Made by ``Vm.debug()``.

    As a context manager it ends the machine, unless it has been detached::

        with uhyve.Vm("app").debug() as dbg:
            dbg.breakpoint("handle_request", condition="arg1 > 4096")
            stop = dbg.cont(timeout=5)
            print(stop, stop.frame.registers.rsi)

    Methods that need the guest to stand still raise ``VmStateError`` while it runs, and the other way round; all raise
    it after ``close()`` or ``detach()``.
    """

    def __init__(self, vm: Vm, machine: Machine) -> None:
        self._vm = vm
        self._machine = machine
        self._breakpoints: dict[int, Breakpoint] = {}
        self._stop: Stop | None = None
        self._reported = 0
        self._result: VmResult | None = None
        self._left: str | None = None
        self._servers: list[GdbServer] = []
        self._vcpus = tuple(Vcpu(machine, number) for number in range(machine.cpus))
        self._next_stop(None)

    # Running and stopping

    @overload
    def cont(self, timeout: float | None = None, wait: Literal[True] = True) -> Stop: ...  # noqa: D102
    @overload
    def cont(self, timeout: float | None = None, *, wait: Literal[False]) -> None: ...  # noqa: D102, F811
    def cont(self, timeout: float | None = None, wait: bool = True) -> Stop | None:  # noqa: F811
        """Lets all vCPUs run until the next stop, and returns it.

        After ``timeout`` seconds the guest is stopped, with ``"timeout"`` for a reason. With ``wait=False`` this
        returns None at once, and ``wait()`` gives the stop. ``KeyboardInterrupt`` stops the guest before it is raised.
        Raises what a callback raised, with the guest stopped at its breakpoint.
        """
        self._resume(None)
        return self._next_stop(timeout) if wait else None

    def step(self, count: int = 1, vcpu: int | None = None, timeout: float | None = None) -> Stop:
        """Executes ``count`` instructions on one vCPU while the others hold.

        ``vcpu`` is the one that the current stop is about if not given. Ends early at any other stop, after ``timeout``
        seconds too.
        """
        if count < 1:
            raise ValueError(f"count is {count}; a step is at least one instruction")
        # Of a guest that runs, `resume` says what is wrong.
        current = self._current()
        chosen = vcpu if vcpu is not None else current.vcpu if current is not None else 0
        deadline = None if timeout is None else time.monotonic() + timeout
        for _ in range(count):
            self._resume(chosen)
            stop = self._next_stop(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if stop.reason != "step":
                break
        return stop

    def step_line(self, count: int = 1, vcpu: int | None = None, timeout: float | None = None) -> Stop:
        """Steps to another source line, ``count`` times, into functions that have lines. Other vCPUs hold meanwhile.

        They run while a function without lines is called. Ends early at any other stop, after ``timeout`` seconds too.
        Where the code has no lines, this is a step of one instruction.
        """
        return self._lines(count, vcpu, timeout, over=False)

    def next(self, count: int = 1, vcpu: int | None = None, timeout: float | None = None) -> Stop:
        """Steps to another source line of the same function, ``count`` times, or to where that returns.

        Called functions run to their ends, with all vCPUs, and return to this very frame, however often it recurses.
        Ends early at any other stop, after ``timeout`` seconds too.
        """
        return self._lines(count, vcpu, timeout, over=True)

    def finish(self, vcpu: int | None = None, timeout: float | None = None) -> Stop:
        """Lets all vCPUs run until the function that a vCPU is in has returned; ``value`` of the stop is its RAX then.

        Ends early at any other stop, with ``value`` None. Raises ``BreakpointError`` if the caller can't be found.
        """
        chosen, deadline = self._chosen(vcpu), _deadline(timeout)
        caller = self._machine.caller(chosen)
        if caller is None:
            raise BreakpointError("the caller of this function can't be found: see backtrace()")
        frame, back = caller
        stop = self._run_to(chosen, [back], frame, deadline)
        if stop.reason == "step" and stop.pc == back:
            object.__setattr__(stop, "value", self._machine.registers(chosen).rax)
        return stop

    def until(self, where: str | int, vcpu: int | None = None, timeout: float | None = None) -> Stop:
        """Lets all vCPUs run until one of them comes to a place, or returns from the function that it is in.

        ``where`` is as for ``breakpoint()``. Ends early at any other stop, after ``timeout`` seconds too.
        """
        chosen, deadline = self._chosen(vcpu), _deadline(timeout)
        places, _ = self._places("the place", where)
        caller = self._machine.caller(chosen)
        returned = None if caller is None else self._machine.stop_at(chosen, [caller[1]], caller[0])
        try:
            return self._run_to(chosen, places, 0, deadline)
        finally:
            if returned is not None:
                self._drop(returned)

    def wait(self, timeout: float | None = None) -> Stop:
        """Waits for the next stop; of a guest that stands still, gives the current one.

        Raises ``TimeoutExpired`` when ``timeout`` seconds are over; the guest runs on. Otherwise raises what ``cont()``
        raises.
        """
        self._check()
        status = self._wait(timeout)
        if status is None:
            raise TimeoutExpired(f"the guest did not stop within {timeout:g} s", timeout=timeout, output=self.output)
        return self._report(status)

    def interrupt(self) -> None:
        """Asks the guest to stop and returns; ``wait()``, here or in another thread, gives the stop.

        Does nothing if the guest stands still. May be called from any thread, a callback or a signal handler.
        """
        self._check()
        self._machine.interrupt()

    def detach(self) -> Vm:
        """Deletes all breakpoints and lets the guest run on; ``wait()`` of the returned Vm gives its result."""
        self._check()
        self._machine.detach()
        self._left, self._stop = "this debugger has been detached from its VM", None
        self._vm._detached(self._machine)
        return self._vm

    def close(self) -> None:
        """Ends the machine, whatever it does. Does nothing after ``detach()`` or another ``close()``."""
        if self._left is None:
            # What the guest has come to is worth keeping.
            self._settled()
            self._left = "this debugger is closed"
            for server in self._servers:
                server.close()
            self._vm._release_machine(self._machine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Breakpoints

    def breakpoint(
        self,
        where: str | int,
        *,
        condition: Condition = None,
        ignore: int = 0,
        temporary: bool = False,
        vcpu: int | None = None,
        enabled: bool = True,
        name: str | None = None,
        hardware: bool = False,
    ) -> Breakpoint:
        """Sets a breakpoint; from the moment that this returns it holds on every vCPU, running or not.

        ``where`` is a symbol, ``"symbol+0x10"``, a source line, ``"file.c:123"`` (wherever it is entered: compilers
        copy and inline lines; of one without code, the next that has some), or an address. ``condition`` decides which
        hits stop the guest: text in the language of ``uhyve.condition`` is compiled once and evaluated by the core; a
        callable is called with a ``Hit`` on the thread of the vCPU, with other vCPUs running, and stops the guest by
        returning something true.
        ``ignore`` is how many hits to let pass before the condition is asked. A ``temporary`` breakpoint is deleted
        when it has stopped the guest once. With ``vcpu``, others pass. ``name`` is for messages. ``hardware`` asks for
        a debug register, which holds when the guest overwrites its code.

        Raises ``BreakpointError`` if the place is unknown or can't be had, ``ConditionError`` for bad text.

        The breakpoint is a decorator, too::

            @dbg.breakpoint("malloc")
            def big(hit):
                return hit.arg(0) > 1 << 20
        """
        self._check()
        addresses, location = self._places("a breakpoint's address", where)
        compiled, predicate = condition_parts(self._machine, condition)
        core = self._machine.add_breakpoint(
            addresses,
            location=location,
            compiled=compiled,
            predicate=predicate,
            ignore=unsigned("ignore", ignore),
            temporary=bool(temporary),
            vcpu=None if vcpu is None else unsigned("vcpu", vcpu, 32),
            enabled=bool(enabled),
            name=name,
            hardware=bool(hardware),
        )
        return self._breakpoint_of(core)

    def watch(
        self,
        where: str | int,
        size: int = 8,
        access: Access = "write",
        *,
        condition: Condition = None,
        ignore: int = 0,
        temporary: bool = False,
        vcpu: int | None = None,
        enabled: bool = True,
        name: str | None = None,
    ) -> Breakpoint:
        """Sets a watchpoint on ``size`` bytes of data; from the moment that this returns it holds on every vCPU.

        ``access`` is "write" (which need not change the value), "read" or "access" (both). An instruction that reads
        and writes, writes. The guest stops behind the instruction. What the host writes for a hypercall, such as the
        contents of a file, counts if it changes something; what a debugger writes does not. Everything else is as for
        ``breakpoint()``; a ``Hit`` has ``address``, ``access``, ``old`` and ``new`` besides::

            dbg.watch("total", condition=lambda hit: hit.new < hit.old)
            stop = dbg.cont()
            print(hex(stop.address), stop.old, stop.new)

        Where debug registers can't do it (more than four aligned pieces, or a hypervisor whose registers notice no
        data), every vCPU executes one instruction at a time while the watchpoint is enabled, and a warning says so.
        With debug registers the CPU does not tell a read from a write: a value that has changed was written.
        """
        self._check()
        addresses, location = self._places("a watchpoint's address", where)
        if len(addresses) > 1:
            raise BreakpointError(f"{location} has code at {len(addresses)} addresses; a watchpoint is for one place")
        compiled, predicate = condition_parts(self._machine, condition)
        core = self._machine.add_watchpoint(
            addresses[0],
            unsigned("size", size),
            access,
            location=location,
            compiled=compiled,
            predicate=predicate,
            ignore=unsigned("ignore", ignore),
            temporary=bool(temporary),
            vcpu=None if vcpu is None else unsigned("vcpu", vcpu, 32),
            enabled=bool(enabled),
            name=name,
        )
        return self._breakpoint_of(core)

    @property
    def breakpoints(self) -> list[Breakpoint]:
        """All breakpoints and watchpoints, by number."""
        return [self._breakpoint_of(core) for core in self._machine.breakpoints()]

    # gdb

    def serve_gdb(self, address: str = "127.0.0.1:0", policy: GdbPolicy | None = None) -> GdbServer:
        """Listens for gdb or LLDB, which may attach now, later or never, and go and come back.

        ``address`` is ``"HOST:PORT"``, ``"PORT"`` on loopback (0 is any free one), ``"unix:PATH"``, or ``"-"`` for
        standard input and output. While a client is attached it decides when the guest runs: ``cont()`` and ``step()``
        raise ``VmStateError``; reading, writing, breakpoints, ``interrupt()`` and ``wait()`` work. ``policy`` decides
        with it.

        Raises ``ConfigError`` for an address that is none, ``OSError`` if it can't be listened at.
        """
        from uhyve.gdb_server import GdbServer

        self._check()
        server = GdbServer(self, address, policy)
        self._servers.append(server)
        return server

    # What there is to see

    @property
    def stop(self) -> Stop:
        """Why the guest stands still. After ``close()``, why it last did. Raises ``VmStateError`` while it runs."""
        stop = self._current() if self._left is None else self._stop
        if stop is None:
            raise VmStateError(self._left or "the guest is running: interrupt() it, or wait() for a stop")
        return stop

    @property
    def running(self) -> bool:
        """Whether the guest is being executed."""
        if self._left is not None:
            return False
        try:
            return self._current() is None
        except VmStateError:
            return False

    @property
    def attached(self) -> bool:
        """Whether this controls its machine: neither ``detach()`` nor ``close()`` was called."""
        return self._left is None

    @property
    def vm(self) -> Vm:
        """The Vm that is being debugged."""
        return self._vm

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs by number."""
        return self._vcpus

    @property
    def registers(self) -> Registers:
        """The registers of the vCPU that the current stop is about."""
        self._check()
        return self._machine.registers(self.stop.vcpu)

    @property
    def memory(self) -> Memory:
        """Guest memory as the vCPU that the current stop is about sees it."""
        self._check()
        return self._machine.memory(self.stop.vcpu)

    def backtrace(self, vcpu: int | None = None, limit: int = 64) -> list[Frame]:
        """The frames of a vCPU (the one that the stop is about, if not given), the innermost first, ``limit`` at most.

        They are found by the image's unwind information, by frame pointers where it has none, and end where neither
        leads on to code. A function that was inlined is a frame of its own, with ``inlined`` set.
        """
        self._check()
        if limit < 1:
            raise ValueError(f"limit is {limit}; a backtrace has at least one frame")
        chosen = self.stop.vcpu if vcpu is None else unsigned("vcpu", vcpu, 32)
        parts = self._machine.backtrace(chosen, min(limit, 1 << 16))
        return [Frame(self._machine, chosen, part[0], level, part) for level, part in enumerate(parts)]

    def symbol(self, name: str) -> int:
        """The address of ``"symbol"`` or ``"symbol+0x10"`` in this machine. Raises ``BreakpointError`` if unknown."""
        return self._machine.resolve(name)

    def symbolize(self, address: int) -> str | None:
        """``"symbol"`` or ``"symbol+0x10"`` for an address, demangled; None if no symbol covers it."""
        return symbol_at(self._machine, address)

    def source_line(self, address: int) -> tuple[str, int] | None:
        """The file and line that an address was compiled from, by the image's debug information."""
        return self._machine.describe(address)[0][4]

    @property
    def load_bias(self) -> int:
        """What to add to an address in the image's file to get the address in this machine."""
        return self._machine.load_bias

    @property
    def output(self) -> str:
        """What the console has captured so far."""
        return text_of(self._machine)

    @property
    def stats(self) -> VmStats:
        """Counters until now."""
        return stats_of(self._machine)

    @property
    def result(self) -> VmResult | None:
        """The result of a guest that has ended itself, else None."""
        if self._result is None and self._left is None:
            self._settled()
        return self._result

    def __repr__(self) -> str:
        state = "the guest is running" if self.running else self._left or self._settled() or "the machine has ended"
        return f"<Debugger of {self._vm!r}: {state}>"

    # Inside

    def _chosen(self, vcpu: int | None) -> int:
        """A vCPU to step: the one that the current stop is about, if none is named."""
        self._check()
        current = self.stop.vcpu
        return current if vcpu is None else unsigned("vcpu", vcpu, 32)

    def _run_to(self, vcpu: int, addresses: list[int], stack: int, deadline: float | None) -> Stop:
        """Lets all run until a vCPU is at one of the addresses, in a frame not below ``stack``."""
        place = self._machine.stop_at(vcpu, addresses, stack)
        try:
            self._resume(None)
            return self._next_stop(_left(deadline))
        finally:
            self._drop(place)

    def _drop(self, place: _core.Breakpoint) -> None:
        try:
            place.delete()
        except VmStateError:
            # The machine is gone, and its breakpoints with it.
            return

    def _step_range(self, vcpu: int, addresses: tuple[int, int] | None, deadline: float | None) -> Stop:
        self._resume(vcpu, addresses)
        return self._next_stop(_left(deadline))

    def _lines(self, count: int, vcpu: int | None, timeout: float | None, *, over: bool) -> Stop:
        if count < 1:
            raise ValueError(f"count is {count}; a step is at least one line")
        chosen, deadline = self._chosen(vcpu), _deadline(timeout)
        for _ in range(count):
            stop = self._line(chosen, deadline, over=over)
            if stop.reason != "step":
                break
        return stop

    def _line(self, vcpu: int, deadline: float | None, *, over: bool) -> Stop:
        """One step to another line; over calls, or into those that have lines."""
        pc = self._machine.registers(vcpu).rip
        begin, addresses = self.source_line(pc), self._machine.line_range(pc)
        caller = self._machine.caller(vcpu)
        while True:
            stop = self._step_range(vcpu, addresses, deadline)
            if stop.reason != "step":
                return stop
            inner = self._machine.caller(vcpu)
            if inner is not None and caller is not None and inner[0] < caller[0]:
                if not over and self._machine.line_range(stop.pc) is not None:
                    return stop
                stop = self._run_to(vcpu, [inner[1]], inner[0], deadline)
                if stop.reason != "step":
                    return stop
                inner = self._machine.caller(vcpu)
            if addresses is None:
                return stop
            if addresses[0] <= stop.pc < addresses[1]:
                continue
            returned = caller is not None and inner is not None and inner[0] > caller[0]
            here = self._machine.line_range(stop.pc)
            if returned or here is None or self.source_line(stop.pc) != begin:
                return stop
            # Another part of the same line.
            addresses = here

    def _places(self, what: str, where: str | int) -> tuple[list[int], str]:
        """The addresses of a place, and what the user called it."""
        if isinstance(where, str):
            return self._machine.resolve_place(where), where
        address = unsigned(what, where)
        return [address], f"{address:#x}"

    def _check(self) -> None:
        if self._left is not None:
            raise VmStateError(self._left)

    def _resume(self, step: int | None, addresses: tuple[int, int] | None = None) -> None:
        self._check()
        self._raise_unreported()
        self._machine.resume(step, addresses)
        self._stop = None

    def _next_stop(self, timeout: float | None) -> Stop:
        """Waits for a stop, and makes one when the time is over."""
        status = self._wait(timeout)
        if status is None:
            self._machine.interrupt(timed_out=True)
            status = self._wait(None)
            assert status is not None
        return self._report(status)

    def _wait(self, timeout: float | None) -> dict[str, Any] | None:
        try:
            status = self._machine.wait(timeout)
        except BaseException:
            # A signal handler raised: the guest stops, so that its user finds it standing still.
            if self.running and self._machine.interrupt():
                self._machine.wait()
            raise
        if status is not None and "ended" in status:
            # A callback, which can't wait for the machine's threads, or another thread has ended it.
            self._vm._release_machine(self._machine)
        return status

    def _report(self, status: dict[str, Any]) -> Stop:
        self._stop_of(status)
        self._raise_unreported()
        return self.stop

    def _raise_unreported(self) -> None:
        """Raises what a callback or a policy raised, once, and what has ended the machine meanwhile."""
        for server in self._servers:
            server._raise_failure()
        self._raise_of_stop()

    def _raise_of_stop(self) -> None:
        """Raises what a callback raised that has made the current stop, once."""
        status = self._machine.status()
        stop = None if status is None else self._stop_of(status)
        if stop is not None and stop.number > self._reported:
            self._reported = stop.number
            if stop.exception is not None:
                raise stop.exception

    def _current(self) -> Stop | None:
        """The stop that the machine is in, or None while it runs. Raises ``VmStateError`` if it has ended."""
        try:
            status = self._machine.status()
        except Exception as error:
            raise VmStateError(f"the machine has ended: {error}") from error
        return None if status is None else self._stop_of(status)

    def _settled(self) -> Stop | None:
        """The stop that the machine is in, if any."""
        try:
            return self._current()
        except VmStateError:
            return None

    def _stop_of(self, status: dict[str, Any]) -> Stop | None:
        if "reason" not in status:
            self._check()
            raise VmStateError("the VM was interrupted or closed while its guest was being debugged")
        if self._stop is None or self._stop.number != status["number"]:
            core = status.get("breakpoint")
            met = None if core is None else self._breakpoint_of(core)
            crash: GuestCrashError | None = status.get("crash")
            if crash is not None:
                crash.output = self.output
            self._stop = Stop(
                status["reason"],
                status["vcpu"],
                status["pc"],
                breakpoint=met,
                code=status.get("code"),
                symbol=status["symbol"],
                message=status.get("message"),
                number=status["number"],
                hits=None if met is None else met.hits,
                exception=status.get("exception"),
                crash=crash,
                address=status.get("address"),
                access=status.get("access"),
                old=status.get("old"),
                new=status.get("new"),
            )
            object.__setattr__(self._stop, "_machine", self._machine)
            if self._stop.code is not None:
                self._result = result_of(self._machine, self._stop.code)
        return self._stop

    def _restart(self, arguments: list[str] | None) -> Machine:
        """A fresh machine in the place of this one, stopped at its entry, with the same breakpoints."""
        self._check()
        kept = [known for known in self._breakpoints.values() if not known.deleted and known.name != "gdb"]
        wishes = [(known, known.condition) for known in kept]
        self._machine = machine = self._vm._relaunch(self._machine, arguments)
        self._stop, self._result, self._reported = None, None, 0
        self._vcpus = tuple(Vcpu(machine, number) for number in range(machine.cpus))
        machine.wait()
        self._breakpoints = {}
        for known, condition in wishes:
            known._move(machine, condition)
            self._breakpoints[known.id] = known
        return machine

    def _breakpoint_of(self, core: _core.Breakpoint) -> Breakpoint:
        known = self._breakpoints.get(core.id)
        if known is None:
            known = self._breakpoints[core.id] = Breakpoint(self._machine, core)
        return known


class Vcpu:
    """One vCPU of a machine that is being debugged. Usable while the guest stands still."""

    __slots__ = ("_machine", "_number")

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine = machine
        self._number = number

    @property
    def number(self) -> int:
        """Its number; the first one is 0."""
        return self._number

    @property
    def registers(self) -> Registers:
        """Its registers; each is fetched when it is touched, and written when it is set."""
        return self._machine.registers(self._number)

    @property
    def memory(self) -> Memory:
        """Guest memory through its page tables."""
        return self._machine.memory(self._number)

    @property
    def pc(self) -> int:
        """The address of its next instruction."""
        return self.registers.rip

    @property
    def symbol(self) -> str | None:
        """``"symbol+0x10"`` for ``pc``, if known."""
        return symbol_at(self._machine, self.pc)

    @property
    def halted(self) -> bool:
        """Whether it waits for an interrupt, in HLT."""
        return self._machine.halted(self._number)

    @property
    def instructions(self) -> int | None:
        """How many instructions it has executed; None on a back end that does not count them (``"soft"`` does)."""
        return self._machine.instructions(self._number)

    def __repr__(self) -> str:
        return f"<Vcpu {self._number}>"


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
