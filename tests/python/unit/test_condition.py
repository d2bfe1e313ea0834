"""Conditions: what compiles, what it computes, and what an error points at.

``interpret`` is a small reference of the bytecode. It is held against Python's own ``eval`` on random expressions, and
the Rust interpreter is held against the same when the extension is built.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uhyve.condition import (
    MAX_STACK,
    REGISTERS,
    CompiledCondition,
    Opcode,
    compile_condition,
    split_if,
)
from uhyve.errors import ConditionError

BASE = 0x1000
MEMORY = bytes((7 * i + 3) % 256 for i in range(64)) + b"\xff" * 16 + b"\0" * 16
VALUES = {name: 0x1122334455667788 + 0x0101 * i for i, name in enumerate(REGISTERS)}
VALUES |= {"rdi": BASE, "rsi": 9, "rdx": 0, "rcx": 2**64 - 1, "r8": 3, "r9": 2**63}
SYMBOLS = {"sys_open": 0x20_0000, "hello_world::main": 0x40_0000, "step_1": 5}
COUNTERS = {"vcpu": 1, "hits": 2, "reached": 4}
SIZES = {"U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}


class EvaluationError(Exception):
    """What Rust's ``EvaluateError`` is; its argument is the kind."""


def fitting(number: int) -> int:
    if not -(2**127) <= number < 2**127:
        raise EvaluationError("overflow")
    return number


def shifted(value: int, count: int, left: bool) -> int:
    if not 0 <= count <= 127:
        raise EvaluationError("shift")
    return fitting(value << count) if left else value >> count


def divided(operation: Callable[[int, int], int], a: int, b: int) -> int:
    if b == 0:
        raise EvaluationError("division")
    return fitting(operation(a, b))


def wrapped(kind: str, number: int) -> int:
    return int.from_bytes((number % 2**64).to_bytes(8, "little")[: SIZES[kind]], "little", signed=kind[0] == "I")


def loaded(kind: str, address: int) -> int:
    if not 0 <= address < 2**64:
        raise EvaluationError("address")
    start = address - BASE
    if start < 0 or start + SIZES[kind] > len(MEMORY):
        raise EvaluationError("unmapped")
    return int.from_bytes(MEMORY[start : start + SIZES[kind]], "little", signed=kind[0] == "I")


