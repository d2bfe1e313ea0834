"""Where a single step ends: at each instruction that a trap flag treats in a way of its own, on each back end."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from uhyve import Debugger, Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 30
TF, IF, DF, CF, NT = 0x100, 0x200, 0x400, 1, 0x4000
STEP_REASONS = ("step", "breakpoint")
OFTEN_LEFT = {
    "lfence": "0fae e8",
    "popcnt": "f348 0fb8 c1",
    "mulx": "c4e2 fbf6 c1",
    "cmpxchg16b": "48 0fc7 0e",
    "bswap": "0f c8",
    "endbr64": "f3 0f1e fa",
    "clflush": "0fae 38",
    "prefetcht0": "0f18 08",
    "pause": "f390",
    "str": "0f00 c8",
    "smsw": "0f01 20",
    "lar": "0f02 c0",
    "lsl": "0f03 c0",
    "verr": "0f00 e0",
    "swapgs": "0f01 f8",
}


class Bench:
    """A guest that waits in `ready`, with code of the test's in its arena."""

    def __init__(self, dbg: Debugger) -> None:
        self.dbg = dbg
        dbg.breakpoint("ready", temporary=True)
        assert dbg.cont(timeout=LIMIT).reason == "breakpoint"
        self.arena, self.scratch = dbg.symbol("arena"), dbg.symbol("scratch")

    def put(self, code: str, at: int = 0, **registers: int) -> None:
        """Writes code (hexadecimal) into the arena and goes to it."""
        self.dbg.memory.write(self.arena + at, bytes.fromhex(code))
        registers = {"rip": self.arena + at, "rflags": 2} | registers
        for name, value in registers.items():
            setattr(self.dbg.registers, name, value)

    def step(self) -> int:
        """One step; its end from the arena's start."""
        stop = self.dbg.step(timeout=LIMIT)
        assert stop.reason in STEP_REASONS, stop
        assert stop.pc == self.dbg.registers.rip
        return stop.pc - self.arena

    def handler(self, vector: int) -> int:
        """The handler of a vector, from the arena's start."""
        return self.dbg.symbol("exception_stubs") + 16 * vector - self.arena

    def word(self, name: str, index: int = 0) -> int:
        return self.dbg.memory.read_u64(self.dbg.symbol(name) + 8 * index)

    def stack(self, index: int) -> int:
        return self.dbg.memory.read_u64(self.dbg.registers.rsp + 8 * index)

    @property
    def flags(self) -> int:
        return self.dbg.registers.rflags


@pytest.fixture
def bench(guest: Callable[..., Path], backend: str) -> Iterator[Bench]:
    with Vm(guest("traps")).debug() as dbg:
        yield Bench(dbg)


@pytest.mark.parametrize("flags", [0, CF, DF, IF, NT, CF | DF | IF], ids=hex)
def test_step_over_popf_takes_the_flags_and_nothing_of_the_step(bench: Bench, flags: int) -> None:
    bench.put("6a00 48810424" + (flags | 2).to_bytes(4, "little").hex() + "9d 90 9c")
    assert [bench.step(), bench.step(), bench.step()] == [2, 10, 11]

    assert bench.flags & 0x4FD7 == flags | 2
    assert [bench.step(), bench.step()] == [12, 13]
    assert bench.stack(0) & 0x4FD7 == flags | 2, "what pushf has pushed"


def test_step_over_popf_that_sets_the_trap_flag_leaves_it_to_the_guest(bench: Bench, cpu_kind: str) -> None:
    bench.put("6802010000 9d 90 90 90")
    assert [bench.step(), bench.step()] == [5, 6]

    assert bench.flags & TF, "the guest has set it"
    bench.dbg.breakpoint(bench.arena + 8, temporary=True)
    assert bench.dbg.cont(timeout=LIMIT).pc == bench.arena + 8
    # Two instructions (of which one ends where the breakpoint is) have trapped.
    if cpu_kind != "PVM":
        assert bench.word("seen", 1) == 2


def test_step_over_popf_that_clears_the_guests_trap_flag_ends_behind_it(bench: Bench) -> None:
    bench.put("6a02 9d 90 90")
    assert bench.step() == 2
    bench.dbg.registers.rflags = 2
    assert bench.step() == 3
    assert bench.flags & TF == 0


