"""Hermit's tasks as gdb's threads: of real kernels, and of guests that have none or only look as if."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from uhyve.hermit_tasks import KERNELS, HermitTasks, Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gdb.conftest import Served

pytestmark = [pytest.mark.timeout(100)]

VM = pytest.mark.vm
"""What lacks it is the software CPU's: with two vCPUs a kernel boots for 10 s on PVM, and one program times itself."""

LATER = "core {}, not executed now"


def at(served: Served, place: str) -> HermitTasks:
    """The policy, with the guest at a place."""
    policy = HermitTasks()
    policy._bind(served.dbg)
    served.dbg.breakpoint(place, temporary=True)
    served.dbg.cont(timeout=60)
    assert served.dbg.stop.reason == "breakpoint"
    return policy


@VM
@pytest.mark.real_gdb
def test_gdb_shows_the_task_that_a_vcpu_of_a_real_kernel_executes(
    serve: Callable[..., Served], hermit_060: Path
) -> None:
    served = serve(hermit_060 / "hello_world", policy=HermitTasks())
    early = served.script("info threads", "tbreak sys_write", "continue", "info threads", "monitor tasks")

    assert re.search(r'"vCPU 0" \(stopped: entry; no task: the core\'s variables are not set up yet\)', early.output)
    assert re.search(r'"task 1" \(priority 2, running; vCPU 0 stopped: breakpoint\)', early.output)
    assert re.search(r"task 0: priority 0, core 0, not executed now\s+task 1: priority 2, vCPU 0\s", early.errors)


def test_each_vcpu_has_its_task_and_an_idle_one_the_idle_task(serve: Callable[..., Served], hermit_060: Path) -> None:
    served = serve(hermit_060 / "hello_c", cpus=2, backend="soft")
    policy = at(served, "sys_write")

    tasks = policy.executed(served.dbg)

    assert tasks == {0: Task(2, 2, 0, "running"), 1: Task(1, 0, 1, "idle")}
    assert [thread.name for thread in policy.threads(served.dbg)] == ["task 2", "idle task 1"]
    assert policy.tasks("").splitlines() == [
        f"task 0: priority 0, {LATER.format(0)}",
        "task 1: priority 0, vCPU 1",
        "task 2: priority 2, vCPU 0",
    ]


@VM
@pytest.mark.parametrize("name", ["hello_world", "hello_c"])
def test_main_task_of_a_later_kernel_is_found(serve: Callable[..., Served], hermit_069: Path, name: str) -> None:
    served = serve(hermit_069 / name)
    policy = at(served, "hermit::syscalls::tasks::exit" if name == "hello_c" else "sys_write")
    assert policy.executed(served.dbg) == {0: Task(1, 2, 0, "running")}


def test_tasks_of_a_program_with_threads_are_listed(serve: Callable[..., Served], hermit_069: Path) -> None:
    served = serve(hermit_069 / "rusty_demo", backend="soft")
    policy = at(served, "sys_join")

    assert policy.executed(served.dbg) == {0: Task(1, 2, 0, "running")}
    listed = [int(number) for number in re.findall(r"^task (\d+): priority 2", policy.tasks(""), flags=re.MULTILINE)]
    # The main one, and those that it waits for.
    assert listed[0] == 1
    assert len(listed) > 1
    assert policy.tasks("").count("not executed now") == len(listed)


@VM
def test_guest_without_the_symbols_is_shown_by_its_vcpus_with_the_reason(serve: Callable[..., Served]) -> None:
    served = serve("busy", cpus=2, policy=HermitTasks())
    stub = served.rsp()

    extra = bytes.fromhex(stub.request("qThreadExtraInfo,p1.2").decode()).decode()

    assert "running; no task: the image has no symbol hermit::scheduler::get_tid::TID_COUNTER" in extra
    assert "no list of tasks" in stub.monitor("tasks")


@VM
@pytest.mark.parametrize(
    "spoiled", [{}, {"task": 0x20}, {"priority": 0x10}, {"current": 0x7FFF_FFFF}, {"scheduler": 0x0}, {"core": 0x10}]
)
def test_layout_that_makes_no_sense_gives_a_reason_and_no_task(
    serve: Callable[..., Served], hermit_060: Path, spoiled: dict[str, Any]
) -> None:
    served = serve(hermit_060 / "hello_world")
    at(served, "sys_write")
    [fitting] = [
        kernel for kernel in KERNELS if HermitTasks([kernel]).executed(served.dbg) == {0: Task(1, 2, 0, "running")}
    ]

    [found] = HermitTasks([fitting._replace(**spoiled)]).executed(served.dbg).values()

    assert isinstance(found, Task) == (spoiled == {})
    if spoiled:
        assert found == "no known kernel's scheduler is where GS leads"


@VM
def test_hostile_pointers_in_the_kernels_place_are_an_answer_not_an_error(
    serve: Callable[..., Served], hermit_060: Path
) -> None:
    served = serve(hermit_060 / "hello_world")
    policy = at(served, "sys_write")
    memory, base = served.dbg.memory, served.dbg.vcpus[0].registers.gs_base
    scheduler = memory.read_u64(base + 8)
    for pointer in (0, 1, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF, base):
        memory.write_u64(base + 8, pointer)
        assert all(isinstance(task, str) for task in policy.executed(served.dbg).values())
    memory.write_u64(base + 8, scheduler)
    tasks = served.dbg.symbol("hermit::scheduler::TASKS")
    for offset, value in ((0x20, 0x7FFF_0000_0000), (0x18, 9), (0x28, 1 << 40), (0x28, 77)):
        before = memory.read_u64(tasks + offset)
        memory.write_u64(tasks + offset, value)
        assert policy.tasks("").startswith("no list of tasks: ")
        memory.write_u64(tasks + offset, before)
    assert "task 1" in policy.tasks("")
