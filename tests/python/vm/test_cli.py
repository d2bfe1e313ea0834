"""The command ``uhyve``, as a process: flags, environment, configuration file, exit status, one line for each error."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import uhyve

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.vm

LIMIT = 60
GREETING = b"Hello from a test guest\nand a line by the buffer\n"


@pytest.fixture(params=["python -m uhyve", "uhyve"])
def start(request: pytest.FixtureRequest, spawn: Callable, tmp_path: Path, backend: str) -> Callable:
    """``start(*words)`` starts the command, by both ways to call it, in a folder of its own and without settings."""
    if request.param == "uhyve":
        installed = Path(sys.executable).parent / "uhyve"
        if not installed.exists():
            pytest.skip(f"the command is not installed beside this interpreter, {sys.executable}")
        prefix: list[str | Path] = [installed]
    else:
        prefix = [sys.executable, "-m", "uhyve"]
    folder = tmp_path / "cwd"
    folder.mkdir()
    ours = ("HERMIT_", "UHYVE_", "RUST_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean["UHYVE_BACKEND"] = backend

    def begin(*words: object, env: dict[str, str] | None = None, **options: Any) -> Any:
        environment = clean | {"XDG_CONFIG_HOME": str(tmp_path / "config"), "COLUMNS": "200"} | (env or {})
        return spawn([*prefix, *map(str, words)], **{"cwd": folder, "env": environment} | options)

    return begin


@pytest.fixture
def run(start: Callable) -> Callable[..., tuple[int, bytes, bytes]]:
    """``run(*words)`` runs the command to its end: status, standard output, standard error."""
    return lambda *words, **options: start(*words, **options).finish(LIMIT)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's folder of configuration files."""
    folder = tmp_path / "config" / "uhyve"
    folder.mkdir(parents=True)
    return folder


def argv(output: bytes) -> list[str]:
    """The application's arguments, from the guest ``args`` on interface 1."""
    return [line.split("=", 1)[1] for line in output.decode().splitlines() if line.startswith("argv[")][1:]


def bootargs(output: bytes) -> str:
    """What the guest ``args`` found in its device tree."""
    [line] = [line for line in output.decode().splitlines() if line.startswith("fdt /chosen bootargs: ")]
    return line.removeprefix("fdt /chosen bootargs: ")


def error_line(errors: bytes) -> str:
    """The one line of an error."""
    [line] = errors.decode().splitlines()
    assert line.startswith("uhyve: error: ")
    return line.removeprefix("uhyve: error: ")


# A run.


@pytest.mark.parametrize("words", [[], ["run"]])
def test_image_runs_and_its_console_is_the_standard_output(
    run: Callable, guest: Callable[..., Path], words: list[str]
) -> None:
    assert run(*words, guest("hello")) == (0, GREETING, b"")


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (255, 255), (256, 0), (257, 1), (-1, 255), (-2, 254)])
def test_exit_status_is_the_low_byte_of_the_guests_code(
    run: Callable, guest: Callable[..., Path], code: int, status: int
) -> None:
    assert run(guest("hello", defines=[f"EXIT_CODE=({code})"])) == (status, GREETING, b"")


@pytest.mark.parametrize(
    ("words", "kernel", "application"),
    [
        (["a", "b c"], [], ["a", "b c"]),
        (["--", "a"], [], ["a"]),
        (["-ip", "x", "--", "-v", "--flag"], ["-ip", "x"], ["-v", "--flag"]),
        (["--", "--", "name=value"], [], ["name=value"]),
        (["--", "k", "--", "--help", "--"], ["k"], ["--help", "--"]),
        (["-h"], [], ["-h"]),
        (["ünï", "漢", "'", '"', ""], [], ["ünï", "漢", "'", '"', ""]),
        ([], [], []),
    ],
)
def test_words_after_the_image_are_arguments_of_kernel_and_application(
    run: Callable, guest: Callable[..., Path], words: list[str], kernel: list[str], application: list[str]
) -> None:
    import shlex

    status, output, errors = run(guest("args", defines=["WITH_FDT"]), *words)

    assert (status, errors) == (0, b"")
    assert argv(output) == application
    found = shlex.split(bootargs(output)) if b"bootargs: " in output else []
    assert found == kernel + (["--", *application] if application else [])


