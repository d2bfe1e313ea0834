"""The real Hermit 0.6.0 images, from Python and from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 100


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What hello_c opens."""
    (tmp_path / "hostname").write_text("the-mapped-host\n")
    return {"/etc/hostname": tmp_path / "hostname"}


@pytest.mark.parametrize("aslr", [True, False])
def test_hello_world_ends_with_0_and_its_greeting(hermit_060: Path, aslr: bool) -> None:
    vm = Vm(hermit_060 / "hello_world", aslr=aslr)

    result = vm.run(LIMIT)

    assert (vm.image.entry_version, vm.image.interface, vm.image.relocatable) == (3, 1, True)
    assert result.code == 0
    assert "Hello World!" in result.output
    assert result.stats.exits["pci_write"] == result.stats.exits["pci_read"] == 1024
    assert result.stats.hypercalls["exit"] == 1


def test_hello_c_prints_the_mapped_hostname_and_ends_with_0(hermit_060: Path, files: dict[str, Path]) -> None:
    vm = Vm(hermit_060 / "hello_c", files=files, env={"NAME": "value 1"}, args=["first", "second"])

    result = vm.run(LIMIT)

    assert (vm.image.entry_version, vm.image.relocatable) == (3, False)
    assert result.code == 0
    assert "Hello World!" in result.output
    assert "the-mapped-host" in result.output
    assert "NAME=value 1" in result.output
    assert "first" in result.output
    assert "second" in result.output


def test_hello_c_without_files_says_that_it_cant_open_one(hermit_060: Path) -> None:
    result = Vm(hermit_060 / "hello_c", env={"NAME": "value"}).run(LIMIT)

    assert result.code == 0
    assert "Unable to open file /etc/hostname" in result.output


def test_hello_c_by_the_command_line_prints_the_mapped_hostname(
    hermit_060: Path, command: Callable, files: dict[str, Path]
) -> None:
    child = command(
        "-e",
        "host",
        "--file-mapping",
        f"{files['/etc/hostname']}:/etc/hostname",
        hermit_060 / "hello_c",
        "an",
        "argument",
    )

    status, output, _ = child.finish(LIMIT)

    assert status == 0
    assert b"Hello World!" in output
    assert b"the-mapped-host" in output
    assert b"argument" in output


def test_hello_world_by_the_command_line_ends_with_0(hermit_060: Path, command: Callable) -> None:
    status, output, _ = command(hermit_060 / "hello_world").finish(LIMIT)

    assert status == 0
    assert b"Hello World!" in output


@pytest.mark.parametrize("name", ["hello_world", "hello_c"])
def test_images_on_two_vcpus_end_with_0(hermit_060: Path, name: str) -> None:
    assert Vm(hermit_060 / name, cpus=2).run(LIMIT).code == 0
