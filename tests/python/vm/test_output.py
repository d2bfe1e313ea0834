"""The console: every sink gets all that the guest wrote, in order, at once, and at a crash too."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, GuestCrashError, TimeoutExpired, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.vm

LIMIT = 60
LINES, BUFFER = 100, 100_000
DEFINES = (f"LINES={LINES}", f"BUFFER_SIZE={BUFFER}")


def expected() -> bytes:
    rows = "".join(chr(ord("a") + row % 26) * 63 + "\n" for row in range(BUFFER // 64 + 1))
    lines = "".join(f"line {number}\n" for number in range(LINES))
    return f"{lines}{rows[:BUFFER]}the end without a newline".encode()


class Sink:
    """A callable output that keeps what it gets, and when."""

    def __init__(self, delay: float = 0) -> None:
        self.pieces: list[bytes] = []
        self.delay = delay
        self.threads: set[str] = set()

    def __call__(self, text: bytes) -> None:
        self.threads.add(threading.current_thread().name)
        if self.delay:
            time.sleep(self.delay)
        self.pieces.append(text)

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)


# Every sink gets everything.


@pytest.mark.parametrize("interface", [1, 2, 3])
def test_captured_output_is_complete_and_in_order(guest: Callable[..., Path], interface: int) -> None:
    result = Vm(guest("output", interface=interface, defines=DEFINES)).run(LIMIT)

    assert result.output_bytes == expected()
    assert result.output == expected().decode()
    assert result.truncated is False


@pytest.mark.parametrize("interface", [1, 3])
def test_callable_output_gets_everything_in_whole_lines(guest: Callable[..., Path], interface: int) -> None:
    sink = Sink()

    result = Vm(guest("output", interface=interface, defines=DEFINES), output=sink).run(LIMIT)

    assert (result.code, result.output_bytes) == (0, b"")
    assert sink.text == expected()
    # Pieces end with a line, or at 8 KiB.
    assert all(isinstance(piece, bytes) for piece in sink.pieces)
    assert all(piece.endswith(b"\n") or len(piece) >= 8192 for piece in sink.pieces[:-1])
    assert max(map(len, sink.pieces)) <= 8192
    assert sink.pieces[:LINES] == [f"line {number}\n".encode() for number in range(LINES)]


def test_callable_output_that_is_slow_gets_everything(guest: Callable[..., Path]) -> None:
    sink = Sink(delay=0.01)

    Vm(guest("output", defines=("LINES=30", "BUFFER_SIZE=0")), output=sink).run(LIMIT)

    assert sink.text == "".join(f"line {number}\n" for number in range(30)).encode() + b"the end without a newline"


@pytest.mark.parametrize("cpus", [1, 2])
def test_callable_output_that_is_slower_than_the_guest_gets_everything_in_order(
    guest: Callable[..., Path], cpus: int
) -> None:
    sink = Sink(delay=0.0005)

    def late(text: bytes) -> None:
        if not sink.pieces:
            time.sleep(1)
        sink(text)

    # Behind 64 KiB the guest waits for its reader, whichever way it prints.
    Vm(guest("output", defines=("LINES=10000", "BUFFER_SIZE=64")), output=late, cpus=cpus).run(LIMIT)

    lines = "".join(f"line {number}\n" for number in range(10000))
    assert sink.text.decode() == lines + "a" * 63 + "\n" + "the end without a newline"


def test_standard_error_gets_everything_before_the_run_returns(
    guest: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    print("before", file=sys.stderr, end="; ")
    result = Vm(guest("output", defines=DEFINES), output="stderr").run(LIMIT)

    out, err = capfd.readouterr()
    assert err.encode() == b"before; " + expected()
    assert out == ""
    assert result.output == ""


def test_file_output_gets_everything(guest: Callable[..., Path], tmp_path: Path) -> None:
    result = Vm(guest("output", defines=DEFINES), output=tmp_path / "console").run(LIMIT)

    assert (tmp_path / "console").read_bytes() == expected()
    assert result.output == ""


def test_file_output_that_exists_is_refused_and_kept(guest: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "console").write_text("mine")

    with pytest.raises(FileExistsError, match="console"):
        Vm(guest("hello"), output=tmp_path / "console").run(LIMIT)

    assert (tmp_path / "console").read_text() == "mine"


def test_file_output_in_a_missing_directory_names_it(guest: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Vm(guest("hello"), output=tmp_path / "nowhere" / "console").run(LIMIT)


@pytest.mark.parametrize("output", ["none", None])
def test_no_output_keeps_nothing(guest: Callable[..., Path], output: str | None) -> None:
    result = Vm(guest("output", defines=DEFINES), output=output).run(LIMIT)

    assert (result.code, result.output_bytes, result.truncated) == (0, b"", False)


def test_stdout_of_the_process_gets_everything_after_what_python_printed(
    guest: Callable[..., Path], python: Callable
) -> None:
    code = "import sys, uhyve\nprint('before')\nuhyve.Vm(sys.argv[1], output='stdout').run(60)\nprint('after')"

    status, output, errors = python(code, guest("output", defines=DEFINES)).finish(LIMIT)

    assert (status, errors) == (0, b"")
    assert output == b"before\n" + expected() + b"after\n"


def test_stdout_that_is_a_slow_reader_gets_everything(guest: Callable[..., Path], python: Callable) -> None:
    code = "import sys, uhyve\nuhyve.Vm(sys.argv[1], output='stdout').run(60)"
    child = python(code, guest("output", defines=("LINES=10", "BUFFER_SIZE=300000")))

    # The pipe holds 64 KiB: the guest has to wait for its reader.
    time.sleep(0.5)
    status, output, errors = child.finish(LIMIT)

    assert (status, errors) == (0, b"")
    assert output.startswith(b"".join(b"line %d\n" % number for number in range(10)))
    assert len(output) == 10 * len("line 0\n") + 300_000 + len("the end without a newline")
    assert output.endswith(b"the end without a newline")


# Limits.


@pytest.mark.parametrize("limit", [0, 1, 10, 1000])
def test_output_limit_keeps_the_first_bytes_and_says_so(guest: Callable[..., Path], limit: int) -> None:
    result = Vm(guest("output", defines=DEFINES), output_limit=limit).run(LIMIT)

    assert result.output_bytes == expected()[:limit]
    assert result.truncated is True


def test_output_of_exactly_the_limit_is_not_truncated(guest: Callable[..., Path]) -> None:
    result = Vm(guest("output", defines=DEFINES), output_limit=len(expected())).run(LIMIT)

    assert (result.output_bytes, result.truncated) == (expected(), False)


def test_output_that_is_not_utf8_is_replaced_in_text_only() -> None:
    from uhyve import VmResult, VmStats

    result = VmResult(0, b"caf\xe9\n", False, VmStats((), "kvm", 0.1))

    assert result.output == "caf\ufffd\n"


# Crash, timeout, interruption: nothing is lost.


def test_output_before_a_crash_is_complete_in_the_exception(guest: Callable[..., Path]) -> None:
    with pytest.raises(GuestCrashError) as caught:
        Vm(guest("output", defines=(*DEFINES, "CRASH"))).run(LIMIT)

    assert caught.value.output.encode() == expected()


@pytest.mark.parametrize("kind", ["callable", "file"])
def test_output_before_a_crash_is_complete_in_every_sink(guest: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    sink, path = Sink(), tmp_path / "console"

    with pytest.raises(GuestCrashError):
        Vm(guest("output", defines=(*DEFINES, "CRASH")), output=sink if kind == "callable" else path).run(LIMIT)

    assert (sink.text if kind == "callable" else path.read_bytes()) == expected()


def test_output_before_a_crash_is_complete_on_stdout(guest: Callable[..., Path], command: Callable) -> None:
    status, output, errors = command(guest("output", defines=(*DEFINES, "CRASH"))).finish(LIMIT)

    assert (status, output) == (134, expected())
    assert b"triple fault" in errors


@pytest.mark.parametrize("name", ["busy", "halt", "hang"])
def test_output_before_a_timeout_is_in_the_exception(guest: Callable[..., Path], name: str) -> None:
    with pytest.raises(TimeoutExpired) as caught:
        Vm(guest(name)).run(1)

    assert caught.value.output == {"busy": "busy\n", "halt": "halting\n", "hang": "hanging\n"}[name]


# Output as it comes.


def test_partial_line_comes_out_while_the_guest_is_blocked(
    guest: Callable[..., Path], command: Callable, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = command("--file-mapping", f"{fifo}:/in", guest("readpath"))
    child.read_until(b"opened\n")
    with fifo.open("wb", buffering=0) as stream:
        stream.write(b"no newline")

        start = time.monotonic()
        child.read_until(b"no newline")

        assert time.monotonic() - start < 1
        assert child.process.poll() is None
    assert child.finish(LIMIT)[:2] == (0, b"opened\nno newlineend of file\n")


def test_partial_line_comes_out_while_the_guest_spins(
    guest: Callable[..., Path], command: Callable, hello_and_spin: Path
) -> None:
    child = command("--timeout", "30", hello_and_spin)

    assert child.read_until(b"busy") == b"busy"
    assert child.process.poll() is None
    child.signal()
    assert child.finish(LIMIT)[:2] == (130, b"busy")


@pytest.fixture
def hello_and_spin(guest: Callable[..., Path], tmp_path: Path) -> Path:
    """The guest ``busy`` with another text, of the same length, without its newline."""
    original = guest("busy").read_bytes()
    assert original.count(b"busy\n\0") == 1
    path = tmp_path / "spin"
    path.write_bytes(original.replace(b"busy\n\0", b"busy\0\0"))
    return path


def test_partial_line_reaches_a_callable_soon_while_the_guest_spins(
    hello_and_spin: Path, wait_until: Callable[..., bool]
) -> None:
    sink = Sink()
    with Vm(hello_and_spin, output=sink) as vm:
        vm.start()

        assert wait_until(lambda: sink.text == b"busy", 2)
        assert vm.running


def test_lines_reach_a_callable_while_the_guest_runs(
    guest: Callable[..., Path], wait_until: Callable[..., bool]
) -> None:
    sink = Sink()
    with Vm(guest("busy"), output=sink) as vm:
        vm.start()

        assert wait_until(lambda: sink.text == b"busy\n", 10)
        assert vm.running


# Callables that misbehave.


class RefusedError(Exception):
    """What a test's callable raises."""