def test_flags_reach_the_machine(run: Callable, guest: Callable[..., Path], tmp_path: Path) -> None:
    status, output, errors = run(
        "-m", "128MiB", "-c", "2", "-e", "A=1", "--env-vars", "B=x y", "-eA=2", "--no-aslr",
        "--file-mapping", f"{tmp_path}:/data", guest("args", interface=3),
    )  # fmt: skip

    assert (status, errors) == (0, b"")
    assert b"fdt /memory@100000000 reg: 0x100000000 0x8000000\n" in output
    assert b"fdt cpus: 2\n" in output
    assert b"fdt /uhyve,mounts mounts: /data\n" in output
    assert bootargs(output) == "env=A=2 env=B='x y'"


@pytest.mark.parametrize(
    "flags",
    [
        "--thp",
        "--ksm",
        "--pit",
        "--cpu-pm",
        "-a 0",
        "--file-isolation none",
        "--io-mode host=sync",
        "--timeout 50",
        "--tempdir .",
    ],
)
def test_flags_of_the_host_change_nothing_for_the_guest(run: Callable, guest: Callable[..., Path], flags: str) -> None:
    assert run(*flags.split(), guest("hello")) == (0, GREETING, b"")


def test_environment_of_the_host_is_passed_on_wish(run: Callable, guest: Callable[..., Path]) -> None:
    _, output, _ = run("-e", "host", guest("args", interface=3), env={"UNLIKELY_NAME": "a value"})

    assert "env=UNLIKELY_NAME='a value'" in bootargs(output)


def test_environment_variables_set_what_flags_do_not(run: Callable, guest: Callable[..., Path]) -> None:
    settings = {"HERMIT_MEMORY_SIZE": "256MiB", "HERMIT_CPU_COUNT": "3"}

    _, by_environment, _ = run("--no-aslr", guest("args", interface=3), env=settings)
    _, by_flag, _ = run("--no-aslr", "-m", "32MiB", "-c", "1", guest("args", interface=3), env=settings)

    assert b"reg: 0x100000000 0x10000000\n" in by_environment
    assert b"fdt cpus: 3\n" in by_environment
    assert b"reg: 0x100000000 0x2000000\n" in by_flag
    assert b"fdt cpus: 1\n" in by_flag


def test_stats_are_printed_on_standard_error(run: Callable, guest: Callable[..., Path]) -> None:
    status, output, errors = run("--stats", guest("ports", defines=["KIND=out", "COUNT=1234"]))

    assert status == 0
    assert output.startswith(b"ports out count=1234")
    assert b"port_write" in errors
    assert b"1,234" in errors


def test_stats_are_printed_when_the_time_is_over_and_after_a_crash(run: Callable, guest: Callable[..., Path]) -> None:
    late, _, counted = run("--stats", "--timeout", "0.5", guest("hang"))
    crashed, _, told = run("--stats", guest("crash"))

    assert (late, crashed) == (124, 134)
    assert b" exits in " in counted
    assert b" exits in " in told


