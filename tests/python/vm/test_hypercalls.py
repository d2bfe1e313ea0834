"""Hypercalls of all three interfaces: files, standard input, ports, and the counters of what a guest did."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from uhyve import ConfigError, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.vm

LIMIT = 60


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The directory that the guest ``files`` wants."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "hello.txt").write_text("hello\n")
    (folder / "link").symlink_to("hello.txt")
    return folder


@pytest.fixture
def read_path(guest: Callable[..., Path]) -> Callable[..., str]:
    """Runs the guest that reads a path, and gives what it printed."""

    def read(path: str, interface: int = 3, **keywords: object) -> str:
        image = guest("readpath", interface=interface, defines=[f'FILE_PATH="{path}"'])
        return Vm(image, **keywords).run(LIMIT).output

    return read


# Every file call.


@pytest.mark.parametrize("interface", [1, 2, 3])
@pytest.mark.parametrize(("isolation", "pie"), [("none", True), ("normal", False)])
def test_files_guest_finds_every_call_right(
    guest: Callable[..., Path], data: Path, interface: int, isolation: str, pie: bool
) -> None:
    image = guest("files", interface=interface, pie=pie)

    result = Vm(image, files={"/data": data}, file_isolation=isolation).run(LIMIT)

    assert (result.code, result.output) == (0, "to fd 1\nto fd 2\nto fd 1 again\nfiles ok\n")
    assert (data / "appended.txt").read_text() == "one two three"
    made = {"made"} if interface == 3 else set()
    assert {entry.name for entry in data.iterdir()} == {"hello.txt", "link", "appended.txt"} | made
    if interface == 3:
        assert sorted(entry.name for entry in (data / "made").iterdir()) == ["f0", "f1", "f2"]
    assert (data / "hello.txt").read_text() == "hello\n"


def test_files_guest_with_an_io_mode_finds_every_call_right(guest: Callable[..., Path], data: Path) -> None:
    assert Vm(guest("files", interface=3), files={"/data": data}, io_mode="host=sync").run(LIMIT).code == 0


def test_files_guest_without_its_directory_says_what_is_missing(guest: Callable[..., Path]) -> None:
    result = Vm(guest("files", interface=3)).run(LIMIT)

    assert result.code == 97
    assert "FAIL: open /data/hello.txt" in result.output


def test_file_created_by_a_guest_has_its_mode(guest: Callable[..., Path], data: Path) -> None:
    Vm(guest("files", interface=3), files={"/data": data}).run(LIMIT)

    assert stat.S_IMODE((data / "appended.txt").stat().st_mode) & ~0o644 == 0


def test_scratch_directory_is_gone_after_the_run(guest: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    Vm(guest("files", interface=3), files={"/data": data}, tempdir=scratch).run(LIMIT)

    assert list(scratch.iterdir()) == []


# What is mapped, and what is not.


@pytest.mark.parametrize("interface", [1, 2, 3])
def test_mapped_file_directory_and_bytes_can_be_read(
    read_path: Callable[..., str], tmp_path: Path, interface: int
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"contents\n")
    files = {
        "/one": tmp_path / "below" / "file",
        "/all": tmp_path,
        "/bytes": b"of Python\n",
        "/deep/er/x": str(tmp_path),
    }

    for path, text in [
        ("/one", "contents"),
        ("/all/below/file", "contents"),
        ("/bytes", "of Python"),
        ("/deep/er/x/below/file", "contents"),
        ("/all/./below/../below//file", "contents"),
    ]:
        assert read_path(path, interface, files=files) == f"opened\n{text}\nend of file\n", path


def test_mapped_bytes_of_a_megabyte_arrive(read_path: Callable[..., str]) -> None:
    text = "".join(f"{number:07}\n" for number in range(4096))

    assert read_path("/in", files={"/in": text.encode()}) == f"opened\n{text}end of file\n"


@pytest.mark.parametrize("interface", [1, 2, 3])
@pytest.mark.parametrize(
    "path", ["/missing", "/data/missing", "/data/hello.txt/below", "/etc/passwd", "/data/../etc/passwd"]
)
def test_path_that_is_not_mapped_cant_be_opened(
    read_path: Callable[..., str], data: Path, path: str, interface: int
) -> None:
    output = read_path(path, interface, files={"/data": data})

    assert output.startswith("open failed: -")


@pytest.mark.parametrize("isolation", ["none", "normal"])
@pytest.mark.parametrize("target", ["absolute", "relative", "directory", "chain"])
def test_symbolic_link_out_of_a_mapped_directory_is_refused(
    read_path: Callable[..., str], data: Path, tmp_path: Path, target: str, isolation: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    (data / "absolute").symlink_to(tmp_path / "secret")
    (data / "relative").symlink_to("../secret")
    (data / "directory").symlink_to("..")
    (data / "chain").symlink_to("relative")
    path = f"/data/{target}" + ("/secret" if target == "directory" else "")

    output = read_path(path, files={"/data": data}, file_isolation=isolation)

    assert output.startswith("open failed: -")
    assert "secret" not in output


def test_symbolic_link_within_a_mapped_directory_is_followed(read_path: Callable[..., str], data: Path) -> None:
    assert read_path("/data/link", files={"/data": data}) == "opened\nhello\nend of file\n"


def test_mapped_directory_is_looked_up_at_each_start(guest: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    vm = Vm(guest("readpath", interface=3, defines=['FILE_PATH="/data/hello.txt"']), files={"/data": data})
    first = vm.run(LIMIT)
    data.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"/data"):
        Vm(vm.image, files={"/data": data / "below"}).run(LIMIT)
    data.mkdir()
    (data / "hello.txt").write_text("another\n")

    second = vm.run(LIMIT)

    assert first.output == "opened\nhello\nend of file\n"
    assert second.output == "opened\nanother\nend of file\n"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"relative": b""}, "must be absolute"),
        ({"/a\0b": b""}, "NUL"),
        ({"/a": b"", "/a/": b""}, "mapped twice"),
        ({"/a": b"", "/a/b": b""}, "lies below"),
        ({"/": b""}, "only be mapped to a directory"),
        ({"/x": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_file_mapping_that_makes_no_sense_is_refused(files: dict[str, bytes | str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Vm.demo(files=files).run(LIMIT)


@pytest.mark.parametrize("source", [1, None, object(), 1.5])
def test_file_mapping_to_something_else_is_a_type_error(source: object) -> None:
    with pytest.raises(TypeError, match="must be a path of the host or bytes"):
        Vm.demo(files={"/x": source})


# Standard input and FIFOs.


@pytest.mark.parametrize("interface", [1, 2, 3])
def test_standard_input_of_the_process_is_the_guests(
    guest: Callable[..., Path], command: Callable, interface: int, tmp_path: Path
) -> None:
    (tmp_path / "input").write_bytes(b"some input\n")
    with (tmp_path / "input").open("rb") as stream:
        child = command(guest("stdin", interface=interface), stdin=stream)

        assert child.finish(LIMIT) == (0, b"stdin 11\nsome input\n", b"")


def test_standard_input_longer_than_the_buffer_gives_what_fits(
    guest: Callable[..., Path], command: Callable, tmp_path: Path
) -> None:
    (tmp_path / "input").write_bytes(b"x" * 500)
    with (tmp_path / "input").open("rb") as stream:
        assert command(guest("stdin"), stdin=stream).finish(LIMIT) == (0, b"stdin 100\n" + b"x" * 100, b"")


@pytest.mark.parametrize("interface", [1, 3])
def test_fifo_is_read_as_it_is_written(
    guest: Callable[..., Path], tmp_path: Path, interface: int, wait_until: Callable[..., bool]
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pieces: list[bytes] = []
    vm = Vm(guest("readpath", interface=interface), files={"/in": fifo}, output=pieces.append)
    vm.start()
    with fifo.open("wb", buffering=0) as stream:
        stream.write(b"first\n")
        assert wait_until(lambda: b"first\n" in pieces, LIMIT)
        stream.write(b"second\n")
        assert wait_until(lambda: b"second\n" in pieces, LIMIT)
        assert vm.running

    result = vm.wait(LIMIT)

    assert (result.code, b"".join(pieces)) == (0, b"opened\nfirst\nsecond\nend of file\n")


# Ports and memory-mapped I/O.


def test_unknown_ports_read_as_ones_and_swallow_writes(guest: Callable[..., Path]) -> None:
    result = Vm(guest("crash", defines=["KIND=port"])).run(LIMIT)

    assert (result.code, result.output) == (0, "crash port\nport 0xff 0xffff 0xffffffff\n")
    assert (result.stats.exits["port_read"], result.stats.exits["port_write"]) == (3, 3)


@pytest.mark.parametrize("count", [1, 100, 2000])
@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [
        ("out", "exits", "port_write"),
        ("in", "exits", "port_read"),
        ("hypercall", "hypercalls", "file_close"),
    ],
)
def test_statistics_count_each_exit_and_hypercall(
    guest: Callable[..., Path], kind: str, where: str, name: str, count: int
) -> None:
    stats = Vm(guest("ports", defines=[f"KIND={kind}", f"COUNT={count}"])).run(LIMIT).stats

    assert getattr(stats, where)[name] == count
    assert stats.hypercalls["exit"] == 1
    # Whoever suspends the process interrupts the guest.
    interrupted = stats.exits.get("interrupted", 0)
    assert set(stats.exits) - {"interrupted"} <= {name}
    assert set(stats.hypercalls) <= {name, "exit", "serial_write_buffer"}
    assert stats.total == count + stats.hypercalls["exit"] + stats.hypercalls["serial_write_buffer"] + interrupted


@pytest.mark.parametrize("address", [0x9F000, 0xE0000, 0xFFFFC])
def test_reads_of_the_firmware_area_cost_no_exit(guest: Callable[..., Path], address: int) -> None:
    image = guest("ports", interface=3, defines=["KIND=mmio", "COUNT=100", f"ADDRESS={address:#x}"])

    result = Vm(image).run(LIMIT)

    assert (result.code, result.stats.exits) == (0, {})


def test_statistics_count_pci_probes_apart(guest: Callable[..., Path]) -> None:
    stats = Vm(guest("ports", defines=["KIND=in", "COUNT=50", "PORT=0xCFC"])).run(LIMIT).stats

    assert stats.exits == {"pci_read": 50}


@pytest.mark.parametrize("count", [0, 10, 1000])
def test_statistics_of_a_guest_without_exits_are_the_same_for_any_work(guest: Callable[..., Path], count: int) -> None:
    result = Vm(guest("loop", defines=[f"COUNT={count}"])).run(LIMIT)

    assert result.output == f"calls={count} total={3 * sum(range(count))}\n"
    assert result.stats.exits == {}
    assert result.stats.hypercalls == {"exit": 1, "serial_write_buffer": 5}


def test_statistics_of_two_vcpus_are_kept_apart(guest: Callable[..., Path]) -> None:
    stats = Vm(guest("smp", defines=["COUNT=10"]), cpus=2).run(LIMIT).stats

    assert stats.vcpus[0].hypercalls["exit"] == 1
    assert "exit" not in stats.vcpus[1].hypercalls
    assert stats.hypercalls["serial_write_buffer"] == stats.vcpus[0].hypercalls["serial_write_buffer"]


def test_statistics_as_text_have_a_line_for_each_counter(guest: Callable[..., Path]) -> None:
    stats = Vm(guest("ports", defines=["KIND=out", "COUNT=1234"])).run(LIMIT).stats

    text = str(stats)

    assert f"{stats.total:,} exits in " in text
    assert any(line.split() == ["port_write", "1,234"] for line in text.splitlines())


# Hypercalls of another version than the note says.


@pytest.mark.parametrize(("interface", "announced"), [(3, 1), (2, 3)])
def test_calls_of_another_version_than_announced_are_served(
    guest: Callable[..., Path], data: Path, interface: int, announced: int
) -> None:
    image = guest("files", interface=interface, announced_interface=announced)

    assert Vm(image, files={"/data": data}).run(LIMIT).code == 0
