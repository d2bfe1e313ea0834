"""Guests that attack: every hypercall with the worst parameters, images that lie, and the process that stays well."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from uhyve import GuestCrashError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 100
ATTACK = """
import sys, uhyve
image, folder = sys.argv[1:3]
files = {"/data": folder} if folder else {}
vm = uhyve.Vm(image, files=files, args=["a", "b"], env={"NAME": "value"}, output="none" if sys.argv[3:] else "capture")
try:
    result = vm.run(100)
    sys.stdout.buffer.write(result.output_bytes)
    print(f"[code {result.code}]")
except uhyve.GuestCrashError as error:
    print(f"{error.output}[crash {error.reason}]")
"""


def told(output: bytes) -> list[bytes]:
    """What the guest meant to print, among what it made the host print."""
    return re.findall(rb"section \d+|hostile ok|FAIL.*|still here|\[code .*\]|\[crash .*", output)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("interface", [1, 2, 3])
def test_hostile_guest_on_every_interface_gets_through_and_harms_nothing(
    guest: Callable[..., Path], python: Callable, tmp_path: Path, interface: int, mapped: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "beside").write_text("untouched")

    status, output, errors = python(
        ATTACK, guest("hostile", interface=interface), data if mapped else "", cwd=tmp_path
    ).finish(LIMIT)

    assert status == 0
    assert all(line.startswith(b"[WARN ") for line in errors.splitlines()), errors
    assert told(output) == [*(f"section {number}".encode() for number in range(1, 13)), b"hostile ok", b"[code 0]"]
    assert b"root:" not in output
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["beside", "data"]
    assert (tmp_path / "beside").read_text() == "untouched"


@pytest.mark.parametrize("pie", [True, False])
@pytest.mark.parametrize("aslr", [True, False])
def test_hostile_guest_at_other_addresses_gets_through(guest: Callable[..., Path], pie: bool, aslr: bool) -> None:
    result = Vm(guest("hostile", interface=3, pie=pie), aslr=aslr, memory="16MiB").run(LIMIT)

    assert (result.code, result.output_bytes[-11:]) == (0, b"hostile ok\n")


@pytest.mark.parametrize("section", range(1, 13))
def test_hostile_section_alone_gets_through(guest: Callable[..., Path], section: int) -> None:
    result = Vm(guest("hostile", interface=3, defines=[f"SECTION={section}"]), output_limit=1 << 20).run(LIMIT)

    assert result.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("interface", [1, 3])
def test_hostile_guest_that_opens_files_without_end_is_refused_at_some_point(
    guest: Callable[..., Path], python: Callable, tmp_path: Path, interface: int
) -> None:
    image = guest("hostile", interface=interface, defines=["SECTION=13"])

    status, output, errors = python(ATTACK, image, tmp_path).finish(LIMIT)

    assert status == 0
    assert all(line.startswith(b"[WARN ") for line in errors.splitlines()), errors
    assert told(output) == [b"section 13", b"hostile ok", b"[code 0]"]


@pytest.mark.parametrize("interface", [1, 3])
@pytest.mark.parametrize("section", [20, 21, 27])
def test_hostile_exit_with_a_code_out_of_ram_is_a_crash(
    guest: Callable[..., Path], interface: int, section: int
) -> None:
    vm = Vm(guest("hostile", interface=interface, defines=[f"SECTION={section}"]))

    with pytest.raises(GuestCrashError, match="Exit with a bad pointer to its code") as caught:
        vm.run(LIMIT)

    assert caught.value.output == f"section {section}\n"


@pytest.mark.parametrize("section", [22, 23])
def test_hostile_exit_by_a_byte_or_word_takes_it_as_the_address(guest: Callable[..., Path], section: int) -> None:
    # The first pages of RAM are zeros; above 4 GiB no such address is RAM.
    low = Vm(guest("hostile", interface=1, defines=[f"SECTION={section}"]), aslr=False).run(LIMIT)
    with pytest.raises(GuestCrashError, match="Exit with a bad pointer to its code"):
        Vm(guest("hostile", interface=3, defines=[f"SECTION={section}"])).run(LIMIT)

    assert (low.code, low.output) == (0, f"section {section}\n")


@pytest.mark.parametrize("interface", [1, 3])
@pytest.mark.parametrize("section", [25, 26])
def test_hostile_exit_with_a_wide_or_narrow_value_gives_its_low_bits(
    guest: Callable[..., Path], interface: int, section: int
) -> None:
    result = Vm(guest("hostile", interface=interface, defines=[f"SECTION={section}"])).run(LIMIT)

    assert (result.code, result.output) == (7, f"section {section}\n")


@pytest.mark.parametrize("interface", [1, 3])
def test_hostile_exit_by_a_string_instruction_is_refused(guest: Callable[..., Path], interface: int) -> None:
    vm = Vm(guest("hostile", interface=interface, defines=["SECTION=24"]))

    # KVM reports the string as one exit, which is no exit call, or as one exit each, and then the address is bad.
    try:
        result = vm.run(LIMIT)
    except GuestCrashError as error:
        ending = (error.reason.partition(":")[0], error.output)
    else:
        ending = (result.code, result.output)

    assert ending in [(95, "section 24\nstill here\n"), ("Exit with a bad pointer to its code", "section 24\n")]


def test_hostile_guests_side_by_side_in_one_process_get_through(guest: Callable[..., Path]) -> None:
    image = guest("hostile", interface=3)
    vms = [Vm(image, cpus=1 + number) for number in range(3)]
    for vm in vms:
        vm.start()

    results = [vm.wait(LIMIT) for vm in vms]

    assert [result.code for result in results] == [0, 0, 0]
