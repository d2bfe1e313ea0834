"""The software CPU beside Unicorn: random sequences of instructions on random and boundary state, on both.

Fixed code loads the state from memory, runs the sequence and stores the state, so that what is compared is memory. The
reference for instructions is the host's own CPU, in Rust's tests; this is a second opinion, by other people, on what
instructions do to one another in blocks. Unicorn 2 has no AVX. ``UHYVE_UNICORN_RUNS`` is the number of sequences,
``UHYVE_UNICORN_SEED`` the first one's seed.
"""

from __future__ import annotations

import os
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest

from sequences.encoder import ALL, COUNTER, DATA_SIZE, FINITE, Sequence
from sequences.generator import Generator
from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from uhyve import Debugger

RUNS = int(os.environ.get("UHYVE_UNICORN_RUNS", "400"))
SEED = int(os.environ.get("UHYVE_UNICORN_SEED", "1"))
LENGTH = 24

# Everything is in one page of 2 MiB: code that loads state, the sequence, code that stores state, state.
PAGE = 2 << 20
PLACE = 8 * PAGE
LOAD, STORE, STATE, BODIES = PLACE, PLACE + 0x400, PLACE + 0x1000, PLACE + 0x10_0000
# Each sequence has a place of its own, so that nothing is left of one that was translated before.
BODY_SIZE = 0x800
PLACES = 512

# Of the state: general registers, flags, MXCSR, XMM registers, data, stack.
FLAGS, MXCSR, VECTORS, TARGET, DATA, STACK = 128, 136, 144, 400, 512, 1024
STATE_SIZE = STACK + 256
BOUNDARIES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63]
FLOATS = [0.0, -0.0, 1.0, -1.5, 2.0**31, -(2.0**63), 3.0e38, 1.0e-30, float("inf"), float("-inf")]


def _at(prefix: bytes, opcode: bytes, reg: int, address: int) -> bytes:
    """``op reg, [address]``, with a 32-bit address."""
    rex = bytes([0x48 | (reg >> 3) << 2]) if not prefix and len(opcode) == 1 else b"\x44" * (reg > 7)
    return prefix + rex + opcode + bytes([0x04 | (reg & 7) << 3, 0x25]) + struct.pack("<I", address)


def load_code() -> bytes:
    """Loads the state and goes to the sequence."""
    vectors = b"".join(_at(b"", b"\x0f\x28", n, STATE + VECTORS + 16 * n) for n in range(16))
    control = _at(b"", b"\x0f\xae", 2, STATE + MXCSR)
    flags = b"\xff\x34\x25" + struct.pack("<I", STATE + FLAGS) + b"\x9d"
    general = b"".join(_at(b"", b"\x8b", n, STATE + 8 * n) for n in range(16))
    go = b"\xff\x24\x25" + struct.pack("<I", STATE + TARGET)
    return vectors + control + _at(b"", b"\x8b", 4, STATE + 8 * 4) + flags + general + go


def store_code() -> bytes:
    """Stores the state, and stops at its end."""
    general = b"".join(_at(b"", b"\x89", n, STATE + 8 * n) for n in range(16))
    # What PUSHFQ has left below the stack may be undefined.
    flags = b"\x9c\x8f\x04\x25" + struct.pack("<I", STATE + FLAGS) + b"\x48\xc7\x44\x24\xf8\0\0\0\0"
    vectors = b"".join(_at(b"", b"\x0f\x29", n, STATE + VECTORS + 16 * n) for n in range(16))
    return general + flags + vectors


END = STORE + len(store_code())