@pytest.mark.parametrize("name", ["hello", "busy", "output"])
def test_exception_of_a_callable_ends_the_run_as_itself(guest: Callable[..., Path], name: str) -> None:
    raised: list[RefusedError] = []

    def refuse(text: bytes) -> None:
        raised.append(RefusedError(text))
        raise raised[-1]

    vm = Vm(guest(name), output=refuse)

    with pytest.raises(RefusedError) as caught:
        vm.run(LIMIT)

    assert len(raised) == 1
    assert caught.value is raised[0]
    assert not vm.running
    with pytest.raises(VmStateError):
        vm.wait()


def test_exception_of_a_callable_at_the_last_partial_line_comes_out(guest: Callable[..., Path]) -> None:
    def refuse(text: bytes) -> None:
        if text.startswith(b"the end"):
            raise RefusedError

    with pytest.raises(RefusedError):
        Vm(guest("output", defines=("LINES=1", "BUFFER_SIZE=0")), output=refuse).run(LIMIT)


def test_vm_after_an_exception_of_its_callable_runs_again(guest: Callable[..., Path]) -> None:
    pieces: list[bytes] = []

    def refuse_once(text: bytes) -> None:
        pieces.append(text)
        if len(pieces) == 1:
            raise RefusedError

    vm = Vm(guest("hello"), output=refuse_once)
    with pytest.raises(RefusedError):
        vm.run(LIMIT)
    pieces[:] = [b"x"]

    assert vm.run(LIMIT).code == 0
    assert pieces[1:] == [b"Hello from a test guest\n", b"and a line by the buffer\n"]


