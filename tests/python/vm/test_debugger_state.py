"""Registers and memory of stopped vCPUs: what they show, that they can be changed, and that the guest sees it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest

from uhyve import Debugger, GuestFaultError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.vm

LIMIT = 30
CPUS = pytest.mark.parametrize("cpus", [1, 2, 4])
GENERAL = (*("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"), *(f"r{n}" for n in range(8, 16)))
VALUE = 0x1122_3344_5566_7788
WINDOW = 0x5000_0000_1000
TABLES = 0x5000_0000_3000


def write_ones(n: int) -> int:
    """A value that differs in every vCPU and register."""
    return (VALUE * (n + 1)) & (2**64 - 1)


def execute(dbg: Debugger, code: bytes, vcpu: int = 0) -> None:
    """Makes a vCPU execute one instruction of the test's own, in place of the one where it stands."""
    registers, memory = dbg.vcpus[vcpu].registers, dbg.vcpus[vcpu].memory
    pc = registers.rip
    covered = memory.read(pc, len(code))
    memory.write(pc, code)
    stop = dbg.step(vcpu=vcpu, timeout=LIMIT)
    assert (stop.reason, stop.vcpu, stop.pc) == ("step", vcpu, pc + len(code))
    memory.write(pc, covered)
    registers.rip = pc


@pytest.fixture
def loop(guest: Callable[..., Path]) -> Path:
    return guest("loop", defines=["COUNT=10"])


# General registers.


@CPUS
def test_general_registers_written_on_every_vcpu_are_read_back_and_independent(
    guest: Callable[..., Path], cpus: int
) -> None:
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        for vcpu in dbg.vcpus:
            for n, name in enumerate(GENERAL):
                setattr(vcpu.registers, name, write_ones(16 * vcpu.number + n))

        for vcpu in dbg.vcpus:
            expected = {name: write_ones(16 * vcpu.number + n) for n, name in enumerate(GENERAL)}
            assert {name: getattr(vcpu.registers, name) for name in GENERAL} == expected
            assert vcpu.registers.to_dict().items() >= expected.items()
            assert vcpu.registers.sp == expected["rsp"]


@CPUS
@pytest.mark.parametrize("name", [name for name in GENERAL if name != "rsp"])
def test_general_register_that_is_written_is_what_the_guest_computes_with(
    guest: Callable[..., Path], name: str, cpus: int
) -> None:
    number = GENERAL.index(name)
    # mov rax, <register>
    code = bytes([0x48 | (number >> 3) << 2, 0x89, 0xC0 | (number & 7) << 3])
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        for vcpu in dbg.vcpus:
            setattr(vcpu.registers, name, write_ones(vcpu.number))
            execute(dbg, code, vcpu.number)
            assert vcpu.registers.rax == write_ones(vcpu.number)


def test_arguments_changed_at_a_stop_change_what_the_guest_prints(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition="arg0 == 5")
        dbg.cont(timeout=LIMIT)

        dbg.registers.rdi = 1000
        dbg.registers.rsi = 2**64 - 1

        dbg.cont(timeout=LIMIT)
        assert dbg.output == f"calls=10 total={3 * sum(range(10)) - 15 + 999}\n"


def test_rip_changed_at_a_stop_is_where_the_guest_goes_on(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition="arg0 == 5")
        stop = dbg.cont(timeout=LIMIT)

        dbg.registers.rip = dbg.memory.read_u64(dbg.registers.rsp)
        dbg.registers.rsp += 8

        assert dbg.vcpus[0].pc != stop.pc
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert dbg.output == f"calls=9 total={3 * sum(range(10)) - 15}\n"


