"""What a guest finds when it starts: boot information, CPU state, TLS, relocations, APIC ids, device tree."""

from __future__ import annotations

import re
import shlex
import time
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 60
GIB = 1 << 30
WORDS = [
    "plain",
    "two words",
    "  spaces  ",
    "",
    "'single'",
    '"double"',
    "back\\slash",
    "$HOME `x` $(x) ;&|<>*?[]{}~!#",
    "a=b",
    "-v",
    "--flag=value",
    "tab\there",
    "new\nline",
    "ünïcödé",
    "漢字 🚀",
    "'\\''",
    "%s %d",
    "x" * 2000,
]


def numbers(output: str, kind: str) -> dict[str, int]:
    return {name: int(value, 0) for name, value in re.findall(rf"^{kind} (\w+): (\w+)$", output, re.MULTILINE)}


# Boot information and state.


@pytest.mark.parametrize("aslr", [True, False])
@pytest.mark.parametrize("pie", [True, False])
@pytest.mark.parametrize("interface", [1, 2, 3])
def test_boot_information_agrees_with_the_machine(
    guest: Callable[..., Path], interface: int, pie: bool, aslr: bool
) -> None:
    before = time.time_ns()

    result = Vm(guest("bootinfo", interface=interface, pie=pie), memory="32MiB", cpus=2, aslr=aslr).run(LIMIT)

    assert result.output.endswith("bootinfo ok\n"), result.output
    boot, state = numbers(result.output, "boot"), numbers(result.output, "state")
    assert boot["phys_end"] - boot["phys_start"] == 32 << 20
    assert boot["phys_start"] % (2 << 20) == 0
    assert boot["phys_start"] < boot["device_tree"] < boot["image_start"] < boot["image_end"] < boot["phys_end"]
    assert boot["platform"] == 1
    assert boot["num_cpus"] == 2
    assert boot["serial_port"] == (0x800 if interface == 1 else 0x1030)
    assert before <= boot["time_ns"] <= time.time_ns()
    assert 100_000 < boot["cpu_khz"] < 10_000_000
    assert state["rsp"] == boot["image_start"] - 0x8000
    if pie and interface > 1:
        assert 4 * GIB <= boot["phys_start"] <= boot["phys_end"] <= 64 * GIB
    else:
        assert boot["phys_end"] <= 3 * GIB
    if not aslr or not pie:
        assert boot["phys_start"] == (4 * GIB if pie and interface > 1 else 0)
    assert pie or boot["image_start"] == 0x80_0000


@pytest.mark.parametrize("interface", [1, 3])
def test_boot_with_aslr_varies_the_address(guest: Callable[..., Path], interface: int) -> None:
    vm = Vm(guest("bootinfo", interface=interface))

    starts = {numbers(vm.run(LIMIT).output, "boot")["phys_start"] for _ in range(6)}

    # Among 1,500 places six runs are at one place once in 10**16 times.
    assert len(starts) > 1


def test_boot_of_entry_version_3_starts_memory_at_0(guest: Callable[..., Path]) -> None:
    result = Vm(guest("bootinfo", entry_version=3), aslr=True).run(LIMIT)

    assert numbers(result.output, "boot")["phys_start"] == 0


@pytest.mark.parametrize("interface", [1, 2])
def test_boot_with_symbolic_relocations_applies_them(guest: Callable[..., Path], interface: int) -> None:
    result = Vm(guest("bootinfo", interface=interface, symbolic=True)).run(LIMIT)

    assert (result.code, result.output[-12:]) == (0, "bootinfo ok\n")


@pytest.mark.parametrize("interface", [1, 3])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_apic_ids_of_all_cpus_are_their_numbers(guest: Callable[..., Path], cpus: int, interface: int) -> None:
    result = Vm(guest("bootinfo", interface=interface, defines=["CHECK_APIC_ID"]), cpus=cpus).run(LIMIT)

    found = re.findall(r"^cpu (\d+): apic (\d+) x2apic (\d+) lapic (\d+)$", result.output, re.MULTILINE)
    assert result.code == 0
    assert found == [(str(n),) * 4 for n in range(cpus)]


def test_boot_tells_the_time_stamp_frequency_in_device_tree_and_boot_information(guest: Callable[..., Path]) -> None:
    tree = device_tree(Vm(guest("args", interface=3)).run(LIMIT).output)
    boot = numbers(Vm(guest("bootinfo", interface=3)).run(LIMIT).output, "boot")

    assert int(tree["/hermit,tsc khz"]) == boot["cpu_khz"]


# Arguments and environment by hypercalls (interface 1).


def lists(output: str) -> tuple[list[str], list[str]]:
    """The strings in the output of the guest ``args``, with newlines in them."""
    match = re.fullmatch(r"argc=(\d+)\n(.*)envc=(\d+)\n(.*)args ok\n", output, re.DOTALL)
    assert match is not None, output
    found = []
    for name, count, text in (("argv", match[1], match[2]), ("env", match[3], match[4])):
        parts = re.split(rf"^{name}\[\d+\]=", text, flags=re.MULTILINE)[1:]
        assert len(parts) == int(count)
        found.append([part.removesuffix("\n") for part in parts])
    return found[0], found[1]


