"""A debugger's life: the entry stop, running and stopping, time limits, interrupts, the end, detach, close, misuse."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from typing import TYPE_CHECKING

import pytest

import uhyve
from uhyve import BreakpointError, ConfigError, GuestCrashError, Stop, TimeoutExpired, Vm, VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 30
CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])


@CPUS
def test_debug_of_a_new_machine_stops_every_vcpu_before_its_first_instruction(
    guest: Callable[..., Path], cpus: int
) -> None:
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        stop = dbg.stop

        assert (stop.reason, stop.vcpu, stop.number, stop.symbol) == ("entry", 0, 1, "_start")
        assert stop.pc == dbg.symbol("_start") == dbg.registers.rip
        assert not dbg.running
        assert len(dbg.vcpus) == cpus
        assert [vcpu.pc for vcpu in dbg.vcpus] == [stop.pc] * cpus
        assert [vcpu.registers.rsi for vcpu in dbg.vcpus] == list(range(cpus))
        assert dbg.memory.read_u64(dbg.symbol("all_ticks")) == 0
        assert dbg.output == ""


@CPUS
def test_cont_without_breakpoints_stops_at_the_exit_with_code_and_output(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp", defines=["COUNT=20"]), cpus=cpus).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.code, stop.vcpu, stop.number) == ("exit", 0, 0, 2)
        assert dbg.output.endswith(f"all={20 * cpus}\n")
        assert dbg.result is not None
        assert (dbg.result.code, dbg.result.output) == (0, dbg.output)
        assert str(stop) == "the guest has ended with code 0"


@pytest.mark.parametrize("code", [0, 1, 42, 255, 256, -1, 2**31 - 1, -(2**31)])
def test_exit_of_any_code_is_kept_as_a_signed_number(guest: Callable[..., Path], code: int) -> None:
    with Vm(guest("hello", defines=[f"EXIT_CODE={code}"])).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.code) == ("exit", code)


@CPUS
def test_registers_and_memory_after_the_exit_can_be_read_on_every_vcpu(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp", defines=["COUNT=5"]), cpus=cpus).debug() as dbg:
        dbg.cont(timeout=LIMIT)

        assert all(vcpu.registers.rip != 0 and len(vcpu.registers.to_dict()) > 80 for vcpu in dbg.vcpus)
        assert dbg.memory.read_u64(dbg.symbol("all_ticks")) == 5 * cpus


def test_resume_after_the_exit_raises_a_state_error_that_names_the_code(guest: Callable[..., Path]) -> None:
    with Vm(guest("hello", defines=["EXIT_CODE=7"])).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        for resume in (dbg.cont, dbg.step):
            with pytest.raises(VmStateError, match="exited with code 7"):
                resume()
        assert dbg.stop is stop


def test_interrupt_after_the_exit_does_nothing(guest: Callable[..., Path]) -> None:
    with Vm(guest("hello")).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        dbg.interrupt()

        assert dbg.wait(timeout=LIMIT) is stop


def test_crash_of_the_guest_is_a_stop_with_registers(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=triple"])).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.vcpu, stop.code) == ("crash", 0, None)
        assert isinstance(stop.crash, GuestCrashError)
        assert stop.crash.registers["rip"] == dbg.registers.rip
        assert stop.crash.output == dbg.output == "crash triple\n"
        assert dbg.result is None
        with pytest.raises(VmStateError, match="has crashed"):
            dbg.cont()


def test_crash_of_another_vcpu_names_that_vcpu(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=ap_triple"]), cpus=2).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.vcpu) == ("crash", 1)
        assert dbg.vcpus[0].registers.rip != 0


def test_exit_by_another_vcpu_names_that_vcpu(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=ap_exit"]), cpus=2).debug() as dbg:
        stop = dbg.cont(timeout=LIMIT)

        assert (stop.reason, stop.vcpu, stop.code) == ("exit", 1, 5)


def caught_by(call: Callable[[], object], caught: list[BaseException]) -> None:
    """Appends what a call raises."""
    try:
        call()
    except BaseException as error:
        caught.append(error)


# Time limits and interrupts.


@CPUS
@pytest.mark.parametrize("name", ["busy", "halt", "hang"])
def test_cont_of_an_endless_guest_stops_when_the_time_is_over_and_goes_on(
    guest: Callable[..., Path], name: str, cpus: int
) -> None:
    with Vm(guest(name), cpus=cpus).debug() as dbg:
        begin = time.monotonic()

        stops = [dbg.cont(timeout=0.05) for _ in range(3)]

        assert [stop.reason for stop in stops] == ["timeout"] * 3
        assert [stop.number for stop in stops] == [2, 3, 4]
        assert 0.15 <= time.monotonic() - begin < LIMIT
        assert stops[-1].pc == dbg.vcpus[stops[-1].vcpu].pc


def test_cont_with_no_time_at_all_stops_at_once(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")).debug() as dbg:
        assert dbg.cont(timeout=0).reason == "timeout"
        assert dbg.cont(timeout=0.0).reason == "timeout"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("-inf")])
def test_cont_with_a_time_that_is_none_raises_and_leaves_the_guest_standing(
    guest: Callable[..., Path], timeout: float
) -> None:
    with Vm(guest("busy")).debug() as dbg:
        with pytest.raises(ConfigError, match="timeout"):
            dbg.cont(timeout=timeout)

        assert not dbg.running
        assert dbg.cont(timeout=0.01).reason == "timeout"


@CPUS
@pytest.mark.parametrize("name", ["busy", "halt", "hang"])
def test_interrupt_of_a_running_guest_is_one_stop(guest: Callable[..., Path], name: str, cpus: int) -> None:
    with Vm(guest(name), cpus=cpus).debug() as dbg:
        for number in range(2, 12):
            dbg.cont(wait=False)
            dbg.interrupt()
            dbg.interrupt()

            stop = dbg.wait(timeout=LIMIT)

            assert (stop.reason, stop.number) == ("interrupt", number)
            dbg.interrupt()
            assert dbg.wait(timeout=LIMIT) is stop


def test_interrupt_of_a_host_call_that_blocks_stops_and_the_call_is_made_again(
    guest: Callable[..., Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keeper = os.open(fifo, os.O_RDWR)
    try:
        with Vm(guest("readpath"), files={"/in": fifo}).debug() as dbg:
            assert dbg.cont(timeout=0.2).reason == "timeout"
            for _ in range(20):
                dbg.cont(wait=False)
                dbg.interrupt()
                assert dbg.wait(timeout=LIMIT).reason == "interrupt"
            assert dbg.output == "opened\n"

            dbg.cont(wait=False)
            os.write(keeper, b"late\n")
            os.close(keeper)
            keeper = -1
            stop = dbg.wait(timeout=LIMIT)

            assert (stop.reason, stop.code) == ("exit", 0)
            assert dbg.output == "opened\nlate\nend of file\n"
    finally:
        if keeper >= 0:
            os.close(keeper)


def test_wait_for_a_guest_that_stands_still_gives_the_current_stop(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")).debug() as dbg:
        assert dbg.wait() is dbg.stop
        assert dbg.wait(timeout=0) is dbg.stop


def test_wait_that_is_too_short_raises_and_the_guest_runs_on(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")).debug() as dbg:
        dbg.cont(wait=False)

        with pytest.raises(TimeoutExpired) as caught:
            dbg.wait(timeout=0.1)

        assert caught.value.timeout == 0.1
        assert dbg.running
        dbg.interrupt()
        assert dbg.wait(timeout=LIMIT).reason == "interrupt"


def test_wait_by_several_threads_gives_all_of_them_the_same_stop(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy"), cpus=2).debug() as dbg:
        found: list[Stop] = []
        dbg.cont(wait=False)
        threads = [threading.Thread(target=lambda: found.append(dbg.wait(timeout=LIMIT))) for _ in range(4)]
        for thread in threads:
            thread.start()

        dbg.interrupt()
        for thread in threads:
            thread.join(LIMIT)

        assert [stop.number for stop in found] == [2] * 4
        assert {stop.reason for stop in found} == {"interrupt"}


def test_cont_without_waiting_returns_none_and_the_stop_is_found_by_asking(
    guest: Callable[..., Path], wait_until: Callable[..., bool]
) -> None:
    with Vm(guest("loop")).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work")

        assert dbg.cont(wait=False) is None

        assert wait_until(lambda: not dbg.running, LIMIT)
        assert (dbg.stop.reason, dbg.stop.breakpoint) == ("breakpoint", breakpoint_)


# Misuse.


def test_everything_that_needs_a_stop_raises_while_the_guest_runs(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy"), cpus=2).debug() as dbg:
        registers, memory, frame = dbg.registers, dbg.memory, dbg.stop.frame
        dbg.cont(wait=False)

        for use in (
            dbg.cont,
            dbg.step,
            lambda: dbg.step(vcpu=1),
            lambda: dbg.stop,
            lambda: dbg.registers,
            lambda: dbg.memory,
            lambda: registers.rip,
            lambda: setattr(registers, "rax", 1),
            lambda: memory.read_u8(0),
            lambda: memory.physical.read_u8(0),
            lambda: memory.write_u8(0, 0),
            lambda: frame.registers.rip,
            lambda: dbg.vcpus[1].pc,
        ):
            with pytest.raises(VmStateError, match="running"):
                use()
        assert dbg.running


def test_everything_after_close_raises(guest: Callable[..., Path]) -> None:
    dbg = Vm(guest("busy")).debug()
    breakpoint_ = dbg.breakpoint("spin")
    stop, registers, memory = dbg.stop, dbg.registers, dbg.memory

    dbg.close()
    dbg.close()

    for use in (
        dbg.cont,
        dbg.step,
        dbg.wait,
        dbg.interrupt,
        dbg.detach,
        lambda: dbg.breakpoint("spin"),
        lambda: registers.rip,
        lambda: memory.read_u8(0),
        breakpoint_.delete,
        lambda: setattr(breakpoint_, "enabled", False),
    ):
        with pytest.raises(VmStateError, match="closed"):
            use()
    assert dbg.stop is stop
    assert not dbg.running
    assert "closed" in repr(dbg)


def test_vcpu_that_does_not_exist_is_named_in_the_error(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy"), cpus=2).debug() as dbg:
        with pytest.raises(VmStateError, match="no vCPU 2"):
            dbg.step(vcpu=2)
        with pytest.raises(BreakpointError, match="no vCPU 2"):
            dbg.breakpoint("spin", vcpu=2)
        with pytest.raises((IndexError, OverflowError, TypeError, ValueError)):
            dbg.step(vcpu=-1)
        assert dbg.stop.number == 1


def test_second_debugger_of_a_vm_is_refused_until_the_first_is_closed(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("hello"))
    with vm.debug() as dbg:
        with pytest.raises(VmStateError, match="runs already"):
            vm.debug()
        with pytest.raises(VmStateError, match="runs already"):
            vm.run()
        with pytest.raises(VmStateError, match="a debugger controls"):
            vm.wait()
        assert dbg.cont(timeout=LIMIT).reason == "exit"

    with vm.debug() as again:
        assert again.stop.reason == "entry"
        assert again.cont(timeout=LIMIT).reason == "exit"
    assert vm.run(LIMIT).code == 0


def test_debug_with_a_callable_output_gives_it_all_before_the_exit_is_reported(guest: Callable[..., Path]) -> None:
    seen: list[bytes] = []
    with Vm(guest("hello"), output=seen.append).debug() as dbg:
        assert dbg.cont(timeout=LIMIT).reason == "exit"

        assert b"".join(seen) == b"Hello from a test guest\nand a line by the buffer\n"


def test_output_that_raises_is_raised_by_cont(guest: Callable[..., Path]) -> None:
    def refuse(text: bytes) -> None:
        raise LookupError("no more paper")

    with Vm(guest("hello"), output=refuse).debug() as dbg, pytest.raises(LookupError, match="no more paper"):
        dbg.cont(timeout=LIMIT)


# Detach.


@CPUS
def test_detach_at_the_entry_lets_the_guest_run_to_its_end(guest: Callable[..., Path], cpus: int) -> None:
    dbg = Vm(guest("smp", defines=["COUNT=50"]), cpus=cpus).debug()
    dbg.breakpoint("tick")

    result = dbg.detach().wait(LIMIT)

    assert (result.code, result.output.splitlines()[-1]) == (0, f"all={50 * cpus}")
    with pytest.raises(VmStateError, match="detached"):
        dbg.cont()
    dbg.close()


@CPUS
def test_detach_of_a_running_guest_lets_it_end_whatever_it_meets(guest: Callable[..., Path], cpus: int) -> None:
    for _ in range(10):
        dbg = Vm(guest("smp", defines=["COUNT=200"]), cpus=cpus).debug()
        dbg.breakpoint("tick", condition="arg1 >= 5")
        dbg.cont(wait=False)

        result = dbg.detach().wait(LIMIT)

        assert (result.code, result.output.splitlines()[-1]) == (0, f"all={200 * cpus}")


def test_detach_after_the_exit_gives_the_result(guest: Callable[..., Path]) -> None:
    dbg = Vm(guest("hello", defines=["EXIT_CODE=3"])).debug()
    dbg.cont(timeout=LIMIT)

    assert dbg.detach().wait(LIMIT).code == 3


def test_detach_after_a_crash_raises_it_from_wait(guest: Callable[..., Path]) -> None:
    dbg = Vm(guest("crash", defines=["KIND=triple"])).debug()
    dbg.cont(timeout=LIMIT)

    with pytest.raises(GuestCrashError):
        dbg.detach().wait(LIMIT)


def test_detach_in_the_middle_of_a_slow_callback_lets_the_guest_end(guest: Callable[..., Path]) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(hit: uhyve.Hit) -> bool:
        inside.set()
        assert go_on.wait(LIMIT)
        return True

    dbg = Vm(guest("loop")).debug()
    dbg.breakpoint("work", condition=slow)
    dbg.cont(wait=False)
    assert inside.wait(LIMIT)
    results: list[uhyve.VmResult] = []
    thread = threading.Thread(target=lambda: results.append(dbg.detach().wait(LIMIT)))
    thread.start()

    go_on.set()
    thread.join(LIMIT)

    assert [(result.code, result.output) for result in results] == [(0, "calls=1000 total=1498500\n")]


def test_detach_by_a_context_manager_leaves_the_guest_running(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("busy"))
    with vm.debug() as dbg:
        dbg.cont(timeout=0.01)
        dbg.detach()

    assert vm.running
    with pytest.raises(TimeoutExpired):
        vm.wait(0.05)
    vm.close()
    assert not vm.running


# Close.


@CPUS
@pytest.mark.parametrize("name", ["busy", "halt", "hang", "smp"])
def test_close_of_a_running_guest_leaves_no_thread(
    guest: Callable[..., Path],
    name: str,
    cpus: int,
    no_leftovers: Callable[[], list[str]],
    wait_until: Callable[..., bool],
) -> None:
    dbg = Vm(guest(name), cpus=cpus).debug()
    dbg.cont(wait=False)

    dbg.close()

    assert wait_until(lambda: no_leftovers() == [], LIMIT)


def test_close_by_an_exception_in_the_with_block_passes_it_on(
    guest: Callable[..., Path], no_leftovers: Callable[[], list[str]], wait_until: Callable[..., bool]
) -> None:
    def fail(dbg: uhyve.Debugger) -> None:
        with dbg:
            dbg.cont(wait=False)
            raise KeyError("mine")

    dbg = Vm(guest("busy"), cpus=2).debug()

    with pytest.raises(KeyError, match="mine"):
        fail(dbg)

    assert wait_until(lambda: no_leftovers() == [], LIMIT)
    assert not dbg.vm.running


@CPUS
def test_close_from_another_thread_during_cont_raises_there(
    guest: Callable[..., Path], cpus: int, wait_until: Callable[..., bool]
) -> None:
    for name in ("busy", "halt"):
        dbg = Vm(guest(name), cpus=cpus).debug()
        caught: list[BaseException] = []

        thread = threading.Thread(target=caught_by, args=(dbg.cont, caught))
        thread.start()
        assert wait_until(lambda dbg=dbg: dbg.running, LIMIT)
        dbg.close()
        thread.join(LIMIT)

        assert not thread.is_alive()
        assert [type(error) for error in caught] == [VmStateError]


def test_close_of_the_vm_during_cont_raises_there(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("busy"))
    dbg = vm.debug()
    dbg.cont(wait=False)
    threading.Timer(0.05, vm.close).start()

    with pytest.raises(VmStateError):
        dbg.wait()

    assert not vm.running
    dbg.close()


# Stops as values.


def test_stop_works_with_match(guest: Callable[..., Path]) -> None:
    def kind(stop: Stop) -> object:
        match stop:
            case Stop("entry"):
                return "entry"
            case Stop("breakpoint", vcpu, pc):
                return vcpu, pc
            case Stop(reason="exit", code=code):
                return code
        return None

    with Vm(guest("loop", defines=["COUNT=1"])).debug() as dbg:
        dbg.breakpoint("work")

        found = [kind(dbg.stop), kind(dbg.cont(timeout=LIMIT)), kind(dbg.cont(timeout=LIMIT))]

        assert found == ["entry", (0, dbg.symbol("work")), 0]


def test_stop_at_a_breakpoint_tells_where_and_why(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop")).debug() as dbg:
        breakpoint_ = dbg.breakpoint("work+7", name="after the load")

        stop = dbg.cont(timeout=LIMIT)

        assert stop.breakpoint is breakpoint_
        assert (stop.symbol, stop.hits, stop.message, stop.exception) == ("work+0x7", 1, None, None)
        assert (stop.frame.function, stop.frame.offset, stop.frame.pc) == ("work", 7, stop.pc)
        assert stop.frame.registers.rip == stop.pc
        assert stop.frame.memory.read_u64(dbg.symbol("calls")) == 0
        place = f"work+0x7 ({stop.pc:#x}), loop.c:{stop.frame.line}"
        assert str(stop) == f"vCPU 0 stopped at {place}: breakpoint 1 (after the load), hit 1"
        assert "work+0x7" in repr(stop.frame)
        with pytest.raises(AttributeError):
            stop.pc = 0


def test_stop_of_an_interrupt_has_the_present_pc(guest: Callable[..., Path]) -> None:
    with Vm(guest("busy")).debug() as dbg:
        dbg.breakpoint("spin", temporary=True)
        dbg.cont(timeout=LIMIT)

        stop = dbg.cont(timeout=0.01)

        assert stop.pc == dbg.registers.rip
        assert dbg.symbolize(stop.pc).split("+")[0] == "spin"


def test_stop_without_a_machine_survives_pickling() -> None:
    stop = Stop("exit", 0, 0x1000, code=3, number=9)

    assert pickle.loads(pickle.dumps(stop)) == stop


def test_stop_at_a_breakpoint_goes_to_another_process_without_it(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop")).debug() as dbg:
        met = dbg.breakpoint("guest_main")
        stop = dbg.cont(timeout=LIMIT)

        there = pickle.loads(pickle.dumps(stop))

        assert (there.breakpoint, there.hits, there.symbol) == (None, 1, "guest_main")
        assert str(there).endswith(": breakpoint")
        with pytest.raises(VmStateError, match="elsewhere"):
            _ = there.frame
        for same in (copy.copy(stop), copy.deepcopy([stop])[0]):
            assert same == stop
            assert same.breakpoint == met
            assert same.frame.registers.rip == stop.pc


def test_debugger_translates_between_symbols_and_addresses(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop"), cpus=2).debug() as dbg:
        work = dbg.symbol("work")

        assert dbg.symbol("work+0x3") == dbg.symbol("work + 3") == work + 3
        assert dbg.symbol(f"{work:#x}") == dbg.symbol(f"*{work:#x}") == work
        assert dbg.symbolize(work) == "work"
        assert dbg.symbolize(work + 3) == "work+0x3"
        assert dbg.symbolize(1) is None


def test_load_bias_of_a_fixed_image_is_0_and_of_a_relocatable_one_is_not(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop", pie=False)).debug() as fixed, Vm(guest("loop")).debug() as moved:
        assert fixed.load_bias == 0
        assert fixed.symbol("_start") > 0x80_0000
        assert moved.symbol("_start") - moved.load_bias < 0x1000


def test_debuggers_of_several_machines_at_once_do_not_disturb_each_other(guest: Callable[..., Path]) -> None:
    with Vm(guest("loop")).debug() as one, Vm(guest("loop")).debug() as two:
        one.breakpoint("work", condition="arg0 == 10")
        two.breakpoint("work", condition="arg0 == 20")
        one.cont(wait=False)
        two.cont(wait=False)

        assert (one.wait(LIMIT).reason, two.wait(LIMIT).reason) == ("breakpoint", "breakpoint")
        assert (one.registers.rdi, two.registers.rdi) == (10, 20)