def test_callable_that_interrupts_its_vm_ends_the_run(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("busy"), output=lambda text: vm.interrupt())

    with pytest.raises(VmStateError, match="interrupted"):
        vm.run(LIMIT)


def test_callable_that_closes_its_vm_ends_the_run(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("busy"), output=lambda text: vm.close())

    with pytest.raises(VmStateError, match="closed"):
        vm.run(LIMIT)


@pytest.mark.parametrize("ending", ["timeout", "interrupt", "close"])
def test_callable_that_is_far_behind_holds_up_no_end_from_outside(guest: Callable[..., Path], ending: str) -> None:
    sink = Sink(delay=0.05)
    vm = Vm(guest("output", defines=["LINES=1000000", "BUFFER_SIZE=0"]), output=sink)
    vm.start()
    while len(sink.pieces) < 3:
        time.sleep(0.01)
    start = time.monotonic()

    if ending == "close":
        vm.close()
    else:
        if ending == "interrupt":
            vm.interrupt()
        with pytest.raises(TimeoutExpired if ending == "timeout" else VmStateError):
            vm.wait(0.1 if ending == "timeout" else LIMIT)
        vm.close()

    assert time.monotonic() - start < 8
    assert sink.text == b"".join(b"line %d\n" % number for number in range(len(sink.pieces)))


def test_callable_that_runs_another_vm_gets_its_result(guest: Callable[..., Path]) -> None:
    inner: list[int] = []

    result = Vm(guest("loop"), output=lambda text: inner.append(Vm(guest("hello")).run(LIMIT).code)).run(LIMIT)

    assert result.code == 0
    assert set(inner) == {0}


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("captured", ConfigError),
        ("/tmp/file", ConfigError),
        (b"capture", TypeError),
        (1, TypeError),
        ([], TypeError),
    ],
)
def test_output_that_is_nothing_known_is_refused(output: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="output"):
        Vm.demo(output=output)


def test_output_that_is_an_open_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    with (tmp_path / "console").open("wb") as stream, pytest.raises(TypeError, match="pass its write method"):
        Vm.demo(output=stream)


def test_output_by_the_write_method_of_a_file_gets_everything(guest: Callable[..., Path], tmp_path: Path) -> None:
    with (tmp_path / "console").open("wb") as stream:
        Vm(guest("output", defines=DEFINES), output=stream.write).run(LIMIT)

    assert (tmp_path / "console").read_bytes() == expected()


def test_output_to_a_full_device_is_the_hosts_error(guest: Callable[..., Path], python: Callable) -> None:
    code = "import sys, uhyve\nuhyve.Vm(sys.argv[1], output='stdout').run(60)"
    with Path("/dev/full").open("wb") as full:
        status, _, errors = python(code, guest("output", defines=DEFINES), stdout=full).finish(LIMIT)

    assert status == 1
    assert b"OSError: [Errno 28]" in errors
