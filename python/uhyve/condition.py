"""Breakpoint conditions: a Python expression, compiled once to bytecode that Rust verifies and runs for each hit.

======================================================  ==============================================================
``rax`` … ``r15``, ``rip``, ``rflags``, ``fs_base``,    a register of the vCPU at the breakpoint, unsigned; ``pc`` and
``gs_base``, ``cr0`` ``cr2`` ``cr3`` ``cr4`` ``cr8``,   ``sp`` are ``rip`` and ``rsp``
``efer``
``eax`` ``ax`` ``al`` ``ah``, ``r8d`` ``r8w`` ``r8b``   its lower 32, 16 or 8 bits (``ah``: bits 8–15); also ``eip``,
                                                        ``eflags``
``arg0`` … ``arg5``                                     the integer arguments of System V: rdi rsi rdx rcx r8 r9
``vcpu``                                                the number of the vCPU
``hits``                                                times that the condition let a vCPU through so far
``reached``                                             times that a vCPU met the breakpoint, this time included
``8``, ``0x8``, ``0o10``, ``0b1000``, ``True``          an integer; ``True`` is 1, ``False`` is 0
``sys_open``, ``symbols["app::main"]``                  the address of a symbol; the names above come first
``u8[address]`` … ``u64[address]``                      unsigned number in guest-virtual memory, little endian
``i8[address]`` … ``i64[address]``                      the same, signed
``u8(x)`` … ``u64(x)``, ``i8(x)`` … ``i64(x)``          ``x`` wrapped to that size
``+`` ``-`` ``*`` ``//`` ``%``, ``-x`` ``+x``           arithmetic, ``//`` and ``%`` floored as in Python
``&`` ``|`` ``^`` ``<<`` ``>>``, ``~x``                 bits
``==`` ``!=`` ``<`` ``<=`` ``>`` ``>=``, ``a < b < c``  comparisons, chained ones too
``x in (1, 2)``, ``x not in {a, b}``                    membership in a tuple, list or set that is written out
``and`` ``or`` ``not``, ``a if c else b``               with short circuit, and with Python's values
======================================================  ==============================================================

A condition holds if its value is not zero. Values are Python's integers as long as they fit 128 signed bits. What does
not fit, a division by zero, a shift by less than 0 or more than 127, and memory that the guest has not mapped are
errors of the evaluation: the breakpoint stops and says so.

>>> condition = compile_condition("arg1 > 8 and u32[arg0 + 8] != 0")
>>> condition.constants
(8, 0)
>>> compile_condition("arg0 == sys_open", {"sys_open": 0x1000}.__getitem__).symbols
(('sys_open', 4096),)
>>> compile_condition("arg7 > 1")
Traceback (most recent call last):
    ...
uhyve.errors.ConditionError: column 1: 'arg7' is not a register: arg0 to arg5 are, further arguments lie on the stack
  arg7 > 1
  ^
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

from uhyve.errors import ConditionError, UhyveError

__all__ = ["REGISTERS", "CompiledCondition", "Opcode", "compile_condition", "split_if"]

MAX_LENGTH = 4096
"""The longest expression in characters."""
MAX_NESTING = 100
"""The deepest nesting of an expression."""
MAX_STACK = 64
"""The most intermediate values at a time; ``src/debug/condition.rs`` has the same limit."""

REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags", "fs_base", "gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"),
)
"""Register names by the number that bytecode uses: ``RegisterId::NAMED`` of ``src/registers.rs``."""


class Opcode(IntEnum):
    """The instructions; ``src/debug/condition/opcode.rs`` says what each does."""

    CONSTANT = 0
    REGISTER = 1
    VCPU = 2
    HITS = 3
    REACHED = 4
    LOAD_U8 = 5
    LOAD_U16 = 6
    LOAD_U32 = 7
    LOAD_U64 = 8
    LOAD_I8 = 9
    LOAD_I16 = 10
    LOAD_I32 = 11
    LOAD_I64 = 12
    CAST_U8 = 13
    CAST_U16 = 14
    CAST_U32 = 15
    CAST_U64 = 16
    CAST_I8 = 17
    CAST_I16 = 18
    CAST_I32 = 19
    CAST_I64 = 20
    ADD = 21
    SUBTRACT = 22
    MULTIPLY = 23
    FLOOR_DIVIDE = 24
    MODULO = 25
    AND = 26
    OR = 27
    XOR = 28
    SHIFT_LEFT = 29
    SHIFT_RIGHT = 30
    NEGATE = 31
    INVERT = 32
    NOT = 33
    EQUAL = 34
    NOT_EQUAL = 35
    LESS = 36
    LESS_EQUAL = 37
    GREATER = 38
    GREATER_EQUAL = 39
    MEMBER = 40
    DROP_SECOND = 41
    DROP = 42
    TUCK = 43
    JUMP = 44
    JUMP_IF_ZERO = 45
    JUMP_IF_ZERO_OR_DROP = 46
    JUMP_IF_NONZERO_OR_DROP = 47


@dataclass(frozen=True, slots=True)
class CompiledCondition:
    """A condition ready for the debug engine. ``str()`` gives the expression."""

    expression: str
    """What the user wrote."""
    code: bytes
    """Bytecode, to be verified by Rust."""
    constants: tuple[int, ...]
    """The numbers in it, each within 128 signed bits."""
    symbols: tuple[tuple[str, int], ...]
    """The symbols in it and their addresses when it was compiled, in order of appearance."""

    def __str__(self) -> str:
        return self.expression


def compile_condition(expression: str, resolve: Callable[[str], int] | None = None) -> CompiledCondition:
    """Compiles a condition; the module's documentation has the language.

    ``resolve`` gives the address of a symbol, or raises ``LookupError``, ``ValueError`` or ``UhyveError`` if there is
    none; it is called once for each name that the language does not know. Raises ``ConditionError``, which names the
    column (from 1, within its line) of what is wrong.
    """
    source = _Source(expression)
    if len(expression) > MAX_LENGTH:
        raise ConditionError(
            f"the condition has {len(expression)} characters, at most {MAX_LENGTH} are allowed",
            expression=expression,
            column=MAX_LENGTH + 1,
        )
    if not expression.strip():
        source.refuse("the condition is empty", 1, 1)
    try:
        compiler = _Compiler(source, resolve)
        compiler.value(source.parse(), 0)
    except (RecursionError, MemoryError):
        source.refuse("the condition is nested too deeply", 1, 1)
    return compiler.finish()


_IF = re.compile(r"(?:^|\s)if(?=[\s(]|$)")


def split_if(text: str) -> tuple[str, str | None]:
    """Splits a location from its condition, as the command line and GDB's ``break`` write them.

    Raises ``ConditionError`` if ``if`` has nothing before or after it.

    >>> split_if("sys_write if arg1 > 8")
    ('sys_write', 'arg1 > 8')
    >>> split_if("*0x1000")
    ('*0x1000', None)
    """
    match = _IF.search(text)
    if match is None:
        return text.strip(), None
    location, condition = text[: match.start()].strip(), text[match.end() :].strip()
    if not location:
        _Source(text).refuse("there is no location before 'if'", 1, 1)
    if not condition:
        _Source(text).refuse("there is no condition after 'if'", 1, len(text.rstrip()))
    return location, condition


_WIDTHS = {f"{sign}{bits}": f"{sign}{bits}".upper() for sign in "ui" for bits in (8, 16, 32, 64)}
_COUNTERS = {"vcpu": Opcode.VCPU, "hits": Opcode.HITS, "reached": Opcode.REACHED}
_BINARY: dict[type[ast.operator], tuple[str, Opcode]] = {
    ast.Add: ("+", Opcode.ADD),
    ast.Sub: ("-", Opcode.SUBTRACT),
    ast.Mult: ("*", Opcode.MULTIPLY),
    ast.FloorDiv: ("//", Opcode.FLOOR_DIVIDE),
    ast.Mod: ("%", Opcode.MODULO),
    ast.BitAnd: ("&", Opcode.AND),
    ast.BitOr: ("|", Opcode.OR),
    ast.BitXor: ("^", Opcode.XOR),
    ast.LShift: ("<<", Opcode.SHIFT_LEFT),
    ast.RShift: (">>", Opcode.SHIFT_RIGHT),
}
_FOREIGN_BINARY: dict[type[ast.operator], tuple[str, str]] = {
    ast.Div: ("/", "conditions count in integers: '//' divides them"),
    ast.Pow: ("**", "'**' isn't part of the condition language; a power of two is 1 << n"),
    ast.MatMult: ("@", "'@' isn't part of the condition language"),
}
_UNARY: dict[type[ast.unaryop], Opcode] = {
    ast.USub: Opcode.NEGATE,
    ast.Invert: Opcode.INVERT,
    ast.Not: Opcode.NOT,
}
_COMPARISONS: dict[type[ast.cmpop], Opcode] = {
    ast.Eq: Opcode.EQUAL,
    ast.NotEq: Opcode.NOT_EQUAL,
    ast.Lt: Opcode.LESS,
    ast.LtE: Opcode.LESS_EQUAL,
    ast.Gt: Opcode.GREATER,
    ast.GtE: Opcode.GREATER_EQUAL,
}
_FOREIGN: dict[type[ast.expr], str] = {
    ast.Attribute: 'an attribute isn\'t part of the condition language; a Rust path is symbols["hello_world::main"]',
    ast.Tuple: "a tuple can only stand to the right of 'in'",
    ast.List: "a list can only stand to the right of 'in'",
    ast.Set: "a set can only stand to the right of 'in'",
    ast.NamedExpr: "an assignment isn't part of the condition language; '==' compares",
    ast.Lambda: "a lambda isn't part of the condition language; pass a callable as the condition instead",
}


def _register_names() -> dict[str, tuple[str, int, int]]:
    """Each register name with the register it lies in, the position of its lowest bit, and its width."""
    names = {name: (name, 0, 64) for name in REGISTERS}
    names |= {"pc": ("rip", 0, 64), "sp": ("rsp", 0, 64), "eip": ("rip", 0, 32), "eflags": ("rflags", 0, 32)}
    for letter in "abcd":
        names[f"{letter}l"] = (f"r{letter}x", 0, 8)
        names[f"{letter}h"] = (f"r{letter}x", 8, 8)
    for name in ("ax", "bx", "cx", "dx", "sp", "bp", "si", "di"):
        names[f"e{name}"] = (f"r{name}", 0, 32)
        if name != "sp":
            names[name] = (f"r{name}", 0, 16)
    for name in ("sp", "bp", "si", "di"):
        names[f"{name}l"] = (f"r{name}", 0, 8)
    for number in range(8, 16):
        for suffix, width in (("d", 32), ("w", 16), ("b", 8)):
            names[f"r{number}{suffix}"] = (f"r{number}", 0, width)
    for argument, name in enumerate(("rdi", "rsi", "rdx", "rcx", "r8", "r9")):
        names[f"arg{argument}"] = (name, 0, 64)
    return names


_REGISTER_NAMES = _register_names()


class _Source:
    """The text of a condition, and how to point at a place in it."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.lines = re.split(r"\r\n|\r|\n", expression)
        # Python refuses an indented expression, so that it is parsed without, and columns are shifted.
        self.indent = len(expression) - len(expression.lstrip(" \t"))

    def parse(self) -> ast.expr:
        """The syntax tree, with the columns of the expression as written."""
        try:
            return ast.parse(self.expression[self.indent :], "<condition>", mode="eval").body
        except SyntaxError as error:
            line, column = error.lineno or 1, (error.offset or 0) + self._shift(error.lineno or 1)
            if not error.offset or line > len(self.lines):  # at the end of the text
                line, column = len(self.lines), len(self.lines[-1]) + 1
            self.refuse(self._syntax_hint(error.msg), line, column)
        except ValueError:  # null bytes before Python 3.12, lone surrogates
            self.refuse("the condition contains a character that can't be part of it", 1, self._first_odd())

    def _shift(self, line: int) -> int:
        return self.indent if line == 1 else 0

    def _first_odd(self) -> int:
        odd = (i for i, c in enumerate(self.expression, 1) if c == "\0" or "\ud800" <= c <= "\udfff")
        return next(odd, 1)

    def _syntax_hint(self, message: str) -> str:
        if "::" in self.expression and "symbols[" not in self.expression:
            return f'{message} (a Rust path is written symbols["hello_world::main"])'
        if re.search(r"[^=!<>:]=(?!=)", self.expression):
            return f"{message} ('==' compares)"
        if "&&" in self.expression or "||" in self.expression:
            return f"{message} (logical operators are 'and', 'or' and 'not')"
        return message

    def position(self, node: ast.expr) -> tuple[int, int]:
        """Line and column, from 1, in characters; ``ast`` counts bytes of UTF-8."""
        return node.lineno, self._column(node.lineno, node.col_offset)

    def _column(self, line: int, offset: int) -> int:
        text = self.lines[line - 1][self._shift(line) :]
        return len(text.encode()[:offset].decode(errors="replace")) + 1 + self._shift(line)

    def operator(self, left: ast.expr, right: ast.expr, symbol: str) -> tuple[int, int]:
        """Where the operator between two operands is, or the left operand if they are on different lines."""
        line = left.end_lineno
        if line is None or left.end_col_offset is None or line != right.lineno:
            return self.position(left)
        start, end = self._column(line, left.end_col_offset), self._column(line, right.col_offset)
        found = self.lines[line - 1].find(symbol, start - 1, end - 1)
        return (line, found + 1) if found >= 0 else self.position(left)

    def refuse(self, message: str, line: int, column: int, cause: BaseException | None = None) -> NoReturn:
        """Raises the error with the line around the column, and a caret under it."""
        text = self.lines[line - 1] if line <= len(self.lines) else ""
        column = min(max(column, 1), len(text) + 1)
        start = max(0, column - 61)
        window = "".join(c if c.isprintable() else " " for c in text[start : start + 100])
        before, after = ("…" if start else ""), ("…" if start + 100 < len(text) else "")
        caret = " " * (column - 1 - start + len(before)) + "^"
        where = f"column {column}" if len(self.lines) == 1 else f"line {line}, column {column}"
        full = f"{where}: {message}\n  {before}{window}{after}\n  {caret}"
        raise ConditionError(full, expression=self.expression, column=column) from cause


