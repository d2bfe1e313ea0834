"""Watchpoints: every way to touch data, conditions on it, several vCPUs, and what else happens at the same moment.

Where debug registers don't fire, the engine executes every instruction by itself; what a user sees is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uhyve import BreakpointError, Debugger, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, Literal

    from uhyve import Breakpoint, Hit, Stop

pytestmark = pytest.mark.vm

LIMIT = 30
CONTENTS = b"0123456789abcdef"


@pytest.fixture
def ways(guest: Callable[..., Path], tmp_path: Path) -> Vm:
    """A VM whose guest touches its data in many ways, one after the other."""
    (tmp_path / "input").write_bytes(CONTENTS)
    return Vm(guest("watch"), files={"/data/input": tmp_path / "input"})


def touches(dbg: Debugger) -> dict[int, list[Stop]]:
    """Runs to the end; the watchpoints' stops by the way that made them."""
    way = dbg.breakpoint("on_way")
    found: dict[int, list[Stop]] = {}
    current = 0
    while (stop := dbg.cont(timeout=LIMIT)).reason != "exit":
        if stop.breakpoint == way:
            current = dbg.registers.rdi
        else:
            assert stop.reason == "watchpoint", stop
            found.setdefault(current, []).append(stop)
    assert (stop.code, dbg.output) == (0, "watch ok\n")
    return found


def values(stops: list[Stop]) -> list[tuple[object, object]]:
    return [(stop.old, stop.new) for stop in stops]


def test_watch_of_writes_sees_each_kind_of_write_with_old_and_new_value(ways: Vm) -> None:
    with ways.debug() as dbg:
        word = dbg.watch("word")
        found = touches(dbg)
        assert {way: values(stops) for way, stops in found.items()} == {
            1: [(0, 0x1111)],
            2: [(0x1111, 0x1111)],
            3: [(0x1111, 0x22001111)],
            5: [(0x22001111, 0x22001112)],
            6: [(0x22001112, 0x22001114)],
        }
        assert all(stop.access == "write" and stop.vcpu == 0 for stops in found.values() for stop in stops)
        assert found[1][0].address == dbg.symbol("word") == word.address
        assert (word.reached, word.hits, word.size) == (5, 5, 8)


def test_watch_of_reads_sees_reads_alone(ways: Vm, backend: str) -> None:
    with ways.debug() as dbg:
        word = dbg.watch("word", access="read")
        by_register = backend == "kvm" and word.kind == "debug register"
        found = touches(dbg)
        if by_register:
            # A real CPU does not tell reads from writes: one of the value that was there already is taken for a read.
            assert values(found.pop(2)) == [(0x1111, 0x1111)]
        assert {way: values(stops) for way, stops in found.items()} == {4: [(0x22001111, 0x22001111)]}
        assert found[4][0].access == "read"


def test_watch_of_a_byte_does_not_see_its_neighbours(ways: Vm) -> None:
    with ways.debug() as dbg:
        dbg.watch("word+3", size=1)
        found = touches(dbg)
        changed = {way for way, stops in found.items() if any(stop.old != stop.new for stop in stops)}
        assert changed == {3}
        assert set(found) <= {1, 2, 3, 5, 6}, "12 wrote beside the word"


def test_watch_of_a_range_sees_strings_pushes_and_an_instruction_of_ten_bytes(ways: Vm) -> None:
    with ways.debug() as dbg:
        dbg.watch("bytes", size=64, access="access", name="bytes")
        dbg.watch("stack_words", size=512)
        found = touches(dbg)
        assert set(found) == {7, 8, 9, 11}
        written = found[7][-1].new
        assert isinstance(written, bytes)
        assert written == b"\1" * 32 + bytes(32)
        assert {stop.access for stop in found[8]} == {"read"}
        assert found[9][0].address == dbg.symbol("stack_words") + 31 * 8
        assert "watchpoint 1 (bytes)" in str(found[7][0])