def test_step_over_a_load_of_ss_ends_behind_the_instruction_that_follows(bench: Bench, cpu_kind: str) -> None:
    bench.put("668cd0 8ed0 90 90")
    assert bench.step() == 3

    end = bench.step()

    # The kernel's emulator under PVM has no shadow.
    assert end == (5 if cpu_kind == "PVM" else 6)
    assert bench.step() == end + 1
    assert bench.dbg.registers.ss == 0x10


def test_step_over_sti_ends_behind_it_and_over_cli_too(bench: Bench) -> None:
    bench.put("fb 90 fa 90")
    assert [bench.step(), bench.flags & IF] == [1, IF]
    assert [bench.step(), bench.step(), bench.flags & IF] == [2, 3, 0]


def test_step_over_the_guests_int3_enters_the_handler_with_a_frame_of_its_own(bench: Bench) -> None:
    bench.put("cc 90")
    assert bench.step() == bench.handler(3)
    assert bench.stack(0) == bench.arena + 1
    assert (bench.stack(2) | bench.flags) & TF == 0


@pytest.mark.parametrize("vector", [0x20, 0x80, 3])
def test_step_over_int_n_enters_the_handler(bench: Bench, vector: int) -> None:
    bench.put(f"cd{vector:02x} 90")
    assert bench.step() == bench.handler(vector)
    assert bench.stack(0) == bench.arena + 2
    assert (bench.stack(2) | bench.flags) & TF == 0


def test_step_over_iret_ends_where_it_returns_to_with_the_flags_of_the_frame(bench: Bench) -> None:
    words = [bench.arena + 0x40, 8, CF | 2, bench.dbg.registers.rsp, 0x10]
    frame = bench.scratch + 0x100
    bench.dbg.memory.write(frame, struct.pack("<5Q", *words))
    bench.put("48cf", rsp=frame)
    bench.put("90 90", at=0x40, rip=bench.arena)
    assert bench.step() == 0x40
    assert (bench.flags & 0xFD7, bench.dbg.registers.rsp) == (CF | 2, words[3])
    assert bench.step() == 0x41


@pytest.mark.parametrize("code", ["f3a4", "f348a5", "f3aa"], ids=["movsb", "movsq", "stosb"])
def test_step_over_a_repeated_string_instruction_is_one_iteration(bench: Bench, code: str) -> None:
    bench.put(code + "90", rsi=bench.scratch, rdi=bench.scratch + 0x200, rcx=5)
    counts = []
    while bench.step() == 0:
        counts.append(bench.dbg.registers.rcx)
    assert counts == [4, 3, 2, 1]
    assert (bench.dbg.registers.rcx, bench.dbg.registers.rip) == (0, bench.arena + len(bytes.fromhex(code)))


def test_step_over_a_repeated_compare_ends_at_the_difference(bench: Bench) -> None:
    bench.dbg.memory.write(bench.scratch, b"abcd" + bytes(60) + b"abXd")
    bench.put("f3a6 90", rsi=bench.scratch, rdi=bench.scratch + 64, rcx=4)
    while bench.step() == 0:
        pass
    assert (bench.dbg.registers.rip - bench.arena, bench.dbg.registers.rcx) == (2, 1)


def test_step_over_syscall_and_sysret_goes_to_the_entry_and_back(bench: Bench, cpu_kind: str) -> None:
    bench.put("0f05 90 90")
    entry = bench.dbg.symbol("syscall_entry") - bench.arena
    assert bench.step() == entry
    assert (bench.dbg.registers.rcx, bench.dbg.registers.r11 & TF, bench.flags & TF) == (bench.arena + 2, 0, 0)
    assert [bench.step(), bench.step()] == [entry + 1, entry + 2]
    if cpu_kind == "PVM":
        return  # Its emulator has no SYSRET: #UD.
    assert bench.step() == 2
    assert (bench.dbg.registers.cs & 3, bench.flags & TF) == (3, 0)
    assert bench.step() == 3


