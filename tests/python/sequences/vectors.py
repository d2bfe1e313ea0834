"""Instructions on XMM and x87 registers."""

from __future__ import annotations

import struct

from sequences.encoder import ALL, COUNTER, FINITE, Encoder

# Vector instructions `op xmm, xmm/m128` by prefix and opcode. RCPPS and RSQRTPS are not among them: each maker of
# processors has its own approximation.
VECTORS = {
    "integer": "66 0f: 60 61 62 63 64 65 66 67 68 69 6a 6b 6c 6d 74 75 76 d1 d2 d3 d4 d5 d8 d9 da db dc dd de df e0 e1"
    " e2 e3 e4 e5 e8 e9 ea eb ec ed ee ef f1 f2 f3 f4 f5 f6 f8 f9 fa fb fc fd fe",
    "SSSE3 and SSE4": "66 0f38: 00 01 02 03 04 05 06 07 08 09 0a 0b 10 14 15 1c 1d 1e 20 21 22 23 24 25 28 29 2b 30 31"
    " 32 33 34 35 37 38 39 3a 3b 3c 3d 3e 3f 40 41",
    "moves": "66 0f: 28 6f 14 15",
    "single moves": " 0f: 10 28 14 15",
    "repeating moves": "f3 0f: 12 16 6f",
    "logic": "66 0f: 54 55 56 57",
    "logic of single": " 0f: 54 55 56 57",
    "AES": "66 0f38: db dc dd de df",
}
# The same of floating point, without HADDPS and its like: of two numbers that are NaN, Unicorn takes the other one.
FLOATS = {
    "packed single": " 0f: 51 58 59 5c 5d 5e 5f 5b",
    "packed double": "66 0f: 51 58 59 5c 5d 5e 5f 5a 5b e6 d0",
    "scalar single": "f3 0f: 51 58 59 5c 5d 5e 5f 5a 5b e6",
    "scalar double": "f2 0f: 51 58 59 5c 5d 5e 5f 5a e6 d0",
}
# Those that Unicorn gets wrong where both operands are one register.
HORIZONTAL = [b"\x0f\x38" + bytes([n]) for n in (1, 2, 3, 5, 6, 7)]
# The same with an immediate byte, whose bits that mean something are named.
WITH_IMMEDIATE = [
    (b"\x66", b"\x0f\x70", 0xFF),
    (b"\xf2", b"\x0f\x70", 0xFF),
    (b"\xf3", b"\x0f\x70", 0xFF),
    (b"", b"\x0f\xc6", 0xFF),
    (b"\x66", b"\x0f\xc6", 0xFF),
    (b"", b"\x0f\xc2", 7),
    (b"\x66", b"\x0f\xc2", 7),
    (b"\xf3", b"\x0f\xc2", 7),
    (b"\xf2", b"\x0f\xc2", 7),
    (b"\x66", b"\x0f\x3a\x08", 3),
    (b"\x66", b"\x0f\x3a\x09", 3),
    (b"\x66", b"\x0f\x3a\x0c", 0xFF),
    (b"\x66", b"\x0f\x3a\x0d", 0xFF),
    (b"\x66", b"\x0f\x3a\x0e", 0xFF),
    (b"\x66", b"\x0f\x3a\x0f", 0xFF),
    (b"\x66", b"\x0f\x3a\x42", 7),
    (b"\x66", b"\x0f\x3a\x44", 0x11),
]


