"""The Hermit 0.6.9 images, where a developer has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 110
ENVIRONMENT = {f"VARIABLE_{number}": f"value {number}" for number in range(10)}


@pytest.mark.parametrize("aslr", [True, False])
def test_hello_world_greets_and_ends_with_0(hermit_069: Path, aslr: bool) -> None:
    result = Vm(hermit_069 / "hello_world", aslr=aslr, env=ENVIRONMENT).run(LIMIT)

    assert result.code == 0
    assert "Hello, world!" in result.output
    assert "[0][FPU]: 1" in result.output


def test_hello_c_greets_shows_its_environment_and_ends_with_0(hermit_069: Path) -> None:
    result = Vm(hermit_069 / "hello_c", env=ENVIRONMENT, args=["one", "two"]).run(LIMIT)

    assert result.code == 0
    assert "Hello World!!!" in result.output
    for text in (*(f"{name}={value}" for name, value in ENVIRONMENT.items()), "one", "two"):
        assert text in result.output


def test_images_by_the_command_line_end_with_0(hermit_069: Path, command: Callable) -> None:
    for name, text in (("hello_world", b"Hello, world!"), ("hello_c", b"Hello World!!!")):
        status, output, _ = command(*(f"-e{key}=value" for key in ENVIRONMENT), hermit_069 / name).finish(LIMIT)

        assert status == 0
        assert text in output


@pytest.mark.slow
def test_rusty_demo_computes_and_ends(hermit_069: Path) -> None:
    result = Vm(hermit_069 / "rusty_demo", env=ENVIRONMENT, args=["argument"]).run(LIMIT)

    # It asserts that a sleep of 100 ms lasts no longer than some 105 ms, which an emulated machine may not keep.
    assert "6.283185307179586" in result.output
    assert "535.4916555247646" in result.output
    assert result.code == 0 or "sleep" in result.output
