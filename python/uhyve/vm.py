"""A virtual machine: what it is made of, and one run after another.

A ``Vm`` is a description that was checked once. Each run makes a machine of it and ends it: ``run()`` in one call,
``start()`` and ``wait()`` in two, ``debug()`` under the control of a ``Debugger``.

>>> parse_size("64MiB"), parse_size("1.5 GB"), parse_size("4096")
(67108864, 1610612736, 4096)
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from weakref import WeakSet

from uhyve._core import Image, Machine
from uhyve.errors import ConfigError, GuestCrashError, TimeoutExpired, VmStateError
from uhyve.result import result_of, stats_of, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Final, Literal, Self, TypeAlias

    from uhyve.debugger import Debugger
    from uhyve.result import VmResult, VmStats

    StrPath: TypeAlias = str | os.PathLike[str]
    FileSource: TypeAlias = StrPath | bytes | bytearray | memoryview
    Output: TypeAlias = (
        Literal["capture", "stdout", "stderr", "none"] | os.PathLike[str] | Callable[[bytes], object] | None
    )

__all__ = ["Vm", "parse_size"]

MINIMUM_MEMORY: Final = 16 << 20
MEMORY_STEP: Final = 2 << 20
OUTPUT_LIMIT: Final = 64 << 20
_UNITS: Final = {"": 1, "b": 1} | {
    letter + ending: 1 << shift
    for letter, shift in zip("kmgt", (10, 20, 30, 40), strict=True)
    for ending in ("", "b", "ib")
}


def parse_size(text: str) -> int:
    """The number of bytes that a size such as ``"64MiB"``, ``"1.5G"`` or ``"4096"`` stands for.

    ``K``, ``M``, ``G`` and ``T`` are powers of 1024, with or without ``B`` or ``iB`` after them, in either case: memory
    comes in these. Raises ``ConfigError`` for anything else.
    """
    size = text.strip()
    digits = len(size) - len(size.lstrip("0123456789."))
    try:
        value = float(size[:digits]) if "." in size[:digits] else int(size[:digits])
        scaled = value * _UNITS[size[digits:].strip().lower()]
        whole = int(scaled)
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(
            f"{text!r} is not a size; write bytes, or a number with KiB, MiB or GiB, such as '64MiB'"
        ) from None
    if scaled != whole:
        raise ConfigError(f"{text!r} is not a whole number of bytes")
    return whole


class _Run:
    """One machine of a Vm, from the wish for it to its end."""

    __slots__ = ("closed", "debugging", "interrupted", "machine")

    def __init__(self, debugging: bool) -> None:
        self.machine: Machine | None = None
        self.debugging = debugging
        self.interrupted = False
        self.closed = False


_running: WeakSet[Vm] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the machines that still run when the interpreter ends: their threads may want to call into it."""
    for vm in list(_running):
        vm.close()


