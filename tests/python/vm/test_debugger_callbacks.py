"""Callbacks: what they may do and may not, what happens when they fail, and that they keep nothing alive."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uhyve import Debugger, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from uhyve import Hit

pytestmark = pytest.mark.vm

LIMIT = 30
COUNT = 40
TOTAL = 3 * sum(range(COUNT))


@pytest.fixture
def loop(guest: Callable[..., Path]) -> Path:
    return guest("loop", defines=[f"COUNT={COUNT}"])


# Failures.


class SpecialError(Exception):
    """An exception with a field."""

    def __init__(self, text: str, field: int) -> None:
        super().__init__(text)
        self.field = field


def test_exception_of_a_callback_is_raised_itself_with_a_note_and_the_vm_stands_there(loop: Path) -> None:
    original = SpecialError("on purpose", 42)

    def fail(hit: Hit) -> None:
        if hit.arg(0) == 7:
            raise original

    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=fail)

        with pytest.raises(SpecialError) as caught:
            dbg.cont(timeout=LIMIT)

        assert caught.value is original
        assert original.field == 42
        [note] = original.__notes__
        assert f"breakpoint {breakpoint_.id} on vCPU 0 at pc {breakpoint_.address:#x} (work)" in note
        assert "in fail" in "".join(traceback.format_exception(caught.value))
        stop = dbg.stop
        assert (stop.reason, stop.pc, stop.exception) == ("exception", breakpoint_.address, original)
        assert stop.breakpoint is breakpoint_
        assert (dbg.registers.rdi, dbg.memory.read_u64(dbg.symbol("calls"))) == (7, 7)
        assert "SpecialError: on purpose" in str(stop)
        assert (breakpoint_.reached, breakpoint_.hits) == (8, 0)


def test_guest_whose_callback_failed_goes_on_from_there(loop: Path) -> None:
    failures = iter([True] * 3 + [False] * COUNT)

    def fail(hit: Hit) -> None:
        if next(failures):
            raise ValueError(hit.arg(0))

    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=fail)
        for i in range(3):
            with pytest.raises(ValueError, match=str(i)):
                dbg.cont(timeout=LIMIT)
            assert dbg.wait().reason == "exception", "raised once, and then a stop like any other"

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert breakpoint_.reached == COUNT
        assert dbg.output == f"calls={COUNT} total={TOTAL}\n"


def test_exception_that_nobody_waited_for_is_raised_by_the_next_call(
    loop: Path, wait_until: Callable[..., bool]
) -> None:
    def fail(hit: Hit) -> None:
        raise ValueError("later")

    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=fail)
        dbg.cont(wait=False)
        assert wait_until(lambda: not dbg.running, LIMIT)

        with pytest.raises(ValueError, match="later"):
            dbg.cont(timeout=LIMIT)

        assert breakpoint_.reached == 1, "the guest has not run on"
        breakpoint_.delete()
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_exception_of_a_callback_is_raised_by_a_step_onto_it(loop: Path) -> None:
    def fail(hit: Hit) -> None:
        raise ValueError("stepped onto")

    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", temporary=True)
        dbg.cont(timeout=LIMIT)
        dbg.breakpoint("work+7", condition=fail)

        with pytest.raises(ValueError, match="stepped onto"):
            dbg.step(timeout=LIMIT)

        assert dbg.stop.reason == "exception"


def test_exception_beside_another_breakpoint_that_stops_is_not_swallowed(loop: Path) -> None:
    def fail(hit: Hit) -> None:
        raise ValueError(f"callback {hit.breakpoint.id}")

    with Vm(loop).debug() as dbg:
        plain = dbg.breakpoint("work")
        failing = dbg.breakpoint("work", condition=fail)

        with pytest.raises(ValueError, match="callback 2"):
            dbg.cont(timeout=LIMIT)

        assert dbg.stop.breakpoint is failing
        assert (plain.reached, failing.reached) == (1, 1)


def test_exceptions_of_two_callbacks_of_one_hit_are_both_raised(loop: Path) -> None:
    def fail(hit: Hit) -> None:
        if hit.arg(0) == 0:
            raise ValueError(f"callback {hit.breakpoint.id}")

    with Vm(loop).debug() as dbg:
        for _ in range(3):
            dbg.breakpoint("work", condition=fail)

        for number in (1, 2, 3):
            with pytest.raises(ValueError, match=f"callback {number}"):
                dbg.cont(timeout=LIMIT)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert [breakpoint_.reached for breakpoint_ in dbg.breakpoints] == [COUNT] * 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exception_that_is_no_error_is_raised_too(loop: Path, kind: type[BaseException]) -> None:
    def fail(hit: Hit) -> None:
        raise kind

    with Vm(loop).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work", condition=fail)

        with pytest.raises(kind):
            dbg.cont(timeout=LIMIT)

        breakpoint_.delete()
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_verdict_without_a_truth_value_is_an_error_of_the_callback(loop: Path) -> None:
    class Neither:
        def __bool__(self) -> bool:
            raise ArithmeticError("neither true nor false")

    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition=lambda hit: Neither())

        with pytest.raises(ArithmeticError, match="neither"):
            dbg.cont(timeout=LIMIT)


def test_callback_that_takes_no_hit_is_a_type_error(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition=lambda: True)

        with pytest.raises(TypeError):
            dbg.cont(timeout=LIMIT)


# What a callback may not do.


@pytest.mark.parametrize("way", ["cont", "cont without waiting", "step", "step a vCPU", "wait"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_callback_that_drives_raises_at_once_and_says_what_to_return(loop: Path, way: str, cpus: int) -> None:
    seconds: list[float] = []
    with Vm(loop, cpus=cpus).debug() as dbg:
        ways: dict[str, Callable[[], object]] = {
            "cont": dbg.cont,
            "cont without waiting": lambda: dbg.cont(wait=False),
            "step": dbg.step,
            "step a vCPU": lambda: dbg.step(vcpu=0),
            "wait": dbg.wait,
        }

        def drive(hit: Hit) -> None:
            begin = time.monotonic()
            try:
                ways[way]()
            finally:
                seconds.append(time.monotonic() - begin)

        breakpoint_ = dbg.breakpoint("work", condition=drive)

        with pytest.raises(VmStateError, match=r"a callback can't .*return"):
            dbg.cont(timeout=LIMIT)

        assert seconds[0] < 5
        assert dbg.stop.reason == "exception"
        breakpoint_.delete()
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_callback_that_uses_the_stopped_view_is_told_that_the_guest_runs(loop: Path) -> None:
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work")
        def look(hit: Hit) -> None:
            for use in (lambda: dbg.registers, lambda: dbg.vcpus[0].pc, lambda: dbg.stop):
                with pytest.raises(VmStateError, match="running"):
                    use()
            assert dbg.running

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert look.reached == COUNT


# Hits.


def test_hit_after_its_callback_raises_on_every_use(loop: Path) -> None:
    kept: list[Any] = []

    def keep(hit: Hit) -> bool:
        kept.extend([hit, hit.registers, hit.memory])
        return True

    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition=keep)
        stop = dbg.cont(timeout=LIMIT)
        hit, registers, memory = kept

        for use in (
            lambda: hit.arg(0),
            lambda: hit.registers.rip,
            lambda: hit.memory.read_u8(stop.pc),
            lambda: registers.rax,
            lambda: setattr(registers, "rax", 0),
            registers.to_dict,
            lambda: memory.read(stop.pc, 1),
            lambda: memory.write_u8(stop.pc, 0),
            lambda: memory.physical.read_u8(0),
        ):
            with pytest.raises(VmStateError, match="this hit is over"):
                use()
        assert (hit.vcpu, hit.pc, hit.symbol, hit.breakpoint) == (0, stop.pc, "work", stop.breakpoint)


def test_hit_after_its_callback_raises_while_the_guest_runs_and_does_not_hang(
    guest: Callable[..., Path], python: Callable[..., Any]
) -> None:
    code = """
