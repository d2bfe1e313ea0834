"""The session that upstream's own test of its stub has, with a guest of ours and a stock gdb.

``break``, ``next``, ``print`` and ``set var`` of an integer and of a floating-point number, ``hbreak``, a register set
before an instruction reads it, ``watch`` and ``awatch`` of a global of one byte, and the exit code, which tells that
the guest itself has seen what gdb had set.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(100)]

TO_FIRST_LOCALS = ["break scenario", "continue", "next", "print number", "set var number = 6", "print number"]
FLOATING = ["next", "next", "print fraction", "set var fraction = 4.5", "print fraction"]
HARDWARE = ["hbreak mark", "continue", "finish", "set $rcx = 5", "next", "print $rax", "print copied"]
WATCH = ["next", "watch watched", "print watched", "print seen", "continue", "print watched", "print seen"]
ACCESS = ["delete 3", "next", "awatch watched", "continue", "next", "print seen", "delete", "continue"]
VALUES = [5, 6, 3.5, 4.5, 5, 5, 2, 0, 3, 0, 3]


@pytest.mark.parametrize("pie", [True, False])
def test_upstreams_session_shows_the_same_values_and_ends_with_0(serve: Callable[..., Served], pie: bool) -> None:
    served = serve("scenario", build={"optimize": "-O0", "pie": pie})

    said = served.script(*TO_FIRST_LOCALS, *FLOATING, *HARDWARE, *WATCH, *ACCESS)

    values = [float(value) for value in re.findall(r"^\$\d+ = ([\d.]+)", said.output, flags=re.MULTILINE)]
    assert values == VALUES, said
    assert re.search(r"Hardware watchpoint 3: watched\s+Old value = 2 .*\s+New value = 3 ", said.output), said
    assert re.search(r"Hardware access \(read/write\) watchpoint 4: watched\s+Value = 3 ", said.output), said
    assert "exited normally" in said
    assert said.status == 0
    assert served.dbg.stop.code == 0
    assert served.dbg.output == "number=6 fraction=0x4012000000000000 copied=5 watched=3\n"