class _Compiler:
    """Turns a syntax tree into bytecode, and follows the depth of the stack while it does."""

    def __init__(self, source: _Source, resolve: Callable[[str], int] | None) -> None:
        self.source = source
        self.resolve = resolve
        self.code = bytearray()
        self.constants: dict[int, int] = {}
        self.symbols: dict[str, int] = {}
        self.depth = 0

    def finish(self) -> CompiledCondition:
        """The program of what was compiled so far."""
        symbols = tuple(self.symbols.items())
        return CompiledCondition(self.source.expression, bytes(self.code), tuple(self.constants), symbols)

    def refuse(self, message: str, node: ast.expr, cause: BaseException | None = None) -> NoReturn:
        """Raises the error that points at a node."""
        self.source.refuse(message, *self.source.position(node), cause=cause)

    def emit(self, opcode: Opcode, change: int, operand: bytes = b"") -> None:
        """Appends an instruction that changes the depth of the stack by ``change``."""
        self.code.append(opcode)
        self.code += operand
        self.depth += change

    def jump(self, opcode: Opcode) -> int:
        """Appends a jump whose target is yet unknown; gives what ``land`` needs. A jump that tests takes a value."""
        self.emit(opcode, 0 if opcode is Opcode.JUMP else -1, b"\0\0")
        return len(self.code)

    def land(self, jump: int) -> None:
        """Makes an earlier jump lead here."""
        self.code[jump - 2 : jump] = (len(self.code) - jump).to_bytes(2, "little")

    def push(self, node: ast.expr, opcode: Opcode, operand: bytes = b"") -> None:
        """Appends an instruction that pushes a value."""
        if self.depth >= MAX_STACK:
            self.refuse(f"the condition needs more than {MAX_STACK} intermediate values here", node)
        self.emit(opcode, 1, operand)

    def constant(self, node: ast.expr, number: int) -> None:
        """Appends the push of a number."""
        if not -(1 << 127) <= number < 1 << 127:
            self.refuse("the number does not fit 128 signed bits", node)
        index = self.constants.setdefault(number, len(self.constants))
        self.push(node, Opcode.CONSTANT, index.to_bytes(2, "little"))

    def value(self, node: ast.expr, nesting: int) -> None:
        """Compiles an expression that leaves one value."""
        if nesting > MAX_NESTING:
            self.refuse(f"the condition is nested more than {MAX_NESTING} levels deep", node)
        match node:
            case ast.Constant(value=int() as number):
                self.constant(node, int(number))
            case ast.Constant(value=str()):
                self.refuse('text has no value in a condition; symbols["name"] is the address of a symbol', node)
            case ast.Constant():
                self.refuse(f"{node.value!r} isn't an integer", node)
            case ast.Name():
                self.name(node)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                self.constant(node, -number)
            case ast.UnaryOp():
                self.value(node.operand, nesting + 1)
                if not isinstance(node.op, ast.UAdd):
                    self.emit(_UNARY[type(node.op)], 0)
            case ast.BinOp():
                self.binary(node, nesting)
            case ast.BoolOp():
                self.boolean(node, nesting)
            case ast.Compare():
                self.compare(node, nesting)
            case ast.IfExp():
                self.choice(node, nesting)
            case ast.Subscript():
                self.subscript(node, nesting)
            case ast.Call():
                self.cast(node, nesting)
            case _:
                text = f"{type(node).__name__} isn't part of the condition language"
                self.refuse(_FOREIGN.get(type(node), text), node)

    def binary(self, node: ast.BinOp, nesting: int) -> None:
        """Compiles ``a + b - c …``: a chain leans to the left, and is walked without recursion."""
        chain = [node]
        while isinstance(chain[-1].left, ast.BinOp):
            chain.append(chain[-1].left)
        self.value(chain[-1].left, nesting + 1)
        for link in reversed(chain):
            if foreign := _FOREIGN_BINARY.get(type(link.op)):
                symbol, message = foreign
                self.source.refuse(message, *self.source.operator(link.left, link.right, symbol))
            self.value(link.right, nesting + 1)
            self.emit(_BINARY[type(link.op)][1], -1)

    def boolean(self, node: ast.BoolOp, nesting: int) -> None:
        """Compiles ``and`` and ``or``, which give the operand that decided."""
        opcode = Opcode.JUMP_IF_ZERO_OR_DROP if isinstance(node.op, ast.And) else Opcode.JUMP_IF_NONZERO_OR_DROP
        jumps: list[int] = []
        for operand in node.values:
            self.value(operand, nesting + 1)
            if operand is not node.values[-1]:
                jumps.append(self.jump(opcode))
        for jump in jumps:
            self.land(jump)

    def compare(self, node: ast.Compare, nesting: int) -> None:
        """Compiles a chain of comparisons: each operand is evaluated once, and none after the first that fails."""
        self.value(node.left, nesting + 1)
        failures: list[int] = []
        left = node.left
        for index, (operator, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
            last = index == len(node.ops) - 1
            if isinstance(operator, ast.In | ast.NotIn):
                self.membership(operator, right, last, nesting)
            elif isinstance(operator, ast.Is | ast.IsNot):
                word, sign = ("is", "==") if isinstance(operator, ast.Is) else ("is not", "!=")
                self.source.refuse(f"numbers have no identity: use '{sign}'", *self.source.operator(left, right, word))
            else:
                self.value(right, nesting + 1)
                if not last:
                    if self.depth >= MAX_STACK:
                        self.refuse(f"the condition needs more than {MAX_STACK} intermediate values here", right)
                    self.emit(Opcode.TUCK, 1)
                self.emit(_COMPARISONS[type(operator)], -1)
            if not last:
                failures.append(self.jump(Opcode.JUMP_IF_ZERO_OR_DROP))
            left = right
        if failures:
            success = self.jump(Opcode.JUMP)
            for failure in failures:
                self.land(failure)
            # A failed comparison leaves the operand in the middle under its result.
            self.depth += 1
            self.emit(Opcode.DROP_SECOND, -1)
            self.land(success)

    def membership(self, operator: ast.cmpop, right: ast.expr, last: bool, nesting: int) -> None:
        """Compiles ``in`` and ``not in`` for the value on the stack: every element is evaluated, as Python does."""
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            self.refuse("'in' needs a tuple, list or set that is written out, e.g. (1, 2)", right)
        if not last:
            self.refuse("a comparison can't go on after 'in (…)'", right)
        self.constant(right, 0)
        for element in right.elts:
            self.value(element, nesting + 1)
            self.emit(Opcode.MEMBER, -1)
        self.emit(Opcode.DROP_SECOND, -1)
        if isinstance(operator, ast.NotIn):
            self.emit(Opcode.NOT, 0)

    def choice(self, node: ast.IfExp, nesting: int) -> None:
        """Compiles ``a if c else b``."""
        self.value(node.test, nesting + 1)
        otherwise = self.jump(Opcode.JUMP_IF_ZERO)
        self.value(node.body, nesting + 1)
        end = self.jump(Opcode.JUMP)
        self.depth -= 1
        self.land(otherwise)
        self.value(node.orelse, nesting + 1)
        self.land(end)

    def subscript(self, node: ast.Subscript, nesting: int) -> None:
        """Compiles ``u32[address]`` and ``symbols["name"]``."""
        match node:
            case ast.Subscript(value=ast.Name(id="symbols"), slice=ast.Constant(value=str() as name)):
                self.constant(node, self.address(name, node.slice))
            case ast.Subscript(value=ast.Name(id="symbols")):
                self.refuse('symbols["name"] needs a name in quotes', node.slice)
            case ast.Subscript(value=ast.Name(id=name)) if name in _WIDTHS:
                if isinstance(node.slice, ast.Slice | ast.Tuple):
                    self.refuse(f"{name}[…] reads one number at one address", node.slice)
                self.value(node.slice, nesting + 1)
                self.emit(Opcode[f"LOAD_{_WIDTHS[name]}"], 0)
            case ast.Subscript(value=ast.Name(id=name)):
                suggestion = _suggest(name, [*_WIDTHS, "symbols"])
                self.refuse(f"{name!r} can't be subscripted: memory is u8[…] to i64[…]{suggestion}", node.value)
            case _:
                self.refuse('only memory, u8[address] to i64[address], and symbols["name"] have subscripts', node.value)

    def cast(self, node: ast.Call, nesting: int) -> None:
        """Compiles ``u32(x)``."""
        if not isinstance(node.func, ast.Name) or node.func.id not in _WIDTHS:
            suggestion = _suggest(node.func.id, list(_WIDTHS)) if isinstance(node.func, ast.Name) else ""
            self.refuse(f"a condition can't call functions but the casts u8(x) to i64(x){suggestion}", node.func)
        name = node.func.id
        if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
            self.refuse(f"{name}(x) takes one number", node)
        self.value(node.args[0], nesting + 1)
        self.emit(Opcode[f"CAST_{_WIDTHS[name]}"], 0)

    def name(self, node: ast.Name) -> None:
        """Compiles a register, a counter or a symbol."""
        name = node.id
        if name in _COUNTERS:
            self.push(node, _COUNTERS[name])
        elif name in _REGISTER_NAMES:
            self.register(node, *_REGISTER_NAMES[name])
        elif name in _WIDTHS:
            self.refuse(f"{name} stands for memory, {name}[address], or for a cast, {name}(x)", node)
        elif name == "symbols":
            self.refuse('symbols needs a name: symbols["hello_world::main"]', node)
        else:
            self.constant(node, self.address(name, node))

    def register(self, node: ast.Name, register: str, shift: int, width: int) -> None:
        """Appends the push of a register or of a part of it."""
        self.push(node, Opcode.REGISTER, bytes([REGISTERS.index(register)]))
        if shift:
            self.constant(node, shift)
            self.emit(Opcode.SHIFT_RIGHT, -1)
        if width < 64:
            self.emit(Opcode[f"CAST_U{width}"], 0)

    def address(self, name: str, node: ast.expr) -> int:
        """The address of a symbol."""
        if name not in self.symbols:
            self.symbols[name] = self._look_up(name, node)
        return self.symbols[name]

    def _look_up(self, name: str, node: ast.expr) -> int:
        detail, cause = "", None
        if self.resolve is not None:
            try:
                address = self.resolve(name)
            except (LookupError, ValueError, UhyveError) as error:
                text = str(error.args[0]) if error.args else ""
                detail, cause = (f": {text}" if text and text != name else ""), error
            else:
                if isinstance(address, int) and 0 <= address < 1 << 64:
                    return int(address)
                detail = f": the symbol resolved to {address!r}, which is no address"
        if isinstance(node, ast.Name) and re.fullmatch(r"arg\d+", name):
            self.refuse(f"{name!r} is not a register: arg0 to arg5 are, further arguments lie on the stack", node)
        known = [*_REGISTER_NAMES, *_COUNTERS] if isinstance(node, ast.Name) else []
        self.refuse(f"unknown name {name[:200]!r}{_suggest(name, known)}{detail}", node, cause)


def _suggest(name: str, known: list[str]) -> str:
    import difflib  # only needed for an error

    near = difflib.get_close_matches(name[:64].lower(), known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