import sys, uhyve
kept = []
with uhyve.Vm(sys.argv[1]).debug() as dbg:
    breakpoint_ = dbg.breakpoint("spin", condition=kept.append)
    dbg.cont(timeout=0.05)
    breakpoint_.delete()
    dbg.cont(wait=False)
    for _ in range(1000):
        try:
            kept[0].registers.rip
        except uhyve.VmStateError:
            pass
        else:
            raise AssertionError
print("over")
"""
    status, output, errors = python(code, guest("busy")).finish(timeout=LIMIT)

    assert (status, output) == (0, b"over\n"), errors


def test_hit_can_be_used_by_another_thread_while_its_callback_runs(loop: Path) -> None:
    seen: list[int] = []

    def look(hit: Hit) -> None:
        if hit.arg(0) == 3:
            thread = threading.Thread(target=lambda: seen.append(hit.registers.rsi))
            thread.start()
            thread.join(LIMIT)

    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition=look)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert seen == [6]


def test_callback_that_writes_registers_changes_what_the_guest_does(loop: Path) -> None:
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work")
        def double(hit: Hit) -> None:
            hit.registers.rdi *= 2

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert double.hits == 0
        assert dbg.output == f"calls={COUNT} total={4 * sum(range(COUNT))}\n"


def test_callback_that_writes_memory_changes_what_the_guest_does(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        total = dbg.symbol("total")

        @dbg.breakpoint("work")
        def clear(hit: Hit) -> None:
            hit.memory.write_u64(total, 0)

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output == f"calls={COUNT} total={3 * (COUNT - 1)}\n"
        assert clear.reached == COUNT


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_callback_that_moves_rip_makes_the_guest_go_on_there(loop: Path, hardware: bool, stops: bool) -> None:
    with Vm(loop).debug() as dbg:

        def skip(hit: Hit) -> bool:
            if hit.arg(0) % 2:
                # Return to the caller at once.
                hit.registers.rip = hit.memory.read_u64(hit.registers.rsp)
                hit.registers.rsp += 8
                return stops
            return False

        breakpoint_ = dbg.breakpoint("work", condition=skip, hardware=hardware)

        while (stop := dbg.cont(timeout=LIMIT)).reason == "breakpoint":
            assert stops
            assert (dbg.symbolize(dbg.registers.rip) or "").startswith("guest_main")

        assert stop.reason == "exit"
        assert breakpoint_.reached == COUNT
        assert dbg.output == f"calls={COUNT // 2} total={3 * sum(range(0, COUNT, 2))}\n"


def test_callback_that_moves_rip_to_another_breakpoint_meets_that_one(loop: Path) -> None:
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work")
        def jump(hit: Hit) -> None:
            if hit.arg(0) == 3:
                hit.registers.rip = hit.pc + 0x12

        other = dbg.breakpoint("work+0x12", condition="arg0 == 3")

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.breakpoint, dbg.memory.read_u64(dbg.symbol("calls"))) == (other, 3)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (jump.reached, other.reached) == (COUNT, COUNT)
        assert dbg.output.startswith(f"calls={COUNT - 1} ")


# What a callback may do.


def test_callback_may_set_change_and_delete_breakpoints(loop: Path) -> None:
    seen: list[tuple[str, int]] = []
    with Vm(loop).debug() as dbg:

        def outer(hit: Hit) -> None:
            seen.append(("outer", hit.arg(0)))
            if hit.arg(0) == 2:
                made.append(dbg.breakpoint("work+7", condition=inner))
            elif hit.arg(0) == 5:
                made[0].delete()
            elif hit.arg(0) == 7:
                first.enabled = False

        def inner(hit: Hit) -> None:
            seen.append(("inner", hit.arg(0)))

        made: list[Any] = []
        first = dbg.breakpoint("work", condition=outer)

        assert dbg.cont(timeout=LIMIT).reason == "exit"

        expected = [[("outer", i), *([("inner", i)] if 2 <= i < 5 else [])] for i in range(8)]
        assert seen == [entry for entries in expected for entry in entries]
        assert (first.reached, made[0].reached) == (8, 3)


def test_callback_may_delete_its_own_breakpoint(loop: Path) -> None:
    with Vm(loop).debug() as dbg:

        @dbg.breakpoint("work")
        def once(hit: Hit) -> None:
            hit.breakpoint.delete()

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert (once.reached, once.deleted) == (1, True)
        assert dbg.output == f"calls={COUNT} total={TOTAL}\n"


def test_callback_may_interrupt_and_the_world_stops_once(loop: Path) -> None:
    with Vm(loop, cpus=2).debug() as dbg:

        @dbg.breakpoint("work")
        def stop_here(hit: Hit) -> None:
            if hit.arg(0) == 5:
                dbg.interrupt()

        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.number) == ("interrupt", 2)
        assert dbg.memory.read_u64(dbg.symbol("calls")) in (5, 6)
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert stop_here.reached == COUNT


def test_callback_that_closes_the_debugger_ends_cont_with_an_error(
    loop: Path, wait_until: Callable[..., bool], no_leftovers: Callable[[], list[str]]
) -> None:
    dbg = Vm(loop).debug()
    dbg.breakpoint("work", condition=lambda hit: dbg.close())

    with pytest.raises(VmStateError, match="closed"):
        dbg.cont(timeout=LIMIT)

    assert wait_until(lambda: no_leftovers() == [], LIMIT)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_callbacks_that_set_breakpoints_at_once_do_not_wait_for_each_other(
    guest: Callable[..., Path], cpus: int
) -> None:
    with Vm(guest("smp", defines=["COUNT=20"]), cpus=cpus).debug() as dbg:

        @dbg.breakpoint("tick")
        def both(hit: Hit) -> None:
            dbg.breakpoint("tick+7", condition="False", vcpu=hit.vcpu).delete()

        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert both.reached == 20 * cpus
        assert dbg.output.endswith(f"all={20 * cpus}\n")


def test_slow_callback_does_not_block_other_vcpus(guest: Callable[..., Path]) -> None:
    others = threading.Event()

    def wait_for_the_other(hit: Hit) -> None:
        if hit.vcpu == 0 and hit.arg(1) == 0:
            assert others.wait(LIMIT), "the other vCPU did not go on"
        elif hit.vcpu == 1 and hit.arg(1) == 19:
            others.set()

    with Vm(guest("smp", defines=["COUNT=20"]), cpus=2).debug() as dbg:
        dbg.breakpoint("tick", condition=wait_for_the_other)

        assert dbg.cont(timeout=LIMIT).reason == "exit"


@pytest.mark.parametrize("cpus", [1, 4])
def test_thread_local_values_persist_across_the_callbacks_of_a_vcpu(guest: Callable[..., Path], cpus: int) -> None:
    local = threading.local()
    results: dict[int, int] = {}

    def count(hit: Hit) -> None:
        local.count = getattr(local, "count", 0) + 1
        results[hit.vcpu] = local.count

    with Vm(guest("smp", defines=["COUNT=20"]), cpus=cpus).debug() as dbg:
        dbg.breakpoint("tick", condition=count)
        dbg.breakpoint("tick+7", condition="arg1 == 10")

        while dbg.cont(timeout=LIMIT).reason == "breakpoint":
            pass

        assert results == dict.fromkeys(range(cpus), 20)


# Lifetimes.


def test_debugger_whose_callback_refers_to_it_is_collected_with_its_threads(
    loop: Path, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    def make() -> tuple[weakref.ref[Vm], weakref.ref[Debugger]]:
        vm = Vm(loop, cpus=2)
        dbg = vm.debug()
        dbg.breakpoint("work", condition=lambda hit: dbg.vcpus[hit.vcpu] is None)
        dbg.cont(timeout=0.0)
        return weakref.ref(vm), weakref.ref(dbg)

    references = make()
    gc.collect()

    assert [reference() for reference in references] == [None, None]
    assert wait_until(lambda: no_leftovers() == [], LIMIT)


def test_callback_of_a_deleted_breakpoint_and_of_a_replaced_condition_is_let_go(loop: Path) -> None:
    class Callback:
        def __call__(self, hit: Hit) -> bool:
            return False

    with Vm(loop).debug() as dbg:
        callbacks = [Callback(), Callback()]
        references = [weakref.ref(callback) for callback in callbacks]
        replaced = dbg.breakpoint("work", condition=callbacks[0])
        dbg.breakpoint("work", condition=callbacks[1])
        assert replaced.condition is callbacks[0]
        callbacks.clear()
        gc.collect()
        assert all(reference() is not None for reference in references)

        replaced.condition = None

        gc.collect()
        assert references[0]() is None
        assert references[1]() is not None
    gc.collect()
    assert references[1]() is None, "close() lets go of the rest"


def test_many_debuggers_one_after_the_other_leave_no_threads_and_no_descriptors(
    loop: Path, no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    def run() -> None:
        with Vm(loop, cpus=2).debug() as dbg:
            dbg.breakpoint("work", condition=lambda hit: hit.arg(0) == 3 and dbg is not None)
            dbg.cont(timeout=LIMIT)

    run()
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(30):
        run()
    gc.collect()

    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert wait_until(lambda: no_leftovers() == [], LIMIT)


# Ctrl-C.


@pytest.mark.parametrize("name", ["busy", "halt", "hang"])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_ctrl_c_in_cont_stops_the_guest_and_keeps_the_vm_usable(
    guest: Callable[..., Path], name: str, cpus: int
) -> None:
    with Vm(guest(name), cpus=cpus).debug() as dbg:
        for number in (2, 3):
            sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            sender.start()

            with pytest.raises(KeyboardInterrupt):
                dbg.cont(timeout=LIMIT)

            sender.join()
            assert (dbg.stop.reason, dbg.stop.number) == ("interrupt", number)
            assert dbg.registers.rip == dbg.stop.pc
        assert dbg.cont(timeout=0.02).reason == "timeout"


def test_ctrl_c_in_a_host_call_that_blocks_stops_the_guest(guest: Callable[..., Path], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keeper = os.open(fifo, os.O_RDWR)
    try:
        with Vm(guest("readpath"), files={"/in": fifo}).debug() as dbg:
            sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            sender.start()

            with pytest.raises(KeyboardInterrupt):
                dbg.cont(timeout=LIMIT)

            sender.join()
            assert dbg.stop.reason == "interrupt"
            assert dbg.output == "opened\n"
    finally:
        os.close(keeper)


def test_signal_handler_that_returns_does_not_end_the_wait(guest: Callable[..., Path]) -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with Vm(guest("busy")).debug() as dbg:
            sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR2))
            sender.start()

            assert dbg.cont(timeout=0.3).reason == "timeout"

            sender.join()
            assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_signal_handler_may_interrupt(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy"), cpus=2).debug() as dbg:
        previous = signal.signal(signal.SIGUSR2, lambda number, frame: dbg.interrupt())
        try:
            sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR2))
            sender.start()

            assert dbg.cont(timeout=LIMIT).reason == "interrupt"

            sender.join()
        finally:
            signal.signal(signal.SIGUSR2, previous)
