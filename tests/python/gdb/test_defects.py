"""The defects that uhyve 0.8.0's GDB module had, by their number in the list of the project's debugger contract: each
test would fail there. The client of the tests says what gdb cannot be made to say."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gdb.rsp import ErrorReplyError, Rsp, StopReply, frame
from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.timeout(60)]

CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
SMP = pytest.mark.parametrize("cpus", [2, 4])
TRAP, INT, SEGV = 5, 2, 11


def thread_of(stop: StopReply) -> int:
    """The number in ``p1.2``: of the vCPU, plus one."""
    assert stop.thread is not None
    return int(stop.thread.rpartition(".")[2], 16)


def run_to(stub: Rsp, address: int) -> StopReply:
    """Runs to an address, where no breakpoint is left behind."""
    stub.insert(address)
    stop = stub.cont()
    assert (stop.kind, stop.code) == ("T", TRAP), stop
    stub.remove(address)
    return stop


def busy(serve: Callable[..., Served], cpus: int) -> tuple[Served, Rsp]:
    """A guest whose every vCPU spins, stopped by Ctrl-C."""
    served = serve("busy", cpus=cpus)
    stub = served.rsp()
    stub.resume()
    time.sleep(0.05)
    stub.interrupt()
    assert stub.wait().code == INT
    return served, stub


@SMP
def test_defect_01_registers_of_every_vcpu_at_a_stop_are_read_at_once_and_stand_still(
    serve: Callable[..., Served], cpus: int
) -> None:
    served = serve("smp", cpus=cpus, defines=["COUNT=100000"])
    stub = served.rsp()
    stub.insert(served.dbg.symbol("tick"))

    for _ in range(5):
        stub.cont()
        begin = time.monotonic()
        counted = stub.read_memory(served.dbg.symbol("ticks"), 8 * cpus)
        states = []
        for thread in stub.threads():
            stub.select_thread(thread)
            states.append(stub.request("g"))
        assert time.monotonic() - begin < 2
        for thread, before in zip(stub.threads(), states, strict=True):
            stub.select_thread(thread)
            assert stub.request("g") == before
        assert stub.read_memory(served.dbg.symbol("ticks"), 8 * cpus) == counted


@SMP
def test_defect_02_breakpoints_are_changed_while_vcpus_hit_others(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus, defines=["COUNT=1000000000"])
    stub = served.rsp()
    hot = served.dbg.breakpoint("tick", condition="arg1 == 1 << 40")
    elsewhere = [served.dbg.symbol(f"tick+{offset:#x}") for offset in (7, 11)]

    stub.resume()
    for change in range(30):
        other = served.dbg.breakpoint(elsewhere[change % 2], condition="False")
        other.delete()
    reached = hot.reached
    while hot.reached == reached:
        time.sleep(0.001)
    assert stub.is_quiet(0.001)
    stub.interrupt()

    assert stub.wait().code == INT
    counted = struct.unpack(f"<{cpus}Q", stub.read_memory(served.dbg.symbol("ticks"), 8 * cpus))
    assert 0 <= hot.reached - sum(counted) <= cpus, "who is in the function may have been met and not have counted"


@CPUS
def test_defect_03_reading_at_the_moment_of_a_hit_is_no_panic(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus, defines=["COUNT=100000"])
    stub = served.rsp()
    stub.insert(served.dbg.symbol("tick"))

    for _ in range(40):
        stub.resume()
        stub.interrupt()
        stop = stub.wait()
        assert (stop.kind, stop.code in (TRAP, INT)) == ("T", True)
        stub.read_memory(served.dbg.symbol("ticks"), 64)
        stub.request("g")
    assert stub.is_quiet(0.02)


@CPUS
def test_defect_04_stopped_vcpus_are_alive_and_listed(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    stub = served.rsp()

    stop = run_to(stub, served.dbg.symbol("tick"))

    threads = stub.threads()
    assert sorted(int(thread.rpartition(".")[2], 16) for thread in threads) == list(range(1, cpus + 1))
    assert int(threads[0].rpartition(".")[2], 16) == thread_of(stop), "the one that stopped comes first"
    for thread in threads:
        stub.expect_ok(f"T{thread}")


@CPUS
def test_defect_05_first_resume_may_be_a_step(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    stub = served.rsp()
    before = [vcpu.pc for vcpu in served.dbg.vcpus]

    stop = stub.step("p1.1")

    assert (stop.code, thread_of(stop)) == (TRAP, 1)
    after = [vcpu.pc for vcpu in served.dbg.vcpus]
    assert 0 < after[0] - before[0] <= 15, "one instruction"
    assert after[1:] == before[1:], "the others hold"
    assert served.dbg.stop.number == 2


@CPUS
def test_defect_06_each_interrupt_is_one_stop(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("busy", cpus=cpus)
    stub = served.rsp()

    for _ in range(20):
        stub.resume()
        stub.interrupt()
        assert stub.wait().code == INT
    assert stub.is_quiet(0.05)
    assert served.dbg.stop.number == 21

    stop = run_to(stub, served.dbg.symbol("spin+7"))
    assert (stop.code, "swbreak" in stop.values) == (TRAP, True)


@SMP
def test_defect_07_hits_at_one_moment_are_all_reported_with_their_own_pc(
    serve: Callable[..., Served], cpus: int
) -> None:
    count = 8
    served = serve("smp", cpus=cpus, defines=[f"COUNT={count}"])
    stub = served.rsp()
    tick = served.dbg.symbol("tick")
    stub.insert(tick)
    seen: dict[int, list[int]] = {number: [] for number in range(cpus)}

    while (stop := stub.cont()).kind == "T":
        vcpu = thread_of(stop) - 1
        stub.select_thread(str(stop.thread))
        values = stub.read_registers()
        assert (values["rip"], values["rdi"]) == (tick, vcpu)
        seen[vcpu].append(values["rsi"] or 0)

    assert (stop.kind, stop.code) == ("W", 0)
    assert seen == {number: list(range(count)) for number in range(cpus)}


@CPUS
def test_defect_08_step_names_its_thread(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    stub = served.rsp()

    for number in range(1, cpus + 1):
        stop = stub.step(f"p1.{number:x}")
        assert (stop.kind, stop.code, thread_of(stop)) == ("T", TRAP, number)


def test_defect_09_step_that_writes_watched_data_reports_the_watchpoint(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=5"])
    stub = served.rsp()
    calls = served.dbg.symbol("calls")
    run_to(stub, served.dbg.symbol("work"))
    stub.insert(calls, type=2, kind=8)

    for _ in range(10):
        stop = stub.step("p1.1")
        if stop.values:
            break

    assert int(stop.values["watch"], 16) == calls
    assert thread_of(stop) == 1
    assert served.word("calls") == 1


def test_defect_10_memory_is_read_over_pages_and_up_to_what_is_not_mapped(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    start = served.dbg.symbol("work") & ~0xFFF

    whole = stub.read_memory(start, 3 * 4096 + 5)
    assert whole == served.dbg.memory.read(start, 3 * 4096 + 5)
    assert stub.read_memory(start + 4090, 20) == whole[4090:4110]

    # What lies behind RAM is not mapped, or holds nothing; neither may fail whole.
    machine = served.dbg.memory
    edge = next(
        page for page in range(start, start + (1 << 34), 0x20_0000) if not _is_mapped(machine, page & ~0x1F_FFFF)
    )
    edge &= ~0x1F_FFFF
    assert 0 < len(stub.read_memory(edge - 16, 64)) <= 64
    for address in (0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFF0, 0x7F00_0000_0000):
        with pytest.raises(ErrorReplyError):
            stub.read_memory(address, 16)
        with pytest.raises(ErrorReplyError):
            stub.write_memory(address, b"12345678")
    assert stub.read_memory(start, 16) == whole[:16]


def _is_mapped(memory, address: int) -> bool:
    try:
        memory.read(address, 1)
    except Exception:
        return False
    return True


def test_defect_10_attributes_of_a_large_page_do_not_leak_into_its_address(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    address = served.dbg.symbol("work")
    before = stub.read_memory(address, 64)
    physical = served.dbg.memory.physical
    table = served.dbg.registers.cr3 & ~0xFFF
    for level in (39, 30):
        table = physical.read_u64(table + 8 * (address >> level & 511)) & 0xF_FFFF_FFFF_F000
    place = table + 8 * (address >> 21 & 511)
    entry = physical.read_u64(place)
    assert entry & 0x80, "a page of 2 MiB"

    # PAT and a protection key.
    physical.write_u64(place, entry | 1 << 12 | 1 << 59)

    assert stub.read_memory(address, 64) == before
    physical.write_u64(place, entry)


def test_defect_10_control_register_that_no_cpu_takes_is_refused(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    cr0 = stub.read_register("cr0")
    some = served.dbg.symbol("work")
    before = stub.read_memory(some, 32)

    with pytest.raises(ErrorReplyError):
        stub.write_register("cr0", cr0 & ~(1 << 31))

    assert stub.read_register("cr0") == cr0, "long mode needs paging"
    assert stub.read_memory(some, 32) == before
    assert served.dbg.memory.physical.read(some, 32) == before


def test_defect_11_breakpoints_that_overlap_restore_what_was_there(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    work = served.dbg.symbol("work")
    physical = served.dbg.memory.physical
    original = physical.read(work, 16)
    mine = served.dbg.breakpoint("work", condition="False")

    for offset in range(4):
        stub.insert(work + offset)
    stub.insert(work, type=1)
    assert stub.read_memory(work, 16) == original, "no planted byte is shown"
    for offset in (2, 0, 3, 1):
        stub.remove(work + offset)
    stub.remove(work, type=1)
    mine.delete()
    stub.step("p1.1")

    assert physical.read(work, 16) == original


def test_defect_12_guests_own_int3_is_the_guests(serve: Callable[..., Served]) -> None:
    served = serve("faults")
    stub = served.rsp()
    fault = served.dbg.symbol("on_page_fault")
    stub.insert(fault)

    for _ in range(2):
        assert stub.cont().code == TRAP
        assert stub.read_register("rip") == fault
    stop = stub.cont()

    assert (stop.kind, stop.code) == ("W", 0), "its three int3 were no stops"
    assert served.word("breakpoints") == 3


def test_defect_13_guest_that_uses_debug_registers_beside_ours_does_not_harm_the_host(
    serve: Callable[..., Served],
) -> None:
    served = serve("faults", defines=["WITH_DEBUG_REGISTERS"])
    stub = served.rsp()
    stub.insert(served.dbg.symbol("watched_function"), type=1)

    stops = []
    while (stop := stub.cont()).kind == "T":
        assert thread_of(stop) == 1
        stops.append(stub.read_register("rip"))
        assert len(stops) < 20

    assert stop.kind == "W"
    assert set(stops) <= {served.dbg.symbol("watched_function")}


@SMP
def test_defect_14_breakpoint_removed_while_hits_wait_is_forgotten(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus, defines=["COUNT=300"])
    stub = served.rsp()
    tick = served.dbg.symbol("tick")

    for _ in range(10):
        run_to(stub, tick)
    stop = stub.cont()

    assert (stop.kind, stop.code) == ("W", 0)
    assert served.word("all_ticks") == cpus * 300


@pytest.mark.parametrize(
    ("offset", "length", "type"), [(1, 8, 2), (3, 3, 4), (0, 16, 2), (0, 0, 2), (7, 1, 3), (0, 1 << 20, 2), (5, 4, 2)]
)
def test_defect_15_watchpoint_of_any_place_and_length_is_set_or_refused(
    serve: Callable[..., Served], offset: int, length: int, type: int
) -> None:
    served = serve("loop", defines=["COUNT=3"])
    stub = served.rsp()
    total = served.dbg.symbol("calls")

    reply = stub.ask(f"Z{type},{total + offset:x},{length:x}")

    assert reply == b"OK" or reply.startswith(b"E"), reply
    if length and offset < 8 and length < 1 << 20:
        assert reply == b"OK"
    if reply == b"OK":
        stub.remove(total + offset, type=type, kind=length)
    assert stub.cont().kind == "W"
    for address in ((1 << 64) - 4, 0x8000_0000_0000):
        assert not stub.ask(f"Z2,{address:x},8").startswith(b"W")


def test_defect_16_one_register_is_written_and_no_other_changes(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    run_to(stub, served.dbg.symbol("work"))
    names = [name for name in stub.registers() if name not in ("k_gs_base",)]
    before = stub.read_registers()

    stub.write_register("r11", 0x1122_3344_5566_7788)
    stub.write_register("fctrl", 0x0F7F)
    stub.write_register("mxcsr", 0x1F00)
    stub.write_register("xmm3", 0xFEDC << 112 | 0xABCD)
    stub.write_register("st2", 0x4000_C90F_DAA2_2168_C235)

    after = stub.read_registers()
    changed = {name for name in names if before[name] != after[name]}
    assert changed <= {"r11", "fctrl", "mxcsr", "xmm3", "st2", "ymm3", "zmm3"}
    assert (after["r11"], after["xmm3"]) == (0x1122_3344_5566_7788, 0xFEDC << 112 | 0xABCD)
    assert (after["fctrl"], after["mxcsr"], after["st2"]) == (0x0F7F, 0x1F00, 0x4000_C90F_DAA2_2168_C235)
    # All of them at once, as they are, change nothing; segments keep what only the hardware knows.
    stub.expect_ok(b"G" + stub.request("g"))
    stub.write_register("ss", after["ss"] or 0)
    assert stub.read_registers() == after
    assert served.dbg.registers.r11 == 0x1122_3344_5566_7788
    stop = run_to(stub, served.dbg.symbol("work+7"))
    assert stop.code == TRAP


def test_defect_16_x87_fields_are_where_gdb_expects_them(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    names = list(stub.registers())
    first = names.index("fctrl")
    assert names[first : first + 8] == ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"]

    # All eight empty: FTAG is 0xffff in its full form, 0 in FXSAVE's.
    assert stub.read_register("ftag") == 0xFFFF
    assert stub.read_register("fctrl") in (0x37F, 0x40), "as after FNINIT, or a reset"
    stub.write_register("ftag", 0x3FFF)
    assert stub.read_register("ftag") & 0xC000 != 0xC000


def test_defect_17_bases_of_fs_and_gs_are_registers(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()

    stub.write_register("fs_base", 0x1234_5000)
    stub.write_register("gs_base", 0x1234_6000)

    assert served.dbg.registers.fs_base == 0x1234_5000
    assert (stub.read_register("fs_base"), stub.read_register("gs_base")) == (0x1234_5000, 0x1234_6000)
    assert "k_gs_base" in stub.registers()
    assert {"cr0", "cr2", "cr3", "cr4", "cr8", "efer"} <= set(stub.registers())


def test_defect_18_offsets_are_those_of_the_load_address_and_none_for_fixed_images(
    serve: Callable[..., Served],
) -> None:
    moved, fixed = serve("loop"), serve("loop", build={"pie": False})

    assert (
        moved.rsp().request("qOffsets") == f"TextSeg={moved.dbg.load_bias.to_bytes(8).lstrip(bytes(1)).hex()}".encode()
    )
    assert fixed.rsp().request("qOffsets") == b"Text=00;Data=00;Bss=00"
    assert fixed.dbg.load_bias == 0


@pytest.mark.real_gdb
@pytest.mark.parametrize("pie", [True, False])
def test_defect_18_every_section_of_the_image_is_where_gdb_looks_for_it(
    serve: Callable[..., Served], pie: bool
) -> None:
    served = serve("hostile", build={"pie": pie})
    names = ["guest_main", "odd_fds", "stacks"]

    said = served.script(*(f"print &{name}" for name in names))

    for name in names:
        assert f"{served.dbg.symbol(name):#x} <{name}>" in said


def test_defect_19_signals_and_unknown_threads_are_no_panic(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=3"])
    stub = served.rsp()

    for packet in ("Hgp1.63", "Hg7fffffff", "Hcp1.9", "Tp1.9", "qThreadExtraInfo,p1.9", "vCont;s:p1.9", "Hgp2.1"):
        with pytest.raises(ErrorReplyError):
            stub.request(packet)
    stub.insert(served.dbg.symbol("work"))
    stub.resume("C0b:p1.1;c")
    assert stub.wait().code == TRAP
    stub.resume("S05:p1.1")
    assert stub.wait().code == TRAP


def test_defect_19_reset_connection_is_no_panic(serve: Callable[..., Served]) -> None:
    served = serve("busy")
    for resumes in (False, True):
        stub = served.rsp()
        if resumes:
            stub.resume()
        stub.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stub.close()
    assert served.rsp().request("g")


@pytest.mark.parametrize("code", [0, 7, 255, 256, -1, 2**31 - 1, -(2**31)])
def test_defect_20_any_exit_code_is_kept(serve: Callable[..., Served], code: int) -> None:
    served = serve("loop", defines=["COUNT=3"])
    stub = served.rsp()
    run_to(stub, served.dbg.symbol("guest_exit"))
    stub.write_register("rdi", code & 0xFFFF_FFFF)

    stop = stub.cont()

    assert (stop.kind, stop.code) == ("W", code & 0xFF)
    assert (served.dbg.stop.reason, served.dbg.stop.code) == ("exit", code)
    assert (str(code) in stub.console) == (not 0 <= code <= 255)


@CPUS
def test_defect_21_detached_guest_runs_on_and_killed_one_ends(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    stub = served.rsp()
    stub.insert(served.dbg.symbol("tick"))
    stub.cont()

    stub.detach()

    stop = served.dbg.wait(timeout=20)
    assert (stop.reason, stop.code) == ("exit", 0)
    assert served.word("all_ticks") == cpus * 1000

    other = serve("busy", cpus=cpus)
    other.rsp().kill()
    assert other.server.wait(timeout=10)
    assert not other.dbg.running


def test_defect_22_interrupt_during_a_hypercall_that_waits_for_the_host_is_not_lost(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)
    try:
        served = serve("readpath", files={"/in": fifo})
        stub = served.rsp()
        for _ in range(3):
            stub.resume()
            time.sleep(0.1)
            stub.interrupt()
            stop = stub.wait(5)
            assert (stop.kind, stop.code) == ("T", INT)
            assert stub.is_quiet(0.02)
    finally:
        os.close(writer)


@CPUS
def test_defect_23_steps_are_not_hijacked_by_interrupts(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("ticker", cpus=cpus)
    stub = served.rsp()
    stub.insert(served.dbg.symbol("turn"))
    for _ in range(3):
        thread = str(stub.cont().thread)
        # A timer's tick waits by now.
        time.sleep(0.002)
        own = range(served.dbg.symbol("turn"), served.dbg.symbol("turn") + 0x40)
        for _ in range(3):
            stub.step(thread)
            stub.select_thread(thread)
            assert stub.read_register("rip") in own
    stub.remove(served.dbg.symbol("turn"))
    stub.insert(served.dbg.symbol("on_tick"))
    assert stub.cont().code == TRAP, "the interrupts were held, not lost"


def test_defect_24_long_stop_does_not_cost_the_connection(serve: Callable[..., Served]) -> None:
    served = serve("busy")
    stub = served.rsp()
    time.sleep(2)

    assert stub.request("g")
    assert stub.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert stub.step("p1.1").code == TRAP


def test_defect_25_output_and_statistics_are_there_with_a_client(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=3"])
    stub = served.rsp()
    stub.cont()

    assert served.dbg.output == "calls=3 total=9\n"
    assert served.dbg.result is not None
    assert served.dbg.result.output == "calls=3 total=9\n"
    assert served.dbg.stats.total > 0


def test_defect_26_threads_have_small_numbers_that_mean_something(serve: Callable[..., Served]) -> None:
    stub = serve("smp", cpus=4).rsp()

    assert sorted(stub.threads()) == ["p1.1", "p1.2", "p1.3", "p1.4"]
    assert stub.thread_names()["p1.3"] == "vCPU 2"


def test_defect_26_clients_come_late_again_and_by_a_unix_socket(serve: Callable[..., Served], tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    served = serve("busy", cpus=2, address=f"unix:{path}")
    served.dbg.cont(wait=False)
    for _ in range(3):
        with Rsp.unix(str(path)) as stub:
            assert stub.handshake().kind == "T"
            stub.detach()
        assert served.dbg.running
    assert path.stat().st_mode & 0o777 == 0o600


@CPUS
def test_defect_27_question_mark_after_a_stop_repeats_it(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("smp", cpus=cpus)
    stub = served.rsp()
    stop = run_to(stub, served.dbg.symbol("tick"))

    again = StopReply.parse(stub.request("?"))

    assert (again.kind, again.code, again.thread) == (stop.kind, stop.code, stop.thread)


def test_defect_28_memory_is_read_by_many_bytes_at_once(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    stub = served.rsp()
    start = served.dbg.symbol("work") & ~0xFFF
    packet, answer = frame(f"m{start:x},4000".encode()), 2 * 0x4000 + 4

    pieces = 0
    for _ in range(64):
        stub.send_raw(packet)
        left = answer
        while left:
            left -= len(stub.connection.recv(left))
            pieces += 1

    assert pieces <= 64 * 8, f"{pieces} pieces for 64 answers of {answer} bytes"


@pytest.mark.parametrize("packet", [b"Hgp01.zz", b"vCont;s:zz", b"mzz,1", b"Z0", b"qXfer:features:read:target.xml:zz"])
def test_defect_29_malformed_packet_is_an_error_of_that_packet(serve: Callable[..., Served], packet: bytes) -> None:
    stub = serve("loop", defines=["COUNT=1"]).rsp()

    reply = stub.ask(packet)

    assert reply == b"" or reply.startswith(b"E")
    assert stub.cont().kind == "W"


def test_defect_30_second_server_on_a_taken_port_fails(serve: Callable[..., Served], guest) -> None:
    served = serve("busy")

    with Vm(guest("busy")).debug() as other, pytest.raises(OSError, match=str(served.port)) as error:
        other.serve_gdb(served.server.address)
    assert error.value.errno == errno.EADDRINUSE
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", served.port), 1)


def test_defect_31_hit_at_once_after_the_first_resume_is_one_stop(serve: Callable[..., Served]) -> None:
    for _ in range(5):
        served = serve("loop", defines=["COUNT=3"])
        stub = served.rsp()
        entry = served.dbg.vcpus[0].pc
        stub.step("p1.1")
        second = served.dbg.vcpus[0].pc
        assert second != entry
        stub.step("p1.1")
        third = served.dbg.vcpus[0].pc
        served.dbg.vcpus[0].registers.rip = second
        stub.insert(third)

        stop = stub.cont()

        assert (stop.code, "swbreak" in stop.values) == (TRAP, True)
        assert stub.read_register("rip") == third
        assert stub.is_quiet(0.02), "and no second one"
        stub.remove(third)
        assert stub.cont().kind == "W"


def test_threads_of_the_tests_end(serve: Callable[..., Served]) -> None:
    served = serve("busy", cpus=2)
    served.rsp().resume()
    names = {thread.name for thread in threading.enumerate()}
    served.close()
    assert {thread.name for thread in threading.enumerate()} <= names
