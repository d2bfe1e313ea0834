"""How a run ends that the guest does not end: timeouts, interrupts, Ctrl-C, close, and the end of the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, TimeoutExpired, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 60
KINDS = {
    "busy": "busy\n",
    "halt": "halting\n",
    "hang": "hanging\n",
    "blocked": "opened\n",
    "cli; hlt": "crash hlt_forever\n",
}
RUN = """
import json, os, sys, time, uhyve

def threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except OSError:  # it has gone meanwhile
            pass
    return [name for name in names if name.startswith("uhyve")]

image, files = sys.argv[1], json.loads(sys.argv[2])
try:
    uhyve.Vm(image, cpus=int(sys.argv[3]), files=files, output="stdout").run()
except KeyboardInterrupt:
    # A thread that was joined can be seen a moment longer.
    deadline = time.monotonic() + 1
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    print("KeyboardInterrupt, threads:", threads(), flush=True)
"""


@pytest.fixture
def endless(guest: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, str]]]:
    """An image that never ends, of each kind, and the files that it needs."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def make(kind: str, interface: int = 1) -> tuple[Path, dict[str, str]]:
        if kind == "blocked":
            return guest("readpath", interface=interface), {"/in": str(fifo)}
        if kind == "cli; hlt":
            return guest("crash", interface=interface, defines=["KIND=hlt_forever"]), {}
        return guest(kind, interface=interface), {}

    return make


def ended_quickly(start: float, limit: float) -> bool:
    return time.monotonic() - start < limit


# Timeouts.


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_timeout_ends_a_guest_that_never_ends(endless: Callable, kind: str, cpus: int) -> None:
    image, files = endless(kind)
    vm = Vm(image, files=files, cpus=cpus)
    start = time.monotonic()

    with pytest.raises(TimeoutExpired, match=r"did not end within 0\.5 s") as caught:
        vm.run(timeout=0.5)

    assert 0.5 <= time.monotonic() - start < 5
    assert (caught.value.timeout, caught.value.output) == (0.5, KINDS[kind])
    assert not vm.running


@pytest.mark.parametrize("interface", [2, 3])
@pytest.mark.parametrize("kind", ["busy", "blocked"])
def test_timeout_on_other_interfaces_ends_the_guest(endless: Callable, kind: str, interface: int) -> None:
    image, files = endless(kind, interface)

    with pytest.raises(TimeoutExpired):
        Vm(image, files=files).run(timeout=0.3)


def test_timeout_of_zero_ends_at_once(endless: Callable) -> None:
    image, files = endless("busy")

    with pytest.raises(TimeoutExpired):
        Vm(image, files=files).run(timeout=0)


def test_timeout_is_a_timeout_error_too(endless: Callable) -> None:
    with pytest.raises(TimeoutError):
        Vm(endless("busy")[0]).run(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), 1e300])
def test_timeout_that_is_no_time_is_refused_and_leaves_nothing_running(endless: Callable, timeout: float) -> None:
    vm = Vm(endless("busy")[0])

    with pytest.raises((ConfigError, ValueError)):
        vm.run(timeout=timeout)

    assert not vm.running


def test_timeout_longer_than_the_run_changes_nothing(guest: Callable[..., Path]) -> None:
    assert Vm(guest("hello")).run(timeout=1e6).code == 0


def test_run_after_a_timeout_starts_again(endless: Callable) -> None:
    vm = Vm(endless("busy")[0])

    for _ in range(3):
        with pytest.raises(TimeoutExpired) as caught:
            vm.run(timeout=0.3)
        assert caught.value.output == "busy\n"


def test_wait_that_times_out_leaves_the_guest_running(endless: Callable) -> None:
    with Vm(endless("busy")[0]) as vm:
        vm.start()
        for _ in range(2):
            with pytest.raises(TimeoutExpired):
                vm.wait(timeout=0.2)
            assert vm.running


