"""Sessions of the real gdb, which is told nothing but where to attach, and of LLDB."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from gdb.gdb import DebuggerError, Gdb, run_gdb, run_lldb
from gdb.rsp import Rsp
from uhyve import VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(100)]

CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])


@pytest.mark.parametrize("pie", [True, False])
def test_target_remote_alone_finds_symbols_and_lines(serve: Callable[..., Served], pie: bool) -> None:
    served = serve("loop", build={"pie": pie})

    said = served.script("break work", "continue", "print &work", "detach")

    assert re.search(r"Breakpoint 1, work \(i=.*loop\.c:\d+", said.output), said
    assert f"{served.dbg.symbol('work'):#x} <work>" in said


def test_scenario_of_break_next_print_set_hbreak_watch_and_exit_code(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=10"])
    gdb = served.gdb()
    gdb.console("break work")
    assert gdb.cont().results["reason"] == "breakpoint-hit"
    gdb.run("-exec-next")
    assert gdb.number("calls") == 1
    gdb.console("set var calls = 100")
    assert served.word("calls") == 100
    gdb.console("delete")
    gdb.console("watch calls")
    assert "watchpoint-trigger" in gdb.cont().results["reason"]
    assert gdb.number("calls") == 101
    gdb.console("delete")
    gdb.console("awatch total")
    assert "watchpoint-trigger" in gdb.cont().results["reason"]
    gdb.console("delete")
    gdb.console("hbreak print_dec")
    assert gdb.cont().results["frame"]["func"] == "print_dec"
    gdb.console("delete")
    end = gdb.cont()
    assert end.results["reason"] == "exited-normally"
    assert served.dbg.stop.code == 0


def test_next_over_a_loop_of_a_thousand_rounds_is_one_resume(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=1000"])
    said = served.script(
        "break work", "continue", "delete", "up", "tbreak print_dec", "set debug remote 1", "continue", timeout=60
    )
    assert "calls" in said.output or served.word("calls") == 1000
    resumes = re.findall(r"Sending packet: \$vCont;", said.output + said.errors)
    assert 1 <= len(resumes) <= 3


def test_condition_of_a_stock_gdb_is_evaluated_in_the_target(serve: Callable[..., Served]) -> None:
    counts = {}
    for mode in ("auto", "host"):
        served = serve("loop", defines=["COUNT=60"])
        said = served.script(
            f"set breakpoint condition-evaluation {mode}",
            "break work if i == 50",
            "set debug remote 1",
            "continue",
            "set debug remote 0",
            "print i",
        )
        assert "$1 = 50" in said
        counts[mode] = len(re.findall(r"Sending packet: \$vCont;", said.output + said.errors))
    assert counts["auto"] == 1
    assert counts["host"] >= 51


def test_finish_returns_the_value_of_the_call(serve: Callable[..., Served]) -> None:
    said = serve("loop").script("break work if i == 3", "continue", "finish")
    assert re.search(r"Value returned is \$1 = 18", said.output), said


@CPUS
def test_threads_are_named_and_traced_back(serve: Callable[..., Served], cpus: int) -> None:
    said = serve("smp", cpus=cpus).script("break tick", "continue", "info threads", "thread apply all bt")
    for number in range(cpus):
        assert f'"vCPU {number}"' in said
    assert said.output.count("guest_main") >= 1
    assert len(re.findall(r"^Thread \d+ \(Thread", said.output, flags=re.MULTILINE)) == cpus


@pytest.mark.parametrize("mode", ["on", "step", "off"])
def test_steps_under_each_scheduler_locking_move_the_thread(serve: Callable[..., Served], mode: str) -> None:
    served = serve("lockstep", cpus=2)
    gdb = served.gdb()
    gdb.console("break pass")
    gdb.cont()
    gdb.console("delete")
    before, others = gdb.number("$pc"), served.dbg.vcpus[1].registers.to_dict()
    gdb.console(f"set scheduler-locking {mode}")
    assert gdb.run("-exec-step-instruction").results["reason"] == "end-stepping-range"
    assert gdb.number("$pc") != before
    if mode != "off":
        assert served.dbg.vcpus[1].registers.to_dict() == others


@CPUS
@pytest.mark.parametrize("name", ["busy", "halt", "hang"])
def test_ctrl_c_stops_any_guest(serve: Callable[..., Served], name: str, cpus: int) -> None:
    gdb = serve(name, cpus=cpus).gdb()
    for _ in range(3):
        gdb.resume()
        gdb.interrupt()
        assert gdb.wait_stop(10).results["signal-name"] == "SIGINT"


def test_detached_guest_runs_and_a_second_gdb_attaches(serve: Callable[..., Served]) -> None:
    served = serve("busy")
    for _ in range(3):
        said = served.script("print spin_counter", "detach")
        assert "$1 = " in said
        assert served.dbg.running
    with pytest.raises(DebuggerError):
        served.gdb().console("print 1 +")


def test_second_client_is_refused_while_one_is_there(serve: Callable[..., Served]) -> None:
    served = serve("busy")
    first = served.rsp()
    said = run_gdb([f"target remote {served.server.address}"], timeout=30)
    assert said.status != 0 or "attached" in said.output + said.errors
    assert first.request("g")


def test_client_that_dies_leaves_the_guest_stopped_for_the_next(serve: Callable[..., Served]) -> None:
    served = serve("busy", cpus=2)
    gdb = served.gdb()
    gdb.resume()
    gdb.kill()
    deadline = time.monotonic() + 5
    while served.server.client is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.server.client is None
    assert not served.dbg.running
    assert served.rsp().request("g")


def test_python_beside_gdb_reads_and_is_told_who_controls(
    serve: Callable[..., Served], wait_until: Callable[..., bool]
) -> None:
    served = serve("busy")
    served.dbg.cont(wait=False)
    stub = served.rsp()
    assert served.dbg.stop.reason == "interrupt"
    with pytest.raises(VmStateError, match=re.escape(str(served.server.client))):
        served.dbg.cont()
    assert served.dbg.memory.read(served.dbg.symbol("spin"), 4)
    stub.resume()
    # Of a guest that stands still Python asks nothing.
    assert wait_until(lambda: served.dbg.running)
    served.dbg.interrupt()
    assert stub.wait().code == 2


def test_detach_in_the_middle_of_a_locked_step_lets_every_vcpu_run(serve: Callable[..., Served]) -> None:
    served = serve("busy", cpus=2)
    stub = served.rsp()
    stub.resume("c:p1.1")
    stub.send("D;1")
    assert stub.receive() == b"OK"
    time.sleep(0.1)
    served.dbg.interrupt()
    served.dbg.wait(5)
    assert all(vcpu.symbol is not None and vcpu.symbol.startswith("spin") for vcpu in served.dbg.vcpus)


def test_run_in_extended_mode_gives_a_fresh_guest(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=5"])
    gdb = served.gdb(extended=True)
    for _ in range(2):
        gdb.console("break work")
        assert gdb.cont().results["reason"] == "breakpoint-hit"
        assert gdb.number("calls") == 0
        gdb.console("delete")
        assert gdb.cont().results["reason"] == "exited-normally"
        gdb.console("starti")
        gdb.wait_stop()


def test_triple_fault_is_a_crash_with_registers(serve: Callable[..., Served]) -> None:
    served = serve("crash", defines=["KIND=triple"])
    said = served.script("continue", "print $pc", "print $rip == (long)&crash_triple || 1")
    assert "SIGSEGV" in said
    assert served.dbg.stop.reason == "crash"


def test_hypercalls_are_caught_as_system_calls(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=3"])
    stub = served.rsp()
    stub.expect_ok("QCatchSyscalls:1;880")
    entry, back = stub.cont(), stub.cont()
    assert int(entry.values["syscall_entry"], 16) == 0x880
    assert int(back.values["syscall_return"], 16) == 0x880
    stub.expect_ok("QCatchSyscalls:0")
    assert stub.cont().kind == "W"


def test_idle_server_costs_no_time(serve: Callable[..., Served]) -> None:
    served = serve("busy")
    stub = served.rsp()
    begin = time.process_time()
    time.sleep(2)
    assert time.process_time() - begin < 0.02
    assert stub.request("g")


def test_unix_socket_serves_the_real_gdb(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve("busy", address=f"unix:{tmp_path / 'gdb'}")
    with Gdb() as gdb:
        gdb.console(f"target remote {tmp_path / 'gdb'}")
        assert gdb.number("$pc") == served.dbg.vcpus[0].pc
    with Rsp.unix(str(tmp_path / "gdb")) as stub:
        assert stub.handshake().kind == "T"


@pytest.mark.real_lldb
def test_lldb_attaches_breaks_steps_and_reads_registers(serve: Callable[..., Served], guest) -> None:
    image = guest("loop", pie=False, defines=())
    served = serve(image)
    said = run_lldb(
        [
            f"gdb-remote {served.server.address}",
            "breakpoint set -n work",
            "continue",
            "register read rip fs_base",
            "thread step-inst",
            "breakpoint delete -f",
            "continue",
        ],
        file=str(image),
    )
    assert "stop reason = breakpoint 1.1" in said
    assert f"rip = 0x{served.dbg.symbol('work'):016x}" in said
    assert "stop reason = instruction step into" in said
    assert "exited with status = 0" in said


@pytest.mark.real_lldb
@pytest.mark.parametrize("pie", [True, False])
def test_lldb_unwinds_shows_variables_and_meets_breakpoints_that_it_sets_later(
    serve: Callable[..., Served], guest, pie: bool
) -> None:
    image = guest("loop", pie=pie, defines=("COUNT=7",))
    served = serve(image)
    said = run_lldb(
        [
            f"gdb-remote {served.server.address}",
            "breakpoint set -n work -c 'i == 3'",
            "continue",
            "bt",
            "next",
            "frame variable",
            "breakpoint delete -f",
            "breakpoint set -n print_dec",
            "continue",
            "breakpoint delete -f",
            "continue",
        ],
        file=str(image),
    )
    assert re.search(r"frame #1: .*`guest_main.* at loop\.c:\d+", said.output), said
    assert "frame #2: " in said
    assert "(uint64_t) i = 3" in said
    assert "(uint64_t) twice = 6" in said
    assert "`print_dec(value=7)" in said
    assert "exited with status = 0" in said


def test_vector_registers_that_gdb_prints_and_sets_are_the_guests(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    registers = served.dbg.registers
    registers.ymm7 = 3 << 192 | 1
    with Gdb() as gdb:
        gdb.console(f"target remote {served.server.address}")
        assert "{1, 0, 0, 3}" in gdb.console("print $ymm7.v4_int64")
        gdb.console("set $ymm2.v4_int64[3] = 9")
        assert registers.ymm2 == 9 << 192
        if not hasattr(registers, "zmm0"):
            return
        registers.zmm20, registers.zmm3, registers.k2 = 5 << 448 | 2, 8 << 320, 0xABCD_0000_0001
        gdb.console("maintenance flush register-cache")
        assert "{2, 0, 0, 0, 0, 0, 0, 5}" in gdb.console("print $zmm20.v8_int64")
        assert "{0, 0, 0, 0, 0, 8, 0, 0}" in gdb.console("print $zmm3.v8_int64")
        assert "0xabcd00000001" in gdb.console("print/x $k2")
        gdb.console("set $zmm31.v8_int64[6] = 77")
        gdb.console("set $zmm1.v8_int64[5] = 66")
        gdb.console("set $k7 = 0x1234567887654321")
        assert (registers.zmm31, registers.zmm1, registers.k7) == (77 << 384, 66 << 320, 0x1234_5678_8765_4321)