def test_file_that_the_host_reads_into_watched_memory_is_a_write(ways: Vm) -> None:
    with ways.debug() as dbg:
        dbg.watch("block", size=16)
        found = touches(dbg)
        assert set(found) == {8, 10}
        assert (found[10][0].access, found[10][0].new) == ("write", CONTENTS)


def test_stop_is_behind_the_instruction_and_names_the_function(ways: Vm) -> None:
    with ways.debug() as dbg:
        dbg.watch("shared", temporary=True)
        stop = dbg.cont(timeout=LIMIT)
        assert stop.symbol is not None and stop.symbol.startswith("count+")
        assert dbg.memory.read_u64(dbg.symbol("shared")) == stop.new == 1
        assert dbg.breakpoints == []
        assert dbg.cont(timeout=LIMIT).reason == "exit"


def test_conditions_counts_and_switches_are_those_of_breakpoints(ways: Vm) -> None:
    with ways.debug() as dbg:
        text = dbg.watch("shared", condition="u64[shared] % 50 == 0", ignore=50)
        seen: list[tuple[Any, ...]] = []

        def note(hit: Hit) -> bool:
            seen.append((hit.vcpu, hit.address, hit.access, hit.old, hit.new, hit.breakpoint.size))
            return hit.new == 7

        call = dbg.watch("own", condition=note)
        first = dbg.cont(timeout=LIMIT)
        assert (first.breakpoint, first.old, first.new) == (call, 6, 7)
        assert seen == [(0, dbg.symbol("own"), "write", n, n + 1, 8) for n in range(7)]
        call.enabled = False
        assert call.kind is None
        second = dbg.cont(timeout=LIMIT)
        assert (second.breakpoint, second.new, text.reached, text.hits) == (text, 100, 100, 1)
        text.delete()
        assert text.deleted
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert len(seen) == 7


def test_exception_in_a_callback_names_the_watchpoint(ways: Vm) -> None:
    def fail(hit: Hit) -> bool:
        raise LookupError(hit.new)

    with ways.debug() as dbg:
        dbg.watch("shared", condition=fail)
        with pytest.raises(LookupError) as caught:
            dbg.cont(timeout=LIMIT)
        assert "watchpoint 1 on vCPU 0" in caught.value.__notes__[0]
        assert dbg.stop.reason == "exception"


@pytest.mark.parametrize("cpus", [2, 4])
def test_every_write_of_every_vcpu_is_one_hit(guest: Callable[..., Path], tmp_path: Path, cpus: int) -> None:
    (tmp_path / "input").write_bytes(CONTENTS)
    vm = Vm(guest("watch"), cpus=cpus, files={"/data/input": tmp_path / "input"})
    with vm.debug() as dbg:
        shared = dbg.watch("shared", condition="0")
        own = [dbg.watch(f"own+{8 * n}", condition="0") for n in range(cpus)]
        last = dbg.watch(f"own+{8 * (cpus - 1)}", vcpu=0, condition="1")
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert shared.reached == 100 * cpus
        assert [w.reached for w in own] == [100] * cpus
        assert last.reached == 0


