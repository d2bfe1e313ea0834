"""What the other tests stand on: each runs on the back end that its name says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm


@pytest.fixture
def machine(guest: Callable[..., Path]) -> Vm:
    """A VM that is made before the test's own fixtures are asked for, as most are."""
    return Vm(guest("hello"))


def test_test_that_does_not_ask_for_its_back_end_runs_on_it(machine: Vm, request: pytest.FixtureRequest) -> None:
    assert machine.run(timeout=30).backend == request.node.callspec.params["backend"]
