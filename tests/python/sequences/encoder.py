"""Encodes instructions and collects them in a sequence, with what is known of the flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ALL = CF | PF | AF | ZF | SF | OF

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
# What instructions may change.
FREE = [n for n in range(16) if n not in (RSP, RSI)]
# Bytes of data at RSI. Memory operands are in the first part; the others are not changed, but for a loop's counter.
DATA_SIZE = 512
OPERANDS = 384
# Here are numbers that are finite as singles and as doubles.
FINITE = 400
COUNTER = 496


@dataclass
class Sequence:
    """Machine code, with a text for people of each instruction."""

    code: bytearray = field(default_factory=bytearray)
    names: list[str] = field(default_factory=list)
    undefined: int = 0


class Encoder:
    """Appends instructions to a sequence."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._now = Sequence()

    def _add(self, code: bytes, name: str, reads: int = 0, writes: int = 0, leaves: int = 0) -> None:
        """Appends an instruction that reads and writes these flags and leaves those undefined."""
        now = self._now
        if now.undefined & reads:
            now.code += b"\x48\x83\xfd" + self._draw.randbytes(1)
            now.names.append("cmp rbp")
            now.undefined = 0
        now.code += code
        now.names.append(f"{name} {code.hex()}")
        now.undefined = now.undefined & ~writes | leaves

    def _encode(
        self,
        opcode: bytes,
        reg: int,
        rm: int | None,
        *,
        size: int = 4,
        prefix: bytes = b"",
        align: int = 1,
        tail: bytes = b"",
        is_byte: bool = False,
        vex: tuple[int, int, int] | None = None,
    ) -> bytes:
        """An instruction with a ModRM byte; without ``rm``, its operand is in memory, aligned to ``align`` bytes.

        ``is_byte``: the registers are byte registers. ``vex``: map, prefix and second source of a VEX prefix.
        """
        base, index, modrm = 0, 0, b""
        if rm is not None:
            base = rm >> 3
            modrm = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        else:
            disp = self._draw.randrange(0, OPERANDS - 16) // align * align
            if disp < 128 and self._draw.random() < 0.5:
                modrm = bytes([0x40 | (reg & 7) << 3 | RSI, disp])
            elif self._draw.random() < 0.5:
                modrm = bytes([0x44 | (reg & 7) << 3, 0x26, disp & 0x7F & -align])
            else:
                modrm = bytes([0x80 | (reg & 7) << 3 | RSI]) + disp.to_bytes(4, "little")
        if vex is not None:
            table, pp, source = vex
            first = ((~(reg >> 3) & 1) << 7) | 0x40 | ((~base & 1) << 5) | table
            return bytes([0xC4, first, (size == 8) << 7 | (~source & 15) << 3 | pp]) + opcode + modrm + tail
        rex = (size == 8) << 3 | (reg >> 3) << 2 | index << 1 | base
        narrow = b"\x66" if size == 2 else b""
        address = b"\x67" if rm is None and self._draw.random() < 0.1 else b""
        is_forced = is_byte and any(4 <= n < 8 for n in (reg, rm or 0)) and self._draw.random() < 0.5
        # With REX, 4 and 6 are SPL and SIL, which are not ours.
        is_forced = is_forced and not any(n in (RSP, RSI) for n in (reg, rm or 0))
        return address + narrow + prefix + (bytes([0x40 | rex]) if rex or is_forced else b"") + opcode + modrm + tail

    def _register(self, size: int = 8) -> int:
        """A register to change; of bytes AH to BH too, which have the numbers 4 to 7 where there is no REX."""
        return self._draw.randrange(8) if size == 1 and self._draw.random() < 0.5 else self._draw.choice(FREE)

    def _pair(self, size: int) -> tuple[int, int]:
        """Two registers of one instruction."""
        if size > 1:
            return self._draw.choice(FREE), self._draw.choice(FREE)
        if self._draw.random() < 0.5:
            return self._draw.randrange(8), self._draw.randrange(8)
        return self._draw.choice(FREE), self._draw.choice(FREE)

    def _size(self, *sizes: int) -> int:
        return self._draw.choice(sizes or (1, 2, 4, 4, 8, 8))

    def _modrm(self, opcode: int | bytes, size: int, name: str, *, digit: int | None = None, **flags: int) -> None:
        """``op r/m, r`` and its like, where the opcode for bytes is one less."""
        code = bytes([opcode - (size == 1)]) if isinstance(opcode, int) else opcode
        reg, rm = self._pair(size)
        is_memory = self._draw.random() < 0.35
        if digit is not None:
            reg = digit
        both = self._encode(code, reg, None if is_memory else rm, size=size, is_byte=size == 1 and digit is None)
        self._add(both, name, **flags)

    def _number(self, size: int) -> bytes:
        """An immediate of that size, often at a boundary; 4 bytes for 8."""
        size = min(size, 4)
        value = self._draw.choice(
            [0, 1, -1, 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1, self._draw.getrandbits(32)]
        )
        return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
