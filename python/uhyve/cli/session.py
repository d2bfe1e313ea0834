"""A debugging session on the command line: breakpoints, a script, a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uhyve
from uhyve.cli.ending import Failure, exit_code, say, user_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Session:
    """One guest under ``uhyve debug``."""

    def __init__(self, vm: uhyve.Vm, dbg: uhyve.Debugger, commands: Sequence[str], timeout: float | None) -> None:
        self.dbg = dbg
        self.commands = commands
        self.timeout = timeout
        self.scope: dict[str, Any] = {"dbg": dbg, "vm": vm, "uhyve": uhyve}

    def set_breakpoints(self, places: Iterable[str]) -> None:
        """Sets the breakpoints of the command line."""
        from uhyve.condition import split_if

        for place in places:
            location, condition = split_if(place)
            self.dbg.breakpoint(location, condition=condition)

    def run_script(self, path: Path) -> None:
        """Runs a file as the main module, with the session in its globals."""
        try:
            source = path.read_bytes()
        except OSError as error:
            raise Failure(f"{path}: can't read the script: {error.strerror}") from None
        sys.path.insert(0, str(path.resolve().parent))
        self.scope |= {"__name__": "__main__", "__file__": str(path)}
        self.execute(source, str(path))

    def execute(self, source: Any, name: str = "<commands>") -> None:
        """Runs the user's code."""
        with user_errors():
            exec(compile(source, name, "exec"), self.scope)

    def is_over(self) -> bool:
        """Whether there is nothing left to run."""
        dbg = self.dbg
        return not dbg.attached or (not dbg.running and dbg.stop.reason in ("exit", "crash"))

    def show(self, stop: uhyve.Stop) -> None:
        """Prints a stop, and runs the commands of ``--commands``."""
        say(str(stop))
        if stop.reason not in ("exit", "crash"):
            say(_registers(stop))
        self.scope["stop"] = stop
        for code in self.commands:
            self.execute(code)

    def run_to_end(self) -> None:
        """Prints each stop and goes on, until the guest's end."""
        import time

        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while not self.is_over():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with user_errors():
                stop = self.dbg.wait(left) if self.dbg.running else self.dbg.cont(left)
            if stop.reason == "timeout":
                raise uhyve.TimeoutExpired(f"the guest did not end within {self.timeout:g} s: {stop}")
            self.show(stop)

    def interact(self) -> None:
        """A Python prompt that controls the guest."""
        import code
        import importlib

        try:
            readline = importlib.import_module("readline")
            completer = importlib.import_module("rlcompleter").Completer(self.scope)
            readline.set_completer(completer.complete)
            readline.parse_and_bind("tab: complete")
        except ImportError:
            # A Python without readline has a plain prompt.
            pass
        dbg = self.dbg

        class Console(code.InteractiveConsole):
            """A prompt that answers Ctrl-C with where the guest stands now."""

            def showtraceback(self) -> None:
                if isinstance(sys.exc_info()[1], KeyboardInterrupt) and not dbg.running:
                    self.write(f"\nKeyboardInterrupt\n{dbg.stop}\n")
                else:
                    super().showtraceback()

        sys.displayhook = _display
        Console(self.scope).interact(_banner(dbg), exitmsg="")

    def exit_code(self) -> int:
        """The status to end with: the guest's code, if it has one."""
        dbg = self.dbg
        if not dbg.attached and dbg.vm.running:
            # The script has detached.
            return dbg.vm.wait(self.timeout).code
        return exit_code(dbg)


def _banner(dbg: uhyve.Debugger) -> str:
    return f"""{dbg.stop}
  dbg.breakpoint("symbol", condition="arg1 > 8")   a breakpoint; conditions may be callables, too
  dbg.cont(), dbg.step(), Ctrl-C                   go on, execute an instruction, stop the guest
  dbg.stop.frame, dbg.registers, dbg.memory        where the guest stands, and what is there
  dbg.vcpus[1].registers, dbg.symbolize(address)   the other vCPUs, the symbol at an address
  help(dbg), Ctrl-D                                all there is, and the end of guest and prompt"""


def _display(value: object) -> None:
    """Shows stops and registers at the prompt as text for people."""
    if isinstance(value, uhyve.Stop | uhyve.Registers | uhyve.VmStats):
        print(value)
    elif value is not None:
        print(repr(value))


def _registers(stop: uhyve.Stop) -> str:
    """The registers that arguments are passed in, and where the stack is."""
    registers = stop.frame.registers
    names = ("rdi", "rsi", "rdx", "rcx", "rax", "rsp")
    return "  " + "  ".join(f"{name} {getattr(registers, name):#x}" for name in names)