class Vm:
    """A Hermit image and the machine to run it on.

    ``image`` is a path, the image's bytes, or an ``Image``; it is read and checked here, once, and may change on the
    disk afterwards. The keywords:

    ``memory``
        RAM: bytes as an integer, or text such as ``"64MiB"``. None: what the image asks for, at least 64 MiB. At least
        16 MiB, and a multiple of 2 MiB.
    ``cpus``
        Number of vCPUs. None: what the image asks for, at least 1.
    ``args``, ``kernel_args``
        Arguments of the application and of the kernel. None: the image's own, if it carries any.
    ``env``
        Environment: a mapping that is added to the image's own, or ``"host"`` for the host's as it is at each start.
    ``files``
        What of the host the guest sees: guest path to host path, or to bytes. Directories are seen with all below.
    ``output``
        Where the guest's console goes. ``"capture"``: into ``VmResult.output``, up to ``output_limit`` bytes.
        ``"stdout"``, ``"stderr"``: to file descriptor 1 or 2. A ``pathlib.Path``: to that file, which must not exist.
        A callable: it gets whole lines as ``bytes`` while the guest runs, on a thread of the VM, and for a second when
        the guest is ended from outside; what it is behind by then is dropped, with a warning. ``"none"`` or None:
        nowhere.
    ``backend``
        ``"kvm"``, ``"soft"`` (a CPU in software, which needs no KVM), or ``"auto"``: KVM where it runs the guest's
        kernel on the CPU itself, else ``"soft"``. The environment variable ``UHYVE_BACKEND`` takes the place of
        ``"auto"``.
    ``seed``
        For ``"soft"``: an integer from which follows all that is left to chance: the interleaving of the vCPUs, random
        numbers, the load address, the time of day. The same seed gives the same execution, to the last instruction, if
        the guest gets the same input. None: the load address is random, and the time of day the host's.
    ``quantum``
        For ``"soft"``: how many instructions a vCPU executes, on average, before it is the next one's turn.
    ``clock``
        For ``"soft"``: what the guest's time goes by. ``"virtual"``: its instructions, one a nanosecond, and an idle
        guest jumps to its next timer; this is the default. ``"host"``: the host's clock, and an idle guest sleeps.
        With ``backend="auto"``, any of these three chooses ``"soft"``.
    ``aslr``
        Load a relocatable image at a random address.
    ``thp``, ``ksm``
        Back RAM by transparent huge pages, which suits guests that use much of it; without, a guest takes the pages
        that it touches. Let the host merge equal pages.
    ``pit``, ``cpu_pm``
        Emulate an interval timer; let an idle guest keep its host CPU, which wakes it faster.
    ``affinity``
        The host CPU of each vCPU.
    ``tempdir``
        Where the scratch directory is made, for files that the guest creates outside of ``files``.
    ``file_isolation``
        Landlock on the vCPU threads: ``"none"``, ``"normal"`` (what the kernel has) or ``"strict"`` (all, or an error).
    ``io_mode``
        How host files are opened: None, ``"direct"``, ``"sync"`` or ``"direct,sync"``.
    ``sampling``
        One exit in so many, at random, is timed for ``VmStats.latencies``; 1: all of them, 0: none.

    Raises ``ImageError``, and ``ConfigError`` or ``TypeError`` for a keyword that isn't right. What only a start can
    find out (the image's wishes, the host's limits) is raised by the start.

    A Vm runs one machine at a time, and any number one after the other. Several may run at once, from any threads.

    >>> from uhyve import Vm
    >>> vm = Vm.demo(memory="64MiB", cpus=2, env={"KEY": "value"})
    >>> vm
    Vm('demo', memory=67108864, cpus=2)
    """

    def __init__(
        self,
        image: StrPath | bytes | Image,
        *,
        memory: str | int | None = None,
        cpus: int | None = None,
        kernel_args: Sequence[StrPath] | None = None,
        args: Sequence[StrPath] | None = None,
        env: Mapping[str, str] | Literal["host"] | None = None,
        files: Mapping[str, FileSource] | None = None,
        output: Output = "capture",
        output_limit: int = OUTPUT_LIMIT,
        backend: str = "auto",
        seed: int | None = None,
        quantum: int | None = None,
        clock: Literal["virtual", "host"] | None = None,
        aslr: bool = True,
        thp: bool = False,
        ksm: bool = False,
        pit: bool = False,
        cpu_pm: bool = False,
        affinity: Sequence[int] | None = None,
        tempdir: StrPath | None = None,
        file_isolation: Literal["none", "normal", "strict"] = "none",
        io_mode: str | None = None,
        sampling: int = 128,
    ) -> None:
        direct, sync = _io_mode(io_mode)
        self._host_environment = env == "host"
        self._arguments: dict[str, object] = {
            "memory": _memory(memory),
            "cpus": None if cpus is None else _number("cpus", cpus, 1, 1 << 32),
            "kernel_args": _words("kernel_args", kernel_args),
            "args": _words("args", args),
            "env": [] if env is None or env == "host" else _environment(env),
            "files": _files(files or {}),
            "output": _output(output),
            "output_limit": _number("output_limit", output_limit, 0),
            "backend": _backend(backend),
            "seed": None if seed is None else _number("seed", seed, 0),
            "quantum": None if quantum is None else _number("quantum", quantum, 1),
            "clock": None if clock is None else _choice("clock", clock, ("virtual", "host")),
            "aslr": bool(aslr),
            "guest_address": None,
            "thp": bool(thp),
            "ksm": bool(ksm),
            "pit": bool(pit),
            "cpu_pm": bool(cpu_pm),
            "affinity": [_number("affinity", cpu, 0) for cpu in affinity or ()],
            "tempdir": None if tempdir is None else os.fspath(tempdir),
            "file_isolation": _choice("file_isolation", file_isolation, ("none", "normal", "strict")),
            "io_direct": direct,
            "io_sync": sync,
            "sampling": _number("sampling", sampling, 0, 1 << 31),
            "sampling_skip": 0,
            "firmware_exits": False,
        }
        self._image = _image(image)
        self._lock = threading.RLock()
        self._run: _Run | None = None
        self._result: VmResult | None = None
        self._stats: VmStats | None = None

    @classmethod
    def demo(cls, **keywords: Any) -> Self:
        """A Vm of the small guest that is part of this package, so that a first run needs no image.

        It greets, handles ten requests (``handle_request(id, size)``) and ends with code 0. ``keywords`` are those of
        ``Vm``.
        """
        return cls(Image.demo(), **keywords)

    @property
    def image(self) -> Image:
        """The parsed image."""
        return self._image

    @property
    def running(self) -> bool:
        """Whether a machine of this Vm was started whose guest has neither ended nor been closed.

        A guest that a debugger has stopped is running in this sense.
        """
        run = self._run
        if run is None:
            return False
        return run.machine is None or is_alive(run.machine)

    @property
    def stats(self) -> VmStats | None:
        """The counters of the machine now, while it runs, too; after its end, however it came, those of its end.

        ``None`` if there was no machine yet.
        """
        with self._lock:
            run, stats = self._run, self._stats
        return stats if run is None or run.machine is None else stats_of(run.machine)

    def run(self, timeout: float | None = None) -> VmResult:
        """Runs the guest to its end.

        Raises ``TimeoutExpired`` when ``timeout`` seconds are over, ``GuestCrashError`` if the guest crashes (both with
        what was captured as ``output``), ``VmStateError`` if another thread ends the run or one is under way,
        ``HypervisorError`` or ``OSError`` if the host fails, and what a callable ``output`` raised. The machine is gone
        when this returns or raises, by ``KeyboardInterrupt`` too.
        """
        run = _Run(debugging=False)
        try:
            self._launch(run)
            return self._wait(run, timeout)
        finally:
            self._release(run)

    def start(self) -> None:
        """Starts the guest and returns; it runs until its end, ``close()``, or the end of the last reference to this.

        Raises ``VmStateError`` if a machine of this Vm runs already, and ``ConfigError``, ``HypervisorError`` or
        ``OSError`` if none can be made.
        """
        run = _Run(debugging=False)
        try:
            self._launch(run)
        except BaseException:
            self._release(run)
            raise

    def wait(self, timeout: float | None = None) -> VmResult:
        """Waits for the end of the guest that ``start()`` started. Called again after that, gives the same result.

        Raises ``TimeoutExpired`` when ``timeout`` seconds are over; the guest runs on, and may be waited for again.
        Otherwise raises what ``run()`` raises.
        """
        with self._lock:
            run, result = self._run, self._result
        if run is None:
            if result is None:
                raise VmStateError("the VM is not running: start() it, or use run()")
            return result
        if run.debugging:
            raise VmStateError("a debugger controls this VM: use its wait(), or detach() it first")
        return self._wait(run, timeout)

    def interrupt(self) -> None:
        """Ends the guest from another thread, a callback or a signal handler: who waits gets ``VmStateError``.

        Returns at once. Without a running guest it does nothing.
        """
        run = self._run
        if run is not None:
            run.interrupted = True
            if run.machine is not None:
                run.machine.end()

    def debug(self, gdb: str | None = None) -> Debugger:
        """Starts a machine that stands still before its first instruction, and gives the debugger that controls it.

        With ``gdb``, an address, the debugger's ``serve_gdb()`` is called with it. Raises what ``start()`` raises.
        """
        from uhyve.debugger import Debugger

        run = _Run(debugging=True)
        try:
            debugger = Debugger(self, self._launch(run))
            if gdb is not None:
                debugger.serve_gdb(gdb)
            return debugger
        except BaseException:
            self._release(run)
            raise

    def close(self) -> None:
        """Ends the machine, whatever it does, and waits for its threads. Does nothing if there is none."""
        run = self._run
        if run is None:
            return
        if run.machine is None:
            # It is being made, and its guest runs already: a callback closes it.
            run.closed = True
            self.interrupt()
        else:
            self._release(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        given = {name: self._arguments[name] for name in ("memory", "cpus", "args")}
        fields = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"Vm({', '.join([repr(self._image.name), *fields])})"

    def _launch(self, run: _Run, changed: Mapping[str, object] | None = None) -> Machine:
        """Makes the machine of a run. Whoever calls this releases the run, whatever is raised."""
        with self._lock:
            if self._run is not None:
                raise VmStateError(
                    "this Vm runs already: wait for its end or close() it, or make another Vm of the same image"
                )
            self._run, self._result = run, None
            _running.add(self)
        arguments = {**self._arguments, **(changed or {}), "debugging": run.debugging}
        if self._host_environment:
            arguments["env"] = _environment(os.environ)
        stream = {"stdout": sys.stdout, "stderr": sys.stderr}.get(str(arguments["output"]))
        if stream is not None:
            # What Python has printed so far comes before what the guest writes.
            stream.flush()
        # Kept by the run and nothing else, so that Ctrl-C at this very moment can't leave it running.
        run.machine = Machine(self._image, arguments)
        if run.interrupted:
            run.machine.end()
        return run.machine

    def _relaunch(self, machine: Machine, arguments: Sequence[str] | None) -> Machine:
        """A fresh machine in the place of one that is being debugged; with ``arguments``, those of the application.

        It has its RAM where the other had it: gdb, which expects that of ``run``, loses conditions otherwise.
        """
        changed: dict[str, object] = {"guest_address": machine.ram[0]}
        if arguments is not None:
            changed["args"] = list(arguments)
        self._release_machine(machine)
        run = _Run(debugging=True)
        try:
            return self._launch(run, changed)
        except BaseException:
            self._release(run)
            raise

    def _wait(self, run: _Run, timeout: float | None) -> VmResult:
        machine = run.machine
        if machine is None:
            raise VmStateError("the VM is being started by another thread")
        try:
            status = machine.wait(timeout)
        except GuestCrashError as error:
            self._release(run)
            error.output = text_of(machine)
            raise
        except Exception:
            if not is_alive(machine):
                self._release(run)
            raise
        if status is None:
            raise TimeoutExpired(
                f"the guest did not end within {timeout:g} s", timeout=timeout, output=text_of(machine)
            )
        # Its threads are joined before its counters are read.
        machine.close()
        result = None if status["ended"] is None else result_of(machine, status["ended"])
        self._release(run, result)
        if result is None:
            raise VmStateError(
                "the VM was interrupted"
                if run.interrupted and not run.closed
                else "the VM was closed before its guest ended"
            )
        return result

    def _release(self, run: _Run, result: VmResult | None = None) -> None:
        """Ends a machine and makes room for the next one."""
        if run.machine is not None:
            run.machine.close()
        with self._lock:
            if self._run is run:
                self._run, self._result = None, result
                if result is not None:
                    self._stats = result.stats
                elif run.machine is not None:
                    try:
                        self._stats = stats_of(run.machine)
                    except VmStateError:
                        # A forked child has a copy that is not the VM.
                        self._stats = None
                _running.discard(self)

    def _release_machine(self, machine: Machine) -> None:
        run = self._run
        if run is not None and run.machine is machine:
            self._release(run)
        else:
            machine.close()

    def _detached(self, machine: Machine) -> None:
        """The debugger of this machine has let go of it."""
        with self._lock:
            if self._run is not None and self._run.machine is machine:
                self._run.debugging = False


def is_alive(machine: Machine) -> bool:
    """Whether the guest of a machine has not ended."""
    try:
        status = machine.status()
    except Exception:  # noqa: BLE001 – a crash or a failure of the host, which a callback may have raised
        return False
    return status is None or status.get("reason") not in (None, "exit", "crash")


def _image(image: StrPath | bytes | Image) -> Image:
    if isinstance(image, Image):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return Image.from_bytes("image", bytes(image))
    if isinstance(image, str | os.PathLike):
        return Image.open(image)
    raise TypeError(f"an image is a path, bytes or an Image, not {type(image).__name__}")


def _number(what: str, value: int, minimum: int, limit: int = 1 << 63) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    number = value.__index__()
    if not minimum <= number < limit:
        bound = f"{minimum} or more" if number < minimum else f"less than {limit}"
        raise ConfigError(f"{what} is {number}; it must be {bound}")
    return number


def _memory(memory: str | int | None) -> int | None:
    if memory is None:
        return None
    size = _number("memory", parse_size(memory) if isinstance(memory, str) else memory, 0)
    if size < MINIMUM_MEMORY or size % MEMORY_STEP:
        raise ConfigError(f"memory is {memory!r} ({size} bytes); at least 16 MiB and a multiple of 2 MiB are needed")
    return size


def _words(what: str, words: Sequence[StrPath] | None) -> list[str] | None:
    if words is None:
        return None
    if isinstance(words, str | bytes):
        raise TypeError(f"{what} must be a sequence of strings, not one string; shlex.split() makes one")
    return [_text(f"{what}[{index}]", os.fspath(word)) for index, word in enumerate(words)]


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be text, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is not valid UTF-8: {text!r}") from None
    return text


def _environment(env: Mapping[str, str]) -> list[tuple[str, str]]:
    if isinstance(env, str) or not hasattr(env, "items"):
        raise TypeError(f'env must be a mapping, or "host" for the environment of the host, not {env!r}')
    return [(_text("a name in env", name), _text(f"env[{name!r}]", value)) for name, value in env.items()]


def _files(files: Mapping[str, FileSource]) -> list[tuple[str, bytes | StrPath]]:
    sources: list[tuple[str, bytes | StrPath]] = []
    for guest, host in files.items():
        if isinstance(host, bytes | bytearray | memoryview):
            sources.append((_text("a guest path in files", guest), bytes(host)))
        elif isinstance(host, str | os.PathLike):
            # A str would be taken for neither by the core's union of bytes and path on every version.
            sources.append((_text("a guest path in files", guest), os.fspath(host)))
        else:
            raise TypeError(f"files[{guest!r}] must be a path of the host or bytes, not {type(host).__name__}")
    return sources


def _output(output: Output) -> object:
    if output is None:
        return "none"
    if isinstance(output, str):
        if output not in ("capture", "stdout", "stderr", "none"):
            raise ConfigError(
                f'output is {output!r}; it must be "capture", "stdout", "stderr", "none", a callable or a pathlib.Path'
            )
    elif not callable(output) and not isinstance(output, os.PathLike):
        hint = ": pass its write method" if hasattr(output, "write") else ""
        found = type(output).__name__ + hint
        raise TypeError(
            f'output must be "capture", "stdout", "stderr", "none", a callable, or a pathlib.Path, not {found}'
        )
    return output


def _backend(backend: str) -> str:
    chosen = os.environ.get("UHYVE_BACKEND", "") if backend == "auto" else ""
    return _text("backend", chosen or backend)


def _choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value


def _io_mode(mode: str | None) -> tuple[bool, bool]:
    words = [] if mode is None else mode.removeprefix("host=").split(",")
    for word in words:
        if word not in ("direct", "sync"):
            raise ConfigError(f"io_mode is {mode!r}; it must be 'direct', 'sync' or 'direct,sync'")
    return "direct" in words, "sync" in words
