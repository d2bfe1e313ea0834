"""Guests that crash: the exception, its facts, and that the VM is over then."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING

import pytest

from uhyve import GuestCrashError, TimeoutExpired, UhyveError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 60
GENERAL = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16))}


def crash(vm: Vm) -> GuestCrashError:
    with pytest.raises(GuestCrashError) as caught:
        vm.run(LIMIT)
    assert not vm.running
    return caught.value


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize(
    ("kind", "symbol"),
    [
        ("triple", "crash_triple"),
        ("int3_no_idt", "crash_int3_no_idt"),
        ("jump_null", None),
        ("stack", "recurse"),
    ],
)
def test_crash_by_a_triple_fault_tells_vcpu_registers_symbol_and_output(
    guest: Callable[..., Path], kind: str, symbol: str | None, cpus: int, shutdown_keeps_registers: bool
) -> None:
    error = crash(Vm(guest("crash", defines=[f"KIND={kind}"]), cpus=cpus))

    assert (error.vcpu, error.reason.split(" (")[0], error.output) == (0, "triple fault", f"crash {kind}\n")
    assert "vCPU 0" in str(error)
    assert set(error.registers) == GENERAL | {"rip", "rflags"}
    assert f"{error.registers['rip']:#x}" in str(error)
    # KVM finds some triple faults itself, while it delivers an exception; then registers are kept on any processor.
    is_lost = "after the CPU's reset" in error.reason
    assert not (is_lost and shutdown_keeps_registers)
    if is_lost:
        assert (error.registers["rip"], error.symbol) == (0xFFF0, None)
    elif symbol is None:
        assert (error.registers["rip"], error.symbol) == (0, None)
    else:
        assert error.symbol is not None
        assert error.symbol.split("+")[0] == symbol
        assert symbol in str(error)


def test_crash_by_reserved_bits_in_cr3_is_reported(guest: Callable[..., Path]) -> None:
    error = crash(Vm(guest("crash", defines=["KIND=cr3_reserved"])))

    # An emulated CPU lets the guest load them, and refuses to run it then.
    reasons = ("KVM_EXIT_FAIL_ENTRY", "triple fault") if os.environ.get("KVMBOX") else ("triple fault",)
    assert any(reason in error.reason for reason in reasons)
    assert (error.vcpu, error.output) == (0, "crash cr3_reserved\n")


def test_crash_by_a_page_table_of_nothing_ends_the_run(guest: Callable[..., Path], cpu_kind: str) -> None:
    vm = Vm(guest("crash", defines=["KIND=cr3"]))

    # Where hardware walks the page tables, the vCPU may also try for ever to fetch its next instruction.
    with pytest.raises(GuestCrashError if cpu_kind != "hardware" else (GuestCrashError, TimeoutExpired)) as caught:
        vm.run(LIMIT if cpu_kind != "hardware" else 2)

    assert caught.value.output == "crash cr3\n"
    assert not vm.running


def test_crash_of_an_application_processor_names_it(guest: Callable[..., Path]) -> None:
    error = crash(Vm(guest("crash", defines=["KIND=ap_triple"]), cpus=2))

    assert (error.vcpu, error.reason.split(" (")[0], error.output) == (1, "triple fault", "crash ap_triple\n")


@pytest.mark.parametrize(("kind", "access"), [("mmio", "read"), ("mmio_write", "write")])
def test_crash_by_an_access_to_nothing_names_the_address(guest: Callable[..., Path], kind: str, access: str) -> None:
    error = crash(Vm(guest("crash", defines=[f"KIND={kind}"])))

    assert f"{access} of 4 bytes at guest physical address 0xd0000000" in error.reason
    assert error.symbol is not None
    assert error.symbol.startswith(f"crash_{kind}")


def test_avx_that_the_cpu_announces_is_executed_on_every_back_end(guest: Callable[..., Path]) -> None:
    result = Vm(guest("crash", defines=["KIND=avx"])).run(LIMIT)

    assert result.code == 0
    assert result.output in ("crash avx\navx ok\n", "crash avx\navx not offered\n")


@pytest.mark.parametrize("interface", [1, 2, 3])
@pytest.mark.parametrize("pie", [True, False])
def test_crash_on_every_kind_of_image_finds_the_symbol(guest: Callable[..., Path], interface: int, pie: bool) -> None:
    error = crash(Vm(guest("crash", interface=interface, pie=pie, defines=["KIND=mmio"])))

    assert error.symbol is not None
    assert error.symbol.split("+")[0] == "crash_mmio"


def test_vm_after_a_crash_runs_again(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("crash", defines=["KIND=triple"]))

    first, second = crash(vm), crash(vm)

    assert first.output == second.output == "crash triple\n"


def test_crash_of_a_started_guest_is_raised_by_wait(guest: Callable[..., Path]) -> None:
    vm = Vm(guest("crash", defines=["KIND=triple"]))
    vm.start()

    with pytest.raises(GuestCrashError):
        vm.wait(LIMIT)

    assert not vm.running


def test_crash_error_is_a_uhyve_error_that_can_be_pickled(guest: Callable[..., Path]) -> None:
    error = crash(Vm(guest("crash", defines=["KIND=triple"])))

    copy = pickle.loads(pickle.dumps(error))

    assert isinstance(error, UhyveError)
    assert (copy.vcpu, copy.reason, copy.registers, copy.symbol, copy.output, str(copy)) == (
        error.vcpu,
        error.reason,
        error.registers,
        error.symbol,
        error.output,
        str(error),
    )