# interrupt() and close().


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cpus", [1, 4])
def test_interrupt_from_another_thread_ends_the_run(
    endless: Callable, kind: str, cpus: int, wait_until: Callable[..., bool]
) -> None:
    image, files = endless(kind)
    pieces: list[bytes] = []
    vm = Vm(image, files=files, cpus=cpus, output=pieces.append)
    ends: list[float] = []

    def interrupt() -> None:
        wait_until(lambda: pieces, LIMIT)
        ends.append(time.monotonic())
        vm.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(VmStateError, match="interrupted"):
        vm.run(LIMIT)

    thread.join()
    assert ended_quickly(ends[0], 2)
    assert not vm.running


def test_interrupt_without_a_running_guest_does_nothing(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("hello"))

    vm.interrupt()
    vm.close()

    assert vm.run(LIMIT).code == 0
    vm.interrupt()
    assert vm.wait().code == 0


def test_interrupt_many_times_from_many_threads_ends_each_run_once(endless: Callable) -> None:
    vm = Vm(endless("busy")[0], cpus=2)
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            vm.interrupt()
            time.sleep(0.005)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            with pytest.raises(VmStateError, match="interrupted"):
                vm.run(LIMIT)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_close_ends_the_guest_and_its_threads(
    endless: Callable, kind: str, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    image, files = endless(kind)
    vm = Vm(image, files=files, cpus=2)
    vm.start()
    assert vm.running
    # A new thread gives itself its name.
    assert wait_until(lambda: {"uhyve-vcpu0", "uhyve-vcpu1"} <= set(no_leftovers()))
    start = time.monotonic()

    vm.close()

    assert ended_quickly(start, 2)
    # A thread that was joined can be seen a moment longer.
    assert wait_until(lambda: not no_leftovers(), 1)
    assert not vm.running


def test_close_while_another_thread_waits_ends_its_wait(endless: Callable) -> None:
    vm = Vm(endless("busy")[0])
    vm.start()
    timer = threading.Timer(0.3, vm.close)
    timer.start()

    with pytest.raises(VmStateError, match=r"closed|not running"):
        vm.wait(LIMIT)

    timer.join()


def test_exit_of_the_with_block_ends_the_guest(
    endless: Callable, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    with Vm(endless("hang")[0]) as vm:
        vm.start()
        assert wait_until(no_leftovers)

    assert wait_until(lambda: not no_leftovers(), 1)


def test_vm_without_references_ends_its_guest(
    endless: Callable, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    vm = Vm(endless("busy")[0])
    vm.start()

    del vm

    assert wait_until(lambda: no_leftovers() == [], 10)


# Ctrl-C.


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_is_a_keyboard_interrupt_and_ends_the_guest(
    endless: Callable, python: Callable, kind: str, cpus: int
) -> None:
    import json

    image, files = endless(kind)
    child = python(RUN, image, json.dumps(files), cpus)
    child.read_until(KINDS[kind].encode())
    start = time.monotonic()

    child.signal(signal.SIGINT)
    status, output, errors = child.finish(10)

    assert ended_quickly(start, 3)
    assert (status, errors) == (0, b"")
    assert output.decode() == KINDS[kind] + "KeyboardInterrupt, threads: []\n"


def test_signal_handler_that_returns_lets_the_guest_run_on(endless: Callable) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(TimeoutExpired):
            Vm(endless("busy")[0]).run(timeout=1)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)

    assert seen == [signal.SIGUSR1]


def test_signal_handler_that_interrupts_ends_the_run(endless: Callable) -> None:
    vm = Vm(endless("halt")[0])
    before = signal.signal(signal.SIGALRM, lambda number, frame: vm.interrupt())
    remaining = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(VmStateError, match="interrupted"):
            vm.run(30)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *remaining)


# The end of the process.


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise RuntimeError('on purpose')"])
@pytest.mark.parametrize("kind", ["busy", "hang", "blocked"])
def test_process_that_ends_with_a_running_vm_ends_cleanly(
    endless: Callable, python: Callable, kind: str, ending: str
) -> None:
    import json

    image, files = endless(kind)
    code = (
        "import json, sys, uhyve\n"
        "vm = uhyve.Vm(sys.argv[1], files=json.loads(sys.argv[2]), cpus=2, output=lambda text: None)\n"
        f"vm.start()\nprint('started', flush=True)\n{ending}"
    )
    child = python(code, image, json.dumps(files))
    child.read_until(b"started\n")
    start = time.monotonic()

    status, _, errors = child.finish(10)

    assert ended_quickly(start, 2)
    assert status == {"": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert errors == b"" or b"on purpose" in errors


@pytest.mark.parametrize("ending", ["", "dbg.cont(wait=False)", "server.close()", "vm.close()", "del dbg, server, vm"])
def test_process_that_ends_with_a_gdb_server_ends_cleanly(
    endless: Callable, python: Callable, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / "gdb"
    code = (
        "import sys, uhyve\n"
        "vm = uhyve.Vm(sys.argv[1])\ndbg = vm.debug()\nserver = dbg.serve_gdb('unix:' + sys.argv[2])\n"
        f"{ending}\nprint('ready', flush=True)"
    )
    child = python(code, endless("busy")[0], path)
    child.read_until(b"ready\n")

    status, _, errors = child.finish(10)

    assert (status, errors) == (0, b"")
    assert not path.exists()


@pytest.mark.parametrize(
    "late",
    [
        "vm.start()",
        "kept.append(vm.debug())",
        "kept.append(vm.debug()); kept[0].breakpoint('_start', condition=print); kept[0].cont(wait=False)",
        "kept.append(vm.debug()); kept.append(kept[0].serve_gdb())",
    ],
)
def test_process_whose_last_exit_handler_starts_a_vm_ends(endless: Callable, python: Callable, late: str) -> None:
    # What is registered before the package is imported runs behind its own handler.
    code = (
        "import atexit, sys\n"
        "kept = []\n"
        "def last():\n"
        "    import uhyve\n"
        "    vm = uhyve.Vm(sys.argv[1], cpus=2)\n"
        f"    {late}\n"
        "    kept.append(vm)\n"
        "    print('started', flush=True)\n"
        "atexit.register(last)\n"
        "import uhyve"
    )
    child = python(code, endless("busy")[0])
    child.read_until(b"started\n")

    status, _, errors = child.finish(10)

    assert (status, errors) == (0, b"")


def test_vm_that_is_started_when_modules_are_cleared_is_refused(endless: Callable, python: Callable) -> None:
    code = (
        "import sys, uhyve\n"
        "class Last:\n"
        "    vm = uhyve.Vm(sys.argv[1])\n"
        "    def __del__(self, write=sys.stdout.write, flush=sys.stdout.flush):\n"
        "        try:\n"
        "            self.vm.start()\n"
        "        except RuntimeError as error:\n"
        "            write(str(error)); flush()\n"
        "last = Last()"
    )

    status, output, errors = python(code, endless("busy")[0]).finish(10)

    assert (status, output, errors) == (0, b"Python is ending: no VM can be started any more", b"")


def test_process_that_is_terminated_with_a_running_vm_is_gone(endless: Callable, python: Callable) -> None:
    child = python(RUN, endless("busy")[0], "{}", 2)
    child.read_until(b"busy\n")

    child.signal(signal.SIGTERM)

    assert child.finish(5)[0] == -signal.SIGTERM


# Calls in the wrong state.


def test_run_while_running_is_refused(endless: Callable) -> None:
    with Vm(endless("busy")[0]) as vm:
        vm.start()

        for call in (vm.run, vm.start, vm.debug):
            with pytest.raises(VmStateError, match="runs already"):
                call()

        assert vm.running


def test_wait_before_a_start_is_refused(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("hello"))

    with pytest.raises(VmStateError, match="not running"):
        vm.wait()


def test_wait_again_gives_the_same_result(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("hello"))
    vm.start()

    first = vm.wait(LIMIT)

    assert vm.wait() is first
    assert not vm.running


def test_wait_from_two_threads_gives_both_the_result(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("tsc", defines=["MILLISECONDS=50"]))
    vm.start()
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(vm.wait(LIMIT).code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert codes == [0, 0]
