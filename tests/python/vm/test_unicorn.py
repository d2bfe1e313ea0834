"""The software CPU beside Unicorn, another emulator: random sequences of instructions on random states, with registers,
flags and memory compared afterwards. Both execute the same bytes: code that loads a state from memory, the sequence,
and code that stores the state. ``UHYVE_UNICORN`` is the number of sequences.

Flags that the manuals leave undefined are cleared after the instruction. MXCSR is not compared: Unicorn does not set
its flags. Unicorn is no dependency; where it is missing, the test is skipped, or fails if ``UHYVE_REQUIRE_UNICORN``
is 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest

from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LIMIT = 60
SEQUENCES = int(os.environ.get("UHYVE_UNICORN", "300"))
LENGTH = 12
# From the first address of the 2 MiB page that the guest stands in.
CODE, STATE, DATA, STACK = 0x10_0000, 0x14_0000, 0x15_0000, 0x16_0000
SIZE = 0x1000
# The state in memory: general registers by number, flags, and at 256 the vector registers.
FLAGS_AT, VECTORS_AT = 128, 256
RSP, RBX = 4, 3
REGISTERS = [n for n in range(16) if n not in (RSP, RBX)]
CF, PF, AF, ZF, SF, OF = 1, 4, 16, 64, 128, 2048
ARITHMETIC = CF | PF | AF | ZF | SF | OF
CR4_OF_SSE = 0x620
INTERESTING = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    1 << 31,
    (1 << 31) - 1,
    1 << 63,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
# Second bytes of instructions with prefix 66 on two vector registers, or one and memory.
SSE2 = bytes.fromhex(
    "606162636465666768696a6b6c6d747576 d1d2d3d4d5d8d9dadbdcdddedf e0e1e2e3e4e5e8e9eaebecedeeef"
    "f1f2f3f4f5f6f8f9fafbfcfdfe 1415545556572829106f"
)
# Third bytes of those with 66 0F 38.
SSE4 = bytes.fromhex("000102030405060708090a0b1c1d1e 202122232425 282930313233343537 38393a3b3c3d3e3f4041 101415 17")
# Shifts of vectors by an immediate: second byte and number in ModRM.
SHIFTS = [(0x71, n) for n in (2, 4, 6)] + [(0x72, n) for n in (2, 4, 6)] + [(0x73, n) for n in (2, 3, 6, 7)]
HORIZONTAL = bytes.fromhex("010203050607")
# Square root, conversions, minimum, maximum. Not arithmetic: of two NaNs, Unicorn takes another one than SSE does.
FLOATS = bytes.fromhex("515a5d5f")


class Writer:
    """Writes random instructions. RBX points to data, RSP to a stack; both stay as they are."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def number(self, bits: int) -> int:
        draw = self.draw
        value = draw.choice(INTERESTING) if draw.random() < 0.4 else draw.getrandbits(64)
        return value & ((1 << bits) - 1)

    def modrm(self, register: int, *, vector: bool = False, memory: float = 0.3) -> tuple[int, bytes]:
        """REX bits, and ModRM with what follows, for a register operand and another or memory."""
        if self.draw.random() < memory:
            displacement = 16 * self.draw.randrange(200)
            return (register >> 3) << 2, bytes([0x80 | (register & 7) << 3 | RBX]) + struct.pack("<i", displacement)
        other = self.draw.randrange(8) if vector else self.draw.choice(REGISTERS)
        return (register >> 3) << 2 | other >> 3, bytes([0xC0 | (register & 7) << 3 | other & 7])

    def general(self, opcode: bytes, group: int | None = None, *, sizes: str = "248", memory: float = 0.3) -> bytes:
        """An instruction on general registers of a random size."""
        register = self.draw.choice(REGISTERS) if group is None else group
        rex, rest = self.modrm(register, memory=memory)
        size = self.draw.choice(sizes)
        prefix = b"\x66" if size == "2" else b""
        mandatory = opcode[:1] if opcode[0] in (0xF2, 0xF3) else b""
        return prefix + mandatory + bytes([0x40 | rex | (8 if size == "8" else 0)]) + opcode[len(mandatory) :] + rest

    def arithmetic(self) -> tuple[bytes, int]:
        number = self.draw.randrange(8)
        undefined = AF if number in (1, 4, 6) else 0
        opcode = 8 * number
        match self.draw.randrange(5):
            case 0:
                return self.general(bytes([opcode + self.draw.choice([1, 3])])), undefined
            case 1:
                return self.general(bytes([opcode + self.draw.choice([0, 2])]), sizes="4"), undefined
            case 2:
                return self.general(b"\x83", number) + bytes([self.number(8)]), undefined
            case 3:
                return self.general(b"\x81", number, sizes="48") + struct.pack("<I", self.number(32)), undefined
            case _:
                return self.general(b"\x80", number, sizes="4") + bytes([self.number(8)]), undefined

    def single(self) -> tuple[bytes, int]:
        products = SF | ZF | AF | PF
        match self.draw.randrange(6):
            case 0:
                return self.general(b"\xf7", self.draw.choice([2, 3])), 0
            case 1:
                return self.general(b"\xff", self.draw.choice([0, 1])), 0
            case 2:
                return self.general(b"\xf7", self.draw.choice([4, 5])), products
            case 3:
                return self.general(b"\x0f\xaf"), products
            case 4:
                return self.general(b"\x6b") + bytes([self.number(8)]), products
            case _:
                # CMPXCHG that fails clears the upper half of a 32-bit destination in Unicorn, not in a CPU.
                opcode, sizes = self.draw.choice(
                    [(b"\x85", "248"), (b"\x87", "248"), (b"\x0f\xc1", "248"), (b"\x0f\xb1", "28")]
                )
                return self.general(opcode, sizes=sizes), AF

    def shift(self) -> tuple[bytes, int]:
        kind = self.draw.choice([0, 1, 2, 3, 4, 5, 7])
        match self.draw.randrange(4):
            case 0:
                return self.general(b"\xc1", kind, sizes="48") + bytes([self.number(8)]), AF | OF
            case 1:
                return self.general(b"\xd1", kind), AF
            case 2:
                return self.general(b"\xd3", kind, sizes="48"), AF | OF
            case _:
                opcode = self.draw.choice([b"\x0f\xa4", b"\x0f\xac"])
                return self.general(opcode, sizes="48") + bytes([self.number(8)]), AF | OF

    def bits(self) -> tuple[bytes, int]:
        draw = self.draw
        match draw.randrange(6):
            case 0:
                opcode = draw.choice([b"\x0f\xa3", b"\x0f\xab", b"\x0f\xb3", b"\x0f\xbb"])
                return self.general(opcode, memory=0), OF | SF | AF | PF
            case 1:
                return self.general(b"\x0f\xba", draw.choice([4, 5, 6, 7])) + bytes([self.number(8)]), OF | SF | AF | PF
            case 2:
                # Of zero, the destination is undefined, and the upper half of a 32-bit one differs.
                return self.general(draw.choice([b"\x0f\xbc", b"\x0f\xbd"]), sizes="28"), CF | OF | SF | AF | PF
            case 3:
                return self.general(b"\xf3\x0f\xb8"), 0
            case 4:
                register = draw.choice(REGISTERS)
                return bytes([0x48 | register >> 3, 0x0F, 0xC8 | register & 7]), 0
            case _:
                return self.general(b"\xf2\x0f\x38\xf1", sizes="48"), 0

    def move(self) -> tuple[bytes, int]:
        draw = self.draw
        condition = draw.randrange(16)
        match draw.randrange(8):
            case 0:
                return self.general(bytes([0x0F, draw.choice([0xB6, 0xB7, 0xBE, 0xBF])])), 0
            case 1:
                return self.general(bytes([0x0F, 0x90 | condition]), 0, sizes="4"), 0
            case 2:
                return self.general(bytes([0x0F, 0x40 | condition])), 0
            case 3:
                return self.general(bytes([draw.choice([0x89, 0x8B])])), 0
            case 4:
                return self.general(b"\x63", sizes="8"), 0
            case 5:
                return draw.choice(
                    [b"\x98", b"\x99", b"\x66\x98", b"\x48\x98", b"\x48\x99", b"\x9e", b"\x9f", b"\xf9", b"\xf5"]
                ), 0
            case 6:
                # LEA with an index.
                register, base, index = (draw.choice(REGISTERS) for _ in range(3))
                rex = 0x48 | (register >> 3) << 2 | (index >> 3) << 1 | base >> 3
                sib = draw.randrange(4) << 6 | (index & 7) << 3 | base & 7
                return bytes([rex, 0x8D, 0x44 | (register & 7) << 3, sib, draw.getrandbits(8)]), 0
            case _:
                push, pop = draw.choice(REGISTERS), draw.choice(REGISTERS)
                return bytes([0x40 | push >> 3, 0x50 | push & 7, 0x40 | pop >> 3, 0x58 | pop & 7]), 0

    def vector(self) -> tuple[bytes, int]:
        draw = self.draw
        register = draw.randrange(8)
        rest = self.modrm(register, vector=True)[1]
        match draw.randrange(7):
            case 0 | 1:
                return b"\x66\x0f" + bytes([draw.choice(SSE2)]) + rest, 0
            case 2:
                opcode = draw.choice(SSE4)
                if opcode in HORIZONTAL and rest[0] == 0xC0 | register << 3 | register:
                    # Unicorn reads the source when it has written the half of it.
                    opcode = 0
                return b"\x66\x0f\x38" + bytes([opcode]) + rest, 0
            case 3:
                prefix = draw.choice([b"\x66", b"\xf2", b"\xf3"])
                return prefix + b"\x0f\x70" + rest + bytes([draw.getrandbits(8)]), 0
            case 4:
                opcode, kind = draw.choice(SHIFTS)
                return bytes([0x66, 0x0F, opcode, 0xC0 | kind << 3 | register, self.number(8)]), 0
            case 5:
                prefix = draw.choice([b"", b"\x66", b"\xf2", b"\xf3"])
                return prefix + b"\x0f" + bytes([draw.choice(FLOATS)]) + rest, 0
            case _:
                general = draw.randrange(8) | 8
                opcode = draw.choice([0x6E, 0x7E])
                return bytes([0x66, 0x49, 0x0F, opcode, 0xC0 | register << 3 | general & 7]), 0

    def macro(self) -> tuple[bytes, int]:
        """Division without a fault, and repeated strings."""
        draw = self.draw
        if draw.random() < 0.5:
            # xor edx, edx; or rcx, 1; div rcx
            return bytes.fromhex("31d2 4883c901 48f7f1"), ARITHMETIC
        opcode = draw.choice([0xA4, 0xA5, 0xAA, 0xAB])
        source, target = draw.randrange(0x600), draw.randrange(0x600)
        # mov ecx, count; lea rsi, [rbx + source]; lea rdi, [rbx + target]; rep movs or stos
        load = b"\xb9" + struct.pack("<I", draw.randrange(40))
        load += b"\x48\x8d\xb3" + struct.pack("<i", source) + b"\x48\x8d\xbb" + struct.pack("<i", target)
        return load + bytes([0xF3, opcode]), 0

    def instruction(self) -> bytes:
        makers = [self.arithmetic, self.single, self.shift, self.bits, self.move, self.vector, self.vector]
        code, undefined = self.macro() if self.draw.random() < 0.05 else self.draw.choice(makers)()
        if undefined:
            # pushfq; and dword [rsp], ~undefined; popfq
            code += b"\x9c\x81\x24\x24" + struct.pack("<I", ~undefined & 0xFFFF_FFFF) + b"\x9d"
        return code

    def sequence(self) -> bytes:
        code = b""
        for _ in range(LENGTH):
            instruction = self.instruction()
            if self.draw.random() < 0.1:
                # Jcc over it.
                code += bytes([0x70 | self.draw.randrange(16), len(instruction)])
            code += instruction
        return code

    def content(self, length: int) -> bytes:
        return b"".join(struct.pack("<Q", self.number(64)) for _ in range(length // 8))

    def state(self, base: int) -> bytes:
        general = [self.number(64) for _ in range(16)]
        general[RSP], general[RBX] = base + STACK, base + DATA
        flags = 2 | self.draw.getrandbits(16) & ARITHMETIC
        state = struct.pack("<17Q", *general, flags)
        return state.ljust(VECTORS_AT, b"\0") + self.content(16 * 8)


def framed(sequence: bytes, base: int) -> tuple[bytes, int]:
    """The code around a sequence, and the offset of its end."""
    state = base + STATE

    def absolute(rex: int, opcode: bytes, register: int, at: int, prefix: bytes = b"") -> bytes:
        """With the operand at a 32-bit address."""
        rest = bytes([0x04 | (register & 7) << 3, 0x25]) + struct.pack("<I", at)
        return prefix + bytes([rex | (register >> 3) << 2]) + opcode + rest

    vectors = [(n, state + VECTORS_AT + 16 * n) for n in range(8)]
    load = b"".join(absolute(0x40, b"\x0f\x6f", n, at, b"\xf3") for n, at in vectors)
    # mov rsp, [...]; push [flags]; popfq
    load += absolute(0x48, b"\x8b", RSP, state + 8 * RSP)
    load += b"\xff\x34\x25" + struct.pack("<I", state + FLAGS_AT) + b"\x9d"
    load += b"".join(absolute(0x48, b"\x8b", n, state + 8 * n) for n in range(16) if n != RSP)
    store = b"".join(absolute(0x48, b"\x89", n, state + 8 * n) for n in range(16))
    # pushfq; pop [flags]
    store += b"\x9c\x8f\x04\x25" + struct.pack("<I", state + FLAGS_AT)
    store += b"".join(absolute(0x40, b"\x0f\x7f", n, at, b"\xf3") for n, at in vectors)
    code = load + sequence + store
    return code + b"\xf4", len(code)


class Theirs:
    """Unicorn, with one page of code and RAM at the guest's addresses."""

    def __init__(self, base: int) -> None:
        unicorn: Any = importlib.import_module("unicorn")
        x86: Any = importlib.import_module("unicorn.x86_const")
        self._uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._uc.ctl_set_cpu_model(x86.UC_CPU_X86_HASWELL)
        self._uc.mem_map(base, 1 << 21)
        self._uc.reg_write(x86.UC_X86_REG_CR4, CR4_OF_SSE)
        self._base = base

    def run(self, code: bytes, end: int, state: bytes, data: bytes) -> tuple[bytes, bytes]:
        base = self._base
        for at, content in ((CODE, code), (STATE, state), (DATA, data)):
            self._uc.mem_write(base + at, content)
        self._uc.ctl_remove_cache(base + CODE, base + CODE + SIZE)
        self._uc.emu_start(base + CODE, base + CODE + end)
        return bytes(self._uc.mem_read(base + STATE, len(state))), bytes(self._uc.mem_read(base + DATA, len(data)))


def differences(ours: bytes, theirs: bytes) -> str:
    """What of the states differs, in words."""
    names = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rflags".split()
    words = zip(names, struct.unpack_from("<17Q", ours), struct.unpack_from("<17Q", theirs), strict=True)
    found = [f"{name} {a:#x} here, {b:#x} there" for name, a, b in words if a != b]
    for n in range(8):
        a, b = (state[VECTORS_AT + 16 * n :][:16][::-1].hex() for state in (ours, theirs))
        if a != b:
            found.append(f"xmm{n} {a} here, {b} there")
    return ", ".join(found) or "the data"


@pytest.mark.timeout(600)
def test_random_sequences_leave_the_state_that_unicorn_leaves(guest: Callable[..., Path]) -> None:
    if importlib.util.find_spec("unicorn") is None:
        reason = "unicorn is not installed"
        if os.environ.get("UHYVE_REQUIRE_UNICORN") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with Vm(guest("halt"), backend="soft", memory="16MiB", aslr=False).debug() as dbg:
        base = dbg.registers.rip & -(1 << 21)
        theirs = Theirs(base)
        dbg.registers.cr4 |= CR4_OF_SSE
        for seed in range(SEQUENCES):
            writer = Writer(seed)
            sequence, state, data = writer.sequence(), writer.state(base), writer.content(SIZE)
            code, end = framed(sequence, base)
            for at, content in ((CODE, code), (STATE, state), (DATA, data)):
                dbg.memory.physical.write(base + at, content)
            dbg.registers.rip = base + CODE
            dbg.breakpoint(base + CODE + end, temporary=True)

            stop = dbg.cont(timeout=LIMIT)

            assert (stop.reason, stop.pc) == ("breakpoint", base + CODE + end), f"seed {seed}: {sequence.hex(' ')}"
            ours = dbg.memory.physical.read(base + STATE, len(state)), dbg.memory.physical.read(base + DATA, SIZE)
            expected = theirs.run(code, end, state, data)
            assert ours == expected, f"seed {seed}: {differences(ours[0], expected[0])}\n{sequence.hex(' ')}"