def test_output_goes_to_a_new_file_or_nowhere(run: Callable, guest: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "console"

    assert run("-o", path, guest("hello")) == (0, b"", b"")
    assert path.read_bytes() == GREETING
    assert run("--output", "none", guest("hello")) == (0, b"", b"")
    status, output, errors = run("-o", path, guest("hello"))
    assert (status, output) == (125, b"")
    assert str(path) in error_line(errors)
    assert "File exists" in error_line(errors)
    assert path.read_bytes() == GREETING


def test_standard_output_that_is_closed_ends_with_141(start: Callable, guest: Callable[..., Path]) -> None:
    readable, writable = os.pipe()
    os.close(readable)

    child = start(guest("output", defines=["LINES=100", "BUFFER_SIZE=0"]), stdout=writable)
    os.close(writable)

    status, _, errors = child.finish(LIMIT)
    assert (status, errors) == (141, b"")


def test_standard_output_of_a_report_that_is_closed_ends_with_141(start: Callable) -> None:
    readable, writable = os.pipe()
    os.close(readable)

    child = start("doctor", stdout=writable)
    os.close(writable)

    status, _, errors = child.finish(LIMIT)
    assert status == 141
    assert b"Traceback" not in errors


def test_standard_streams_that_are_closed_are_nobody_elses(start: Callable, guest: Callable[..., Path]) -> None:
    # The image would be the standard input, and the descriptor of the CPU the output.
    closed = functools.partial(os.closerange, 0, 2)

    assert start(guest("stdin"), preexec_fn=closed).finish(LIMIT) == (0, b"", b"")


@pytest.mark.parametrize(("words", "expected"), [(["--stats", "hello"], 0), (["crash"], 134), (["run"], 2)])
def test_standard_error_that_takes_nothing_leaves_the_status(
    start: Callable, guest: Callable[..., Path], words: list[str], expected: int
) -> None:
    named = [guest(word) if word in ("hello", "crash") else word for word in words]

    with open("/dev/full", "wb") as full:
        child = start(*named, stderr=full, stdout=subprocess.DEVNULL)

    assert child.process.wait(LIMIT) == expected


def test_what_a_script_prints_stands_where_it_was_printed(
    run: Callable, guest: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('before')\nprint(dbg.cont().reason)\n")

    status, output, _ = run("debug", guest("hello"), "-x", script)

    assert (status, output) == (0, b"before\n" + GREETING + b"exit\n")


def test_text_that_the_locale_lacks_is_replaced(run: Callable, guest: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('5 µs')", encoding="utf-8")

    status, output, errors = run("debug", guest("hello"), "-x", script, env={"PYTHONIOENCODING": "ascii"})

    assert (status, output.splitlines()[0]) == (0, b"5 ?s"), errors


# The configuration file.


def test_configuration_file_sets_what_flags_do_not(
    run: Callable, guest: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    (home / "uhyve.toml").write_text(
        '[memory]\nmemory_size = "128MiB"\nno_aslr = true\n[cpu]\ncpu_count = 2\n'
        '[guest]\nenv_vars = ["A=file", "B=file"]\n'
    )

    _, by_file, errors = run(guest("args", interface=3))
    _, by_flag, _ = run("-m", "32MiB", "-e", "A=flag", guest("args", interface=3))

    assert errors == b""
    assert b"reg: 0x100000000 0x8000000\n" in by_file
    assert b"fdt cpus: 2\n" in by_file
    assert bootargs(by_file) == "env=A=file env=B=file"
    assert b"reg: 0x100000000 0x2000000\n" in by_flag
    assert bootargs(by_flag) == "env=A=flag env=B=file"


def test_configuration_file_of_the_folder_wins_over_the_users(
    run: Callable, guest: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    (home / "uhyve.toml").write_text("[cpu]\ncpu_count = 2\n")
    (tmp_path / "cwd" / "uhyve.toml").write_text("[cpu]\ncpu_count = 3\n")
    (tmp_path / "other.toml").write_text("[cpu]\ncpu_count = 4\n")

    assert b"fdt cpus: 3\n" in run(guest("args", interface=3))[1]
    assert b"fdt cpus: 4\n" in run("--config", tmp_path / "other.toml", guest("args", interface=3))[1]
    by_variable = run(guest("args", interface=3), env={"HERMIT_CONFIG": str(tmp_path / "other.toml")})
    assert b"fdt cpus: 4\n" in by_variable[1]


def test_configuration_file_with_an_unknown_key_is_a_warning(
    run: Callable, guest: Callable[..., Path], home: Path
) -> None:
    (home / "uhyve.toml").write_text("[cpu]\nspeed = 2\n")

    status, output, errors = run(guest("hello"))

    assert (status, output) == (0, GREETING)
    assert b"unknown key cpu.speed" in errors


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[cpu\n", "uhyve.toml"),
        ('[cpu]\ncpu_count = "two"\n', "cpu.cpu_count can't be 'two'"),
        ("[memory]\nno_aslr = 1\n", "memory.no_aslr must be true or false"),
        ('[memory]\nmemory_size = "17MiB"\n', "multiple of 2 MiB"),
        ('[guest]\nenv_vars = "A=1"\n', "must be a list of strings"),
    ],
)
def test_configuration_file_that_is_wrong_is_one_line(
    run: Callable, guest: Callable[..., Path], home: Path, text: str, why: str
) -> None:
    (home / "uhyve.toml").write_text(text)

    status, output, errors = run(guest("hello"))

    assert (status, output) == (2, b"")
    assert why in error_line(errors)


# Errors.


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["/nowhere/image"], "/nowhere/image: can't read the image: No such file"),
        (["/bin/true"], "not a Hermit image"),
        (["/etc/passwd"], "not an ELF file"),
        (["--no-such-flag", "image"], "--no-such-flag"),
        (["-m", "17MiB", "IMAGE"], "multiple of 2 MiB"),
        (["-m", "much", "IMAGE"], "is not a size"),
        (["-m", "8GiB", "IMAGE"], "at most 3072 MiB"),
        (["-c", "0", "IMAGE"], "0 is not in the range"),
        (["-c", "x", "IMAGE"], "x"),
        (["-c", "5000000000", "IMAGE"], "less than 4294967296"),
        (["-m", "99999999T", "IMAGE"], "less than"),
        (["-s=" + "9" * 5000, "IMAGE"], "is no port"),
        (["-a", "0-9999999999", "IMAGE"], "write host CPUs"),
        (["-e", "NAME", "IMAGE"], "write KEY=VALUE"),
        (["--file-mapping", "x", "IMAGE"], "write HOST:GUEST"),
        (["--file-mapping", "/x/y/z:/a", "IMAGE"], "/x/y/z"),
        (["--file-mapping", "/tmp:/a", "--file-mapping", "/etc:/a", "IMAGE"], "mapped twice"),
        (["-a", "1-", "IMAGE"], "affinity"),
        (["-a", "0,1", "IMAGE"], "affinity names 2 host CPUs for 1 vCPUs"),
        (["--io-mode", "fast", "IMAGE"], "io_mode"),
        (["--tempdir", "/nowhere/at/all", "IMAGE"], "/nowhere/at/all"),
        (["--file-isolation", "some", "IMAGE"], "some"),
        (["--timeout", "-1", "IMAGE"], "-1"),
        (["run"], "IMAGE"),
        (["--config", "/nowhere.toml", "IMAGE"], "/nowhere.toml: can't read the configuration"),
        (["--config", "/dev/zero", "IMAGE"], "/dev/zero: this is no configuration file"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    run: Callable, guest: Callable[..., Path], words: list[str], why: str
) -> None:
    status, output, errors = run(*(guest("hello") if word == "IMAGE" else word for word in words))

    assert (status, output) == (2, b"")
    assert why in error_line(errors)


def test_backend_that_is_unknown_is_named(run: Callable, guest: Callable[..., Path]) -> None:
    status, output, errors = run(guest("hello"), env={"UHYVE_BACKEND": "magic"})

    assert (status, output) == (2, b"")
    assert "magic" in error_line(errors)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user who may not open /dev/kvm takes root")
def test_user_without_permission_for_kvm_gets_one_line_that_says_what_to_do(
    spawn: Callable, guest: Callable[..., Path], tmp_path: Path
) -> None:
    if Path("/dev/kvm").stat().st_mode & 0o006:
        pytest.skip("everybody may open /dev/kvm here")
    # The library and the image are read before the change of user, who may not be able to reach them.
    code = (
        "import os, sys, uhyve\n"
        "vm = uhyve.Vm(sys.argv[1], backend='kvm')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n    vm.run()\n"
        "except uhyve.HypervisorUnavailableError as error:\n    print(error)\n"
    )

    child = spawn([sys.executable, "-c", code, guest("hello")], cwd="/", env=os.environ | {"TMP": "/tmp"})
    status, output, errors = child.finish(LIMIT)

    assert (status, errors) == (0, b"")
    assert len(output.splitlines()) == 1
    assert b"permission" in output.lower()
    assert b"kvm" in output


# Ends that are none of the guest's.


def test_crash_is_told_with_registers_and_status_134(run: Callable, guest: Callable[..., Path]) -> None:
    status, output, errors = run(guest("crash", defines=["KIND=triple"]))

    assert (status, output) == (134, b"crash triple\n")
    assert errors.startswith(b"uhyve: error: the guest has crashed: vCPU 0: triple fault at 0x")
    assert b"(crash_triple)" in errors
    assert b"rip " in errors


@pytest.mark.parametrize("name", ["busy", "hang"])
def test_timeout_ends_with_124_and_keeps_the_output(run: Callable, guest: Callable[..., Path], name: str) -> None:
    status, output, errors = run("--timeout", "0.5", guest(name))

    assert status == 124
    assert output == {"busy": b"busy\n", "hang": b"hanging\n"}[name]
    assert "did not end within 0.5 s" in error_line(errors)


@pytest.mark.parametrize(("name", "text"), [("busy", b"busy\n"), ("halt", b"halting\n"), ("hang", b"hanging\n")])
def test_ctrl_c_ends_with_130(start: Callable, guest: Callable[..., Path], name: str, text: bytes) -> None:
    child = start("-c", "2", guest(name))
    child.read_until(text)

    child.signal(signal.SIGINT)

    assert child.finish(5) == (130, text, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", [[], ["--stats"], ["debug", "--batch"]])
def test_kill_ends_with_130_and_leaves_no_scratch_directory(
    start: Callable, guest: Callable[..., Path], tmp_path: Path, words: list[str], number: signal.Signals
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    child = start(*words, guest("hang"), env={"TMPDIR": str(scratch)})
    child.read_until(b"hanging\n")

    child.signal(number)

    assert child.finish(LIMIT)[:2] == (130, b"hanging\n")
    assert list(scratch.iterdir()) == []


def test_ctrl_c_while_the_guest_waits_for_input_ends_with_130(
    start: Callable, guest: Callable[..., Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = start("--file-mapping", f"{fifo}:/in", guest("readpath"))
    child.read_until(b"opened\n")

    child.signal(signal.SIGINT)

    assert child.finish(5) == (130, b"opened\n", b"")


def test_standard_input_reaches_the_guest(start: Callable, guest: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"typed\n")
    with (tmp_path / "input").open("rb") as stream:
        assert start(guest("stdin"), stdin=stream).finish(LIMIT) == (0, b"stdin 6\ntyped\n", b"")


# The other commands.


def test_help_and_version_are_on_standard_output(run: Callable) -> None:
    status, output, errors = run("--version")
    assert (status, output, errors) == (0, f"uhyve {uhyve.__version__}\n".encode(), b"")
    for words in (["--help"], ["-h"], [], ["run", "--help"], ["debug", "--help"]):
        status, output, errors = run(*words)
        assert (status, errors) == (0, b"")
        assert b"Usage: uhyve" in output


@pytest.mark.kvm
def test_doctor_tells_what_this_machine_can_do(run: Callable, backend: str) -> None:
    capabilities = uhyve._core.probe_kvm()
    status, output, errors = run("doctor", "--json")

    assert (status, errors) == (0, b"")
    diagnosis = json.loads(output)
    assert diagnosis["usable"] is True
    assert diagnosis["capabilities"] == capabilities
    assert diagnosis["kind"] == ("hardware" if capabilities["native_ring0"] else "PVM")


def test_doctor_for_people_ends_with_its_verdict(run: Callable) -> None:
    status, output, _ = run("doctor")

    assert status == 0
    assert b"guests run here" in output


def test_demo_shows_a_run_and_the_debugger(run: Callable) -> None:
    status, output, errors = run("demo")

    assert (status, errors) == (0, b"")
    assert b"It ended with code 0" in output
    assert b"handle_request(id=" in output


def test_debug_with_a_conditional_breakpoint_prints_each_stop(run: Callable, guest: Callable[..., Path]) -> None:
    image = guest("loop", defines=["COUNT=10"])

    status, output, errors = run("debug", image, "-b", "work if arg0 >= 8")

    assert (status, output) == (0, b"calls=10 total=135\n")
    text = errors.decode()
    assert text.count("work") >= 2
    assert "rdi 0x8" in text
    assert "rdi 0x9" in text
    assert "rdi 0x7" not in text
