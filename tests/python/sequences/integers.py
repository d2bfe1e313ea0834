"""Instructions on general registers, flags and the stack."""

from __future__ import annotations

from sequences.encoder import AF, ALL, CF, FREE, OF, PF, RAX, RDX, SF, ZF, Encoder


class Integers(Encoder):
    """Each method appends one instruction, with those that make its operands fit."""

    def _arithmetic(self) -> None:
        number = self._draw.randrange(9)
        size = self._size()
        is_logic = number in (1, 4, 6, 8)
        flags = {"reads": CF if number in (2, 3) else 0, "writes": ALL, "leaves": AF if is_logic else 0}
        if number == 8:
            self._modrm(0x85, size, "test", **flags)
        else:
            self._modrm(
                8 * number + self._draw.choice([1, 3]), size, "add or adc sbb and sub xor cmp".split()[number], **flags
            )

    def _immediate(self) -> None:
        number = self._draw.randrange(8)
        size = self._size()
        is_short = self._draw.random() < 0.5 or size == 1
        opcode = 0x80 if size == 1 else 0x83 if is_short else 0x81
        tail = self._number(1 if is_short else size)
        rm = None if self._draw.random() < 0.35 else self._register(size)
        code = self._encode(bytes([opcode]), number, rm, size=size, tail=tail)
        leaves = AF if number in (1, 4, 6) else 0
        self._add(code, f"op{number} imm", CF if number in (2, 3) else 0, ALL, leaves)

    def _one_operand(self) -> None:
        what = self._draw.choice(["inc", "dec", "not", "neg"])
        opcode, digit = {"inc": (0xFF, 0), "dec": (0xFF, 1), "not": (0xF7, 2), "neg": (0xF7, 3)}[what]
        writes = {"inc": ALL & ~CF, "dec": ALL & ~CF, "not": 0, "neg": ALL}[what]
        self._modrm(opcode, self._size(), what, digit=digit, writes=writes)

    def _shift(self) -> None:
        digit = self._draw.choice([0, 1, 2, 3, 4, 5, 7])
        size = self._size()
        is_rotate = digit < 4
        touched = CF | OF if is_rotate else ALL
        count = self._draw.choice([1, 1, self._draw.randrange(256), self._draw.randrange(8 * size), 8 * size - 1])
        masked = count & (63 if size == 8 else 31)
        opcode, tail = (0xC1, bytes([count])) if count != 1 or self._draw.random() < 0.5 else (0xD1, b"")
        is_by_cl = self._draw.random() < 0.3
        if is_by_cl:
            opcode, tail, masked = 0xD3, b"", 2
        leaves = 0 if is_rotate else AF
        if masked != 1:
            leaves |= OF
        if not is_rotate and size < 4 and (masked >= 8 * size or is_by_cl):
            leaves |= CF
        if masked == 0:
            touched = leaves = 0
        if is_by_cl:
            touched = 0
        rm = None if self._draw.random() < 0.3 else self._register(size)
        code = self._encode(bytes([opcode - (size == 1)]), digit, rm, size=size, tail=tail)
        self._add(code, "rol ror rcl rcr shl shr - sar".split()[digit], CF if digit in (2, 3) else 0, touched, leaves)

    def _double_shift(self) -> None:
        size = self._size(2, 4, 8)
        opcode = self._draw.choice([0xA4, 0xAC])
        count = self._draw.randrange(16 if size == 2 else 64)
        masked = count & (63 if size == 8 else 31)
        is_by_cl = size != 2 and self._draw.random() < 0.3
        flags = (0, AF | OF) if is_by_cl else (0, 0) if masked == 0 else (ALL, AF | (OF if masked != 1 else 0))
        rm = None if self._draw.random() < 0.3 else self._register()
        tail = b"" if is_by_cl else bytes([count])
        code = self._encode(bytes([0x0F, opcode + is_by_cl]), self._register(), rm, size=size, tail=tail)
        self._add(code, "shld" if opcode == 0xA4 else "shrd", 0, *flags)

    def _bit(self) -> None:
        digit = self._draw.randrange(4, 8)
        size = self._size(2, 4, 8)
        if self._draw.random() < 0.5:
            rm = None if self._draw.random() < 0.4 else self._register()
            code = self._encode(b"\x0f\xba", digit, rm, size=size, tail=self._draw.randbytes(1))
        else:
            opcode = bytes([0x0F, 0xA3 + 8 * (digit - 4)])
            code = self._encode(opcode, self._register(), self._register(), size=size)
        self._add(code, "bt bts btr btc".split()[digit - 4], 0, CF, OF | SF | AF | PF)

    def _count_bits(self) -> None:
        prefix, opcode, name, leaves = self._draw.choice(
            [
                (b"\xf3", 0xB8, "popcnt", 0),
                (b"\xf3", 0xBC, "tzcnt", OF | SF | PF | AF),
                (b"\xf3", 0xBD, "lzcnt", OF | SF | PF | AF),
                (b"", 0xBC, "bsf", ALL & ~ZF),
                (b"", 0xBD, "bsr", ALL & ~ZF),
            ]
        )
        size = self._size(2, 4, 8)
        reg, rm = self._pair(size)
        if not prefix:
            # Of zero, BSF and BSR leave an undefined result.
            self._add(self._encode(b"\x83", 1, rm, size=size, tail=b"\x40"), "or", 0, ALL, AF)
        code = self._encode(bytes([0x0F, opcode]), reg, rm, size=size, prefix=prefix)
        self._add(code, name, 0, ALL, leaves)

    def _bmi(self) -> None:
        size = self._size(4, 8)
        name, table, pp, opcode, reg, writes, leaves = self._draw.choice(
            [
                ("andn", 2, 0, 0xF2, None, ALL, AF | PF),
                ("blsr", 2, 0, 0xF3, 1, ALL, AF | PF),
                ("blsmsk", 2, 0, 0xF3, 2, ALL, AF | PF),
                # Unicorn's CF is the opposite.
                ("blsi", 2, 0, 0xF3, 3, ALL, AF | PF | CF),
                ("bextr", 2, 0, 0xF7, None, ALL, AF | PF | SF),
                ("bzhi", 2, 0, 0xF5, None, ALL, AF | PF),
                ("pdep", 2, 3, 0xF5, None, 0, 0),
                ("pext", 2, 2, 0xF5, None, 0, 0),
                ("mulx", 2, 3, 0xF6, None, 0, 0),
                ("shlx", 2, 1, 0xF7, None, 0, 0),
                ("shrx", 2, 3, 0xF7, None, 0, 0),
                ("sarx", 2, 2, 0xF7, None, 0, 0),
                ("rorx", 3, 3, 0xF0, None, 0, 0),
            ]
        )
        tail = self._draw.randbytes(1) if name == "rorx" else b""
        source = 0 if name == "rorx" else self._register()
        if name in ("pdep", "bextr"):
            # Of 32 bits, Unicorn takes and deposits bits beyond them.
            size = 8
        if name == "bzhi":
            # Of an index from the last bit on, Unicorn has other results.
            self._add(self._encode(b"\x83", 4, source, size=8, tail=b"\x0f"), "and", 0, ALL, AF)
        if name == "bextr":
            # Of a length from the last bit on, too.
            control = bytes([self._draw.randrange(64), self._draw.randrange(63), 0, 0])
            self._add(self._encode(b"\xc7", 0, source, size=8, tail=control), "mov control")
        rm = None if self._draw.random() < 0.3 else self._register()
        target = self._register() if reg is None else reg
        code = self._encode(bytes([opcode]), target, rm, size=size, tail=tail, vex=(table, pp, source))
        self._add(code, name, 0, writes, leaves)

    def _multiply(self) -> None:
        size = self._size(2, 4, 8)
        leaves = ALL & ~(CF | OF)
        match self._draw.randrange(4):
            case 0:
                self._modrm(b"\x0f\xaf", size, "imul", writes=ALL, leaves=leaves)
            case 1:
                short = self._draw.random() < 0.5
                tail = self._number(1 if short else size)
                opcode = b"\x6b" if short else b"\x69"
                code = self._encode(opcode, self._register(), self._register(), size=size, tail=tail)
                self._add(code, "imul imm", 0, ALL, leaves)
            case digit:
                self._modrm(
                    0xF7, self._size(), "mul" if digit == 2 else "imul", digit=digit + 2, writes=ALL, leaves=leaves
                )

    def _divide(self) -> None:
        size = self._size(4, 8)
        wide = b"\x48" if size == 8 else b""
        divisor = self._draw.choice([n for n in FREE if n not in (RAX, RDX)])
        # A divisor from 1 to 127, and a dividend that was extended from a non-negative number.
        self._add(self._encode(b"\x83", 4, divisor, size=8, tail=b"\x7f"), "and", 0, ALL, AF)
        self._add(self._encode(b"\x83", 1, divisor, size=8, tail=b"\x01"), "or", 0, ALL, AF)
        if self._draw.random() < 0.5:
            self._add(b"\x31\xd2", "xor edx", 0, ALL, AF)
            self._add(self._encode(b"\xf7", 6, divisor, size=size), "div", 0, ALL, ALL)
        else:
            self._add(wide + b"\x99", "cdq")
            self._add(self._encode(b"\xf7", 7, divisor, size=size), "idiv", 0, ALL, ALL)

    def _move(self) -> None:
        size = self._size()
        match self._draw.randrange(6):
            case 0 | 1:
                self._modrm(self._draw.choice([0x89, 0x8B]), size, "mov")
            case 2:
                rm = None if self._draw.random() < 0.4 else self._register(size)
                code = self._encode(bytes([0xC7 - (size == 1)]), 0, rm, size=size, tail=self._number(size))
                self._add(code, "mov imm")
            case 3:
                register = self._register()
                self._add(bytes([0x48 | register >> 3, 0xB8 | register & 7]) + self._draw.randbytes(8), "movabs")
            case 4:
                # RSI does not change, so the address is defined.
                self._add(self._encode(b"\x8d", self._register(), None, size=self._size(2, 4, 8)), "lea")
            case _:
                register = self._register()
                size = self._size(4, 8)
                rex = (size == 8) << 3 | register >> 3
                self._add((bytes([0x40 | rex]) if rex else b"") + bytes([0x0F, 0xC8 | register & 7]), "bswap")

    def _condition(self) -> None:
        condition = self._draw.randrange(16)
        if self._draw.random() < 0.5:
            rm = None if self._draw.random() < 0.3 else self._register(1)
            code = self._encode(bytes([0x0F, 0x90 | condition]), 0, rm)
            self._add(code, "setcc", ALL & ~AF)
        else:
            size = self._size(2, 4, 8)
            reg, rm = self._pair(size)
            self._add(self._encode(bytes([0x0F, 0x40 | condition]), reg, rm, size=size), "cmovcc", ALL & ~AF)

    def _flag(self) -> None:
        match self._draw.randrange(6):
            case 0:
                self._add(b"\x9f", "lahf", ALL & ~OF)
            case 1:
                self._add(b"\x9e", "sahf", 0, ALL & ~OF)
            case 2:
                self._add(b"\xf5", "cmc", CF, CF)
            case 3:
                self._add(self._draw.choice([b"\xf8", b"\xf9"]), "clc stc", 0, CF)
            case number:
                prefix, flag = (b"\x66", CF) if number == 4 else (b"\xf3", OF)
                size = self._size(4, 8)
                code = self._encode(b"\x0f\x38\xf6", self._register(), self._register(), size=size, prefix=prefix)
                self._add(code, "adcx adox", flag, flag)

    def _extend(self) -> None:
        match self._draw.randrange(4):
            case 0:
                self._add(
                    self._draw.choice([b"\x66\x98", b"\x98", b"\x48\x98", b"\x66\x99", b"\x99", b"\x48\x99"]), "cbw cwd"
                )
            case 1:
                self._add(self._encode(b"\x63", self._register(), self._register(), size=8), "movsxd")
            case _:
                opcode = self._draw.choice([0xB6, 0xB7, 0xBE, 0xBF])
                rm = None if self._draw.random() < 0.3 else self._draw.choice(FREE)
                size = self._size(2, 4, 8)
                self._add(self._encode(bytes([0x0F, opcode]), self._register(), rm, size=size), "movzx movsx")

    def _exchange(self) -> None:
        # Of CMPXCHG with 32 bits, Unicorn clears the upper halves of what is not written.
        size = self._size(1, 2, 8)
        opcode, name, writes = self._draw.choice(
            [(b"\x0f\xb1", "cmpxchg", ALL), (b"\x0f\xc1", "xadd", ALL), (b"\x87", "xchg", 0)]
        )
        opcode = opcode[:-1] + bytes([opcode[-1] - (size == 1)])
        is_memory = self._draw.random() < 0.5
        reg, rm = self._pair(size)
        lock = b"\xf0" if is_memory and self._draw.random() < 0.5 else b""
        code = self._encode(opcode, reg, None if is_memory else rm, size=size, is_byte=size == 1)
        self._add(lock + code, name, 0, writes)

    def _wide_exchange(self) -> None:
        size = self._size(4, 8)
        # Unicorn changes the other flags too.
        code = self._encode(b"\x0f\xc7", 1, None, size=size, align=16)
        self._add(code, "cmpxchg8b cmpxchg16b", 0, ZF, ALL & ~ZF)

    def _string(self) -> None:
        """A string instruction on the data, in either direction, RSI kept; RDI is set, and RCX with it."""
        size = self._size(1, 2, 4, 8)
        opcode, name = self._draw.choice(
            [(0xA5, "movs"), (0xAB, "stos"), (0xAD, "lods"), (0xAF, "scas"), (0xA7, "cmps")]
        )
        prefix = self._draw.choice([b"", b"\xf3"] + [b"\xf2"] * (opcode in (0xAF, 0xA7)))
        count = self._draw.randrange(12)
        compares = opcode in (0xAF, 0xA7)
        self._add(b"\x56", "push rsi")
        self._add(b"\xb9" + count.to_bytes(4, "little"), "mov ecx")
        self._add(b"\x48\x8d\xbe" + self._draw.randrange(96, 280).to_bytes(4, "little"), "lea rdi")
        self._add(b"\x48\x81\xc6" + self._draw.randrange(96, 280).to_bytes(4, "little"), "add rsi", 0, ALL)
        if self._draw.random() < 0.3:
            self._add(b"\xfd", "std")
        code = bytes([opcode - (size == 1)])
        narrow = b"\x66" if size == 2 else b"\x48" if size == 8 else b""
        code = narrow + prefix + code if size == 2 else prefix + narrow + code
        is_defined = compares and not (prefix and count == 0)
        self._add(code, name, 0, ALL if is_defined else 0)
        self._add(b"\xfc", "cld")
        self._add(b"\x5e", "pop rsi")

    def _stack(self) -> None:
        register, other = self._register(), self._register()
        head = b"\x41" if register > 7 else b""
        tail = b"\x41" if other > 7 else b""
        match self._draw.randrange(4):
            case 0:
                self._add(head + bytes([0x50 | register & 7]), "push")
                self._add(tail + bytes([0x58 | other & 7]), "pop")
            case 1:
                self._add(b"\x66" + head + bytes([0x50 | register & 7]), "push")
                self._add(b"\x66" + tail + bytes([0x58 | other & 7]), "pop")
            case 2:
                self._add(b"\xc8" + self._draw.randrange(0, 64, 8).to_bytes(2, "little") + b"\x00", "enter")
                self._add(b"\xc9", "leave")
            case _:
                self._add(self._draw.choice([b"\x6a" + self._number(1), b"\x68" + self._number(4)]), "push")
                self._add(tail + bytes([0x58 | other & 7]), "pop")