def test_stops_of_several_vcpus_are_each_reported_once(guest: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(CONTENTS)
    vm = Vm(guest("watch", defines=("COUNT=40",)), cpus=3, files={"/data/input": tmp_path / "input"})
    with vm.debug() as dbg:
        dbg.watch("own", size=24)
        seen = [0, 0, 0]
        while (stop := dbg.cont(timeout=LIMIT)).reason == "watchpoint":
            assert stop.address == dbg.symbol("own") + 8 * stop.vcpu
            seen[stop.vcpu] += 1
        assert (stop.reason, seen) == ("exit", [40, 40, 40])


def test_step_that_touches_is_a_watchpoint_stop_and_the_breakpoint_behind_is_met_next(ways: Vm) -> None:
    with ways.debug() as dbg:
        dbg.breakpoint("on_way", condition="arg0 == 2", temporary=True)
        dbg.cont(timeout=LIMIT)
        watch = dbg.watch("word")
        while (stop := dbg.step(timeout=LIMIT)).reason == "step":
            pass
        assert (stop.reason, stop.breakpoint, stop.old) == ("watchpoint", watch, 0x1111)
        # The breakpoint is where the next write ends.
        dbg.breakpoint("on_way", condition="arg0 == 3", temporary=True)
        dbg.cont(timeout=LIMIT)
        start = dbg.registers.rip
        while (behind := dbg.step(timeout=LIMIT)).reason == "step":
            pass
        assert behind.pc != start
    with ways.debug() as dbg:
        watch = dbg.watch("word", ignore=2)
        behind_address = behind.pc - start + dbg.symbol("on_way")
        met = dbg.breakpoint(behind_address)
        first, second = dbg.cont(timeout=LIMIT), dbg.cont(timeout=LIMIT)
        assert [(s.reason, s.breakpoint, s.pc) for s in (first, second)] == [
            ("watchpoint", watch, behind_address),
            ("breakpoint", met, behind_address),
        ]


def test_debuggers_own_write_is_no_access(ways: Vm) -> None:
    with ways.debug() as dbg:
        watch = dbg.watch("shared")
        dbg.memory.write_u64(dbg.symbol("shared"), 0)
        first = dbg.cont(timeout=LIMIT)
        assert (first.old, first.new) == (0, 1)
        dbg.memory.write_u64(dbg.symbol("shared"), 0)
        second = dbg.cont(timeout=LIMIT)
        assert (second.old, second.new, watch.reached) == (0, 1, 2)


def test_guest_under_watch_still_gets_its_interrupts(guest: Callable[..., Path]) -> None:
    with Vm(guest("timer")).debug() as dbg:
        watch = dbg.watch(dbg.registers.rsp - 4096, size=1, access="read", condition="0")
        assert watch.kind in ("debug register", "single-step")
        stop = dbg.cont(timeout=LIMIT)
        assert (stop.reason, stop.code) == ("exit", 0), dbg.output


def test_interrupt_of_a_watched_busy_loop_comes_at_once(guest: Callable[..., Path]) -> None:
    with Vm(guest("hang")).debug() as dbg:
        dbg.watch(dbg.registers.rsp - 4096, size=1, condition="0")
        assert dbg.cont(timeout=0.2).reason == "timeout"
        assert dbg.cont(timeout=0.2).reason == "timeout"


@pytest.mark.parametrize(
    ("where", "size", "access"),
    [
        ("word", 0, "write"),
        ("word", (1 << 16) + 1, "write"),
        (2**64 - 4, 8, "write"),
        ("word", 8, "execute"),
        ("no", 1, "read"),
    ],
)
def test_watch_that_makes_no_sense_is_refused(
    ways: Vm, where: str | int, size: int, access: Literal["write", "read"]
) -> None:
    with ways.debug() as dbg:
        with pytest.raises(BreakpointError):
            dbg.watch(where, size, access)
        assert dbg.breakpoints == []


def test_fallback_is_chosen_by_need_and_given_up_when_registers_are_free(
    ways: Vm, capabilities: dict[str, Any]
) -> None:
    with ways.debug() as dbg:
        watches: list[Breakpoint] = [dbg.watch(f"bytes+{8 * n}") for n in range(5)]
        kinds = [watch.kind for watch in watches]
        if not capabilities["watchpoints"]:
            assert kinds == ["single-step"] * 5
            return
        if capabilities["hardware_breakpoints"] > 4:
            assert kinds == ["debug register"] * 5
            return
        assert kinds == ["debug register"] * 4 + ["single-step"]
        watches[0].delete()
        assert watches[4].kind == "debug register"


def test_watch_shows_itself_in_words(ways: Vm) -> None:
    with ways.debug() as dbg:
        watch = dbg.watch("word", name="the word", condition="u64[word] > 0")
        assert repr(watch) == (
            f"<Watchpoint 1 'the word' at word ({watch.address:#x}), write of 8 bytes if u64[word] > 0: 0 of 0 hits>"
        )
        stop = dbg.cont(timeout=LIMIT)
        assert str(stop).endswith(f"watchpoint 1 (the word), hit 1: write at {watch.address:#x}, 0x0 → 0x1111")
