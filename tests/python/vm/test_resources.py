"""What VMs take from their process: descriptors, threads and memory, given back; several at once; forks."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uhyve import GuestCrashError, HypervisorError, TimeoutExpired, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.vm

LIMIT = 60


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def resident_kib() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


@pytest.mark.parametrize("way", ["run", "start", "close", "crash", "timeout", "callable", "refused"])
def test_runs_of_each_way_to_end_leave_no_descriptors_threads_or_mappings(
    guest: Callable[..., Path], tmp_path: Path, way: str, wait_until: Callable[..., bool]
) -> None:
    def once() -> None:
        if way == "crash":
            with pytest.raises(GuestCrashError):
                Vm(guest("crash", defines=["KIND=triple"])).run(LIMIT)
        elif way == "timeout":
            with pytest.raises(TimeoutExpired):
                Vm(guest("busy")).run(0.01)
        elif way == "refused":
            with pytest.raises(FileNotFoundError):
                Vm(guest("hello"), output=tmp_path / "nowhere" / "file").run()
        else:
            output = print if way == "callable" else "none"
            vm = Vm(guest("hello"), files={"/data": tmp_path, "/x": b"x"}, output=output)
            if way in ("run", "callable"):
                vm.run(LIMIT)
            else:
                vm.start()
                if way == "start":
                    vm.wait(LIMIT)
                vm.close()

    for _ in range(3):
        once()
    # KVM's own kernel threads of a VM go a little after it.
    before = None

    def settle() -> bool:
        nonlocal before
        now = (descriptors(), threads())
        settled, before = now == before, now
        return settled

    wait_until(settle)
    maps = mappings()
    for _ in range(10):
        once()

    assert wait_until(lambda: (descriptors(), threads()) == before, 5), (before, descriptors(), threads())
    assert mappings() <= maps + 8


@pytest.mark.slow
def test_200_runs_one_after_another_take_nothing_with_them(guest: Callable[..., Path], python: Callable) -> None:
    code = """
import os, sys, uhyve
def look():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), int(status["VmRSS"].split()[0])
vm = uhyve.Vm(sys.argv[1], cpus=2, files={"/x": b"x"})
for _ in range(30):
    vm.run(60)
before = look()
for _ in range(200):
    assert vm.run(60).code == 0
print(*before, *look())
"""
    status, output, errors = python(code, guest("hello")).finish(100)

    assert (status, errors) == (0, b"")
    fds, tasks, rss, fds_after, tasks_after, rss_after = map(int, output.split())
    assert fds_after == fds
    # KVM's kernel threads of the last VM or two may still be on their way out.
    assert tasks_after <= tasks + 2
    # 200 leaked pages would be 800 KiB, 200 leaked stacks or page tables far more.
    assert rss_after - rss < 1024


def test_failed_starts_leave_nothing(guest: Callable[..., Path], tmp_path: Path) -> None:
    vm = Vm(guest("hello"), tempdir=tmp_path / "nowhere")
    before = descriptors(), mappings()

    for _ in range(20):
        with pytest.raises(ValueError, match="tempdir"):
            vm.run()

    assert descriptors() == before[0]
    assert mappings() <= before[1] + 4
    assert not vm.running


def test_start_without_descriptors_left_is_an_os_error_and_the_process_lives(
    guest: Callable[..., Path], python: Callable
) -> None:
    code = """