def test_flags_changed_at_a_stop_decide_a_branch(guest: Callable[..., Path]) -> None:
    with Vm(guest("steps")).debug() as dbg:
        dbg.breakpoint("step_11", temporary=True)
        dbg.cont(timeout=LIMIT)
        assert dbg.registers.rflags & 0x40

        dbg.registers.rflags &= ~0x40
        dbg.step()

        assert dbg.registers.rip == dbg.symbol("step_trap"), "jne is taken without ZF"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rax", 2**64),
        ("rax", -1),
        ("cs", 2**16),
        ("cs_limit", 2**32),
        ("xmm0", 2**128),
        ("ymm0", 2**256),
        ("ymm1", -1),
        ("mxcsr", 2**32),
        ("st0", 2**80),
    ],
)
def test_value_that_does_not_fit_its_register_is_an_overflow(loop: Path, name: str, value: int) -> None:
    with Vm(loop).debug() as dbg:
        before = getattr(dbg.registers, name)

        with pytest.raises(OverflowError, match=name):
            setattr(dbg.registers, name, value)

        assert getattr(dbg.registers, name) == before


@pytest.mark.parametrize("name", ["raxx", "xmm32", "zmm32", "k8", "ymm01", "st8", "xmm01", "r16", "cr1", "fs_", ""])
def test_register_that_does_not_exist_is_an_attribute_error(loop: Path, name: str) -> None:
    with Vm(loop).debug() as dbg:
        with pytest.raises(AttributeError, match="no register"):
            getattr(dbg.registers, name)
        with pytest.raises(AttributeError, match="no register"):
            setattr(dbg.registers, name, 1)


def test_all_registers_are_listed_and_readable(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        listed = {name for name in dir(dbg.registers) if not name.startswith("_")} - {"to_dict"}
        values = dbg.registers.to_dict()

        assert listed == {*values, "pc", "sp"}
        for name in listed:
            assert getattr(dbg.registers, name) >= 0
        assert dbg.registers.pc == values["rip"] == dbg.stop.pc
        assert "rip" in str(dbg.registers).lower()


# Segment, control and model-specific registers.


@CPUS
def test_boot_state_of_every_vcpu_is_long_mode_with_paging(loop: Path, cpus: int) -> None:
    with Vm(loop, cpus=cpus).debug() as dbg:
        for vcpu in dbg.vcpus:
            registers = vcpu.registers
            assert registers.cr0 & 0x8000_0001 == 0x8000_0001
            assert registers.cr4 & 0x20
            assert registers.efer & 0x500 == 0x500
            assert registers.cr3 == dbg.registers.cr3 != 0
            assert registers.cs_attributes & 0x2000, "a 64-bit code segment"
            assert registers.apic_base & 0x800


@CPUS
@pytest.mark.parametrize(("name", "prefix"), [("fs_base", 0x64), ("gs_base", 0x65)])
def test_segment_base_that_is_written_is_where_the_guest_reads(
    guest: Callable[..., Path], name: str, prefix: int, cpus: int
) -> None:
    # mov rax, fs:[8]
    code = bytes([prefix, 0x48, 0x8B, 0x04, 0x25, 8, 0, 0, 0])
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        ticks = dbg.symbol("ticks")
        for n in range(4):
            dbg.memory.write_u64(ticks + 8 * n, 100 + n)
        for vcpu in dbg.vcpus:
            setattr(vcpu.registers, name, ticks + 8 * vcpu.number - 8)
        for vcpu in dbg.vcpus:
            assert getattr(vcpu.registers, name) == ticks + 8 * vcpu.number - 8
            execute(dbg, code, vcpu.number)
            assert vcpu.registers.rax == 100 + vcpu.number


@CPUS
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("cr2", VALUE, b"\x0f\x20\xd0"),
        ("cr8", 5, b"\x44\x0f\x20\xc0"),
    ],
)
def test_control_register_that_is_written_is_what_the_guest_reads(
    guest: Callable[..., Path], name: str, value: int, code: bytes, cpus: int
) -> None:
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        for vcpu in dbg.vcpus:
            setattr(vcpu.registers, name, value + vcpu.number)
        for vcpu in dbg.vcpus:
            assert getattr(vcpu.registers, name) == value + vcpu.number
            execute(dbg, code, vcpu.number)
            assert vcpu.registers.rax == value + vcpu.number