def state(draw: random.Random, address: int) -> bytes:
    """Random and boundary state for a sequence at that address."""

    def number() -> int:
        kind = draw.random()
        if kind < 0.4:
            return (draw.choice(BOUNDARIES) * draw.choice([1, -1])) & (1 << 64) - 1
        return draw.getrandbits(draw.choice([8, 16, 32, 64, 64]))

    def vector() -> bytes:
        kind = draw.randrange(4)
        if kind == 0:
            return struct.pack("<4f", *[draw.choice([draw.choice(FLOATS), draw.uniform(-100, 100)]) for _ in range(4)])
        if kind == 1:
            return struct.pack("<2d", *[draw.choice([draw.choice(FLOATS), draw.uniform(-1e6, 1e6)]) for _ in range(2)])
        return draw.randbytes(16) if kind == 2 else struct.pack("<2Q", number(), number())

    general = [number() for _ in range(16)]
    general[4], general[6] = STATE + STATE_SIZE - 64, STATE + DATA
    flags = 2 | draw.getrandbits(12) & ALL
    mxcsr = 0x1F80 | draw.randrange(4) << 13
    head = struct.pack("<18Q", *general, flags, mxcsr) + b"".join(vector() for _ in range(16))
    data = b"".join(vector() for _ in range(DATA_SIZE // 16))
    finite = b"".join(struct.pack("<f", draw.uniform(-1000, 1000)) for _ in range((COUNTER - FINITE) // 4))
    data = data[:FINITE] + finite + data[COUNTER:]
    return (head + struct.pack("<Q", address)).ljust(DATA, b"\0") + data + bytes(STATE_SIZE - STACK)


class Ours:
    """The software CPU, in a guest that never runs its own code."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        registers = debugger.registers
        # SSE, and no traps of it.
        registers.cr0 = registers.cr0 & ~0xC | 2
        registers.cr4 |= 0x600
        # A page in the middle of RAM, and its tables in the one behind it: present and writable, the last one of 2 MiB.
        page = (registers.cr3 + 16 * PAGE) & -PAGE
        tables = page + PAGE
        for at, entry in [(0, tables + 0x1003), (0x1000, tables + 0x2003), (0x2000 + 8 * (PLACE // PAGE), page | 0x83)]:
            debugger.memory.physical.write_u64(tables + at, entry)
        registers.cr3 = tables
        debugger.memory.write(LOAD, load_code())
        debugger.memory.write(STORE, store_code() + b"\xf4")
        debugger.breakpoint(END)

    def run(self, code: bytes, before: bytes, is_stepped: bool = False) -> bytes:
        debugger = self._debugger
        debugger.memory.write(place(before), code)
        debugger.memory.write(STATE, before)
        debugger.registers.rip = LOAD
        debugger.registers.rflags = 2
        if is_stepped:
            debugger.step(20)
            while debugger.registers.rip != END:
                debugger.step()
        else:
            stop = debugger.cont(timeout=30)
            assert debugger.registers.rip == END, stop
        return debugger.memory.read(STATE, STATE_SIZE)


class Theirs:
    """Unicorn."""

    def __init__(self, unicorn: Any) -> None:
        self._unicorn = unicorn
        self._start()

    def _start(self) -> None:
        unicorn = self._unicorn
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        # One with BMI, ADX and AES.
        self._uc.ctl_set_cpu_model(unicorn.x86_const.UC_CPU_X86_BROADWELL)
        self._uc.mem_map(PLACE, PAGE)
        self._uc.mem_write(LOAD, load_code())
        self._uc.mem_write(STORE, store_code() + b"\xf4")

    def run(self, code: bytes, before: bytes) -> bytes:
        if place(before) == BODIES:
            self._start()
        self._uc.mem_write(place(before), code)
        self._uc.mem_write(STATE, before)
        # They may have any bits set, the trap flag too: see `differences`.
        self._uc.reg_write(self._unicorn.x86_const.UC_X86_REG_EFLAGS, 2)
        self._uc.emu_start(LOAD, END)
        return bytes(self._uc.mem_read(STATE, STATE_SIZE))


def place(before: bytes) -> int:
    """Where the sequence is, as this state has it."""
    address: int = struct.unpack_from("<Q", before, TARGET)[0]
    return address


def body(sequence: Sequence, address: int) -> bytes:
    """The sequence for that address, and a jump to what stores the state."""
    code = bytes(sequence.code)
    assert len(code) < BODY_SIZE - 5
    return code + b"\xe9" + struct.pack("<i", STORE - address - len(code) - 5)


def differences(sequence: Sequence, ours: bytes, theirs: bytes) -> list[str]:
    """What differs between two states, but for undefined flags."""
    found = []
    (our_flags,), (their_flags,) = (struct.unpack_from("<Q", s, FLAGS) for s in (ours, theirs))
    # Unicorn shows other bits than arithmetic flags at random after ADC, BTR and CMPXCHG8B.
    mask = ALL & ~sequence.undefined
    if (our_flags ^ their_flags) & mask:
        found.append(f"flags {our_flags & mask:#x} {their_flags & mask:#x}")
    for at in range(0, STATE_SIZE, 8):
        mine, other = ours[at : at + 8], theirs[at : at + 8]
        if at in (FLAGS, MXCSR) or mine == other:
            continue
        name = (
            f"register {at // 8}" if at < FLAGS else f"xmm{(at - VECTORS) // 16}" if VECTORS <= at < 400 else "memory"
        )
        found.append(f"{name} at {at:#x}: {mine[::-1].hex()} {other[::-1].hex()}")
    return found


@pytest.fixture
def ours(guest: Callable[..., Path]) -> Iterator[Ours]:
    with Vm(guest("hello"), backend="soft", memory="64M").debug() as debugger:
        yield Ours(debugger)


def test_random_sequences_of_instructions_agree_with_unicorn(ours: Ours, unicorn: Any) -> None:
    theirs = Theirs(unicorn)
    instructions = 0
    for seed in range(SEED, SEED + RUNS):
        draw = random.Random(seed)
        sequence = Generator(draw).sequence(draw.randint(1, LENGTH))
        address = BODIES + BODY_SIZE * ((seed - SEED) % PLACES)
        before, code = state(draw, address), body(sequence, address)

        mine = ours.run(code, before, is_stepped=seed % 16 == 0)
        other = theirs.run(code, before)

        found = differences(sequence, mine, other)
        text = "\n".join([f"seed {seed}, ours and Unicorn's:", *found, "after", *sequence.names])
        assert not found, text
        instructions += len(sequence.names)
    print(f"{RUNS} sequences with {instructions} instructions agree")