import os, resource, sys, uhyve
vm = uhyve.Vm(sys.argv[1])
used = len(os.listdir("/proc/self/fd"))
for limit in range(used, used + 12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    try:
        vm.run(60)
        break
    except OSError as error:
        print("OSError", error.errno)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
print(vm.run(60).code)
"""
    status, output, errors = python(code, guest("hello")).finish(LIMIT)

    assert (status, errors) == (0, b"")
    *failures, last = output.decode().splitlines()
    assert failures
    assert set(failures) == {"OSError 24"}
    assert last == "0"


def test_start_with_more_memory_than_the_process_may_have_is_an_os_error(
    guest: Callable[..., Path], python: Callable
) -> None:
    code = """
import resource, sys, uhyve
vm = uhyve.Vm(sys.argv[1], memory="2GiB")
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    vm.run(60)
except OSError as error:
    print(type(error).__name__, error)
"""
    status, output, errors = python(code, guest("hello")).finish(LIMIT)

    assert (status, errors) == (0, b"")
    assert b"Cannot allocate memory" in output


def test_start_with_too_many_vcpus_says_how_many_there_can_be(guest: Callable[..., Path]) -> None:
    with pytest.raises((ValueError, HypervisorError), match="vCPU"):
        Vm(guest("hello"), cpus=100_000).run(LIMIT)


# Several at once.


def test_vms_from_threads_run_at_once_and_dont_mix(guest: Callable[..., Path]) -> None:
    images = [guest("hello", interface=interface, defines=[f"EXIT_CODE={interface}"]) for interface in (1, 2, 3)]
    results: dict[int, list[tuple[int, str]]] = {}

    def work(number: int) -> None:
        vm = Vm(images[number % 3], cpus=1 + number % 2)
        results[number] = [((result := vm.run(LIMIT)).code, result.output) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    text = "Hello from a test guest\nand a line by the buffer\n"
    assert results == {number: [(1 + number % 3, text)] * 5 for number in range(6)}


def test_vm_shared_by_threads_runs_for_one_and_refuses_the_others(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("loop", defines=["COUNT=10"]))
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(10):
            try:
                outcomes.append(vm.run(LIMIT).output)
            except VmStateError:
                outcomes.append("refused")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(outcomes) == 40
    assert set(outcomes) <= {"calls=10 total=135\n", "refused"}
    assert "calls=10 total=135\n" in outcomes
    assert not vm.running


def test_one_vm_crashes_beside_another_that_runs_on(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")) as busy:
        busy.start()

        with pytest.raises(GuestCrashError):
            Vm(guest("crash", defines=["KIND=triple"])).run(LIMIT)

        assert busy.running


# Forks.


def start_and_hear(vm: Vm) -> None:
    """Starts a guest that never ends, and returns when it has said something: its thread has its state by then.

    While Python 3.11 makes the state of a thread that is not its own, a fork copies a lock of the interpreter's, which
    its child then waits for.
    """
    vm.start()
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with pytest.raises(TimeoutExpired) as still_running:
            vm.wait(0.02)
        if still_running.value.output:
            return
    pytest.fail("the guest says nothing")


def in_child(work: Callable[[], str]) -> str:
    """Runs ``work`` in a fork and gives what it returned, or its exception's name."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                text = work()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writable, text.encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as stream:
        text = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("call", ["wait", "run", "start"])
def test_fork_with_a_running_vm_refuses_it_in_the_child(guest: Callable[..., Path], call: str) -> None:
    with Vm(guest("busy")) as vm:
        start_and_hear(vm)

        answer = in_child(lambda: str(getattr(vm, call)()))

        assert answer.startswith("VmStateError:"), answer
        assert vm.running
        with pytest.raises(TimeoutExpired):
            vm.wait(0.2)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_that_closes_the_parents_vm_leaves_it_running(guest: Callable[..., Path], tmp_path: Path) -> None:
    with Vm(guest("busy"), tempdir=tmp_path) as vm:
        start_and_hear(vm)

        assert in_child(lambda: str(vm.close())) == "None"

        assert vm.running
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_that_makes_its_own_vm_runs_it(guest: Callable[..., Path]) -> None:
    image = guest("hello")
    with Vm(guest("busy")) as vm:
        start_and_hear(vm)

        assert in_child(lambda: Vm(image).run(LIMIT).output.splitlines()[0]) == "Hello from a test guest"

        assert vm.running


def test_fork_by_multiprocessing_runs_vms(guest: Callable[..., Path], python: Callable) -> None:
    code = """
import multiprocessing, sys, uhyve
def work(image):
    return uhyve.Vm(image).run(60).code
if __name__ == "__main__":
    uhyve.Vm(sys.argv[1]).run(60)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, [sys.argv[1]] * 4))
"""
    status, output, _ = python(code, guest("hello", defines=["EXIT_CODE=4"])).finish(LIMIT)

    assert (status, output) == (0, b"[4, 4, 4, 4]\n")
