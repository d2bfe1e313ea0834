"""Debug information: backtraces with inlining, source lines, breakpoints by file and line; with broken tables, too."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uhyve import BreakpointError, Debugger, Stop, Vm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.vm

LIMIT = 30
SOURCE = Path(__file__).resolve().parents[2] / "guests" / "frames.c"


def line(words: str) -> int:
    """The line of frames.c that a comment names."""
    lines = SOURCE.read_text().splitlines()
    [number] = [n for n, text in enumerate(lines, 1) if f"/* line: {words} */" in text]
    return number


def to(dbg: Debugger, where: str, condition: str | None = None) -> Stop:
    dbg.breakpoint(where, condition=condition, temporary=True)
    stop = dbg.cont(timeout=LIMIT)
    assert stop.reason == "breakpoint", stop
    return stop


def names(dbg: Debugger, vcpu: int | None = None) -> list[str | None]:
    return [frame.function for frame in dbg.backtrace(vcpu)]


@pytest.fixture(params=[True, False], ids=["pie", "fixed"])
def frames(guest: Callable[..., Path], request: pytest.FixtureRequest) -> Vm:
    return Vm(guest("frames", pie=request.param))


def test_backtrace_shows_callers_inlined_functions_and_lines(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "leaf", "arg0 == 6")
        trace = dbg.backtrace()
        assert [(f.function, f.inlined, f.line) for f in trace[1:5]] == [
            ("twice", True, line("in twice") + 1),
            ("middle", False, line("in middle")),
            ("outer", False, line("in outer")),
            ("shapes", False, line("calls outer")),
        ]
        assert [f.function for f in trace[5:]] == ["guest_main", "_start"]
        assert [f.level for f in trace] == list(range(7))
        assert all(Path(f.file or "").name == "frames.c" for f in trace[:6])
        # The frame of the caller is the stack before its call; an inlined function shares it.
        assert trace[0].cfa == dbg.registers.rsp + 8
        assert trace[1].cfa == trace[2].cfa
        known = [f.cfa for f in trace if f.cfa is not None]
        assert known == sorted(known)
        assert trace[2].symbol is not None
        assert trace[2].symbol.startswith("middle+")
        assert str(trace[2]).endswith(f"in middle at frames.c:{line('in middle')}")
        assert str(trace[1]).endswith("(inlined)")
        assert [f.function for f in dbg.backtrace(limit=2)] == ["leaf", "twice"]


def test_backtrace_of_recursion_has_a_frame_for_each_call(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "factorial", "arg0 == 1")
        assert names(dbg) == ["factorial"] * 5 + ["shapes", "guest_main", "_start"]
        assert {f.line for f in dbg.backtrace()[1:5]} == {line("factorial calls")}


def test_backtrace_at_every_instruction_of_a_call_knows_the_caller(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "no_frame")
        below = ["shapes", "guest_main", "_start"]
        seen = set()
        while (trace := names(dbg)) != below:
            seen.add(tuple(trace))
            assert trace in (["no_frame", *below], ["leaf", "no_frame", *below])
            assert dbg.step(timeout=LIMIT).reason == "step"
        assert len(seen) == 2


def test_backtrace_through_code_without_unwind_information_follows_frame_pointers(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "bare")
        assert names(dbg)[:2] == ["bare", "shapes"]
        to(dbg, "leaf")
        assert names(dbg) == ["leaf", "bare", "shapes", "guest_main", "_start"]


def test_backtrace_of_a_stack_that_leads_nowhere_ends(frames: Vm) -> None:
    with frames.debug() as dbg:
        to(dbg, "broken")
        for _ in range(2):
            to(dbg, "leaf")
            assert names(dbg)[:2] == ["leaf", "broken"]
            assert len(dbg.backtrace(limit=1000)) < 6
        dbg.registers.rsp = 2**64 - 4
        assert len(dbg.backtrace()) == 1
        dbg.registers.rip = 0xDEAD_0000_0000_0000
        [only] = dbg.backtrace()
        assert (only.function, only.file, only.symbol) == (None, None, None)


def test_backtrace_of_each_vcpu_is_its_own(guest: Callable[..., Path]) -> None:
    with Vm(guest("frames"), cpus=2).debug() as dbg:
        dbg.breakpoint("fib", vcpu=1, condition="arg0 == 1", temporary=True)
        assert dbg.cont(timeout=LIMIT).vcpu == 1
        first = names(dbg, 1)
        assert first[-2:] == ["guest_main", "_start"]
        assert first[:-2] == ["fib"] * 8
        assert names(dbg, 0)[-1] == "_start"
        assert names(dbg) == first


def test_breakpoint_by_line_stops_at_its_statement(frames: Vm) -> None:
    with frames.debug() as dbg:
        met = dbg.breakpoint(f"frames.c:{line('after middle')}")
        by_path = dbg.breakpoint(f"guests/frames.c:{line('after middle')}", enabled=False)
        assert by_path.address == met.address
        assert met.location == f"frames.c:{line('after middle')}"
        stop = dbg.cont(timeout=LIMIT)
        assert (stop.breakpoint, stop.frame.function, stop.frame.line) == (met, "outer", line("after middle"))
        assert stop.frame.file is not None
        assert Path(stop.frame.file).name == "frames.c"
        assert f", frames.c:{line('after middle')}: breakpoint 1" in str(stop)
        assert dbg.source_line(met.address) == (stop.frame.file, stop.frame.line)


def test_breakpoint_on_a_line_without_code_is_on_the_next_that_has_some(frames: Vm) -> None:
    with frames.debug() as dbg:
        met = dbg.breakpoint(f"frames.c:{line('factorial calls') - 1}")
        found = dbg.source_line(met.address)
        assert found is not None
        assert found[1] == line("factorial calls")


def test_breakpoint_on_inlined_code_is_at_every_copy(guest: Callable[..., Path]) -> None:
    with Vm(guest("frames", optimize="-O2")).debug() as dbg:
        met = dbg.breakpoint(f"frames.c:{line('in twice')}", condition="0")
        assert met.addresses[0] == met.address
        assert dbg.cont(timeout=LIMIT).reason == "exit"
        assert met.reached >= 1


@pytest.mark.parametrize("where", ["nowhere.c:10", "frames.c:100000", "frames.c:0", "other/frames.c:30", ":30"])
def test_breakpoint_by_a_line_that_is_not_there_is_refused(frames: Vm, where: str) -> None:
    with frames.debug() as dbg, pytest.raises(BreakpointError):
        dbg.breakpoint(where)


def sections(image: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of the sections that hold debug information."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    count, strings = struct.unpack_from("<HH", image, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + 64 * n) for n in range(count)]
    start = headers[strings][4]
    named = {image[start + h[0] :].split(b"\0", 1)[0].decode(): (h[4], h[5]) for h in headers}
    return {name: place for name, place in named.items() if name.startswith(".debug_") or name == ".eh_frame"}


def test_debug_information_that_the_linker_has_compressed_is_read(guest: Callable[..., Path], tmp_path: Path) -> None:
    image = tmp_path / "compressed"
    subprocess.run(["objcopy", "--compress-debug-sections=zlib", guest("frames"), image], check=True)

    with Vm(guest("frames")).debug() as plain, Vm(image).debug() as compressed:
        places = [[frame.line for frame in (to(dbg, "leaf"), dbg.backtrace())[1]] for dbg in (plain, compressed)]

    assert len(image.read_bytes()) < len(guest("frames").read_bytes())
    assert places[0] == places[1]
    assert None not in places[0][:2]


@pytest.mark.timeout(120)
def test_broken_debug_information_gives_less_but_never_fails(guest: Callable[..., Path], tmp_path: Path) -> None:
    image = guest("frames").read_bytes()
    places = sections(image)
    chance = random.Random(4)
    for n in range(60):
        broken = bytearray(image)
        for _ in range(chance.choice((1, 4, 40))):
            offset, size = places[chance.choice(sorted(places))]
            at, length = offset + chance.randrange(size), chance.choice((1, 1, 4))
            broken[at : at + length] = chance.choice((chance.randbytes(length), b"\xff" * length, bytes(length)))
        path = tmp_path / f"broken{n}"
        path.write_bytes(broken[: len(image)])
        with Vm(path).debug() as dbg:
            stop = to(dbg, "leaf")
            assert str(stop)
            trace = [str(frame) for frame in dbg.backtrace(limit=10_000)]
            assert trace[0].startswith("#0 ")
            for number in range(1, 150, 13):
                try:
                    dbg.breakpoint(f"frames.c:{number}", enabled=False)
                except BreakpointError:
                    continue
        path.unlink()


def with_sections(image: bytes, contents: dict[str, bytes]) -> bytes:
    """An ELF image with these sections instead of its own."""
    data, names, headers = bytearray(image), b"\0", [bytes(64)]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in [*contents, ".shstrtab"])
    for name, content in [*contents.items(), (".shstrtab", strings)]:
        headers.append(struct.pack("<IIQQQQIIQQ", len(names), 1, 0, 0, len(data), len(content), 0, 0, 1, 0))
        names += name.encode() + b"\0"
        data += content
    struct.pack_into("<Q", data, 0x28, len(data))
    struct.pack_into("<HHH", data, 0x3A, 64, len(headers), len(headers) - 1)
    return bytes(data) + b"".join(headers)


def abbreviations(*declarations: tuple[int, bool, list[tuple[int, int]]]) -> bytes:
    """Tag, whether it has children, and attributes with their forms, of each; all below 0x80."""
    text = b""
    for code, (tag, children, attributes) in enumerate(declarations, 1):
        text += bytes([code, tag, children, *(part for attribute in attributes for part in attribute), 0, 0])
    return text + b"\0"


def sized(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def unit(entries: bytes) -> bytes:
    return sized(struct.pack("<HIB", 4, 0, 8) + entries)


def one_line_program_for_many_units() -> dict[str, bytes]:
    """2,000 units, each of which claims a program of a million rows."""
    header = bytes([1, 1, 1, 0xFB, 14, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0]) + b"a.c\0\0\0\0\0"
    program = b"\0\x09\x02" + struct.pack("<Q", 0x1000) + b"\x20" * 1_000_000 + b"\0\1\1"
    entry = b"\1" + struct.pack("<QQI", 0x1000, 0x1000_0000, 0)
    return {
        ".debug_abbrev": abbreviations((0x11, False, [(0x11, 1), (0x12, 7), (0x10, 0x17)])),
        ".debug_info": unit(entry) * 2000,
        ".debug_line": sized(struct.pack("<HI", 4, len(header)) + header + program),
    }


def one_long_name_for_many_functions() -> dict[str, bytes]:
    """200,000 functions with a name of 4 MB."""
    entries = b"\1" + struct.pack("<QQ", 0x1000, 0x1000_0000) + (b"\2" + bytes(4)) * 200_000 + b"\0"
    return {
        ".debug_abbrev": abbreviations((0x11, True, [(0x11, 1), (0x12, 7)]), (0x2E, False, [(3, 0xE)])),
        ".debug_info": unit(entries),
        ".debug_str": b"A" * 4_000_000 + b"\0",
    }


def one_unit_with_many_ranges() -> dict[str, bytes]:
    """A unit that is costly to open and has 100,000 times the same range."""
    others = [(0x2E, False, [(3, 0xE)])] * 100
    declarations = abbreviations((0x11, False, [(0x11, 1), (0x55, 0x17)]), *others)
    more = b"".join(bytes([code & 0x7F | 0x80, code >> 7, 0x2E, 0, 3, 0xE, 0, 0]) for code in range(128, 16_000))
    return {
        ".debug_abbrev": declarations[:-1] + more + b"\0",
        ".debug_info": unit(b"\1" + bytes(12)),
        ".debug_ranges": struct.pack("<QQ", 0x1000, 0x1000_0000) * 100_000 + bytes(16),
    }


@pytest.mark.parametrize(
    "contents", [one_line_program_for_many_units, one_long_name_for_many_functions, one_unit_with_many_ranges]
)
def test_debug_information_that_multiplies_costs_little_time_and_memory(
    guest: Callable[..., Path], contents: Callable[[], dict[str, bytes]]
) -> None:
    image = with_sections(guest("frames").read_bytes(), contents())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()

    with Vm(image).debug() as dbg:
        for offset in (0x1002, 0xFFF_FF00):
            dbg.source_line(dbg.load_bias + offset)
        assert len(dbg.backtrace()) == 1
        with pytest.raises(BreakpointError):
            dbg.breakpoint("a.c:99999999")

    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_unwind_information_of_endless_length_is_not_executed_for_each_frame(guest: Callable[..., Path]) -> None:
    common = sized(bytes(4) + b"\1\0\1\x78\x10\x0c\x07\x08\x90\x01" + bytes(2))
    entry = sized(struct.pack("<IQQ", len(common) + 4, 0x1000, 0x1000_0000) + b"\x40" * 16_000_000)
    image = with_sections(guest("frames").read_bytes(), {".eh_frame": common + entry + bytes(4)})

    with Vm(image).debug() as dbg:
        dbg.memory.write(dbg.registers.rsp, struct.pack("<Q", dbg.registers.rip) * 1000)
        start = time.monotonic()
        dbg.backtrace(limit=1000)

        assert time.monotonic() - start < 5
