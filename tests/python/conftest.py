"""Fixtures of all tests: guests built on demand, real images, what this machine's KVM can do, and leftovers.

Environment variables turn a skip for a missing part of the machine into a failure: ``UHYVE_REQUIRE_KVM=1``,
``UHYVE_REQUIRE_IMAGES=1``, ``UHYVE_REQUIRE_BOX=1``. ``UHYVE_HERMIT_069`` names a folder with the Hermit 0.6.9 images.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import uhyve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]
HERMIT_060 = {"hello_world": (1_830_176, "c7540090141d"), "hello_c": (2_177_968, "783b933178bb")}
HERMIT_069 = {"hello_world": "9ec5d674", "rusty_demo": "e854349f", "hello_c": "36a3eb98"}
MANIFEST = """\
[package]
name = "images"
version = "0.0.0"
edition = "2021"

[lib]
path = "lib.rs"

[dependencies]
uhyve = "=0.2.3"

[workspace]
"""


# A shell has background jobs ignore Ctrl-C, which their children inherit: here the tests of Ctrl-C would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Users have Python buffer what it prints into a pipe: so have the processes that tests start.
os.environ.pop("PYTHONUNBUFFERED", None)


def missing(reason: str, requirement: str) -> NoReturn:
    """Skips the test, or fails it if the environment variable ``requirement`` says that nothing may be missing."""
    if os.environ.get(requirement) == "1":
        pytest.fail(f"{reason} ({requirement}=1)", pytrace=False)
    pytest.skip(reason)


# Back ends.

BACKENDS = ("kvm", "soft")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that is marked ``vm`` on each back end, or on the one that ``UHYVE_BACKEND`` names."""
    if metafunc.definition.get_closest_marker("vm"):
        chosen = os.environ.get("UHYVE_BACKEND")
        metafunc.parametrize("backend", [chosen] if chosen else BACKENDS, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The back end that ``"auto"`` stands for in a marked test, in its child processes too."""
    name: str | None = getattr(request, "param", None)
    if name is None:
        return None
    if name == "kvm" and (problem := _kvm_problem()):
        missing(problem, "UHYVE_REQUIRE_KVM")
    monkeypatch.setenv("UHYVE_BACKEND", name)
    return name


@functools.cache
def _kvm_problem() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm can't be opened: {error.strerror}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that is marked ``kvm`` on a machine without one."""
    if item.get_closest_marker("kvm") and (problem := _kvm_problem()):
        missing(problem, "UHYVE_REQUIRE_KVM")


@pytest.fixture
def capabilities(backend: str) -> dict[str, Any]:
    """What the back end can do on this machine."""
    return uhyve._core.probe_soft() if backend == "soft" else uhyve._core.probe_kvm()


@pytest.fixture
def unicorn() -> ModuleType:
    """Unicorn, an emulator to compare with."""
    try:
        return importlib.import_module("unicorn")
    except ImportError:
        missing("Unicorn is not installed (pip install unicorn)", "UHYVE_REQUIRE_UNICORN")


@pytest.fixture
def cpu_kind(backend: str, capabilities: dict[str, Any]) -> str:
    """``"soft"``; of KVM ``"hardware"``, or ``"PVM"``, which emulates ring 0 at some million instructions a second."""
    if backend == "soft":
        return "soft"
    return "hardware" if capabilities["native_ring0"] else "PVM"


@pytest.fixture
def shutdown_keeps_registers(backend: str) -> bool:
    """Whether a vCPU after a triple fault has its registers in any case.

    On AMD's SVM they are undefined then (AMD64 manual, volume 2, 15.14.3), and KVM resets the vCPU.
    """
    return backend == "soft" or not Path("/sys/module/kvm_amd").exists()


# Guests and images.


@functools.cache
def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uhyve_test_guests", REPOSITORY / "tests" / "guests" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def guest() -> Callable[..., Path]:
    """``guest(name, …)`` builds a test guest, once, and returns its path; the options are those of ``build()``."""
    built: dict[tuple[object, ...], Path] = {}

    def build(name: str, **options: Any) -> Path:
        if "defines" in options:
            options["defines"] = tuple(options["defines"])
        key = (name, *sorted(options.items()))
        if key not in built:
            built[key] = _builder().build(name, **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def hermit_060(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real Hermit 0.6.0 images, which a package of the crates registry carries."""
    if shutil.which("cargo") is None:
        missing("the Hermit 0.6.0 images come from the crates registry, and there is no cargo", "UHYVE_REQUIRE_IMAGES")
    folder = tmp_path_factory.mktemp("hermit-0.6.0")
    (folder / "Cargo.toml").write_text(MANIFEST)
    (folder / "lib.rs").write_text("")
    metadata = _cargo(folder, "metadata", "--format-version=1", "--offline")
    if metadata.returncode != 0:
        fetched = _cargo(folder, "fetch")
        if fetched.returncode != 0:
            missing(f"cargo can't fetch the Hermit 0.6.0 images: {fetched.stderr.strip()}", "UHYVE_REQUIRE_IMAGES")
        metadata = _cargo(folder, "metadata", "--format-version=1", "--offline")
        assert metadata.returncode == 0, metadata.stderr
    [package] = [package for package in json.loads(metadata.stdout)["packages"] if package["name"] == "uhyve"]
    images = Path(package["manifest_path"]).parent / "data" / "x86_64"
    for name, (size, digest) in HERMIT_060.items():
        content = (images / name).read_bytes()
        assert len(content) == size, name
        assert hashlib.sha256(content).hexdigest().startswith(digest), name
    return images


def _cargo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["cargo", *arguments], cwd=folder, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="session")
def hermit_069() -> Path:
    """The folder of the Hermit 0.6.9 images, where the developer has them."""
    folder = os.environ.get("UHYVE_HERMIT_069")
    if not folder:
        pytest.skip("UHYVE_HERMIT_069 doesn't name a folder with the Hermit 0.6.9 images")
    for name, digest in HERMIT_069.items():
        content = (Path(folder) / name).read_bytes()
        assert hashlib.sha256(content).hexdigest().startswith(digest), f"{folder}/{name} is another image"
    return Path(folder)


# Threads, waiting, processes.


def vm_threads() -> dict[str, str]:
    """This process's threads that belong to VMs: number and name."""
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("uhyve"):
            threads[task.name] = name
    return threads


def poll(condition: Callable[[], object], timeout: float = 10.0) -> bool:
    """Waits until ``condition()`` is true; False if it never was in ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def wait_until() -> Callable[..., bool]:
    """``wait_until(condition, timeout=10)`` polls a condition, and tells whether it came true."""
    return poll


@pytest.fixture(autouse=True)
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """Fails a test that leaves threads of a VM behind; its value gives the names of those that live now."""
    # A test that failed keeps its VM in its traceback: that is not this one's fault.
    before = vm_threads()

    def own() -> list[str]:
        return sorted(name for number, name in vm_threads().items() if number not in before)

    yield own
    if request.node.get_closest_marker("vm"):
        poll(lambda: not own(), timeout=2)
        assert own() == [], "threads of a VM outlive the test"


class Child:
    """A process that a test has started: Python code, or the command ``uhyve``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.seen = b""

    def read_until(self, text: bytes, timeout: float = 20.0) -> bytes:
        """Standard output so far, which has ``text`` in it; fails if it doesn't come in time."""
        assert self.process.stdout is not None
        handle = self.process.stdout.fileno()
        os.set_blocking(handle, False)
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            try:
                piece = os.read(handle, 65536)
            except BlockingIOError:
                piece = None
            if piece == b"" or (piece is None and time.monotonic() > deadline):
                self.process.kill()
                pytest.fail(f"{text!r} did not come; standard output: {self.seen!r}, error: {self._errors()!r}")
            if piece is None:
                time.sleep(0.005)
            else:
                self.seen += piece
        return self.seen

    def _errors(self) -> bytes:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def signal(self, number: signal.Signals = signal.SIGINT) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def finish(self, timeout: float = 20.0) -> tuple[int, bytes, bytes]:
        """Waits for the end: status, all of standard output, standard error."""
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), True)
        try:
            output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, errors = self.process.communicate()
            pytest.fail(f"no end within {timeout} s; standard output: {self.seen + output!r}, error: {errors!r}")
        self.seen += output or b""
        assert b"panicked" not in errors, errors.decode(errors="replace")
        return self.process.returncode, self.seen, errors


@contextlib.contextmanager
def signals_heard() -> Iterator[None]:
    """Whoever started the tests may ignore signals, as nohup does; a process that is started in here doesn't."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    """``spawn(command, **popen)`` starts a process, which is killed at the test's end if it still runs then."""
    children: list[Child] = []

    def start(command: Sequence[str | Path], **options: Any) -> Child:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        with signals_heard():
            child = Child(subprocess.Popen([str(word) for word in command], **options))
        children.append(child)
        return child

    yield start
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait()
        for stream in (child.process.stdin, child.process.stdout, child.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def python(spawn: Callable[..., Child]) -> Callable[..., Child]:
    """``python(code, *arguments, **popen)`` starts an interpreter on code, with the arguments in ``sys.argv[1:]``."""

    def start(code: str, *arguments: object, **options: Any) -> Child:
        return spawn([sys.executable, "-c", code, *map(str, arguments)], **options)

    return start


@pytest.fixture
def command(spawn: Callable[..., Child]) -> Callable[..., Child]:
    """``command(*arguments, **popen)`` starts the command ``uhyve``."""

    def start(*arguments: object, **options: Any) -> Child:
        return spawn([sys.executable, "-m", "uhyve", *map(str, arguments)], **options)

    return start