def test_control_register_that_the_guest_writes_is_shown(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.registers.rax = dbg.registers.cr4 | 0x200

        execute(dbg, b"\x0f\x22\xe0")  # mov cr4, rax

        assert dbg.registers.cr4 & 0x200


def test_segment_base_that_is_written_changes_nothing_else(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        registers = dbg.registers
        before = registers.to_dict()

        registers.fs_base = 0x1234_5678_9000
        registers.gs_base = 0x77_0000

        assert registers.to_dict() == before | {"fs_base": 0x1234_5678_9000, "gs_base": 0x77_0000}


def test_kernel_gs_base_that_is_written_is_what_the_guest_reads(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.registers.gs_base = 0x1111_0000
        dbg.registers.kernel_gs_base = 0x12_2222_0000
        dbg.registers.rcx = 0xC000_0102

        execute(dbg, b"\x0f\x32")  # rdmsr

        assert (dbg.registers.rdx, dbg.registers.rax) == (0x12, 0x2222_0000)
        assert (dbg.registers.gs_base, dbg.registers.kernel_gs_base) == (0x1111_0000, 0x12_2222_0000)


def test_descriptor_tables_are_shown_where_the_guest_put_them(guest: Callable[..., Path]) -> None:
    with Vm(guest("faults")).debug() as dbg:
        dbg.breakpoint("on_page_fault", temporary=True)
        dbg.cont(timeout=LIMIT)

        assert dbg.registers.idt_base == dbg.symbol("idt")
        assert dbg.registers.idt_limit == 256 * 16 - 1
        assert dbg.registers.cr2 == 0x5000_0000_1230


@pytest.mark.parametrize(("name", "value"), [("cr0", 0x8000_0000), ("cr4", 1 << 40), ("efer", 1 << 60)])
def test_register_value_that_the_cpu_refuses_is_an_error_and_the_vm_lives(loop: Path, name: str, value: int) -> None:
    with Vm(loop).debug() as dbg:
        before = getattr(dbg.registers, name)

        with pytest.raises(OSError, match=r"KVM_SET_SREGS|set_system_registers"):
            setattr(dbg.registers, name, value)

        assert getattr(dbg.registers, name) == before
        assert dbg.cont(timeout=LIMIT).reason == "exit"


# Vector registers.


@CPUS
def test_vector_registers_written_on_every_vcpu_are_read_back(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp", defines=["COUNT=10"]), cpus=cpus).debug() as dbg:
        value = {(v.number, n): write_ones(16 * v.number + n) << 64 | n for v in dbg.vcpus for n in range(16)}
        for vcpu in dbg.vcpus:
            for n in range(16):
                setattr(vcpu.registers, f"xmm{n}", value[vcpu.number, n])
            vcpu.registers.mxcsr = 0x1F80 | 0x40
            vcpu.registers.st0 = 0x3FFF_8000_0000_0000_0000

        for _ in range(2):
            for vcpu in dbg.vcpus:
                assert [getattr(vcpu.registers, f"xmm{n}") for n in range(16)] == [
                    value[vcpu.number, n] for n in range(16)
                ]
                assert vcpu.registers.mxcsr == 0x1FC0
                assert vcpu.registers.st0 == 0x3FFF_8000_0000_0000_0000
            dbg.breakpoint("tick", temporary=True)
            assert dbg.cont(timeout=LIMIT).reason == "breakpoint"


@CPUS
def test_registers_of_avx_and_avx512_that_a_vcpu_has_are_read_back(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp", defines=["COUNT=10"]), cpus=cpus).debug() as dbg:
        has_avx512 = hasattr(dbg.registers, "zmm0")
        widths = {"zmm": 512, "ymm": 256} if has_avx512 else {"ymm": 256}
        count = 32 if has_avx512 else 16

        for prefix, bits in widths.items():
            value = {(v.number, n): (v.number + 1) << (bits - 8) | (n + 1) for v in dbg.vcpus for n in range(count)}
            for (vcpu, n), number in value.items():
                setattr(dbg.vcpus[vcpu].registers, f"{prefix}{n}", number)
            for (vcpu, n), number in value.items():
                registers = dbg.vcpus[vcpu].registers
                assert getattr(registers, f"{prefix}{n}") == number
                assert getattr(registers, f"xmm{n}") == n + 1
                if prefix == "ymm" and has_avx512:
                    assert getattr(registers, f"zmm{n}") == number | (vcpu + 1) << 504, "what lies above stays"
        if has_avx512:
            for n in range(8):
                setattr(dbg.registers, f"k{n}", 2**64 - 1 - n)
            assert [getattr(dbg.registers, f"k{n}") for n in range(8)] == [2**64 - 1 - n for n in range(8)]
        if hasattr(dbg.registers, "pkru"):
            dbg.registers.pkru = 0x5555_5554
            assert dbg.registers.pkru == 0x5555_5554


def test_registers_of_avx512_are_named_all_or_none(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        names = set(dir(dbg.registers))
        avx512 = {f"{kind}{n}" for kind in ("xmm", "ymm") for n in range(16, 32)}
        avx512 |= {f"zmm{n}" for n in range(32)} | {f"k{n}" for n in range(8)}
        assert names & avx512 in (set(), avx512)


@CPUS
def test_vector_register_that_is_written_is_what_the_guest_stores(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        target = dbg.symbol("ticks") & ~15
        for vcpu in dbg.vcpus:
            vcpu.registers.cr0 = vcpu.registers.cr0 & ~0xC | 2
            vcpu.registers.cr4 |= 0x600
            vcpu.registers.xmm3 = write_ones(vcpu.number) << 64 | vcpu.number
            vcpu.registers.rdi = target + 32
        for vcpu in dbg.vcpus:
            execute(dbg, b"\x0f\x11\x1f", vcpu.number)  # movups [rdi], xmm3
            assert (
                int.from_bytes(dbg.memory.read(target + 32, 16), "little")
                == write_ones(vcpu.number) << 64 | vcpu.number
            )


def test_vector_register_changed_before_sqrtpd_changes_the_result(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=sse"])).debug() as dbg:
        dbg.breakpoint("sse_instruction")
        dbg.cont(timeout=LIMIT)
        assert dbg.registers.xmm1 == 0x4022000000000000_4010000000000000, "9.0 and 4.0"

        dbg.registers.xmm1 = 0x4030000000000000_4039000000000000
        dbg.step(timeout=LIMIT)

        assert dbg.registers.xmm0 == 0x4010000000000000_4014000000000000, "4.0 and 5.0"
        assert dbg.cont(timeout=LIMIT).code == 97, "the guest's own check of the result fails"


def test_vector_register_that_the_guest_loads_is_shown(guest: Callable[..., Path]) -> None:
    with Vm(guest("crash", defines=["KIND=sse"])).debug() as dbg:
        dbg.breakpoint("sse_instruction+4")

        dbg.cont(timeout=LIMIT)

        assert dbg.registers.xmm0 == 0x4008000000000000_4000000000000000, "3.0 and 2.0"


# Memory.


@pytest.fixture
def faults(guest: Callable[..., Path]) -> Path:
    return guest("faults")


def with_window(dbg: Debugger) -> None:
    """Lets the guest map its window: one page at WINDOW, whose neighbours are not mapped."""
    dbg.breakpoint("on_breakpoint", temporary=True)
    assert dbg.cont(timeout=LIMIT).reason == "breakpoint"


def test_memory_across_pages_is_one_piece(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        memory, stacks = dbg.memory, dbg.symbol("stacks")
        edge = (stacks + 0x1FFF) & ~0xFFF
        data = bytes(range(256)) * 48

        memory.write(edge - 100, data)

        assert memory.read(edge - 100, len(data)) == data
        assert memory.read_u64(edge - 4) == int.from_bytes(data[96:104], "little")
        memory.write_u64(edge - 3, VALUE)
        assert memory.read(edge - 3, 8) == VALUE.to_bytes(8, "little")


def test_memory_by_physical_address_is_the_same_memory(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        total = dbg.symbol("total")
        physical = dbg.memory.translate(total)
        assert physical is not None

        dbg.memory.physical.write_u64(physical, VALUE)

        assert dbg.memory.read_u64(total) == VALUE
        assert dbg.memory.physical.physical.read_u64(physical) == VALUE


def test_memory_of_a_page_that_is_mapped_elsewhere_is_translated(faults: Path) -> None:
    with Vm(faults).debug() as dbg:
        assert dbg.memory.translate(WINDOW) is None
        with_window(dbg)

        physical = dbg.memory.translate(WINDOW + 0x230)

        assert physical == dbg.memory.translate(dbg.symbol("page") + 0x230)
        assert dbg.memory.read_u64(WINDOW + 0x230) == 0x1234
        dbg.memory.write_u64(WINDOW + 0x238, VALUE)
        assert dbg.memory.read_u64(dbg.symbol("page") + 0x238) == VALUE


@pytest.mark.parametrize(
    ("start", "length", "first", "left"),
    [
        (WINDOW - 1, 1, WINDOW - 1, 1),
        (WINDOW - 8, 16, WINDOW - 8, 16),
        (WINDOW + 0xFF0, 32, WINDOW + 0x1000, 16),
        (WINDOW + 0x1000, 8, WINDOW + 0x1000, 8),
        (0x1234_0000_0000_0000, 8, 0x1234_0000_0000_0000, 8),
        # The last page is a page table, which maps itself; address 0 follows.
        (2**64 - 4, 8, 0, 4),
    ],
)
def test_memory_that_is_not_mapped_is_a_fault_with_its_first_address(
    faults: Path, start: int, length: int, first: int, left: int
) -> None:
    with Vm(faults, cpus=2).debug() as dbg:
        with_window(dbg)
        page = dbg.memory.read(WINDOW, 0x1000)

        with pytest.raises(GuestFaultError) as reading:
            dbg.memory.read(start, length)
        with pytest.raises(GuestFaultError) as writing:
            dbg.memory.write(start, b"x" * length)

        for caught in (reading, writing):
            assert (caught.value.address, caught.value.length, caught.value.vcpu) == (first, left, 0)
        assert dbg.memory.read(WINDOW, 0x1000) == page, "nothing was written"
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_fault_names_the_vcpu_whose_tables_were_used(faults: Path) -> None:
    with Vm(faults, cpus=2).debug() as dbg, pytest.raises(GuestFaultError) as caught:
        dbg.vcpus[1].memory.read_u8(TABLES)

    assert (caught.value.vcpu, caught.value.address) == (1, TABLES)


@pytest.mark.parametrize("address", [0xFFFF_FFFF_FFFF_FFF0, 0xFEE0_0000, 1 << 45])
def test_physical_memory_outside_of_ram_is_a_fault(loop: Path, address: int) -> None:
    with Vm(loop).debug() as dbg:
        with pytest.raises(GuestFaultError) as caught:
            dbg.memory.physical.read(address, 32)
        assert caught.value.address == address
        with pytest.raises(GuestFaultError):
            dbg.memory.physical.write(address, b"12345678")


@pytest.mark.parametrize("length", [2**40, 2**62])
def test_read_of_more_than_all_memory_is_a_fault_and_allocates_nothing(loop: Path, length: int) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(GuestFaultError):
        dbg.memory.read(dbg.symbol("total"), length)


@pytest.mark.parametrize("length", [-1, 2**64])
def test_read_of_an_impossible_length_is_an_overflow(loop: Path, length: int) -> None:
    with Vm(loop).debug() as dbg, pytest.raises(OverflowError):
        dbg.memory.read(dbg.symbol("total"), length)


def test_memory_of_length_0_is_empty_wherever_it_is(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        assert dbg.memory.read(dbg.symbol("total"), 0) == b""
        dbg.memory.write(dbg.symbol("total"), b"")


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_integers_signed_and_unsigned_are_little_endian(loop: Path, bits: int) -> None:
    with Vm(loop).debug() as dbg:
        memory, at = dbg.memory, dbg.symbol("total")

        def use(name: str, *arguments: int) -> Any:
            return getattr(memory, f"{name}{bits}")(at, *arguments)

        for signed, unsigned in ((-1, 2**bits - 1), (-(2 ** (bits - 1)), 2 ** (bits - 1)), (1, 1), (0x12, 0x12)):
            use("write_i", signed)
            assert (use("read_i"), use("read_u")) == (signed, unsigned)
            use("write_u", unsigned)
            assert (use("read_i"), use("read_u")) == (signed, unsigned)
            assert memory.read(at, bits // 8) == unsigned.to_bytes(bits // 8, "little")
        for name, value in (("write_u", 2**bits), ("write_u", -1), ("write_i", 2 ** (bits - 1))):
            with pytest.raises(OverflowError):
                use(name, value)
        assert use("read_u") == 0x12


def test_integer_write_touches_no_neighbour(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        memory, at = dbg.memory, dbg.symbol("stacks")
        memory.write(at, b"\xaa" * 32)

        memory.write_u16(at + 8, 0)
        memory.write_u8(at + 12, 1)

        assert memory.read(at, 16) == b"\xaa" * 8 + b"\0\0\xaa\xaa\x01" + b"\xaa" * 3


def test_write_of_what_has_a_buffer_writes_all_of_it(loop: Path) -> None:
    numbers = array("I", [1, 2**32 - 1, 3])
    with Vm(loop).debug() as dbg:
        memory, at = dbg.memory, dbg.symbol("stacks")

        memory.write(at, numbers)
        memory.write(at + 12, memoryview(b"a-b-c-")[::2])
        memory.physical.write(memory.translate(at) + 15, bytearray(b"end"))

        assert memory.read(at, 18) == numbers.tobytes() + b"abcend"
        for other in ([1, 2], 5, "text", None):
            with pytest.raises(TypeError, match="bytes-like"):
                memory.write(at, other)


def test_cstring_ends_at_its_nul_its_limit_or_the_end_of_what_is_mapped(faults: Path) -> None:
    with Vm(faults).debug() as dbg:
        with_window(dbg)
        memory = dbg.memory
        end = WINDOW + 0x1000
        memory.write(end - 600, b"a" * 599 + b"\0")

        assert memory.read_cstring(end - 600) == b"a" * 599
        assert memory.read_cstring(end - 600, 10) == b"a" * 10
        assert memory.read_cstring(end - 600, 599) == b"a" * 599
        assert memory.read_cstring(end - 1) == b""
        assert memory.read_cstring(end - 600, 0) == b""
        memory.write_u8(end - 1, ord("b"))
        assert memory.read_cstring(end - 4, 4) == b"aaab"
        with pytest.raises(GuestFaultError) as caught:
            memory.read_cstring(end - 4)
        assert caught.value.address == end


def test_memory_changed_at_a_stop_is_what_the_guest_reads(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.breakpoint("work", condition="arg0 == 9")
        dbg.cont(timeout=LIMIT)

        dbg.memory.write_u64(dbg.symbol("calls"), 99)
        dbg.memory.write_u64(dbg.symbol("total"), 1000)

        dbg.cont(timeout=LIMIT)
        assert dbg.output == "calls=100 total=1027\n"


def test_write_to_code_that_is_read_only_for_the_guest_takes_effect(loop: Path) -> None:
    with Vm(loop).debug() as dbg:
        dbg.memory.write_u8(dbg.symbol("work"), 0xC3)  # ret

        dbg.cont(timeout=LIMIT)

        assert dbg.output == "calls=0 total=0\n"


@pytest.mark.parametrize("memory", ["16MiB", "64MiB", "1GiB"])
def test_last_byte_of_ram_is_readable_and_the_next_is_not(loop: Path, memory: str) -> None:
    with Vm(loop, memory=memory).debug() as dbg:
        start, size = dbg._machine.ram
        physical = dbg.memory.physical

        physical.write_u8(start + size - 1, 0x5A)

        assert physical.read(start + size - 2, 2)[1] == 0x5A
        with pytest.raises(GuestFaultError):
            physical.read(start + size - 1, 2)
        with pytest.raises(GuestFaultError):
            physical.read_u8(start + size)


@CPUS
def test_every_vcpu_sees_the_same_memory(guest: Callable[..., Path], cpus: int) -> None:
    with Vm(guest("smp"), cpus=cpus).debug() as dbg:
        at = dbg.symbol("finished")
        for vcpu in dbg.vcpus:
            vcpu.memory.write_u64(at, vcpu.number + 10)
            assert [other.memory.read_u64(at) for other in dbg.vcpus] == [vcpu.number + 10] * cpus
