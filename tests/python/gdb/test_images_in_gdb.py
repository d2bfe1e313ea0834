"""Real images in a stock gdb, which is told nothing but where to attach: names, lines and frames where they are."""

from __future__ import annotations

import io
import re
import tarfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(110)]


def test_pie_kernel_breaks_traces_back_and_finishes_at_its_names(
    serve: Callable[..., Served], hermit_060: Path
) -> None:
    served = serve(hermit_060 / "hello_world")
    main, write = served.dbg.symbol("main"), served.dbg.symbol("sys_write")

    said = served.script(
        "set backtrace past-main on",
        "tbreak *main",
        "continue",
        "bt",
        "hbreak *sys_write",
        "continue",
        "bt 2",
        "finish",
        "info symbol $pc",
    )

    assert re.search(rf"#0  0x0*{main:x} in main \(\)\n#1  0x[0-9a-f]+ in runtime_entry \(\)", said.output), said
    assert re.search(
        rf"#0  0x0*{write:x} in sys_write \(\)\n#1  0x[0-9a-f]+ in .*LineWriter.*write_all", said.output
    ), said
    assert re.search(r"LineWriter.*write_all.* \+ \d+ in section \.text", said.output), said


def test_fixed_kernel_has_the_lines_that_python_reads(serve: Callable[..., Served], hermit_060: Path) -> None:
    served = serve(hermit_060 / "hello_c")
    places = ["core::fmt::write", "core::panicking::panic_fmt", "core::str::slice_error_fail"]
    addresses = [served.dbg.symbol(place) for place in places]

    said = served.script(*(f"info line *{address:#x}" for address in addresses), "break main", "info symbol main")

    for address in addresses:
        file, line = served.dbg.source_line(address)
        name = re.escape(file.rpartition("library/")[2])
        pattern = rf'Line {line} of "[^"]*{name}" starts at address {address:#x} '
        assert re.search(pattern, said.output), said
    assert f"Breakpoint 1 at {served.dbg.symbol('main'):#x}" in said


@pytest.mark.parametrize("name", ["hello_world", "rusty_demo"])
@pytest.mark.parametrize("aslr", [True, False])
def test_later_pie_kernel_is_where_chance_has_put_it(
    serve: Callable[..., Served], hermit_069: Path, name: str, aslr: bool
) -> None:
    served = serve(hermit_069 / name, aslr=aslr)
    said = served.script("tbreak *main", "continue", "info symbol $pc", "print &'hermit::scheduler::TASKS'")
    assert f"{served.dbg.symbol('main'):#x}" in said.output
    assert "main in section .text" in said
    assert (served.dbg.load_bias > 1 << 20) == aslr


def test_archived_kernel_is_served_as_the_kernel(serve: Callable[..., Served], guest, tmp_path: Path) -> None:
    kernel = guest("loop", defines=("COUNT=5",)).read_bytes()
    config = (
        b'version = "1"\nkernel = "kernel"\n[input]\nkernel_args = []\napp_args = []\nenv_vars = []\n[requirements]\n'
    )
    archive = tmp_path / "loop.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("hermit.toml", config), ("kernel", kernel)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    served = serve(archive)

    said = served.script("break work if i == 4", "continue", "bt", "delete", "continue")

    assert re.search(r"#0  work \(i=i@entry=4, .*loop\.c:\d+\n#1 .* guest_main .*loop\.c:\d+", said.output), said
    assert "exited normally" in said
