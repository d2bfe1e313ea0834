"""Chooses the instructions of a sequence, and lets control flow through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sequences.encoder import AF, ALL, CF, COUNTER, Sequence
from sequences.integers import Integers
from sequences.vectors import Vectors

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


class Generator(Integers, Vectors):
    """Makes sequences, the same ones from the same ``random.Random``."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._kinds: list[Callable[[], None]] = [
            *[self._arithmetic] * 5,
            *[self._immediate] * 3,
            *[self._one_operand] * 2,
            *[self._shift] * 3,
            *[self._vector] * 6,
            *[self._float] * 3,
            *[self._vector_immediate] * 2,
            *[self._branch] * 2,
            self._double_shift,
            self._bit,
            self._count_bits,
            self._bmi,
            self._multiply,
            self._divide,
            self._move,
            self._condition,
            self._flag,
            self._extend,
            self._exchange,
            self._wide_exchange,
            self._string,
            self._stack,
            self._call,
            self._loop,
            self._vector_move,
            self._vector_shift,
            self._vector_test,
            self._convert,
            self._x87,
        ]

    def sequence(self, length: int) -> Sequence:
        """One with about so many instructions."""
        self._now = Sequence()
        while len(self._now.names) < length:
            self._draw.choice(self._kinds)()
        return self._now

    def _plain(self) -> None:
        self._draw.choice([self._arithmetic, self._one_operand, self._shift, self._move, self._vector])()

    def _apart(self) -> tuple[bytes, list[str], int]:
        """Some instructions that are not yet in the sequence, and the flags that they leave undefined."""
        outer = self._now
        self._now = Sequence(undefined=outer.undefined)
        for _ in range(self._draw.randint(1, 3)):
            self._plain()
        inner, self._now = self._now, outer
        return bytes(inner.code), inner.names, inner.undefined

    def _branch(self) -> None:
        self._add(b"", "branch", ALL & ~AF)
        self._now.names.pop()
        body, names, undefined = self._apart()
        condition = self._draw.randrange(16)
        short = bytes([0x70 | condition, len(body)])
        near = bytes([0x0F, 0x80 | condition]) + len(body).to_bytes(4, "little")
        self._add(self._draw.choice([short, near]), "jcc")
        self._now.code += body
        self._now.names += names
        self._now.undefined |= undefined

    def _call(self) -> None:
        body, names, undefined = self._apart()
        self._add(b"\xe8\x02\x00\x00\x00", "call")
        self._add(bytes([0xEB, len(body) + 1]), "jmp")
        self._now.code += body
        self._now.names += names
        self._now.undefined = undefined
        self._add(b"\xc3", "ret")

    def _loop(self) -> None:
        """Some instructions a few times, with the counter in memory."""
        set_counter = b"\xc7\x86" + COUNTER.to_bytes(4, "little") + self._draw.randint(1, 6).to_bytes(4, "little")
        count_down = b"\xff\x8e" + COUNTER.to_bytes(4, "little")
        self._add(set_counter, "mov counter")
        # Around the loop come the flags of DEC, and CF.
        self._add(b"\x48\x83\xfd\x05", "cmp rbp", 0, ALL)
        body, names, undefined = self._apart()
        if undefined & CF:
            body, names = body + b"\xf8", [*names, "clc"]
        self._now.code += body
        self._now.names += names
        self._add(count_down, "dec counter", 0, ALL)
        self._add(b"\x0f\x85" + (-(len(body) + len(count_down) + 6) & 0xFFFFFFFF).to_bytes(4, "little"), "jnz")
