"""The commands of a stock gdb, each told what it should find: moving about, breakpoints, registers, memory, threads.

The guest's own counters and the debugger in Python are what gdb's answers are held against.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gdb.gdb import DebuggerError, run_gdb

if TYPE_CHECKING:
    from collections.abc import Callable

    from gdb.conftest import Served
    from gdb.gdb import Gdb

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(100)]

GUESTS = Path(__file__).resolve().parents[2] / "guests"
SEVERAL_CPUS = pytest.mark.parametrize("cpus", [2, 4])


def line_of(guest: str, words: str) -> int:
    """The number of the line of a guest's source whose comment has these words."""
    lines = (GUESTS / f"{guest}.c").read_text().splitlines()
    [number] = [number for number, text in enumerate(lines, 1) if f"/* line: {words} */" in text]
    return number


def place(gdb: Gdb) -> tuple[str, int]:
    """The innermost frame's function and line."""
    frame = gdb.command("-stack-info-frame").results["frame"]
    return frame["func"], int(frame["line"])


def depth(gdb: Gdb) -> int:
    """How many frames there are."""
    return int(gdb.command("-stack-info-depth").results["depth"])


def run(gdb: Gdb, command: str) -> tuple[str, int]:
    """Runs a command that lets the guest go on, to its stop."""
    gdb.run(f'-interpreter-exec console "{command}"')
    return place(gdb)


def run_to(gdb: Gdb, where: str) -> None:
    """Lets the guest run to a place, once."""
    gdb.console(f"tbreak {where}")
    gdb.cont()


def stopped_vcpu(served: Served) -> int:
    """The vCPU of which the last stop is."""
    stop = served.dbg.stop
    assert stop is not None
    return stop.vcpu


# Moving about.


def test_step_goes_into_a_recursion_finish_comes_out_and_next_passes_over(serve: Callable[..., Served]) -> None:
    gdb = serve("frames").gdb()
    calls, multiplies = (line_of("frames", f"factorial {does}") for does in ("calls", "multiplies"))
    run_to(gdb, "factorial")
    outermost = depth(gdb)

    assert run(gdb, "next") == ("factorial", calls)
    assert run(gdb, "step")[0] == "factorial"
    assert (depth(gdb), gdb.number("n")) == (outermost + 1, 4)
    assert run(gdb, "next") == ("factorial", calls)
    assert run(gdb, "next") == ("factorial", multiplies)
    assert (depth(gdb), gdb.number("n"), gdb.number("below")) == (outermost + 1, 4, 6)
    assert run(gdb, "finish")[0] == "factorial"
    assert (depth(gdb), gdb.number("$"), gdb.number("n")) == (outermost, 24, 5)
    assert run(gdb, "finish") == ("shapes", line_of("frames", "calls factorial"))
    assert gdb.number("$") == 120


def test_until_passes_over_inner_calls_where_advance_stops_in_the_innermost(serve: Callable[..., Served]) -> None:
    multiplies = line_of("frames", "factorial multiplies")
    found = []
    for command in ("until", "advance"):
        gdb = serve("frames").gdb()
        run_to(gdb, "factorial")
        assert run(gdb, f"{command} {multiplies}") == ("factorial", multiplies)
        found.append(gdb.number("n"))
    assert found == [5, 2]


def test_until_leaves_a_loop_and_advance_goes_to_a_function(serve: Callable[..., Served]) -> None:
    served = serve("frames")
    gdb = served.gdb()
    run_to(gdb, "spin")

    # A jump back to the start of the line is what `until` does not stop for.
    left = run(gdb, "until")
    assert left in [("spin", line_of("frames", "after spin")), ("shapes", line_of("frames", "after spins"))]
    # It stops where the frame returns, too.
    if left[0] == "spin":
        assert run(gdb, "advance fib")[0] == "shapes"
    assert run(gdb, "advance fib")[0] == "guest_main"
    assert run(gdb, "advance fib")[0] == "fib"
    assert gdb.number("n") == 8
    assert run(gdb, "finish")[0] == "guest_main"
    assert gdb.number("$") == 21