BINARY: dict[str, Callable[[int, int], int]] = {
    "ADD": lambda a, b: fitting(a + b),
    "SUBTRACT": lambda a, b: fitting(a - b),
    "MULTIPLY": lambda a, b: fitting(a * b),
    "FLOOR_DIVIDE": lambda a, b: divided(lambda x, y: x // y, a, b),
    "MODULO": lambda a, b: divided(lambda x, y: x % y, a, b),
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "XOR": lambda a, b: a ^ b,
    "SHIFT_LEFT": lambda a, b: shifted(a, b, left=True),
    "SHIFT_RIGHT": lambda a, b: shifted(a, b, left=False),
    "EQUAL": lambda a, b: int(a == b),
    "NOT_EQUAL": lambda a, b: int(a != b),
    "LESS": lambda a, b: int(a < b),
    "LESS_EQUAL": lambda a, b: int(a <= b),
    "GREATER": lambda a, b: int(a > b),
    "GREATER_EQUAL": lambda a, b: int(a >= b),
    "DROP_SECOND": lambda a, b: b,
}
UNARY: dict[str, Callable[[int], int]] = {
    "NEGATE": lambda a: fitting(-a),
    "INVERT": lambda a: ~a,
    "NOT": lambda a: int(a == 0),
}


def interpret(condition: CompiledCondition) -> int:
    """The value of a condition, by the rules of ``src/debug/condition.rs``."""
    code, at, stack = condition.code, 0, list[int]()
    while at < len(code):
        opcode = Opcode(code[at])
        name = opcode.name
        at += 1
        if name == "CONSTANT":
            stack.append(condition.constants[int.from_bytes(code[at : at + 2], "little")])
            at += 2
        elif name == "REGISTER":
            stack.append(VALUES[REGISTERS[code[at]]])
            at += 1
        elif name.lower() in COUNTERS:
            stack.append(COUNTERS[name.lower()])
        elif name.startswith("LOAD_"):
            stack.append(loaded(name.removeprefix("LOAD_"), stack.pop()))
        elif name.startswith("CAST_"):
            stack.append(wrapped(name.removeprefix("CAST_"), stack.pop()))
        elif name in BINARY:
            right = stack.pop()
            stack.append(BINARY[name](stack.pop(), right))
        elif name in UNARY:
            stack.append(UNARY[name](stack.pop()))
        elif name == "MEMBER":
            element, found = stack.pop(), stack.pop()
            stack.append(found | (stack[-1] == element))
        elif name == "TUCK":
            stack.insert(-1, stack[-1])
            stack[-3], stack[-2] = stack[-2], stack[-3]
            assert stack[-3] == stack[-1]
        else:
            distance = int.from_bytes(code[at : at + 2], "little")
            at += 2
            at = jumped(name, stack, at, distance)
        assert len(stack) <= MAX_STACK
    (value,) = stack
    return value


def jumped(name: str, stack: list[int], at: int, distance: int) -> int:
    if name == "JUMP":
        return at + distance
    if name == "JUMP_IF_ZERO":
        return at + distance if stack.pop() == 0 else at
    if (stack[-1] == 0) == (name == "JUMP_IF_ZERO_OR_DROP"):
        return at + distance
    stack.pop()
    return at


class Checked(int):
    """An integer whose arithmetic has the limits of the bytecode, for ``eval``."""

    def __bool__(self) -> bool:
        return int(self) != 0

    def __neg__(self) -> Checked:
        return Checked(fitting(-int(self)))

    def __invert__(self) -> Checked:
        return Checked(~int(self))

    def __pos__(self) -> Checked:
        return self


def _define(python: str, name: str) -> None:
    operation = BINARY[name]
    setattr(Checked, f"__{python}__", lambda a, b: Checked(operation(int(a), int(b))))
    setattr(Checked, f"__r{python}__", lambda a, b: Checked(operation(int(b), int(a))))


for _python, _name in {
    "add": "ADD", "sub": "SUBTRACT", "mul": "MULTIPLY", "floordiv": "FLOOR_DIVIDE", "mod": "MODULO",
    "and": "AND", "or": "OR", "xor": "XOR", "lshift": "SHIFT_LEFT", "rshift": "SHIFT_RIGHT",
}.items():  # fmt: skip
    _define(_python, _name)


class Width:
    """``u8`` and its kin, for ``eval``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, address: int) -> Checked:
        return Checked(loaded(self.kind, int(address)))

    def __call__(self, number: int) -> Checked:
        return Checked(wrapped(self.kind, int(number)))


class _CheckNumbers(ast.NodeTransformer):
    """Makes literals, comparisons and negations ``Checked`` too."""

    def _checked(self, node: ast.expr) -> ast.expr:
        return ast.Call(ast.Name("Checked", ast.Load()), [node], [])

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return node if isinstance(node.value, str) else self._checked(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        return self._checked(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return self._checked(node) if isinstance(node.op, ast.Not) else node


def python_value(expression: str) -> int:
    """What Python's own ``eval`` says, with the limits of 128 bits and of shift counts."""
    names: dict[str, Any] = {name: Checked(value) for name, value in (VALUES | COUNTERS | SYMBOLS).items()}
    names |= {kind.lower(): Width(kind) for kind in SIZES}
    names |= {"pc": names["rip"], "sp": names["rsp"], "symbols": {k: Checked(v) for k, v in SYMBOLS.items()}}
    names |= {"eax": Checked(VALUES["rax"] % 2**32), "ax": Checked(VALUES["rax"] % 2**16)}
    names |= {"al": Checked(VALUES["rax"] % 256), "ah": Checked(VALUES["rax"] // 256 % 256)}
    names |= {"r8d": Checked(VALUES["r8"] % 2**32), "sil": Checked(VALUES["rsi"] % 256)}
    names |= {f"arg{i}": names[name] for i, name in enumerate(("rdi", "rsi", "rdx", "rcx", "r8", "r9"))}
    names |= {"Checked": Checked, "__builtins__": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.fix_missing_locations(_CheckNumbers().visit(ast.parse(expression.strip(), mode="eval")))
        return int(eval(compile(tree, "<test>", "eval"), names))


def outcome(function: Callable[[], int]) -> int | str:
    try:
        return function()
    except EvaluationError as error:
        return str(error.args[0])


def compiled(expression: str) -> CompiledCondition:
    return compile_condition(expression, SYMBOLS.__getitem__)


CONSTRUCTS = (
    """
arg1 > 8 and u32[arg0 + 8] != 0
rax
r15 == 0x10 + 0b11 - 0o7
pc + sp + rip - rsp
eax | ax ^ al & ah
r8d + sil
vcpu == 1 and hits < 3 and reached > hits
True + True
False
1_000
sys_open + 0x10
symbols["hello_world::main"] < rip
u8[arg0] + u16[arg0 + 1] + u32[arg0 + 3] + u64[arg0 + 8]
i8[arg0 + 64] + i16[arg0 + 64] + i32[arg0 + 64] + i64[arg0 + 64]
u64[u8[arg0] + 0x1000 - 3]
-7 // 2
7 % -3
-(5) + ~6 - +7
1 << 4 >> 2
1 < 2 < 3
1 < 2 > 3 != 4
3 < arg1 <= 9 == 9
rcx in (1, 2, rcx)
1 not in [2, 3]
1 in {1}
1 in ()
1 < 2 in (2, 3)
3 < 2 in (2, 3)
not arg2
not 1 < 2
arg2 or 5
arg2 and 1 // 0
1 or 1 // 0
arg2 or 0 or vcpu
1 if arg2 else 2 if vcpu else 3
(1 if 1 else 2) + 1
u8(0x1ff) + u16(-1) + u32(-1) + u64(-1)
i8(0x80) + i16(0x8000) + i32(0x80000000) + i64(0x8000000000000000)
(1 << 126) * 2
-(1 << 126) * 2
1 << 128
1 >> -1
1 % 0
u8[0]
u8[-1]
1 in (1, u8[0])
  arg0 == 4096
(arg0 ==
 4096)
""".strip("\n")
    .replace("(arg0 ==\n", "(arg0 ==\\n")
    .splitlines()
)


@pytest.mark.parametrize("expression", [line.replace("\\n", "\n") for line in CONSTRUCTS])
def test_compile_condition_each_construct_computes_what_python_does(expression: str) -> None:
    condition = compiled(expression)
    assert outcome(lambda: interpret(condition)) == outcome(lambda: python_value(expression))


@pytest.mark.parametrize(
    "name",
    "eax ebx ecx edx esp ebp esi edi eip eflags ax bx cx dx bp si di al bl cl dl ah bh ch dh spl bpl sil dil "
    "r8d r15d r8w r15w r8b r15b pc sp".split(),
)
def test_compile_condition_part_of_a_register_is_masked(name: str) -> None:
    value = interpret(compile_condition(name))
    full = {"pc": "rip", "eip": "rip", "sp": "rsp", "eflags": "rflags"}.get(name)
    if full is None and name.startswith("r"):
        full = name[:-1]
    full = full or "r" + name.removeprefix("e").rstrip("lh").ljust(2, "x" if len(name.rstrip("lh")) == 1 else "?")
    whole = VALUES[full]
    high = name in ("ah", "bh", "ch", "dh")
    bits = 64 if name in ("pc", "sp") else 32 if name[0] == "e" or (name[-1] == "d" and name[0] == "r") else None
    if bits is None:
        bits = 8 if high or name[-1] in "lb" else 16
    assert value == (whole >> 8 if high else whole) % 2**bits


def test_compile_condition_symbols_are_resolved_once_and_listed() -> None:
    asked: list[str] = []

    def resolve(name: str) -> int:
        asked.append(name)
        return SYMBOLS[name]

    condition = compile_condition('step_1 == step_1 or symbols["hello_world::main"] == pc', resolve)
    assert asked == ["step_1", "hello_world::main"]
    assert condition.symbols == (("step_1", 5), ("hello_world::main", 0x40_0000))
    assert str(condition) == condition.expression
    assert hash(condition) == hash(compile_condition(condition.expression, resolve))


ERRORS = [
    ("", 1, "empty"),
    ("   ", 1, "empty"),
    ("arg0 >", 7, "syntax"),
    ("arg1 > 8 and foo", 14, "unknown name 'foo'"),
    ("arg1 > 8 and raxx", 14, "did you mean rax"),
    ("  1 + rbxx", 7, "did you mean rbx"),
    ("RAX == 1", 1, "did you mean rax"),
    ("arg6 == 1", 1, "arg0 to arg5"),
    ("arg0 / 2", 6, "'//'"),
    ("arg0 ** 2", 6, "1 << n"),
    ("arg0 @ 2", 6, "'@'"),
    ("arg0 is 1", 6, "'=='"),
    ("arg0 is not 1", 6, "'!='"),
    ("1 + 2.5", 5, "2.5"),
    ("1 + None", 5, "None"),
    ("'text' == 1", 1, "text has no value"),
    ("'ä' == 1", 1, "text has no value"),
    ('symbols["ä"] == 2', 9, "unknown name 'ä'"),
    ('symbols["step_1"] == "ö" + fo', 22, "text has no value"),
    ("é + 1", 1, "unknown name"),
    ("step_1 + é + fo", 10, "unknown name 'é'"),
    ("u8 == 1", 1, "u8[address]"),
    ("symbols == 1", 1, "symbols needs a name"),
    ("symbols[1]", 9, "quotes"),
    ("u24[1]", 1, "did you mean u"),
    ("1 + u8[1:2]", 8, "one number"),
    ("u8[1, 2]", 4, "one number"),
    ("arg0[1]", 1, "subscripted"),
    ("(1)[1]", 2, "subscripts"),
    ("1 + abs(1)", 5, "casts"),
    ("u8(1, 2)", 1, "one number"),
    ("u8(x=1)", 1, "one number"),
    ("u8(*arg0)", 1, "one number"),
    ("arg0.x", 1, "attribute"),
    ("hello_world.main == 1", 1, "symbols["),
    ("pc == hello_world::main", 18, "symbols["),
    ("arg0 && arg1", 7, "'and'"),
    ("(1, 2)", 1, "to the right of 'in'"),
    ("1 in 2", 6, "written out"),
    ("1 in (1, 2) == 1", 6, "go on"),
    ("1 in (*arg0,)", 7, "Starred"),
    ("(x := 1)", 2, "'=='"),
    ("lambda: 1", 1, "callable"),
    ("[x for x in (1,)]", 1, "ListComp"),
    ("arg0 = 1", 6, "'=='"),
    ("1 << " + str(2**127), 6, "128"),
    ("arg0 == 1\0", 10, ""),
    ("arg0 == '\ud800'", 10, ""),
    ("arg0; arg1", 5, "syntax"),
    ("import os", 1, "syntax"),
    ("f'{arg0}'", 1, "JoinedStr"),
]


@pytest.mark.parametrize(("expression", "column", "text"), ERRORS)
def test_compile_condition_bad_expression_points_at_the_column(expression: str, column: int, text: str) -> None:
    with pytest.raises(ConditionError) as caught:
        compiled(expression)
    message = str(caught.value)
    if "\0" not in expression:  # where Python itself sees a null byte depends on its version
        assert caught.value.column == column
        assert message.splitlines()[2].index("^") == column + 1
        assert message.startswith(f"column {column}: ")
    assert text in message
    assert caught.value.expression == expression


def test_compile_condition_error_on_a_later_line_points_there() -> None:
    with pytest.raises(ConditionError, match="line 2, column 4") as caught:
        compiled("(arg0 and\n   foo)")
    assert str(caught.value).splitlines()[1:] == ["     foo)", "     ^"]
    assert caught.value.column == 4


def test_compile_condition_long_line_shows_the_part_around_the_column() -> None:
    with pytest.raises(ConditionError) as caught:
        compiled("1 + " * 200 + "foo" + " + 1" * 200)
    _, shown, caret = str(caught.value).splitlines()
    assert caught.value.column == 801
    assert len(shown) < 110
    assert shown[caret.index("^") :].startswith("foo")


@pytest.mark.parametrize(
    "expression",
    [
        "1" * 5000,
        "(" * 2000 + "1" + ")" * 2000,
        "-" * 4000 + "1",
        "not " * 1000 + "1",
        "u8[" * 500 + "1" + "]" * 500,
        "1 if 1 else " * 300 + "1",
        "1 - (" * 90 + "1" + ")" * 90,
        "1 < (" * 80 + "1" + ")" * 80,
        "9" * 4096,
    ],
)
def test_compile_condition_too_much_is_refused_clearly(expression: str) -> None:
    with pytest.raises(ConditionError) as caught:
        compiled(expression)
    assert caught.value.column is not None
    assert len(str(caught.value)) < 600


def test_compile_condition_long_chains_are_no_nesting() -> None:
    assert interpret(compiled("1 + " * 900 + "1")) == 901
    assert interpret(compiled("0 or " * 700 + "7")) == 7
    assert interpret(compiled("0 < " + "1 <= " * 700 + "1")) == 1
    assert interpret(compiled("5 in (" + "1, " * 1000 + "5)")) == 1


def test_compile_condition_near_the_recursion_limit_raises_condition_error() -> None:
    def dive() -> None:
        try:
            dive()
        except RecursionError:  # no room for another frame; on the way up there soon is room for an error
            compiled("~" * 90 + "1")

    with pytest.raises(ConditionError, match="nested too deeply"):
        dive()


@pytest.mark.parametrize("error", [LookupError("gone"), ValueError("gone"), KeyError("foo")])
def test_compile_condition_resolver_that_fails_is_the_cause(error: Exception) -> None:
    def resolve(name: str) -> int:
        raise error

    with pytest.raises(ConditionError, match="unknown name 'foo'") as caught:
        compile_condition("1 + foo", resolve)
    assert caught.value.__cause__ is error
    assert caught.value.column == 5


@pytest.mark.parametrize("address", [-1, 1 << 64, "text", None])
def test_compile_condition_resolver_without_an_address_is_refused(address: Any) -> None:
    with pytest.raises(ConditionError, match="no address"):
        compile_condition("foo", lambda name: address)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sys_write if arg1 > 8", ("sys_write", "arg1 > 8")),
        ("sys_write", ("sys_write", None)),
        (" a::b+0x10  if  1 if 2 else 3 ", ("a::b+0x10", "1 if 2 else 3")),
        ("f if(arg1)", ("f", "(arg1)")),
        ("iffy", ("iffy", None)),
        ("notif if x", ("notif", "x")),
        ("<a as b>::c if 1", ("<a as b>::c", "1")),
        ("*0x10 if 1", ("*0x10", "1")),
        ("", ("", None)),
    ],
)
def test_split_if_location_and_condition_are_separated(text: str, expected: tuple[str, str | None]) -> None:
    assert split_if(text) == expected


@pytest.mark.parametrize(("text", "column"), [("if arg1 > 8", 1), ("f if", 4), ("f if  ", 4)])
def test_split_if_half_missing_is_refused(text: str, column: int) -> None:
    with pytest.raises(ConditionError) as caught:
        split_if(text)
    assert caught.value.column == column


LEAVES = st.one_of(
    st.sampled_from(
        [*REGISTERS, *COUNTERS, "pc", "sp", "eax", "ah", "al", "r8d", "sil", "sys_open", "True", "False"]
        + [f"arg{i}" for i in range(6)]
        + ["u32[arg0 + 8]", "i16[arg0 + 64]", 'symbols["hello_world::main"]', str(2**127 - 1), "127", "128"]
    ),
    st.integers(0, 300).map(str),
    st.integers(0, 2**70).map(hex),
)


def _combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from("+ - * // % & | ^ << >> == != < <= > >= and or".split())
    comparison = st.sampled_from("== != < <= > >=".split())
    width = st.sampled_from([kind.lower() for kind in SIZES])
    collection = st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]")
    return st.one_of(
        st.tuples(inner, binary, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, binary, inner, binary, inner).map(lambda t: "(" + " ".join(t) + ")"),
        st.tuples(inner, comparison, inner, comparison, inner).map(lambda t: "(" + " ".join(t) + ")"),
        st.tuples(st.sampled_from(["-", "+", "~", "not "]), inner).map(lambda t: f"({t[0]}{t[1]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(inner, st.sampled_from(["in", "not in"]), collection).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, comparison, inner, collection).map(lambda t: f"({t[0]} {t[1]} {t[2]} in {t[3]})"),
        st.tuples(width, inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(width, inner).map(lambda t: f"{t[0]}[arg0 + ({t[1]}) % 90]"),
    )


EXPRESSIONS = st.recursive(LEAVES, _combined, max_leaves=12)


@given(EXPRESSIONS)
@settings(max_examples=1000, deadline=None)
def test_compile_condition_any_expression_computes_what_python_does(expression: str) -> None:
    condition = compiled(expression)
    assert outcome(lambda: interpret(condition)) == outcome(lambda: python_value(expression))


@given(st.text(max_size=40) | st.text(alphabet="()[]+-*/%<>=!&|^~ 01axurgis.,:'\"\n\\#", max_size=30))
@settings(max_examples=500, deadline=None)
def test_compile_condition_any_text_compiles_or_is_refused(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled(text)
        except ConditionError as error:
            assert error.column is not None and error.column >= 1


def extension() -> Any:
    """``uhyve._core``, or a skip if it is not built or lacks what a test needs."""
    return pytest.importorskip("uhyve._core", reason="the extension is not built")


def test_opcodes_and_registers_are_those_of_rust() -> None:
    core = extension()
    assert dict(core.CONDITION_OPCODES) == {opcode.name: int(opcode) for opcode in Opcode}
    registers = dict(core.CONDITION_REGISTERS)
    assert {name: registers[name] for name in REGISTERS} == {name: i for i, name in enumerate(REGISTERS)}


def rust_outcome(core: Any, condition: CompiledCondition) -> bool | str:
    try:
        return bool(
            core.evaluate_condition(condition.code, list(condition.constants), VALUES, {BASE: MEMORY}, **COUNTERS)
        )
    except Exception as error:  # the extension maps EvaluateError to an exception with Rust's text
        words = {"128 bits": "overflow", "divides by zero": "division", "shift count": "shift"}
        words |= {"not a 64-bit address": "address", "isn't there": "unmapped"}
        return next((kind for word, kind in words.items() if word in str(error)), repr(error))


@given(EXPRESSIONS)
@settings(max_examples=1000, deadline=None)
def test_rust_any_expression_computes_what_python_does(expression: str) -> None:
    core = extension()
    if not hasattr(core, "evaluate_condition"):
        pytest.skip("uhyve._core has no evaluate_condition")
    expected = outcome(lambda: python_value(expression))
    assume(isinstance(expected, int | str))
    assert rust_outcome(core, compiled(expression)) == (expected if isinstance(expected, str) else expected != 0)


def test_import_condition_does_not_load_difflib() -> None:
    code = "import sys, uhyve.condition; sys.exit('difflib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