def _listed(table: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Prefix and opcode of each instruction of a table."""
    found = []
    for text in table.values():
        head, opcodes = text.split(":")
        prefix, escape = head.split(" ")
        found += [(bytes.fromhex(prefix), bytes.fromhex(escape + opcode)) for opcode in opcodes.split()]
    return found


class Vectors(Encoder):
    """Each method appends one instruction, with those that make its operands fit."""

    _vectors, _floats = _listed(VECTORS), _listed(FLOATS)

    def _vector(self) -> None:
        prefix, opcode = self._draw.choice(self._vectors)
        rm = None if self._draw.random() < 0.35 else self._draw.randrange(16)
        reg = self._draw.randrange(16)
        if opcode in HORIZONTAL and rm == reg:
            rm ^= 1
        self._add(self._encode(opcode, reg, rm, prefix=prefix, align=16), "vector")

    def _float(self) -> None:
        """With a finite source, so that no more than one operand is NaN."""
        prefix, opcode = self._draw.choice(self._floats)
        reg, source = self._draw.randrange(16), self._draw.randrange(16)
        finite = (FINITE + 16 * self._draw.randrange((COUNTER - FINITE) // 16)).to_bytes(4, "little")
        rex = bytes([0x40 | (source >> 3) << 2])
        self._add(rex + b"\x0f\x28" + bytes([0x86 | (source & 7) << 3]) + finite, "movaps")
        self._add(self._encode(opcode, reg, source, prefix=prefix), "float")

    def _vector_immediate(self) -> None:
        prefix, opcode, mask = self._draw.choice(WITH_IMMEDIATE)
        rm = None if self._draw.random() < 0.35 else self._draw.randrange(16)
        tail = bytes([self._draw.getrandbits(8) & mask])
        self._add(self._encode(opcode, self._draw.randrange(16), rm, prefix=prefix, align=16, tail=tail), "vector imm")

    def _vector_test(self) -> None:
        """What sets flags by vectors, and CRC32."""
        vector, other = self._draw.randrange(16), self._draw.randrange(16)
        match self._draw.randrange(3):
            case 0:
                self._add(self._encode(b"\x0f\x38\x17", vector, other, prefix=b"\x66"), "ptest", 0, ALL)
            case 1:
                opcode = bytes([0x0F, 0x3A, self._draw.randrange(0x60, 0x64)])
                if opcode[-1] < 0x62:
                    # Lengths beyond an int crash Unicorn.
                    self._add(b"\xb8" + struct.pack("<i", self._draw.randint(-20, 20)), "mov eax")
                    self._add(b"\xba" + struct.pack("<i", self._draw.randint(-20, 20)), "mov edx")
                # Not "equal ordered", where Unicorn does not see a beginning at the end.
                tail = bytes([self._draw.getrandbits(7) & self._draw.choice([0x77, 0x7B])])
                self._add(self._encode(opcode, vector, other, prefix=b"\x66", tail=tail), "pcmpxstrx", 0, ALL)
            case _:
                code = self._encode(
                    b"\x0f\x38\xf1", self._register(), self._register(), size=self._size(4, 8), prefix=b"\xf2"
                )
                self._add(code, "crc32")

    def _vector_shift(self) -> None:
        opcode, digit = self._draw.choice(
            [
                (0x71, 2),
                (0x71, 4),
                (0x71, 6),
                (0x72, 2),
                (0x72, 4),
                (0x72, 6),
                (0x73, 2),
                (0x73, 3),
                (0x73, 6),
                (0x73, 7),
            ]
        )
        tail = bytes([self._draw.choice([self._draw.randrange(20), self._draw.randrange(256)])])
        self._add(
            self._encode(bytes([0x0F, opcode]), digit, self._draw.randrange(16), prefix=b"\x66", tail=tail), "shift imm"
        )

    def _vector_move(self) -> None:
        vector, register = self._draw.randrange(16), self._register()
        match self._draw.randrange(5):
            case 0:
                code = self._encode(
                    self._draw.choice([b"\x0f\x6e", b"\x0f\x7e"]),
                    vector,
                    register,
                    size=self._size(4, 8),
                    prefix=b"\x66",
                )
            case 1:
                code = self._encode(b"\x0f\xd7", register, vector, prefix=b"\x66")
            case 2:
                code = self._encode(b"\x0f\x50", register, vector, prefix=self._draw.choice([b"", b"\x66"]))
            case 3:
                code = self._encode(b"\x0f\x7f", vector, None, prefix=self._draw.choice([b"\x66", b"\xf3"]), align=16)
            case _:
                tail = self._draw.randbytes(1)
                code = self._encode(b"\x0f\xc4", vector, register, prefix=b"\x66", tail=tail)
        if b"\x66\x66" not in code:
            self._add(code, "vector move")

    def _convert(self) -> None:
        vector, register = self._draw.randrange(16), self._register()
        prefix = self._draw.choice([b"\xf2", b"\xf3"])
        size = self._size(4, 8)
        if self._draw.random() < 0.5:
            code = self._encode(b"\x0f\x2a", vector, register, size=size, prefix=prefix)
            self._add(code, "cvtsi2s")
        elif self._draw.random() < 0.6:
            code = self._encode(
                self._draw.choice([b"\x0f\x2c", b"\x0f\x2d"]), register, vector, size=size, prefix=prefix
            )
            self._add(code, "cvts2si")
        else:
            prefix = self._draw.choice([b"", b"\x66"])
            opcode = self._draw.choice([b"\x0f\x2e", b"\x0f\x2f"])
            code = self._encode(opcode, vector, self._draw.randrange(16), prefix=prefix)
            self._add(code, "ucomis comis", 0, ALL)

    def _x87(self) -> None:
        """An operation of two numbers in memory, stored again."""
        self._add(b"\xdb\xe3", "fninit")
        self._add(self._encode(b"\xdd", 0, None), "fld m64")
        digit = self._draw.choice([0, 1, 4, 5, 6, 7])
        self._add(self._encode(self._draw.choice([b"\xdc", b"\xd8"]), digit, None), "fadd fmul fsub fdiv")
        self._add(self._encode(self._draw.choice([b"\xdd", b"\xd9"]), 3, None), "fstp")