def test_return_call_and_jump_change_what_the_guest_does(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=10"])
    gdb = served.gdb()
    run_to(gdb, "work")

    assert gdb.console("call work(5, 6)").strip().endswith("= 11")
    assert served.word("calls") == 1
    # A breakpoint in a function that gdb calls stops there; the frame of the call is given up again.
    gdb.console("break work if i == 7")
    with pytest.raises(DebuggerError, match="stopped while in a function called from GDB"):
        gdb.console("call work(7, 0)")
    gdb.console("return")
    assert place(gdb)[0] == "work"
    gdb.console("delete")
    gdb.console("return (unsigned long)0")
    assert place(gdb)[0] == "guest_main"
    assert gdb.cont().results["reason"] == "exited-normally"
    assert "calls=10 " in served.dbg.output


# Breakpoints.


def test_breakpoint_commands_run_at_each_hit_and_a_temporary_one_goes(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve("loop", defines=["COUNT=6"])
    script = tmp_path / "commands"
    script.write_text('break work\ncommands\nsilent\nprintf "at %d\\n", i\ncontinue\nend\ntbreak print_dec\n')

    said = served.script(f"source {script}", "continue", "info breakpoints", "delete", "continue")

    assert re.findall(r"^at (\d+)$", said.output, flags=re.MULTILINE) == list("012345")
    assert "breakpoint already hit 6 times" in said
    assert "print_dec" in said
    assert "del " not in said.output.partition("Num")[2].partition("exited")[0]
    assert "exited normally" in said


def test_ignored_disabled_and_changed_conditions_hold(serve: Callable[..., Served]) -> None:
    served = serve("loop", defines=["COUNT=100"])
    gdb = served.gdb()
    gdb.console("break work")
    gdb.console("ignore 1 10")
    gdb.cont()
    assert gdb.number("i") == 10
    gdb.console("condition 1 i % 16 == 0")
    gdb.cont()
    assert gdb.number("i") == 16
    gdb.console("disable 1")
    gdb.console("break work if i == 40")
    gdb.cont()
    assert gdb.number("i") == 40
    gdb.console("enable once 1")
    gdb.cont()
    assert gdb.number("i") == 48
    assert gdb.cont().results["reason"] == "exited-normally"


def test_more_hardware_breakpoints_than_a_cpu_has_are_all_met(serve: Callable[..., Served]) -> None:
    served = serve("frames")
    gdb = served.gdb()
    functions = ["outer", "middle", "factorial", "no_frame", "spin", "fib"]
    for function in functions:
        gdb.console(f"thbreak {function}")

    assert [gdb.cont().results["frame"]["func"] for _ in functions] == functions
    assert gdb.cont().results["reason"] == "exited-normally"


@pytest.mark.parametrize("command", ["rwatch", "awatch", "watch"])
def test_watchpoint_with_a_condition_stops_where_it_holds(serve: Callable[..., Served], command: str) -> None:
    served = serve("loop", defines=["COUNT=12"])
    gdb = served.gdb()
    run_to(gdb, "work")

    gdb.console(f"{command} calls if calls == 5")
    assert "watchpoint-trigger" in gdb.cont().results["reason"]
    assert place(gdb)[0] == "work"
    assert served.word("calls") == 5
    gdb.console("delete")
    assert gdb.cont().results["reason"] == "exited-normally"


def test_structures_and_registers_are_watched(serve: Callable[..., Served]) -> None:
    gdb = serve("watch").gdb()
    run_to(gdb, "on_way")
    gdb.console("watch area")
    assert gdb.cont().results["value"]["new"] == "{before = 0, word = 4369, after = 0}"
    gdb.console("delete")
    gdb.console("watch block")
    assert "watchpoint-trigger" in gdb.cont().results["reason"]
    gdb.console("delete")
    # A register gdb watches by itself, in single steps.
    gdb.console("watch $rsp")
    stop = gdb.cont().results
    assert stop["reason"] == "watchpoint-trigger"
    assert f"{gdb.number('$rsp'):#x} <stacks+" in stop["value"]["new"]


def test_dprintf_prints_and_the_guest_goes_on(serve: Callable[..., Served]) -> None:
    said = serve("loop", defines=["COUNT=5"]).script('dprintf work,"work %d\\n", i', "continue")
    assert re.findall(r"^work (\d)$", said.output, flags=re.MULTILINE) == list("01234")
    assert "exited normally" in said


def test_watchpoint_on_a_local_ends_with_its_frame(serve: Callable[..., Served]) -> None:
    gdb = serve("scenario", build={"optimize": "-O0"}).gdb()
    run_to(gdb, "scenario")
    gdb.console("watch seen")
    values = []
    while (stop := gdb.cont().results)["reason"] == "watchpoint-trigger":
        values.append(stop["value"]["new"])
    assert values[-2:] == ["1", "3"]
    assert stop["reason"] == "watchpoint-scope"
    gdb.console("delete")
    assert gdb.cont().results["reason"] == "exited"


def test_catch_syscall_is_refused_by_gdb_itself_and_harms_nothing(serve: Callable[..., Served]) -> None:
    # gdb has tables for the operating systems that it knows. The packets have a test of their own.
    served = serve("loop", defines=["COUNT=3"])
    gdb = served.gdb()
    with pytest.raises(DebuggerError, match="not supported on this architecture"):
        gdb.console("catch syscall")
    assert gdb.cont().results["reason"] == "exited-normally"


# Registers and memory.


def test_registers_come_in_groups_and_are_what_python_reads(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    gdb = served.gdb()
    run_to(gdb, "work")
    own = served.dbg.vcpus[0].registers.to_dict()

    shown = {
        name: int(value, 16)
        for name, value in re.findall(r"^(\w+)\s+(0x[0-9a-f]+)", gdb.console("info registers"), flags=re.MULTILINE)
    }
    assert {"rax", "r15", "rip", "eflags", "ss", "fs_base", "k_gs_base", "cr0", "cr3", "cr4", "efer"} <= set(shown)
    assert {name: shown[name] for name in set(shown) & set(own)} == {name: own[name] for name in set(shown) & set(own)}
    general, floats, vectors = (gdb.console(f"info registers {group}") for group in ("general", "float", "vector"))
    assert "rax" in general and "st0" not in general
    assert "st0" in floats and "fctrl" in floats and "rax" not in floats
    widest = max(name for name in own if re.fullmatch("[xyz]mm0", name))
    assert f"{widest} " in vectors
    assert "mxcsr" in gdb.console("info registers all")
    with pytest.raises(DebuggerError, match="Invalid register"):
        gdb.console("info registers nonsense")


def test_registers_of_every_kind_are_written_and_only_those(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    gdb = served.gdb()
    run_to(gdb, "work")
    before = served.dbg.vcpus[0].registers.to_dict()
    vectors = ["$xmm3.v2_int64[1]", "$xmm15.v16_int8[15]"]
    if "ymm0" in before:
        vectors.append("$ymm7.v4_int64[3]")

    gdb.console("set var $rbx = 0x1122334455667788")
    gdb.console("set var $bl = 0xff")
    gdb.console("set var $cx = 0x1234")
    gdb.console("set var $eflags = $eflags | 1")
    gdb.console("set var $fs_base = 0x7000")
    gdb.console("set var $st0 = 1.5")
    gdb.console("set var $mxcsr = 0x1fa0")
    for vector in vectors:
        gdb.console(f"set var {vector} = 0x55")

    assert [gdb.number(vector) for vector in vectors] == [0x55] * len(vectors)
    assert gdb.evaluate("$st0") == "1.5"
    assert "0x1fa0" in gdb.console("print/x $mxcsr")
    after = served.dbg.vcpus[0].registers.to_dict()
    changed = {name: value for name, value in after.items() if value != before[name]}
    changed.pop("st0")
    written = {"mm3": 0x55 << 64, "mm15": 0x55 << 120}
    expected = {
        "rbx": 0x11223344556677FF,
        "rcx": before["rcx"] & ~0xFFFF | 0x1234,
        "rflags": before["rflags"] | 1,
        "fs_base": 0x7000,
        "mxcsr": 0x1FA0,
    }
    # A write to a vector register is one to the wider ones that it is the low part of.
    expected |= {width + name: value for width in "xyz" for name, value in written.items() if width + name in before}
    if len(vectors) == 3:
        expected |= {width + "mm7": 0x55 << 192 for width in "yz" if width + "mm7" in before}
    assert changed == expected


def test_memory_is_shown_up_to_what_is_not_mapped(serve: Callable[..., Served]) -> None:
    served = serve("loop")
    page = 0x20_0000
    edge = (served.dbg.symbol("work") & ~(page - 1)) + page
    while _is_mapped(served, edge):
        edge += page
    gdb = served.gdb()

    with pytest.raises(DebuggerError, match=f"Cannot access memory at address {edge:#x}"):
        gdb.console(f"x/2xg {edge - 8:#x}")
    shown = gdb.command(f"-data-read-memory-bytes {edge - 16:#x} 64").results["memory"]
    # gdb halves what it asks for until one byte is left in doubt, and shows that, too.
    assert len(shown) == 1
    assert int(shown[0]["begin"], 16) == edge - 16
    assert int(shown[0]["end"], 16) in (edge, edge + 1)
    for address in (0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFF0, edge):
        with pytest.raises(DebuggerError, match="Cannot access memory"):
            gdb.console(f"x/xg {address:#x}")
        with pytest.raises(DebuggerError, match="Cannot access memory"):
            gdb.console(f"set var *(long *){address:#x} = 1")


def _is_mapped(served: Served, address: int) -> bool:
    try:
        served.dbg.memory.read(address, 1)
    except Exception:
        return False
    return True


def test_memory_is_searched_dumped_and_restored(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve("loop")
    gdb = served.gdb()
    stacks = served.dbg.symbol("stacks")
    served.dbg.memory.write(stacks + 0x2FF9, b"needle in hay")
    file = tmp_path / "dump"

    found = gdb.console(f'find {stacks:#x}, +0x4000, "needle in hay"')
    assert f"{stacks + 0x2FF9:#x} <stacks+{0x2FF9}>" in found
    assert "1 pattern found" in found
    assert "not found" in gdb.console(f'find {stacks:#x}, +0x2000, "needle in hay"')
    gdb.console(f"dump binary memory {file} {stacks:#x} {stacks + 0x4000:#x}")
    assert file.read_bytes() == served.dbg.memory.read(stacks, 0x4000)
    gdb.console(f"restore {file} binary {stacks + 0x4000:#x}")
    assert served.dbg.memory.read(stacks + 0x4000 + 0x2FF9, 6) == b"needle"
    assert "AT_ENTRY" in gdb.console("info auxv")


# Threads.


@SEVERAL_CPUS
@pytest.mark.parametrize("command", ["stepi", "step", "next"])
@pytest.mark.parametrize("mode", ["on", "step"])
def test_locked_steps_of_a_chosen_thread_move_no_other(
    serve: Callable[..., Served], cpus: int, mode: str, command: str
) -> None:
    served = serve("lockstep", cpus=cpus)
    gdb = served.gdb()
    run_to(gdb, "pass if $rdi == 1")
    assert stopped_vcpu(served) == 1
    gdb.console(f"set scheduler-locking {mode}")
    for chosen in (1, cpus):
        gdb.console(f"thread {chosen}")
        before = [vcpu.registers.to_dict() for vcpu in served.dbg.vcpus]
        run(gdb, command)
        after = [vcpu.registers.to_dict() for vcpu in served.dbg.vcpus]
        moved = [number for number in range(cpus) if before[number] != after[number]]
        assert moved == [chosen - 1]
        assert stopped_vcpu(served) == chosen - 1


@SEVERAL_CPUS
def test_steps_without_a_lock_let_the_others_go_on(serve: Callable[..., Served], cpus: int) -> None:
    served = serve("lockstep", cpus=cpus)
    gdb = served.gdb()
    run_to(gdb, "pass if $rdi == 0")
    gdb.console("set scheduler-locking off")
    # The token comes back only if all the others have passed it on. A step is short: a busy host may run none of them.
    while served.word("passes") <= cpus:
        run(gdb, "next")
        assert stopped_vcpu(served) == 0


def test_breakpoint_of_one_thread_is_met_by_that_alone(serve: Callable[..., Served]) -> None:
    served = serve("lockstep", cpus=4, defines=["COUNT=3"])
    gdb = served.gdb()
    gdb.console("break pass thread 3")
    met = []
    while (stop := gdb.cont().results)["reason"] == "breakpoint-hit":
        met.append((stop["thread-id"], stopped_vcpu(served), gdb.number("round")))
    assert met == [("3", 2, number) for number in range(3)]


def test_non_stop_mode_is_refused_and_the_next_client_is_served(serve: Callable[..., Served]) -> None:
    served = serve("busy", cpus=2)
    said = run_gdb(["set non-stop on", f"target remote {served.server.address}"])
    assert "remote does not support non-stop" in said.errors
    assert "_start" in served.script("info threads").output
