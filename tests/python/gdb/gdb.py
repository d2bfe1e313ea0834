"""Drivers of the real debuggers: gdb by a script or in a session of its machine interface, and LLDB by a script.

A debugger that does not come to its end in time is killed, with the processes that it started and no others.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

TIMEOUT = 30.0
START = 80.0
"""Seconds for its start, which in the box reads all of gdb over a slow file system."""

SETTINGS = (
    "set pagination off",
    "set confirm off",
    "set width 0",
    "set height 0",
    "set style enabled off",
    "set debuginfod enabled off",
    "set print thread-events off",
    "set history save off",
    "set remotetimeout 10",
    "set tcp connect-timeout 10",
    "maintenance set internal-error corefile no",
)
"""What makes gdb's output the same everywhere."""


class DebuggerError(AssertionError):
    """A debugger that did not do what it was told. The message has what it said."""


class DebuggerTimeoutError(DebuggerError):
    """A debugger that did not come to its end, or to a stop, in time."""


@dataclass(frozen=True)
class Transcript:
    """What a debugger said."""

    output: str
    errors: str
    status: int
    seconds: float

    def __contains__(self, text: str) -> bool:
        return text in self.output


def _environment() -> dict[str, str]:
    """No user's settings, no colours, no terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DEBUGINFOD_URLS", "PYTHONPATH")}
    return {**kept, "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", "TERM": "dumb"}


def _run(arguments: Sequence[str], timeout: float) -> Transcript:
    started = time.monotonic()
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise DebuggerTimeoutError(f"{arguments[0]} has not ended after {timeout} s:\n{output}\n{errors}") from None
    return Transcript(output, errors, process.returncode, time.monotonic() - started)


def run_gdb(commands: Sequence[str], *, file: str | None = None, timeout: float = TIMEOUT) -> Transcript:
    """Runs gdb on ``commands``; it ends after the last one or the first that fails (``-batch``)."""
    words = [*SETTINGS, *commands]
    arguments = ["gdb", "-q", "-nx", "-batch", *(word for command in words for word in ("-ex", command))]
    return _run([*arguments, *([file] if file else [])], timeout)


def run_lldb(commands: Sequence[str], *, file: str | None = None, timeout: float = TIMEOUT) -> Transcript:
    """Runs LLDB on ``commands`` (``-b``); it ends after the last one."""
    words = ["settings set use-color false", "settings set auto-confirm true", *commands]
    arguments = ["lldb", "--no-lldbinit", "-b", *(word for command in words for word in ("-o", command))]
    return _run([*arguments, *([file] if file else [])], timeout)


@dataclass(frozen=True)
class Record:
    """A record of the machine interface: ``^done,…`` or ``*stopped,…``, with the console text that came before it."""

    kind: str
    """``^``, ``*`` or ``=``."""
    name: str
    results: dict[str, Any]
    console: str = ""


@dataclass
class _Reader:
    """Reads the values of MI: strings, tuples and lists."""

    text: str
    at: int = 0

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.take(",") or (self.at < len(self.text) and self.text[self.at] not in "}]"):
            name, value = self.result()
            # gdb repeats a name where it means a list, as in thread groups of a breakpoint.
            found[name] = value
        return found

    def result(self) -> tuple[str, Any]:
        match = re.compile(r"([\w-]+)=").match(self.text, self.at)
        if match is None:
            raise DebuggerError(f"no result at {self.at} of {self.text}")
        self.at = match.end()
        return match[1], self.value()

    def value(self) -> Any:
        if self.take('"'):
            return self.string()
        if self.take("{"):
            value: Any = self.results()
            self.take("}")
            return value
        if self.take("["):
            value = []
            while not self.take("]"):
                self.take(",")
                value.append(self.value() if self.text[self.at] in '"{[' else self.result()[1])
            return value
        raise DebuggerError(f"no value at {self.at} of {self.text}")

    def string(self) -> str:
        match = re.compile(r'((?:[^"\\]|\\.)*)"').match(self.text, self.at)
        if match is None:
            raise DebuggerError(f"no end of the string at {self.at} of {self.text}")
        self.at = match.end()
        return _unquote(match[1])


def _unquote(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        if escape[0].isdigit():
            return chr(int(escape, 8))
        return {"n": "\n", "t": "\t", "r": "\r", "e": "\x1b"}.get(escape, escape)

    return re.sub(r"\\([0-7]{3}|.)", replace, text)


@dataclass
class Gdb:
    """A gdb with which a test speaks: ``with Gdb() as gdb: gdb.console("target remote :1234"); gdb.cont()``.

    Commands are the console's (:meth:`console`) or the machine interface's (:meth:`command`). Each waits for its
    result; a stop is waited for by :meth:`wait_stop`.
    """

    file: str | None = None
    timeout: float = TIMEOUT
    log: list[str] = field(default_factory=list)
    """Every line in and out."""

    def __post_init__(self) -> None:
        arguments = ["gdb", "-q", "-nx", "--interpreter=mi3", *([self.file] if self.file else [])]
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
        self._buffer = b""
        self._text = ""
        self._token = 0
        self._records: list[Record] = []
        try:
            for setting in (*SETTINGS, "set mi-async on"):
                self.console(setting, START)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Gdb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends gdb: by asking, and if that is not enough by force."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ProcessLookupError):
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        """The debugger's sudden death, in the middle of whatever it does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    # Commands.

    def command(self, text: str, timeout: float | None = None) -> Record:
        """Runs a command of the machine interface; an ``^error`` raises."""
        assert self.process.stdin is not None
        self._token += 1
        self._text = ""
        self.log.append(f"{self._token}{text}")
        self.process.stdin.write(f"{self._token}{text}\n".encode())
        self.process.stdin.flush()
        record = self._wait(lambda record: record.kind == "^", timeout)
        if record.name == "error":
            raise DebuggerError(record.results.get("msg", "") + record.console)
        return record

    def console(self, text: str, timeout: float | None = None) -> str:
        """Runs a command of gdb's own language; what it printed."""
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        return self.command(f'-interpreter-exec console "{quoted}"', timeout).console

    def evaluate(self, expression: str) -> str:
        """The value of an expression, as gdb shows it."""
        quoted = expression.replace("\\", "\\\\").replace('"', '\\"')
        value: str = self.command(f'-data-evaluate-expression "{quoted}"').results["value"]
        return value

    def number(self, expression: str) -> int:
        """The value of an expression as a number of 64 bits."""
        return int(self.evaluate(f"(unsigned long)({expression})").split()[0], 0)

    # Running.

    def cont(self, timeout: float | None = None) -> Record:
        """Continues until the next stop."""
        return self.run("-exec-continue --all", timeout)

    def run(self, command: str, timeout: float | None = None) -> Record:
        """Runs a command that resumes the guest, until it stops: ``-exec-step``, ``-exec-next-instruction``, …"""
        self._records = [record for record in self._records if record.name != "stopped"]
        self.command(command, timeout)
        return self.wait_stop(timeout)

    def resume(self, command: str = "-exec-continue --all") -> None:
        """Lets the guest run, without waiting."""
        self._records = [record for record in self._records if record.name != "stopped"]
        self.command(command)

    def wait_stop(self, timeout: float | None = None) -> Record:
        """The next ``*stopped``; its ``reason``, ``frame`` and ``thread-id`` are in its results."""
        return self._wait(lambda record: record.kind == "*" and record.name == "stopped", timeout)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.command("-exec-interrupt --all")

    # Records.

    def _wait(self, wanted: Callable[[Record], bool], timeout: float | None) -> Record:
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            for at, record in enumerate(self._records):
                if wanted(record):
                    return self._records.pop(at)
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        assert self.process.stdout is not None
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self.process.stdout], [], [], left)[0]:
            raise DebuggerTimeoutError("gdb says nothing more:\n" + "\n".join(self.log[-60:]))
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        if not part:
            raise DebuggerError("gdb has ended:\n" + "\n".join(self.log[-60:]))
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace").rstrip("\r"))

    def _take(self, line: str) -> None:
        self.log.append(line)
        match = re.match(r"(\d*)([\^*=~@&+])(.*)", line)
        if match is None:
            return
        token, kind, rest = match.groups()
        if kind in "~@&":
            self._text += _Reader(rest, 1).string() if kind != "&" else ""
            return
        if kind == "^" and token and int(token) != self._token:
            return
        name, _, results = rest.partition(",")
        self._records.append(Record(kind, name, _Reader(results).results(), self._text))
        if kind == "=":
            del self._records[-1]