def test_arguments_by_hypercall_arrive_exactly(guest: Callable[..., Path]) -> None:
    image = guest("args")

    arguments, environment = lists(Vm(image, args=WORDS).run(LIMIT).output)

    assert arguments == [str(image), *WORDS]
    assert environment == []


def test_environment_by_hypercall_arrives_exactly(guest: Callable[..., Path]) -> None:
    variables = {f"NAME_{number}": word for number, word in enumerate(WORDS)} | {"Ünï": "=", "lower": "a=b=c"}

    arguments, environment = lists(Vm(guest("args"), env=variables).run(LIMIT).output)

    assert len(arguments) == 1
    assert environment == [f"{name}={value}" for name, value in variables.items()]


def test_arguments_and_environment_of_128_entries_arrive(guest: Callable[..., Path]) -> None:
    args = [f"argument {number}" for number in range(127)]
    env = {f"NAME_{number}": str(number) for number in range(128)}

    arguments, environment = lists(Vm(guest("args"), args=args, env=env).run(LIMIT).output)

    assert arguments[1:] == args
    assert environment == [f"{name}={value}" for name, value in env.items()]


@pytest.mark.parametrize(
    ("keywords", "why"),
    [
        ({"args": ["x"] * 128}, "129 arguments .* at most 128"),
        ({"env": {f"N{number}": "" for number in range(129)}}, "129 environment variables.* at most 128"),
        ({"args": ["nul\0"]}, "NUL"),
        ({"env": {"NAME": "nul\0"}}, "NUL"),
        ({"env": {"": "x"}}, "empty"),
        ({"env": {"A=B": "x"}}, "contains"),
        ({"kernel_args": ["--"]}, "--"),
    ],
)
def test_arguments_that_cant_be_passed_are_refused(guest: Callable[..., Path], keywords: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Vm(guest("args"), **keywords).run(LIMIT)


def test_environment_of_the_host_is_read_at_each_start(
    guest: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = Vm(guest("args", interface=3), env="host")
    monkeypatch.setenv("UHYVE_TEST_VARIABLE", "first value")
    first = words(vm.run(LIMIT).output)
    monkeypatch.setenv("UHYVE_TEST_VARIABLE", "second value")
    second = words(vm.run(LIMIT).output)

    assert "env=UHYVE_TEST_VARIABLE=first value" in first
    assert "env=UHYVE_TEST_VARIABLE=second value" in second


# The device tree (interfaces 2 and 3, and there for 1 as well).


def device_tree(output: str) -> dict[str, str]:
    """Path and property, and the value: the last one of a list."""
    assert output.endswith("args ok\n"), output
    return dict(re.findall(r"^fdt (\S+ \S+): (.*)$", output, re.MULTILINE))


def words(output: str) -> list[str]:
    """The words of bootargs, which may have newlines in them."""
    match = re.search(r"^fdt /chosen bootargs: (.*)\nfdt cpus: ", output, re.MULTILINE | re.DOTALL)
    assert match is not None, output
    return shlex.split(match[1])


@pytest.mark.parametrize("interface", [2, 3])
def test_device_tree_arguments_split_into_the_given_words(guest: Callable[..., Path], interface: int) -> None:
    variables = {f"NAME_{number}": word for number, word in enumerate(WORDS)}
    vm = Vm(guest("args", interface=interface), kernel_args=["-ip", "10.0.5.3 x"], args=WORDS, env=variables)

    found = words(vm.run(LIMIT).output)

    environment = [f"env={name}={value}" for name, value in variables.items()]
    assert found == ["-ip", "10.0.5.3 x", *environment, "--", *WORDS]


def test_device_tree_of_a_big_environment_moves_and_arrives(guest: Callable[..., Path]) -> None:
    variables = {f"NAME_{number}": "value " * 20 for number in range(300)}

    found = words(Vm(guest("args", interface=3), env=variables).run(LIMIT).output)

    assert found == [f"env={name}={value}" for name, value in variables.items()]


@pytest.mark.parametrize(("interface", "defines"), [(1, ["WITH_FDT"]), (2, []), (3, [])])
def test_device_tree_describes_memory_cpus_and_mounts(
    guest: Callable[..., Path], tmp_path: Path, interface: int, defines: list[str]
) -> None:
    files = {"/data": tmp_path, "/etc/motd": b"hi"}
    vm = Vm(guest("args", interface=interface, defines=defines), cpus=4, memory="128MiB", files=files, aslr=False)

    output = vm.run(LIMIT).output

    tree = device_tree(output)
    start = 0 if interface == 1 else 4 * GIB
    assert tree["/ compatible"] == "hermit,uhyve"
    assert tree[f"/memory@{start:x} reg"].split() == [hex(start), hex(128 << 20)]
    assert int(tree["/hermit,tsc khz"]) > 0
    assert re.findall(r"^fdt /uhyve,mounts mounts: (.*)$", output, re.MULTILINE) == ["/data", "/etc"]
    assert "fdt cpus: 4" in output


def test_device_tree_without_files_has_no_mounts(guest: Callable[..., Path]) -> None:
    assert "mounts" not in Vm(guest("args", interface=3)).run(LIMIT).output
