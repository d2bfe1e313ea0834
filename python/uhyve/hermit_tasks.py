"""Hermit's tasks as gdb's threads, for kernels 0.6.0 to 0.6.9 on x86-64.

These kernels come without debug information. What leads to a task is a register and a few numbers: GS holds the address
of the core's variables, they that of its scheduler, that one the address of the task that it executes. The numbers
differ from build to build (``KERNELS``), and which holds is found by looking: identifiers, core, priority and status
must all make sense. Source: the kernel's ``scheduler`` and ``core_local`` modules, and how rustc laid their structures
out in Hermit's published images.
"""

from __future__ import annotations

from collections import namedtuple

from uhyve.errors import BreakpointError, GuestFaultError
from uhyve.gdb_policy import GdbPolicy, ThreadInfo, monitor_command, vcpu_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from uhyve._core import Memory
    from uhyve.debugger import Debugger, Vcpu

__all__ = ["KERNELS", "HermitTasks", "KernelLayout", "Task"]

COUNTER = "hermit::scheduler::get_tid::TID_COUNTER"
TASKS = "hermit::scheduler::TASKS"
STATUS = ("invalid", "ready", "running", "blocked", "finished", "idle")
PRIORITIES = 31
MOST_TASKS = 4096
NODE = 11
"""Entries of a node of Rust's ``BTreeMap``."""

KernelLayout = namedtuple("KernelLayout", ["name", "core", "scheduler", "current", "task", "priority"])
KernelLayout.__doc__ = """Where a kernel has what leads to a task.

``core`` and ``scheduler`` are offsets in what GS points at, ``current`` in the scheduler, ``task`` (the number, with
the core's behind it) and ``priority`` (with the status behind it) in the counted cell of a task.
"""

KERNELS = (
    KernelLayout("0.6.9", core=0x8, scheduler=0x10, current=0x20, task=0x580, priority=0x588),
    KernelLayout("0.6.9 with newlib", core=0x8, scheduler=0x10, current=0x20, task=0x580, priority=0x58C),
    KernelLayout("0.6.0", core=0x28, scheduler=0x8, current=0x230, task=0x598, priority=0x5A0),
    KernelLayout("0.6.0 with newlib", core=0x28, scheduler=0x8, current=0x288, task=0x598, priority=0x5A4),
)

Task = namedtuple("Task", ["id", "priority", "core", "status"])
Task.__doc__ = (
    """A task: its number, its priority (0 is idle, 31 the highest), its core; its status, if it is executed."""
)


class HermitTasks(GdbPolicy):
    """Names gdb's threads by the Hermit tasks that the vCPUs execute, and lists all tasks by ``monitor tasks``.

    ``info threads`` says ``"task 3" (priority 2, running; vCPU 0 stopped: breakpoint)``. A vCPU whose task is not known
    is shown as ever, with the reason: its kernel has not come to tasks yet, or it is none of ``kernels``.

    It ends at tasks that no vCPU executes: their registers lie where no symbol leads, so they are in the list, without
    a thread of their own. In the instants of a switch a vCPU may be shown with the task that it leaves.

    >>> import uhyve
    >>> with uhyve.Vm.demo().debug() as dbg, dbg.serve_gdb(policy=HermitTasks()):
    ...     [(thread.name, thread.extra) for thread in HermitTasks().threads(dbg)]
    [('vCPU 0', 'stopped: entry; no task: the image has no symbol hermit::scheduler::get_tid::TID_COUNTER')]
    """

    def __init__(self, kernels: Sequence[KernelLayout] = KERNELS) -> None:
        self._kernels = tuple(kernels)

    def threads(self, debugger: Debugger) -> Iterable[ThreadInfo]:
        """One for each vCPU, named by its task."""
        stop = debugger._settled()
        found = self.executed(debugger)
        threads = []
        for vcpu in debugger.vcpus:
            task, state = found[vcpu.number], vcpu_state(vcpu, stop)
            if isinstance(task, Task):
                name = f"{'idle ' * (task.status == 'idle')}task {task.id}"
                extra = f"priority {task.priority}, {task.status}; vCPU {vcpu.number} {state}"
            else:
                name, extra = f"vCPU {vcpu.number}", f"{state}; no task: {task}"
            threads.append(ThreadInfo(vcpu.number + 1, name, extra, vcpu=vcpu.number))
        return threads

    @monitor_command
    def tasks(self, arguments: str) -> str:  # noqa: ARG002
        """List Hermit's tasks."""
        executed = self.executed(self.debugger)
        running = {task.id: vcpu for vcpu, task in executed.items() if isinstance(task, Task)}
        try:
            tasks = list(_all_tasks(self.debugger))
        except (BreakpointError, GuestFaultError, OverflowError, ValueError) as error:
            return f"no list of tasks: {error}\n"
        lines = []
        for task in tasks:
            where = f"vCPU {running[task.id]}" if task.id in running else f"core {task.core}, not executed now"
            lines.append(f"task {task.id}: priority {task.priority}, {where}\n")
        return "".join(lines) or "no tasks yet\n"

    def executed(self, debugger: Debugger) -> dict[int, Task | str]:
        """The task that each vCPU executes, by the vCPU's number, or why it is not known."""
        try:
            count = debugger.memory.read_u32(debugger.symbol(COUNTER))
        except BreakpointError:
            return dict.fromkeys(range(len(debugger.vcpus)), f"the image has no symbol {COUNTER}")
        except GuestFaultError:
            return dict.fromkeys(range(len(debugger.vcpus)), "the kernel's memory can't be read yet")
        # A kernel is what it is: where one vCPU's task makes sense, the others' do.
        best: dict[int, Task | str] = {}
        for kernel in self._kernels:
            found = {vcpu.number: _executed(vcpu, kernel, count) for vcpu in debugger.vcpus}
            if not best or _known(found) > _known(best):
                best = found
        return best


