"""What of the debugger needs no machine: stops as values, texts, and the checks of arguments."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import uhyve
from uhyve import Breakpoint, Debugger, Frame, Stop, Vcpu, _core
from uhyve.breakpoint import unsigned

REASONS = ("entry", "breakpoint", "step", "interrupt", "timeout", "exit", "crash", "exception")


@pytest.mark.parametrize("reason", REASONS)
def test_stop_of_every_reason_has_a_text_that_names_it(reason: str) -> None:
    stop = Stop(reason, 1, 0x1000, code=3 if reason == "exit" else None, symbol="main", message="a triple fault")

    if reason == "exit":
        assert str(stop) == "the guest has ended with code 3"
    elif reason == "crash":
        assert str(stop) == "the guest has crashed: a triple fault"
    else:
        assert str(stop) == f"vCPU 1 stopped at main (0x1000): {reason}"


def test_stop_without_a_symbol_shows_the_address_alone() -> None:
    assert str(Stop("step", 0, 0xABC)) == "vCPU 0 stopped at 0xabc: step"


def test_stop_is_equal_to_one_with_the_same_fields_and_hashes_like_it() -> None:
    one, same, other = (Stop("step", 0, 1, number=n) for n in (5, 5, 6))

    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != ("step", 0, 1)
    assert len({one, same, other}) == 2


def test_stop_can_not_be_changed() -> None:
    stop = Stop("step", 0, 1)

    with pytest.raises(AttributeError, match="can't be changed"):
        stop.reason = "exit"
    with pytest.raises(AttributeError, match="can't be changed"):
        del stop.pc


@pytest.mark.parametrize("duplicate", [copy.copy, lambda stop: pickle.loads(pickle.dumps(stop))])
def test_stop_survives_copies(duplicate: object) -> None:
    stop = Stop("exit", 2, 0x1234, code=-5, symbol="f+0x1", number=7)

    assert duplicate(stop) == stop
    assert repr(duplicate(stop)) == repr(stop)


def test_stop_matches_by_position_and_by_name() -> None:
    match Stop("exit", 3, 0x10, code=-1):
        case Stop("exit", vcpu, pc, code=code):
            assert (vcpu, pc, code) == (3, 0x10, -1)
        case _:
            pytest.fail("no match")


def test_match_arguments_are_the_fields_in_the_order_of_the_constructor() -> None:
    parameters = [name for name in inspect.signature(Stop).parameters if name != "self"]

    assert list(Stop.__match_args__) == parameters
    assert parameters[:3] == ["reason", "vcpu", "pc"]


def test_reasons_of_the_package_and_of_the_core_are_the_same() -> None:
    source = inspect.getsource(inspect.getmodule(Stop))

    for reason in REASONS:
        assert f'"{reason}"' in source


@pytest.mark.parametrize("kind", [Debugger, Breakpoint, Vcpu, Frame, Stop])
def test_public_members_have_docstrings_and_annotations(kind: type) -> None:
    for name, member in vars(kind).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        function = member.fget if isinstance(member, property) else member
        assert function.__doc__, f"{kind.__name__}.{name}"
        assert "return" in function.__annotations__, f"{kind.__name__}.{name}"


def test_names_are_exported_by_the_package() -> None:
    for name in ("Breakpoint", "Debugger", "Hit", "Stop", "Vm"):
        assert getattr(uhyve, name) is not None
        assert name in uhyve.__all__


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_unsigned_takes_what_fits(value: int) -> None:
    assert unsigned("x", value) == value


@pytest.mark.parametrize("value", [-1, 2**64])
def test_unsigned_of_what_does_not_fit_is_a_breakpoint_error(value: int) -> None:
    with pytest.raises(uhyve.BreakpointError, match=f"x is {value}"):
        unsigned("x", value)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_unsigned_of_what_is_no_integer_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="x must be an integer"):
        unsigned("x", value)


def test_unsigned_takes_what_has_an_index() -> None:
    class Address:
        def __index__(self) -> int:
            return 0x1000

    assert unsigned("x", Address()) == 0x1000


@pytest.mark.parametrize("kind", [_core.Breakpoint, _core.Hit, _core.Registers, _core.Memory])
def test_classes_of_the_core_can_not_be_made_by_hand(kind: type) -> None:
    with pytest.raises(TypeError):
        kind()