@pytest.mark.parametrize("code", OFTEN_LEFT.values(), ids=OFTEN_LEFT.keys())
def test_step_over_what_some_hypervisors_leave_unexecuted_ends_behind_it(bench: Bench, code: str) -> None:
    bench.put(code + "90 90 90", rsi=bench.scratch, rax=bench.scratch)
    length = len(bytes.fromhex(code))
    assert [bench.step(), bench.step()] == [length, length + 1]


def test_run_through_what_some_hypervisors_leave_unexecuted_does_all_of_it(bench: Bench) -> None:
    bench.dbg.memory.write(bench.scratch, struct.pack("<QQ", 0x10, 6))
    # cmpxchg16b [rsi]; lar ecx, eax; swapgs; swapgs; int 0x80; nop; nop
    bench.put("480fc70e 0f02c8 0f01f8 0f01f8 cd80 90 90", rsi=bench.scratch, rax=0x10, rdx=6, rbx=7, rcx=8)
    bench.dbg.breakpoint(bench.arena + 16, temporary=True)

    stop = bench.dbg.cont(timeout=LIMIT)

    assert (stop.reason, stop.pc - bench.arena) == ("breakpoint", 16), stop
    assert struct.unpack("<QQ", bench.dbg.memory.read(bench.scratch, 16)) == (7, 8)
    assert bench.word("seen", 0x80) == 1


def test_step_over_pause_and_rdtsc_ends_behind_them_with_a_time_that_grows(bench: Bench) -> None:
    bench.put("f390 0f31 0f31 90", rax=0, rdx=0)
    times = []
    assert bench.step() == 2
    for end in (4, 6):
        assert bench.step() == end
        times.append(bench.dbg.registers.rdx << 32 | bench.dbg.registers.rax)
    assert times[0] < times[1]
    assert [bench.step(), bench.flags & TF] == [7, 0]


def test_step_over_wrmsr_rdmsr_and_cpuid_ends_behind_them_with_what_they_do(bench: Bench) -> None:
    value = bench.dbg.symbol("ready")
    low, high = value & 0xFFFF_FFFF, value >> 32
    bench.put("0f30 31c0 0f32 31c0 0fa2 90", rcx=0xC000_0082, rax=low, rdx=high)
    assert [bench.step(), bench.step(), bench.step()] == [2, 4, 6]
    assert (bench.dbg.registers.rax, bench.dbg.registers.rdx) == (low, high)
    assert [bench.step(), bench.step(), bench.flags & TF] == [8, 10, 0]
    assert bench.dbg.registers.rbx != 0, "the maker's name"


def test_step_over_wrmsr_of_a_register_that_is_not_there_enters_the_handler(bench: Bench) -> None:
    bench.put("0f30 90", rcx=0x4BAD_0000, rax=0, rdx=0)
    assert bench.step() == bench.handler(13)
    assert (bench.stack(1), (bench.stack(3) | bench.flags) & TF) == (bench.arena, 0)


def test_step_over_a_port_instruction_ends_behind_it_with_what_was_read(bench: Bench) -> None:
    bench.put("66baf80c ed e681 90", rax=0x55)  # mov dx, 0xcf8 + …: PCI's address port; out 0x81, al
    assert [bench.step(), bench.step()] == [4, 5]
    assert bench.step() == 7
    assert bench.flags & TF == 0


def test_step_over_an_access_to_a_device_ends_behind_it(bench: Bench) -> None:
    table = page_table_entry(bench.dbg, bench.scratch)
    # The scratch page now leads to where a firmware's table would be, which reads as 0 and is no RAM.
    bench.dbg.memory.physical.write(table, struct.pack("<Q", 0xF_0000 | 7))
    bench.put("0f20d8 0f22d8 8b03 90", rbx=bench.scratch, rax=0x1234)
    assert [bench.step(), bench.step(), bench.step()] == [3, 6, 8]
    assert bench.step() == 9


def page_table_entry(dbg: Debugger, address: int) -> int:
    """Guest-physical address of the lowest entry that maps an address."""
    table = dbg.registers.cr3 & ~0xFFF
    for shift in (39, 30, 21):
        [entry] = struct.unpack("<Q", dbg.memory.physical.read(table + 8 * (address >> shift & 511), 8))
        table = entry & 0xF_FFFF_FFFF_F000
    return table + 8 * (address >> 12 & 511)