def _known(found: dict[int, Task | str]) -> int:
    return sum(isinstance(task, Task) for task in found.values())


def _executed(vcpu: Vcpu, kernel: KernelLayout, count: int) -> Task | str:
    """The task that a vCPU executes, if this is its kernel's layout; otherwise what is wrong."""
    base, memory = vcpu.registers.gs_base, vcpu.memory
    if base == 0:
        return "the core's variables are not set up yet"
    try:
        if memory.read_u64(base) != base:
            return "GS does not hold the address of a core's variables"
        scheduler = memory.read_u64(base + kernel.scheduler)
        if scheduler == 0:
            return "the core has no scheduler yet"
        core = memory.read_u32(base + kernel.core)
        cell = memory.read_u64(scheduler + kernel.current)
        number, its_core = (memory.read_u32(cell + kernel.task + 4 * n) for n in range(2))
        priority, status = (memory.read_u8(cell + kernel.priority + n) for n in range(2))
    except (GuestFaultError, OverflowError):
        return "no known kernel's scheduler is where GS leads"
    if not (number < count and core == its_core and priority < PRIORITIES and 0 < status < len(STATUS)):
        return "no known kernel's scheduler is where GS leads"
    return Task(number, priority, core, STATUS[status])


def _all_tasks(debugger: Debugger) -> Iterator[Task]:
    """Walks the kernel's map of tasks. Raises ``ValueError`` if it is none that is known here."""
    memory, start = debugger.memory, debugger.symbol(TASKS)
    first, second, length = (memory.read_u64(start + offset) for offset in (0x18, 0x20, 0x28))
    if length == 0:
        return
    # The pointer to the root and the tree's height, in either order.
    root, height = (first, second) if first > second else (second, first)
    if length > MOST_TASKS or height > 3:
        raise ValueError("the map of tasks makes no sense")
    for has_cores in (True, False):
        tasks = [task for task in _entries(memory, root, height, has_cores) if task is not None]
        if len(tasks) == length:
            yield from tasks
            return
    raise ValueError("the map of tasks is laid out in no known way")


def _entries(memory: Memory, node: int, height: int, has_cores: bool) -> Iterator[Task | None]:
    """The entries of a node and of those below it, in order; None for what is none."""
    # Rust puts what is largest first: with cores an entry is (task, core, priority), and the keys are before it.
    keys, values, size, counted = (0x8, 0x34, 12, 0xBA) if has_cores else (0x60, 0x8, 8, 0x8E)
    count = memory.read_u16(node + counted)
    if count > NODE:
        return
    edges = node + (counted + 2 + 7) // 8 * 8
    for n in range(count + 1):
        if height > 0:
            yield from _entries(memory, memory.read_u64(edges + 8 * n), height - 1, has_cores)
        if n == count:
            break
        key, value = memory.read_u32(node + keys + 4 * n), node + values + size * n
        core = memory.read_u32(value + 4) if has_cores else 0
        priority = memory.read_u8(value + (8 if has_cores else 4))
        is_one = memory.read_u32(value) == key and priority < PRIORITIES
        yield Task(key, priority, core, None) if is_one else None
