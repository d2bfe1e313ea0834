"""The fourteen promises of the debugger, each by its number: with one engine, a client of gdb's protocol and Python
beside it, on each back end, and on several vCPUs where that matters.

1 all-stop, 2 one stop in and out, 3 a breakpoint holds everywhere, 4 nobody slips past, 5 planted bytes are not seen,
6 the guest's own traps are the guest's, 7 a stop names its vCPU, 8 interrupts do not hijack steps, 9 the decision
chain, 10 failures are not swallowed, 11 callbacks don't drive, 12 detach, kill and loss, 13 Ctrl-C, 14 exit codes.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gdb.rsp import ErrorReplyError
from uhyve import VmStateError
from uhyve.gdb_policy import Decision, GdbPolicy
from uhyve.policies import Conditions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gdb.conftest import Served
    from gdb.rsp import Rsp, StopReply
    from uhyve import Debugger, Hit, Stop

pytestmark = [pytest.mark.vm, pytest.mark.timeout(90)]

CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
SMP = pytest.mark.parametrize("cpus", [2, 4])
TRAP, INT, SEGV = 5, 2, 11
SOON = 20.0
"""Seconds; far more than anything takes, so that only a hang is met by it."""


def vcpu_of(stop: StopReply) -> int:
    assert stop.thread is not None
    return int(stop.thread.rpartition(".")[2], 16) - 1


def words(dbg: Debugger, name: str, cpus: int) -> list[int]:
    """An array of the guest, a word for each vCPU."""
    start = dbg.symbol(name)
    return [dbg.memory.read_u64(start + 8 * cpu) for cpu in range(cpus)]


def everything(served: Served, stub: Rsp) -> list[object]:
    """All that must not change while the world stands still, by both front ends."""
    state: list[object] = [vcpu.registers.to_dict() for vcpu in served.dbg.vcpus]
    for thread in sorted(stub.threads()):
        stub.select_thread(thread)
        state.append(stub.request("g"))
    cpus = len(served.dbg.vcpus)
    return [*state, *(words(served.dbg, name, cpus) for name in ("calls", "serials", "writes")), served.word("total")]


# 1. All-stop means all.


@CPUS
@pytest.mark.parametrize("cause", ["breakpoint", "interrupt", "step", "callable"])
def test_invariant_01_at_a_stop_no_vcpu_runs_and_every_state_is_read_at_once(
    serve: Callable[..., Served], cpus: int, cause: str
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=0"])
    stub = served.rsp()
    if cause == "breakpoint":
        stub.insert(served.dbg.symbol("event"))
    if cause == "callable":
        served.dbg.breakpoint("event", condition=lambda hit: hit.arg(1) % 3 == 1)

    counted = []
    for _ in range(6):
        stub.resume("s:p1.1;c" if cause == "step" else "c")
        if cause == "interrupt":
            time.sleep(0.005)
            stub.interrupt()
        stub.wait(SOON)
        begin = time.monotonic()
        state = everything(served, stub)
        assert time.monotonic() - begin < 5, "nobody is waited for"
        time.sleep(0.01)
        assert everything(served, stub) == state
        counted.append(served.word("total"))

    assert len(set(counted)) > 1 or cause == "step", "between the stops they do run"


# 2. One stop in, one stop out.


def hit_together(served: Served, cpus: int, at: int) -> None:
    """Every vCPU hits at once, in its call number ``at``."""
    meeting = threading.Barrier(cpus)

    def together(hit: Hit) -> bool:
        if hit.arg(1) != at:
            return False
        meeting.wait(SOON)
        return True

    served.dbg.breakpoint("event", condition=together)


@CPUS
def test_invariant_02_hits_at_one_moment_are_a_stop_each_and_nothing_runs_between_them(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=20"])
    stub = served.rsp()
    hit_together(served, cpus, 7)
    number = served.dbg.stop.number

    seen, states = [], []
    for _ in range(cpus):
        stop = stub.cont(SOON)
        number += 1
        assert (served.dbg.stop.number, served.dbg.stop.reason) == (number, "breakpoint")
        stub.select_thread(str(stop.thread))
        values = stub.read_registers()
        assert (values["rip"], values["rdi"], values["rsi"]) == (served.dbg.symbol("event"), vcpu_of(stop), 7)
        seen.append(vcpu_of(stop))
        states.append(words(served.dbg, "calls", cpus))

    assert sorted(seen) == list(range(cpus))
    assert states == [[7] * cpus] * cpus
    assert stub.cont(SOON).kind == "W"
    assert served.dbg.stop.number == number + 1


@SMP
def test_invariant_02_hit_that_waits_is_dropped_with_its_breakpoint(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=20"])
    stub = served.rsp()
    hit_together(served, cpus, 7)
    stub.cont(SOON)

    for breakpoint_ in served.dbg.breakpoints:
        breakpoint_.delete()

    assert stub.cont(SOON).kind == "W", "no stale stop"
    assert words(served.dbg, "calls", cpus) == [20] * cpus


@SMP
def test_invariant_02_hit_that_waits_is_dropped_when_its_vcpu_was_moved(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=20"])
    stub = served.rsp()
    hit_together(served, cpus, 7)
    first = vcpu_of(stub.cont(SOON))
    moved = next(vcpu for vcpu in served.dbg.vcpus if vcpu.number != first)

    # To where it is no hit: behind the first call, as if that had returned.
    moved.registers.rip = served.dbg.symbol("event") + 7
    moved.registers.rdx = served.dbg.symbol("calls")

    seen = {first}
    while (stop := stub.cont(SOON)).kind == "T":
        seen.add(vcpu_of(stop))
    assert seen == set(range(cpus)) - {moved.number}
    assert words(served.dbg, "calls", cpus) == [20] * cpus


@pytest.mark.parametrize("cpus", [2])
def test_invariant_02_access_that_waits_outlives_a_watchpoint_set_anew_meanwhile(
    serve: Callable[..., Served], cpus: int
) -> None:
    both = threading.Barrier(2, timeout=SOON)
    met: list[int] = []
    arrivals = itertools.count()

    def written(hit: Hit) -> bool:
        if hit.vcpu != 1 or met:
            return False
        met.append(hit.registers.rsi)
        both.wait()
        time.sleep(1)  # The other one's hit comes first.
        return True

    def arrived(_: Hit) -> bool:
        return next(arrivals) == 0 and both.wait() >= 0  # It waits for the write, however late vCPU 1 starts.

    served = serve("events", cpus=cpus, defines=["COUNT=20"], policy=Conditions({"word": written}))
    stub, watch = served.rsp(), {"address": served.dbg.symbol("word"), "type": 2, "kind": 8}
    stub.insert(**watch)
    served.dbg.breakpoint("event", vcpu=0, condition=arrived)
    assert vcpu_of(stub.cont(SOON)) == 0

    # What vCPU 1 has found waits while it holds; then its watchpoint is another one, at the same place.
    stub.remove(**watch)
    stub.resume("s:p1.1")
    assert vcpu_of(stub.wait(SOON)) == 0
    stub.insert(**watch)
    stop = stub.cont(SOON)

    assert vcpu_of(stop) == 1
    assert int(stop.values["watch"], 16) == watch["address"]
    assert served.dbg.vcpus[1].registers.rsi == met[0]


@CPUS
def test_invariant_02_interrupt_that_comes_too_late_is_no_stop(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=40", "WITHOUT_NAPS"])
    stub = served.rsp()
    stub.insert(served.dbg.symbol("event"))
    number = served.dbg.stop.number

    seen: list[tuple[int, int]] = []
    while True:
        stub.resume()
        for _ in range(3):
            stub.interrupt()
            served.dbg.interrupt()
        stop = stub.wait(SOON)
        number += 1
        assert served.dbg.stop.number == number, "a stop for each resume, and no other"
        if stop.kind == "W":
            break
        stub.select_thread(str(stop.thread))
        if "swbreak" in stop.values:
            assert stub.read_register("rip") == served.dbg.symbol("event")
            seen.append((vcpu_of(stop), stub.read_register("rsi")))
        else:
            assert stop.code == INT
    assert sorted(seen) == list(itertools.product(range(cpus), range(40)))


@CPUS
def test_invariant_02_stop_of_pythons_at_a_breakpoint_of_the_clients_is_not_taken_for_that_ones(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=5"])
    stub = served.rsp()
    served.dbg.breakpoint("event", condition="vcpu == 0 and arg1 == 2")
    # `$rsi == 100`: gdb would judge SIGTRAP there by it, and go on.
    stub.insert(served.dbg.symbol("event"), conditions=[bytes.fromhex("2600042264" + "1327")])

    stop = stub.cont(SOON)

    assert (stop.kind, stop.code, vcpu_of(stop)) == ("T", INT, 0)
    assert "breakpoint 1" in stub.console
    assert stub.cont(SOON).kind == "W"


@CPUS
def test_invariant_02_breakpoint_is_asked_once_for_an_arrival_though_the_client_sets_its_own_anew(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=12"])
    stub = served.rsp()
    observer = served.dbg.breakpoint("event", condition="False")
    event = served.dbg.symbol("event")
    stub.insert(event)

    while (stop := stub.cont(SOON)).kind == "T":
        stub.remove(event)
        stub.step(str(stop.thread))
        stub.insert(event)

    assert observer.reached == cpus * 12


# 3. A breakpoint holds on every vCPU.


@CPUS
@pytest.mark.parametrize("hardware", [False, True])
def test_invariant_03_breakpoint_set_while_vcpus_run_holds_on_each_when_it_returns(
    serve: Callable[..., Served], wait_until: Callable[..., bool], cpus: int, hardware: bool
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=0"])
    stub = served.rsp()
    seen: list[list[int]] = [[] for _ in range(cpus)]
    before = served.dbg.breakpoint("event", condition="False")

    stub.resume()
    time.sleep(0.02)
    served.dbg.breakpoint("event_counted", condition=lambda hit: seen[hit.vcpu].append(hit.arg(1)), hardware=hardware)
    reached = before.reached
    assert wait_until(lambda: len(seen[0]) > 5, SOON)
    stub.interrupt()
    stub.wait(SOON)

    # From its first on, each vCPU's hits have no gap, up to where it stands now.
    assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for numbers in seen if numbers)
    for numbers, calls in zip(seen, words(served.dbg, "calls", cpus), strict=True):
        assert not numbers or calls - 2 <= numbers[-1] < calls
    assert sum(map(len, seen)) >= before.reached - reached - cpus, "none has run past it since it was set"


def test_invariant_03_breakpoint_holds_in_code_that_the_guest_patches_and_loads(serve: Callable[..., Served]) -> None:
    served = serve("selfmod", defines=["ROUNDS=5"])
    stub = served.rsp()
    for symbol in ("patched", "loaded_code"):  # Not planted: the guest copies the one over the other.
        stub.insert(served.dbg.symbol(symbol), type=1)

    met = []
    while stub.cont(SOON).kind == "T":
        met.append(stub.read_register("rip"))

    assert met == [served.dbg.symbol("patched"), served.dbg.symbol("loaded_code")] * 5
    assert served.dbg.output.endswith("selfmod ok\n")


def test_invariant_03_removal_restores_the_physical_byte_whatever_the_page_tables_say_now(
    serve: Callable[..., Served],
) -> None:
    served = serve("loop", defines=["COUNT=5"])
    stub = served.rsp()
    physical = served.dbg.memory.physical
    address = served.dbg.symbol("work")
    table = served.dbg.registers.cr3 & ~0xFFF
    for level in (39, 30):
        table = physical.read_u64(table + 8 * (address >> level & 511)) & 0xF_FFFF_FFFF_F000
    place = table + 8 * (address >> 21 & 511)
    entry = physical.read_u64(place)
    elsewhere = (entry & 0xF_FFFF_FFE0_0000) + 0x20_0000 + (address & 0x1F_FFFF)
    before = physical.read(elsewhere, 16)
    planted = [served.dbg.breakpoint(address), served.dbg.breakpoint(address + 7)]
    assert stub.cont(SOON).kind == "T"

    # The code's window shows other memory when the breakpoints go.
    physical.write_u64(place, entry + 0x20_0000)
    for breakpoint_ in planted:
        breakpoint_.delete()
    assert physical.read(elsewhere, 16) == before
    physical.write_u64(place, entry)

    # An int3 that was left would be the guest's own, which it has no handler for.
    assert stub.cont(SOON).kind == "W"
    assert served.dbg.output == "calls=5 total=30\n"


# 4. Nobody slips past a breakpoint that is stepped over.


@CPUS
@pytest.mark.parametrize("place", ["event", "event_serial", "event_write"])
def test_invariant_04_every_passage_of_every_vcpu_is_met_while_others_are_stepped_over(
    serve: Callable[..., Served], cpus: int, place: str
) -> None:
    # The emulator knows the instructions of the first and the last; the CPU steps over the one between.
    count = 60
    served = serve("events", cpus=cpus, defines=[f"COUNT={count}", "WITHOUT_NAPS"])
    stub = served.rsp()
    rejecting = served.dbg.breakpoint(place, condition="False")
    asked = served.dbg.breakpoint("event_counted", condition=lambda hit: hit.arg(1) % 20 == 0)

    stops = 0
    while stub.cont(SOON).kind == "T":
        stops += 1

    assert (rejecting.reached, rejecting.hits) == (cpus * count, 0)
    assert (asked.reached, asked.hits, stops) == (cpus * count, cpus * 3, cpus * 3)
    assert words(served.dbg, "writes", cpus) == [count] * cpus


@CPUS
def test_invariant_04_step_over_by_the_client_itself_loses_no_hit_of_the_others(
    serve: Callable[..., Served], cpus: int
) -> None:
    count = 15
    served = serve("events", cpus=cpus, defines=[f"COUNT={count}", "WITHOUT_NAPS"])
    stub = served.rsp()
    place = served.dbg.symbol("event_serial")
    stub.insert(place)
    seen: list[tuple[int, int]] = []

    while (stop := stub.cont(SOON)).kind == "T":
        stub.select_thread(str(stop.thread))
        assert stub.read_register("rip") == place
        seen.append((vcpu_of(stop), stub.read_register("rsi")))
        # What gdb does: without its breakpoints, and with the other vCPUs held.
        stub.remove(place)
        stepped = stub.step(str(stop.thread))
        assert (stepped.code, stepped.thread) == (TRAP, stop.thread)
        stub.insert(place)

    assert sorted(seen) == list(itertools.product(range(cpus), range(count)))


# 5. Planted bytes are not seen.


@CPUS
def test_invariant_05_no_read_shows_a_planted_byte_and_a_write_goes_beneath_it(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=5"])
    stub = served.rsp()
    start = served.dbg.symbol("event")
    code = stub.read_memory(start, 64)
    for offset in range(8):
        stub.insert(start + offset)
    served.dbg.breakpoint("event_counted", condition="False")
    served.dbg.breakpoint(start, condition=lambda hit: hit.memory.read(start, 64) != code)

    assert stub.cont(SOON).kind == "T"
    own = [vcpu.memory for vcpu in served.dbg.vcpus]
    assert [memory.read(start, 64) for memory in own] == [code] * cpus
    assert stub.read_memory(start, 64) == code
    assert [stub.read_memory(start + n, 1) for n in range(64)] == [bytes([byte]) for byte in code]

    # `incq (%rdx, %rdi, 8)` becomes `decq`, whose first byte is one of a breakpoint.
    before = words(served.dbg, "calls", cpus)
    assert code[7:11] == bytes.fromhex("48ff04fa")
    stub.write_memory(start + 7, bytes.fromhex("48ff0cfa"))
    assert stub.read_memory(start + 7, 4) == bytes.fromhex("48ff0cfa")
    for offset in range(8):
        stub.remove(start + offset)
    for breakpoint_ in served.dbg.breakpoints:
        breakpoint_.delete()
    assert stub.cont(SOON).kind == "W"
    assert stub.read_memory(start, 64) == code[:7] + bytes.fromhex("48ff0cfa") + code[11:]
    assert words(served.dbg, "calls", cpus) == [(done - (5 - done)) % (1 << 64) for done in before]


# 6. The guest's own traps are the guest's.


@CPUS
def test_invariant_06_guests_own_int3_is_never_a_stop_beside_planted_ones(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("faults", cpus=cpus)
    stub = served.rsp()
    stub.insert(served.dbg.symbol("on_breakpoint"))
    served.dbg.breakpoint("on_page_fault", condition="False")

    numbers = []
    while stub.cont(SOON).kind == "T":
        assert stub.read_register("rip") == served.dbg.symbol("on_breakpoint")
        numbers.append(stub.read_register("rdi"))

    assert numbers == [1, 2, 3], "the guest's handler got all of them"
    assert served.dbg.output.endswith("faults ok\n")


def test_invariant_06_guests_own_debug_registers_and_trap_flag_work_with_a_client_attached(
    serve: Callable[..., Served],
) -> None:
    served = serve("faults", defines=["WITH_DEBUG_REGISTERS"])
    stub = served.rsp()

    assert stub.cont(SOON).kind == "W", "its #DB are no stops"

    assert served.dbg.output.splitlines()[-3:] == ["debug register 1", "steps 4", "faults ok"]


# 7. A stop names its vCPU.


@CPUS
def test_invariant_07_every_kind_of_stop_names_its_vcpu_which_is_first_and_alive(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=0"])
    stub = served.rsp()

    def check(stop: StopReply, vcpu: int | None = None) -> int:
        current = vcpu_of(stop)
        assert vcpu in (None, current)
        assert served.dbg.stop.vcpu == current
        threads = stub.threads()
        assert threads[0] == f"p1.{current + 1:x}", "and comes first"
        assert sorted(threads) == [f"p1.{number + 1:x}" for number in range(cpus)]
        for thread in threads:
            stub.expect_ok(f"T{thread}")
        assert stub.request("qC").decode() == f"QCp1.{current + 1:x}"
        return current

    for number in range(cpus):
        check(stub.step(f"p1.{number + 1:x}"), number)
    hit = served.dbg.breakpoint("event", vcpu=cpus - 1)
    check(stub.cont(SOON), cpus - 1)
    hit.delete()
    stub.insert(served.dbg.symbol("event_serial"))
    stub.select_thread(f"p1.{check(stub.cont(SOON)) + 1:x}")
    assert stub.read_register("rip") == served.dbg.symbol("event_serial")
    stub.remove(served.dbg.symbol("event_serial"))
    stub.insert(served.dbg.symbol("word"), type=2, kind=8)
    watched = stub.cont(SOON)
    assert int(watched.values["watch"], 16) == served.dbg.symbol("word")
    writer = check(watched)
    stub.select_thread(f"p1.{writer + 1:x}")
    # Not the word itself: another vCPU may have written it, too, before it was stopped.
    assert stub.read_register("rip") == served.dbg.symbol("event_written")
    assert stub.read_register("rax") >> 32 == writer, "who wrote it"
    stub.remove(served.dbg.symbol("word"), type=2, kind=8)
    stub.resume()
    stub.interrupt()
    check(stub.wait(SOON))


# 8. Interrupts do not hijack a step.


@CPUS
def test_invariant_08_steps_never_enter_the_handler_of_an_interrupt_that_waits(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("ticker", cpus=cpus)
    stub = served.rsp()
    turn = served.dbg.symbol("turn")
    stub.insert(turn)
    stop = stub.cont(SOON)
    stub.remove(turn)
    stub.select_thread(str(stop.thread))
    ticks = words(served.dbg, "timer_ticks", cpus)[vcpu_of(stop)]

    for _ in range(60):
        # On KVM a timer's tick waits by then; the software CPU's timer goes by its instructions.
        time.sleep(0.0005)
        assert stub.step(str(stop.thread)).thread == stop.thread
        symbol = served.dbg.symbolize(stub.read_register("rip"))
        assert symbol is not None
        assert symbol.partition("+")[0] in ("turn", "guest_main")

    assert words(served.dbg, "timer_ticks", cpus)[vcpu_of(stop)] == ticks
    stub.insert(served.dbg.symbol("on_tick"))
    assert stub.cont(SOON).code == TRAP, "they were held back, not lost"


# 9. The decision chain.


@CPUS
def test_invariant_09_hits_that_the_chain_rejects_are_seen_by_nobody_and_counted(
    serve: Callable[..., Served], cpus: int
) -> None:
    class Asked(GdbPolicy):
        def __init__(self) -> None:
            self.stops: list[Stop] = []

        def on_stop(self, stop: Stop) -> Decision:
            self.stops.append(stop)
            return Decision.REPORT

    count, policy = 50, Asked()
    served = serve("events", cpus=cpus, defines=[f"COUNT={count}", "WITHOUT_NAPS"], policy=policy)
    stub = served.rsp()
    called: list[int] = []
    dbg, last = served.dbg, cpus - 1
    disabled = dbg.breakpoint("event", condition=called.append, enabled=False)
    compiled = dbg.breakpoint("event", condition="arg1 > 1000")
    callable_ = dbg.breakpoint("event_serial", condition=lambda hit: called.append(hit.vcpu), vcpu=last)
    ignoring = dbg.breakpoint("event_written", ignore=cpus * count, condition=called.append)
    interrupted = [vcpu.exits.get("interrupted", 0) for vcpu in dbg.stats.vcpus]
    number = dbg.stop.number

    assert stub.cont(SOON).kind == "W"

    assert dbg.stop.number == number + 1
    assert [stop.reason for stop in policy.stops] == ["exit"]
    assert called == [last] * count, "only who passes the filter is asked"
    assert (disabled.reached, compiled.reached, callable_.reached) == (0, cpus * count, count)
    assert (ignoring.reached, ignoring.ignore) == (cpus * count, 0)
    assert compiled.hits == callable_.hits == ignoring.hits == 0
    # The stop at the exit kicks each once; what was stepped over without its others would have kicked them each time.
    after = [vcpu.exits.get("interrupted", 0) for vcpu in dbg.stats.vcpus]
    kicked = sum(after) - sum(interrupted)
    assert kicked <= 4 * cpus + (2 * cpus * count if last else 0), "a rejected hit stops nobody"


@CPUS
def test_invariant_09_ignored_hits_come_before_the_condition_and_a_temporary_goes_with_its_stop(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=30"])
    stub = served.rsp()
    asked: list[int] = []

    def sixth(hit: Hit) -> bool:
        asked.append(hit.arg(1))
        return hit.arg(1) >= 10

    breakpoint_ = served.dbg.breakpoint("event", vcpu=0, ignore=4, condition=sixth, temporary=True)

    stop = stub.cont(SOON)

    assert (vcpu_of(stop), stub.read_register("rsi")) == (0, 10)
    assert asked == list(range(4, 11))
    assert (breakpoint_.reached, breakpoint_.hits, breakpoint_.deleted) == (11, 1, True)
    assert stub.cont(SOON).kind == "W"


# 10. A failing callback is never swallowed.


@CPUS
def test_invariant_10_exception_of_a_callback_is_raised_itself_and_shown_to_the_client(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=20"])
    chosen = cpus - 1
    failure = LookupError("on purpose")

    def fail(hit: Hit) -> bool:
        if (hit.vcpu, hit.arg(1)) in ((chosen, 5), (chosen, 9)):
            raise failure
        return False

    place = served.dbg.breakpoint("event", condition=fail)
    with pytest.raises(LookupError) as caught:
        served.dbg.cont(timeout=SOON)
    assert caught.value is failure
    assert [f"breakpoint {place.id}" in note for note in failure.__notes__] == [True]
    assert f"vCPU {chosen}" in failure.__notes__[0]
    assert f"{place.address:#x}" in failure.__notes__[0]
    assert (served.dbg.stop.reason, served.dbg.stop.vcpu, served.dbg.registers.rsi) == ("exception", chosen, 5)

    # The same with a client that lets the guest run: the guest stops for it, and Python still gets the exception.
    stub = served.rsp()
    stop = stub.cont(SOON)
    assert (stop.kind, vcpu_of(stop)) == ("T", chosen)
    assert f"breakpoint {place.id}" in stub.console
    stub.select_thread(str(stop.thread))
    assert stub.read_register("rsi") == 9
    with pytest.raises(LookupError) as caught:
        served.dbg.wait(SOON)
    assert caught.value is failure
    assert stub.cont(SOON).kind == "W"


@CPUS
def test_invariant_10_condition_without_a_value_stops_and_says_why(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=3"])
    stub = served.rsp()
    # By the engine's own language, and by the agent expression of a stock gdb: a read through an unmapped address.
    served.dbg.breakpoint("event", condition="u64[0x700000000000] == 1 and vcpu == 0")
    bytecode = bytes.fromhex("25 0000700000000000 19 27".replace(" ", ""))

    stop = stub.cont(SOON)
    assert stop.kind == "T"
    assert "0x700000000000" in str(served.dbg.stop.message)
    assert "0x700000000000" in stub.console

    served.dbg.breakpoints[0].delete()
    stub.console = ""
    stub.insert(served.dbg.symbol("event_serial"), conditions=[bytecode])
    stop = stub.cont(SOON)
    assert (stop.kind, "swbreak" in stop.values) == ("T", True)
    assert "700000000000" in stub.console


# 11. Callbacks return decisions, they do not drive.


@CPUS
@pytest.mark.parametrize("call", ["cont", "step", "next", "finish"])
def test_invariant_11_callback_that_drives_gets_an_error_at_once_that_says_what_to_return(
    serve: Callable[..., Served], cpus: int, call: str
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=5"])
    caught: list[VmStateError] = []
    seconds: list[float] = []

    def drive(hit: Hit) -> bool:
        begin = time.monotonic()
        try:
            getattr(served.dbg, call)()
        except VmStateError as error:
            caught.append(error)
        seconds.append(time.monotonic() - begin)
        return False

    served.dbg.breakpoint("event", condition=drive)

    assert served.rsp().cont(SOON).kind == "W"

    assert len(caught) == cpus * 5
    assert max(seconds) < SOON
    if call in ("cont", "step"):
        assert all("return" in str(error) for error in caught)


# 12. Detach, kill, loss; and what no client can do.


@CPUS
def test_invariant_12_detach_lets_the_guest_run_and_clients_come_again(
    serve: Callable[..., Served], wait_until: Callable[..., bool], cpus: int
) -> None:
    served = serve("busy", cpus=cpus)
    served.dbg.cont(wait=False)

    for _ in range(4):
        stub = served.rsp()
        counted = served.word("spin_counter")
        assert served.word("spin_counter") == counted
        stub.detach()
        stub.close()
        assert served.dbg.running
        time.sleep(0.01)

    def has_run() -> bool:
        served.dbg.interrupt()
        assert served.dbg.wait(SOON).reason == "interrupt"
        if served.word("spin_counter") != counted:
            return True
        # A loaded host may not have come to the vCPU's thread.
        served.dbg.cont(wait=False)
        return False

    assert wait_until(has_run)


@CPUS
@pytest.mark.parametrize("resumed", [False, True])
def test_invariant_12_lost_client_leaves_the_guest_stopped_for_the_next(
    serve: Callable[..., Served], wait_until: Callable[..., bool], cpus: int, resumed: bool
) -> None:
    served = serve("busy", cpus=cpus)
    stub = served.rsp()
    stub.insert(served.dbg.symbol("guest_exit"))
    if resumed:
        stub.resume()
    stub.close()

    assert wait_until(lambda: served.server.client is None, SOON)
    assert not served.dbg.running
    assert served.dbg.breakpoints == [], "its breakpoints went with it"
    counted = served.word("spin_counter")
    stub = served.rsp()
    assert served.word("spin_counter") == counted
    assert stub.step("p1.1").code == TRAP


def test_invariant_12_lost_client_is_followed_by_what_the_policy_says(
    serve: Callable[..., Served], wait_until: Callable[..., bool]
) -> None:
    class Loss(GdbPolicy):
        decision = Decision.RESUME

        def on_disconnect(self, client: str) -> Decision:
            return self.decision

    policy = Loss()
    served = serve("busy", policy=policy)
    served.rsp().close()
    assert wait_until(lambda: served.server.client is None and served.dbg.running, SOON)
    policy.decision = Decision.END
    served.rsp().close()
    assert served.server.wait(SOON)
    assert not served.dbg.running


@CPUS
def test_invariant_12_kill_ends_the_guest(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("busy", cpus=cpus)
    served.rsp().kill()

    assert served.server.wait(SOON)
    with pytest.raises(VmStateError):
        served.dbg.cont()


@pytest.mark.parametrize(
    "packet", ["Hgp01.zz", "Hgp1.9", "vCont;s:p1.9", "m0123456789abcdef,8", "M7f0000000000,1:00", "z0,7f0000000000,1"]
)
def test_invariant_12_what_a_client_does_wrong_is_an_error_of_that_packet(
    serve: Callable[..., Served], packet: str
) -> None:
    served = serve("events", cpus=2, defines=["COUNT=5"])
    stub = served.rsp()

    with pytest.raises(ErrorReplyError):
        stub.request(packet)

    assert stub.step("p1.2").code == TRAP
    assert stub.cont(SOON).kind == "W"


# 13. Ctrl-C always works.


@CPUS
@pytest.mark.parametrize("name", ["busy", "halt", "hang", "ticker", "events"])
def test_invariant_13_interrupt_by_the_client_and_by_python_stops_any_guest(
    serve: Callable[..., Served], wait_until: Callable[..., bool], cpus: int, name: str
) -> None:
    served = serve(name, cpus=cpus, defines=["COUNT=0"] if name == "events" else [])
    stub = served.rsp()
    stub.resume()
    time.sleep(0.05)
    for by_python in (False, True) * 5:
        # Of a guest that stands still Python asks nothing.
        assert not by_python or wait_until(lambda: served.dbg.running)
        begin = time.monotonic()
        (served.dbg if by_python else stub).interrupt()
        stop = stub.wait(SOON)
        assert time.monotonic() - begin < 5
        assert (stop.kind, stop.code) == ("T", INT)
        stub.resume()
    stub.interrupt()
    stub.wait(SOON)


@pytest.mark.parametrize("cpus", [1, 4])
def test_invariant_13_interrupt_reaches_a_guest_that_waits_for_the_host(
    serve: Callable[..., Served], tmp_path: Path, cpus: int
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)
    try:
        served = serve("readpath", cpus=cpus, files={"/in": fifo})
        stub = served.rsp()
        for by_python in (False, True) * 3:
            stub.resume()
            time.sleep(0.03)
            begin = time.monotonic()
            (served.dbg if by_python else stub).interrupt()
            assert stub.wait(SOON).code == INT
            assert time.monotonic() - begin < 5
        # And the call is made to its end all the same.
        stub.resume()
        os.write(writer, b"late")
        time.sleep(0.2)
        stub.interrupt()
        stub.wait(SOON)
        assert served.dbg.output.endswith("late")
    finally:
        os.close(writer)


@CPUS
def test_invariant_13_interrupt_reaches_a_vcpu_in_a_callback_when_that_returns(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("events", cpus=cpus, defines=["COUNT=0"])
    stub = served.rsp()
    inside, leave = threading.Event(), threading.Event()

    def slow(hit: Hit) -> bool:
        if hit.vcpu == cpus - 1:
            inside.set()
            leave.wait(SOON)
        return False

    served.dbg.breakpoint("event", condition=slow)
    stub.resume()
    assert inside.wait(SOON)
    stub.interrupt()
    leave.set()

    assert stub.wait(SOON).code == INT


# 14. Exit codes and crashes.


@pytest.mark.parametrize("code", [0, 1, 255, 256, -1, -(2**31), 2**31 - 1])
def test_invariant_14_exit_code_is_kept_beside_the_byte_of_the_protocol(
    serve: Callable[..., Served], code: int
) -> None:
    served = serve("events", cpus=2, defines=["COUNT=2"])
    stub = served.rsp()
    stub.insert(served.dbg.symbol("guest_exit"))
    stub.cont(SOON)
    stub.write_register("rdi", code & 0xFFFF_FFFF)

    stop = stub.cont(SOON)

    assert (stop.kind, stop.code) == ("W", code & 0xFF)
    assert (served.dbg.stop.reason, served.dbg.stop.code) == ("exit", code)
    assert served.dbg.result is not None
    assert served.dbg.result.code == code


@pytest.mark.parametrize(("kind", "cpus", "vcpu"), [("triple", 1, 0), ("triple", 4, 0), ("ap_triple", 2, 1)])
def test_invariant_14_triple_fault_is_a_crash_with_registers_and_no_exit(
    serve: Callable[..., Served], shutdown_keeps_registers: bool, kind: str, cpus: int, vcpu: int
) -> None:
    served = serve("crash", cpus=cpus, defines=[f"KIND={kind}"])
    stub = served.rsp()

    stop = stub.cont(SOON)

    assert (stop.kind, stop.code, vcpu_of(stop)) == ("T", SEGV, vcpu)
    assert (served.dbg.stop.reason, served.dbg.stop.code) == ("crash", None)
    assert served.dbg.stop.crash is not None
    if shutdown_keeps_registers:
        assert str(served.dbg.symbolize(stub.read_register("rip"))).startswith(("crash_", "guest_main+"))
    assert served.dbg.result is None
    again = stub.cont(SOON)
    assert (again.kind, again.code) == ("X", SEGV)
