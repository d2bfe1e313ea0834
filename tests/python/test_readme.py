"""Every example of the README is run: its Python blocks, its uhyve commands, and the files in examples/."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    uhyve ", line)]
EXPECTED = {
    "Vm.demo(cpus=2).run": "vCPU 0 stopped at handle_request",
    "sys_open": "Hostname: changed",
    "log::__private_api_log": "41 calls of log::__private_api_log until exit code 0",
    "on_request": "after 7 requests",
    "KeepOut(": "no client",
}
SERVED = [block for block in BLOCKS if "server.wait" in block]
SESSIONS = re.findall(r"```\n((?:\(gdb\) .*\n)+)```", README)

pytestmark = pytest.mark.vm


@pytest.fixture
def folder(tmp_path: Path, guest: Callable[..., Path], hermit_060: Path) -> Path:
    for name in ("hello_world", "hello_c"):
        (tmp_path / name).symlink_to(hermit_060 / name)
    (tmp_path / "app").symlink_to(guest("args"))
    (tmp_path / "host.txt").write_text("text")
    (tmp_path / "script.py").write_text("print('script at', dbg.stop.reason, dbg.cont(timeout=60).symbol)\n")
    return tmp_path


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)


def test_readme_has_the_blocks_that_are_expected() -> None:
    assert len(BLOCKS) == len(EXPECTED) + len(SERVED)
    assert len(SERVED) == len(SESSIONS) == 1
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in SERVED])
def test_readme_script_runs_and_prints_what_it_says(block: str, folder: Path) -> None:
    [expected] = [text for key, text in EXPECTED.items() if key in block]

    result = run(folder, [sys.executable, "-c", block])

    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_readme_gdb_session_runs_beside_its_script(folder: Path) -> None:
    script = subprocess.Popen([sys.executable, "-c", SERVED[0]], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert script.stdout is not None
        address = script.stdout.readline().split()[-1]
        lines = [line.removeprefix("(gdb) ").replace("127.0.0.1:6677", address) for line in SESSIONS[0].splitlines()]
        words = [word for line in ["set debuginfod enabled off", *lines] for word in ("-ex", line)]

        gdb = run(folder, ["gdb", "-q", "-nx", "-batch", *words])
        output, _ = script.communicate(timeout=60)
    finally:
        script.kill()
        script.wait()

    assert "handle_request (id=id@entry=4, size=size@entry=4000)" in gdb.stdout
    assert "1 skipped" in gdb.stdout + gdb.stderr
    assert "exited normally" in gdb.stdout
    assert output.strip() == "0"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_ends_with_the_guests_code(command: str, folder: Path) -> None:
    result = run(folder, [sys.executable, "-m", *shlex.split(command)])

    assert result.returncode == 0, result.stdout + result.stderr
    if "script.py" in command:
        assert "script at entry main" in result.stdout
    if "-b 'sys_open" in command:
        assert "sys_open" in result.stdout + result.stderr


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_file_runs(example: Path, folder: Path) -> None:
    result = run(folder, [sys.executable, str(example)])

    assert result.returncode == 0, result.stderr
    assert "2 of 10 requests met the condition" in result.stdout
