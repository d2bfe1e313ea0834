"""How the command ends: its exit statuses, and what it says about errors."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

import uhyve

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_SCRIPT = 1
"""A script of ``uhyve debug``, or a callback in it, raised."""
EXIT_USAGE = 2
"""Wrong usage, configuration or image."""
EXIT_TIMEOUT = 124
"""The time of ``--timeout`` is over."""
EXIT_HOST = 125
"""The host failed: no KVM, no permission, no memory."""
EXIT_INTERRUPT = 130
"""Ctrl-C, SIGTERM or SIGHUP."""
EXIT_CRASH = 134
"""The guest crashed."""
EXIT_KILLED = 137
"""A gdb client killed the guest."""
EXIT_PIPE = 141
"""Nobody reads the standard output any more."""


class Failure(click.ClickException):
    """An error that ends the command with one line and this status."""

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status


def exit_code(dbg: uhyve.Debugger) -> int:
    """The status to end with: the guest's code, if it has one."""
    if dbg.result is not None:
        return dbg.result.code
    try:
        return EXIT_CRASH if not dbg.running and dbg.stop.reason == "crash" else 0
    except uhyve.VmStateError:
        # A client has killed it.
        return EXIT_KILLED


def prepare_streams() -> None:
    """Makes the standard streams ready for whatever is written to them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It was closed, and the next file would take its number: the guest's console would go there.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A locale without "µ" is no reason to fail, and what a script prints stands among the guest's output where it
        # was printed, in a file or a pipe, too.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


def give_up_streams() -> None:
    """Lets go of what can't be written any more: Python would try once more as it ends, and change the status."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # Full, without a reader, or closed or taken away by a script.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def prepare_signals() -> None:
    """Has a polite kill, and a terminal that goes, end the guest as Ctrl-C does: its scratch directory goes with it."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # What is ignored, by nohup for one, stays so.
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)


def _end(*_signal: object) -> NoReturn:
    # Not KeyboardInterrupt, which a prompt survives.
    raise SystemExit(EXIT_INTERRUPT)


def say(text: str) -> None:
    """A line about the run, which is not the guest's output."""
    # Where it can't be written, the exit status is what is left to say.
    with suppress(OSError):
        click.echo(text, err=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user's code raises ends the command with a traceback that begins there."""
    try:
        yield
    except (uhyve.TimeoutExpired, uhyve.HypervisorError):
        raise
    except Exception as error:  # noqa: BLE001 – a script may raise anything
        import traceback

        package = str(Path(__file__).parents[1])
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(package):
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames or error.__traceback__))
        raise Failure("a script or a callback has failed", EXIT_SCRIPT) from None