@pytest.mark.parametrize(
    ("code", "vector", "error", "registers"),
    [
        ("0f0b", 6, False, {}),
        ("48f7f1", 0, False, {"rcx": 0, "rdx": 0}),
        ("488b03", 14, True, {"rbx": 0x5000_0000_0000}),
        ("488903", 14, True, {"rbx": 0x5000_0000_0000}),
        ("488b03", 13, True, {"rbx": 0x1234_0000_0000_0000}),
        ("ffe3", 14, True, {"rbx": 0x5000_0000_0000}),
        ("0f22c0", 13, True, {"rax": 1 << 40}),
        ("8ed8", 13, True, {"rax": 0x1230}),
    ],
    ids=["ud2", "div", "load", "store", "noncanonical", "jump", "control", "segment"],
)
def test_step_over_a_faulting_instruction_enters_the_handler_with_a_frame_of_its_own(
    bench: Bench, code: str, vector: int, error: bool, registers: dict[str, Any]
) -> None:
    bench.put(code + "90", **registers)
    end = bench.step()
    if code == "ffe3":
        # The jump itself does not fault, what is there does.
        assert end + bench.arena == 0x5000_0000_0000
        end = bench.step()
    assert end == bench.handler(vector)
    frame = 1 if error else 0
    assert bench.stack(frame) == registers.get("rbx", 0) if code == "ffe3" else bench.stack(frame) == bench.arena
    assert (bench.stack(frame + 2) | bench.flags) & TF == 0


def test_guest_goes_on_after_a_step_into_a_faults_handler(bench: Bench) -> None:
    bench.put("0f0b 90 90 90")
    bench.dbg.memory.write_u64(bench.dbg.symbol("resume_at"), bench.arena + 2)
    assert bench.step() == bench.handler(6)
    bench.dbg.breakpoint(bench.arena + 3, temporary=True)
    assert bench.dbg.cont(timeout=LIMIT).pc == bench.arena + 3
    assert (bench.word("seen", 6), bench.word("seen", 1), bench.word("frame_rflags") & TF) == (1, 0, 0)


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("code", ["9c", "fb", "90", "f3a4", "0f0b"], ids=["pushf", "sti", "nop", "movsb", "ud2"])
def test_step_at_a_breakpoint_executes_what_is_under_it(bench: Bench, code: str, hardware: bool) -> None:
    bench.put(code + "90", rsi=bench.scratch, rdi=bench.scratch + 0x100, rcx=1)
    breakpoint_ = bench.dbg.breakpoint(bench.arena, hardware=hardware)
    stop = bench.dbg.step(timeout=LIMIT)
    if stop.reason == "breakpoint":
        # It was never asked here: that is the first thing to do.
        assert (stop.pc, breakpoint_.reached) == (bench.arena, 1)
        bench.step()
    end = bench.dbg.registers.rip - bench.arena
    assert end == bench.handler(6) if code == "0f0b" else end == len(bytes.fromhex(code))
    if code == "9c":
        assert bench.stack(0) & TF == 0
    assert breakpoint_.reached == 1


def test_step_over_hlt_ends_behind_it(bench: Bench) -> None:
    bench.put("f4 90")
    stop = bench.dbg.step(timeout=2)
    assert stop.reason in ("step", "timeout")
    assert bench.dbg.registers.rip == bench.arena + 1


def test_segment_registers_keep_their_attributes_through_writes_and_steps(bench: Bench) -> None:
    registers = bench.dbg.registers
    segments, fields = ("cs", "ss", "ds", "es", "fs", "gs", "tr"), ("", "_attributes", "_limit")
    names = [f"{segment}{field}" for segment in segments for field in fields]
    before = {name: getattr(registers, name) for name in names}
    bench.put("90 90")
    registers.fs_base, registers.gs_base = 0x1111_0000, 0xFFFF_8000_0000_0000
    assert bench.step() == 1
    assert {name: getattr(registers, name) for name in names} == before
    assert (registers.fs_base, registers.gs_base) == (0x1111_0000, 0xFFFF_8000_0000_0000)
