"""The command ``uhyve``.

``uhyve [flags] IMAGE [args]`` runs an image and ends with its exit code, so that it can be cargo's runner for Hermit
targets; ``uhyve debug`` runs it under the debugger; ``uhyve doctor`` looks at the machine; ``uhyve demo`` shows both on
a guest that is part of the package. Flags, environment variables and the configuration file are those of the original
uhyve.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import uhyve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from uhyve.doctor import Diagnosis

__all__ = [
    "EXIT_CRASH",
    "EXIT_HOST",
    "EXIT_INTERRUPT",
    "EXIT_KILLED",
    "EXIT_PIPE",
    "EXIT_SCRIPT",
    "EXIT_TIMEOUT",
    "EXIT_USAGE",
    "main",
]

EXIT_SCRIPT = 1
"""A script of ``uhyve debug``, or a callback in it, raised."""
EXIT_USAGE = 2
"""Wrong usage, configuration or image."""
EXIT_TIMEOUT = 124
"""The time of ``--timeout`` is over."""
EXIT_HOST = 125
"""The host failed: no KVM, no permission, no memory."""
EXIT_INTERRUPT = 130
"""Ctrl-C."""
EXIT_CRASH = 134
"""The guest crashed."""
EXIT_KILLED = 137
"""A gdb client killed the guest."""
EXIT_PIPE = 141
"""Nobody reads the standard output any more."""

_EXIT_CODES = f"""\
The exit status is the guest's exit code (its lowest 8 bits), or {EXIT_USAGE} for wrong usage, configuration or image,
{EXIT_TIMEOUT} when --timeout is over, {EXIT_HOST} if the host fails, {EXIT_INTERRUPT} after Ctrl-C, {EXIT_CRASH} if the
guest crashes, {EXIT_KILLED} if gdb kills it."""

_ARGUMENTS = """\
Words after IMAGE are arguments of the application. If there is a "--" among them, those before it are arguments of the
kernel, and those after it the application's; a "--" right after IMAGE is dropped."""


class Failure(click.ClickException):
    """An error that ends the command with one line and this status."""

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status


# The configuration: flags, environment variables, and a TOML file below them.

_BOOLEANS = {
    "uhyve.stats": "stats",
    "memory.no_aslr": "no_aslr",
    "memory.thp": "thp",
    "memory.ksm": "ksm",
    "cpu.pit": "pit",
    "cpu.cpu_pm": "cpu_pm",
}
_VALUES = {
    "uhyve.output": "output",
    "uhyve.tempdir": "tempdir",
    "uhyve.file_isolation": "file_isolation",
    "uhyve.io_mode": "io_mode",
    "memory.memory_size": "memory_size",
    "cpu.cpu_count": "cpu_count",
    "cpu.affinity": "affinity",
    "uhyve.gdb_port": "gdb_port",
}
_ISOLATION = ("none", "normal", "strict")
_MISSING = {
    "net": "has no network yet",
    "trace_dir": "does not trace",
}


@dataclass
class Settings:
    """What the flags and the configuration file ask for."""

    values: dict[str, Any]
    environment: dict[str, str] | str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def gdb_port(self) -> int | None:
        """Where to wait for gdb."""
        value = self.values.get("gdb_port")
        if value is None:
            return None
        text = str(value).removeprefix("=")
        if not text.isdecimal() or int(text) > 0xFFFF:
            raise Failure(f"--gdb-port {text!r} is no port: write -s=PORT, or -s -- IMAGE for port 6677")
        return int(text)

    @property
    def stats(self) -> bool:
        """Whether to print counters at the end."""
        return bool(self.values.get("stats"))

    def keywords(self, kernel_args: list[str], args: list[str]) -> dict[str, Any]:
        """The keywords of ``uhyve.Vm``."""
        values = self.values
        output = values.get("output")
        return {
            "memory": values.get("memory_size"),
            "cpus": values.get("cpu_count"),
            "kernel_args": kernel_args or None,
            "args": args or None,
            "env": self.environment,
            "files": self.files,
            "output": "stdout" if output is None else "none" if output in ("none", "None") else Path(output),
            "aslr": not values.get("no_aslr"),
            "thp": bool(values.get("thp")),
            "ksm": bool(values.get("ksm")),
            "pit": bool(values.get("pit")),
            "cpu_pm": bool(values.get("cpu_pm")),
            "affinity": _affinity(values.get("affinity")),
            "tempdir": values.get("tempdir"),
            "file_isolation": values.get("file_isolation") or "normal",
            "io_mode": values.get("io_mode"),
        }


def _settings(flags: dict[str, Any]) -> Settings:
    """Flags and their environment variables win over the configuration file."""
    for name, what in _MISSING.items():
        if flags.get(name) is not None:
            raise Failure(f"--{name.replace('_', '-')}: this version {what}")
    table, environment = _configuration(flags.get("config"))
    values = table | {name: value for name, value in flags.items() if value is not None}
    return Settings(values, _environment(environment, flags["env_vars"]), _file_mappings(flags["file_mapping"]))


def _configuration(path: str | None) -> tuple[dict[str, Any], list[str]]:
    """The settings in the configuration file, and its environment variables."""
    file = _configuration_file(path)
    if file is None:
        return {}, []
    import tomllib

    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"{file}: can't read the configuration: {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"{file}: {error}") from None
    settings: dict[str, Any] = {}
    environment: list[str] = []
    for table, keys in document.items():
        for key, value in keys.items() if isinstance(keys, dict) else [("", keys)]:
            name = f"{table}.{key}" if key else table
            if name == "guest.env_vars":
                environment = _listed(file, name, value)
            else:
                settings |= _setting(file, name, value)
    return settings, environment


def _configuration_file(path: str | None) -> Path | None:
    if path is not None:
        return Path(path)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    for file in (Path("uhyve.toml"), home / "uhyve" / "uhyve.toml"):
        try:
            if file.is_file():
                return file
        except OSError:
            # A directory that this user may not look into has no configuration for it.
            continue
    return None


def _setting(file: Path, name: str, value: Any) -> dict[str, Any]:
    """One key of the configuration file, checked."""
    if name in _BOOLEANS:
        if not isinstance(value, bool):
            raise Failure(f"{file}: {name} must be true or false, not {value!r}")
        return {_BOOLEANS[name]: value}
    if name in _VALUES:
        kinds = {
            "memory.memory_size": (str, int),
            "cpu.cpu_count": (int,),
            "cpu.affinity": (str, list),
            "uhyve.gdb_port": (int,),
        }
        if isinstance(value, bool) or not isinstance(value, kinds.get(name, (str,))):
            raise Failure(f"{file}: {name} can't be {value!r}")
        return {_VALUES[name]: value}
    key = name.rpartition(".")[2]
    if key in _MISSING:
        raise Failure(f"{file}: {name}: this version {_MISSING[key]}")
    _say(f"uhyve: warning: {file}: unknown key {name}")
    return {}


def _listed(file: Path, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Failure(f"{file}: {name} must be a list of strings such as 'KEY=VALUE'")
    return value


def _environment(configured: Iterable[str], given: Iterable[str]) -> dict[str, str] | str:
    """Variables of the configuration file, then those of the command line; ``host`` stands for all of the host's."""
    words = [*configured, *given]
    if words == ["host"]:
        return "host"
    variables: dict[str, str] = dict(os.environ) if "host" in words else {}
    for word in words:
        name, equals, value = word.partition("=")
        if name and equals:
            variables[name] = value
        elif word != "host":
            raise Failure(f"{word!r} is no environment variable; write KEY=VALUE, or host for the whole environment")
    return variables


def _file_mappings(mappings: Iterable[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for mapping in mappings:
        host, _, guest = mapping.partition(":")
        if not host or not guest or ":" in guest:
            raise Failure(f"--file-mapping {mapping!r}: write HOST:GUEST (a path with ':' in it needs the Python API)")
        if guest in files:
            raise Failure(f"--file-mapping: {guest} is mapped twice, to {files[guest]} and to {host}")
        files[guest] = host
    return files


def _affinity(text: str | list[Any] | None) -> list[int] | None:
    """The host CPUs in ``"0-1,2"``, or in a list of numbers and such texts."""
    if text is None:
        return None
    cpus: list[int] = []
    for part in text.split(",") if isinstance(text, str) else text:
        first, dash, last = str(part).strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise Failure(f"affinity {text!r}: write host CPUs as in 0-1,2")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the kernel and of the application.

    >>> split_arguments(["a", "-b"]), split_arguments(["k", "--", "a"]), split_arguments(["--", "--", "a"])
    (([], ['a', '-b']), (['k'], ['a']), ([], ['a']))
    """
    rest = list(words[1:] if words[:1] in (["--"], ("--",)) else words)
    if "--" not in rest:
        return [], rest
    at = rest.index("--")
    return rest[:at], rest[at + 1 :]


# The commands.


class _Flat(click.Command):
    """A command whose options end at its first argument, as those of the original uhyve do."""

    allow_interspersed_args = False


class _Mixed(click.Command):
    """A command that takes options behind IMAGE as well; what follows a ``--`` is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta["uhyve.tail"] = args[at:]
        return super().parse_args(ctx, args[:at])


def _vm_options(command: Callable[..., None]) -> Callable[..., None]:
    """The flags of the original uhyve."""
    options = [
        click.option("-m", "--memory-size", envvar="HERMIT_MEMORY_SIZE", metavar="SIZE", help="RAM, such as 128MiB."),
        click.option(
            "-c", "--cpu-count", envvar="HERMIT_CPU_COUNT", type=click.IntRange(min=1), metavar="N", help="vCPUs."
        ),
        click.option(
            "-e",
            "--env-vars",
            multiple=True,
            metavar="KEY=VALUE",
            help="A variable for the guest; host: all of the host's. May be repeated.",
        ),
        click.option(
            "--file-mapping",
            multiple=True,
            metavar="HOST:GUEST",
            help="A file or directory that the guest sees. May be repeated.",
        ),
        click.option("-o", "--output", metavar="FILE", help="Console into a new file; none: nowhere."),
        click.option("--stats/--no-stats", default=None, help="Print counters at the end."),
        click.option("--no-aslr/--aslr", default=None, help="Load the image at a fixed address."),
        click.option("--thp/--no-thp", default=None, help="Transparent huge pages for RAM."),
        click.option("--ksm/--no-ksm", default=None, help="Let the host merge equal pages of RAM."),
        click.option("--pit/--no-pit", default=None, help="Emulate an interval timer."),
        click.option("--cpu-pm/--no-cpu-pm", default=None, help="Let an idle guest keep its host CPU."),
        click.option("-a", "--affinity", metavar="CPUS", help="Host CPU of each vCPU, such as 0-1,2."),
        click.option("--tempdir", metavar="PATH", help="Where the scratch directory is made."),
        click.option(
            "--file-isolation", type=click.Choice(_ISOLATION), help="Landlock for the guest's file calls [normal]."
        ),
        click.option("--io-mode", metavar="host=MODE", help="Host files: direct, sync or direct,sync."),
        click.option("--config", envvar="HERMIT_CONFIG", metavar="FILE", help="Instead of ./uhyve.toml or the user's."),
        click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="End the guest after S seconds."),
        click.option(
            "-s",
            "--gdb-port",
            envvar="HERMIT_GDB_PORT",
            is_flag=False,
            flag_value="6677",
            metavar="[PORT]",
            help="Wait for gdb on loopback [6677] before the first instruction. Write -s=PORT, or -s -- IMAGE.",
        ),
        click.option("-n", "--net", hidden=True),
        click.option("--trace-dir", is_flag=False, flag_value="./uhyve_trace", hidden=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(
    invoke_without_command=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="'uhyve [FLAGS] IMAGE [ARGS]' is short for 'uhyve run'. An image that is called like a command: './run'.",
)
@click.version_option(uhyve.__version__, "-V", "--version", message="uhyve %(version)s")
def cli() -> None:
    """Runs and debugs images of the Hermit unikernel."""


@cli.command(cls=_Flat, epilog=f"{_ARGUMENTS}\n\n{_EXIT_CODES}")
@_vm_options
@click.argument("image", type=click.Path())
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def run(image: str, words: tuple[str, ...], timeout: float | None, **flags: Any) -> None:
    """Runs IMAGE, and ends with its exit code."""
    _finish(_run(_settings(flags), image, words, timeout))


def _run(settings: Settings, image: str | uhyve.Image, words: Sequence[str], timeout: float | None) -> int:
    vm = uhyve.Vm(image, **settings.keywords(*split_arguments(words)))
    if (port := settings.gdb_port) is not None:
        with vm.debug() as dbg:
            code = _serve(dbg, f"127.0.0.1:{port}", timeout)
            if settings.stats:
                _say(str(dbg.stats))
            return code
    result = vm.run(timeout)
    if settings.stats:
        _say(str(result.stats))
    return result.code


def _serve(dbg: uhyve.Debugger, address: str, timeout: float | None) -> int:
    """Lets gdb's users control the guest until its end."""
    server = dbg.serve_gdb(address)
    if server.address != "-":
        _say(f"uhyve: waiting for gdb: target remote {server.address}")
    with server, _user_errors():
        if not server.wait(timeout):
            raise uhyve.TimeoutExpired(f"the guest did not end within {timeout:g} s: {dbg!r}")
    return _exit_code(dbg)


def _exit_code(dbg: uhyve.Debugger) -> int:
    """The status to end with: the guest's code, if it has one."""
    if dbg.result is not None:
        return dbg.result.code
    try:
        return EXIT_CRASH if not dbg.running and dbg.stop.reason == "crash" else 0
    except uhyve.VmStateError:
        # A client has killed it.
        return EXIT_KILLED


@cli.command(cls=_Mixed, epilog=f"{_ARGUMENTS}\n\n{_EXIT_CODES}")
@_vm_options
@click.option(
    "-b",
    "--break",
    "places",
    multiple=True,
    metavar="'PLACE [if CONDITION]'",
    help="A breakpoint: a symbol, symbol+offset or address. May be repeated.",
)
@click.option(
    "-x", "--script", metavar="FILE", help="Python to run once the breakpoints are set, with dbg, vm and uhyve."
)
@click.option(
    "-C", "--commands", multiple=True, metavar="CODE", help="Python to run at each stop, with dbg, stop, vm and uhyve."
)
@click.option("--batch", is_flag=True, help="No prompt, on a terminal either.")
@click.option(
    "--gdb",
    metavar="ADDRESS",
    help="Serve gdb at HOST:PORT, PORT on loopback (0: any), unix:PATH, or - (target remote |).",
)
@click.argument("image", type=click.Path())
@click.argument("words", nargs=-1, metavar="[ARGS]...")
@click.pass_context
def debug(
    ctx: click.Context,
    /,
    image: str,
    words: tuple[str, ...],
    places: tuple[str, ...],
    script: str | None,
    commands: tuple[str, ...],
    batch: bool,
    gdb: str | None,
    timeout: float | None,
    **flags: Any,
) -> None:
    """Runs IMAGE under the debugger.

    The guest stands still before its first instruction while the breakpoints are set and FILE is run. Then, on a
    terminal, a Python prompt controls it; otherwise each stop is printed on the standard error output, and the guest
    goes on until its end.
    """
    settings = _settings(flags)
    if gdb is None and settings.gdb_port is not None:
        gdb = f"127.0.0.1:{settings.gdb_port}"
    keywords = settings.keywords(*split_arguments([*words, *ctx.meta["uhyve.tail"]]))
    if gdb == "-" and keywords["output"] == "stdout":
        # Standard output is the client's.
        keywords["output"] = _to_standard_error
    vm = uhyve.Vm(image, **keywords)
    prompt = not batch and gdb != "-" and sys.stdin.isatty() and sys.stdout.isatty()
    with vm.debug() as dbg:
        session = _Session(vm, dbg, commands, timeout)
        session.set_breakpoints(places)
        if script is not None:
            session.run_script(Path(script))
        if prompt and not session.is_over():
            if gdb is not None:
                _say(f"uhyve: gdb: target remote {dbg.serve_gdb(gdb).address}")
            session.interact()
        elif gdb is not None and not session.is_over():
            _serve(dbg, gdb, timeout)
        else:
            session.run_to_end()
        code = session.exit_code()
        if settings.stats:
            _say(str(dbg.stats))
    _finish(code)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """Looks at what this machine can do.

    It runs small guests to find out what KVM really does, and says what to do about what is missing. Ends with 1 if
    guests can't run here.
    """
    from uhyve.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        import json

        click.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        _render(diagnosis)
    _finish(0 if diagnosis.usable else 1)


@cli.command()
@click.option("-m", "--memory-size", default="64MiB", show_default=True, metavar="SIZE", help="RAM.")
@click.option("-c", "--cpu-count", type=click.IntRange(min=1), default=1, metavar="N", help="vCPUs.")
def demo(memory_size: str, cpu_count: int) -> None:
    """Runs and debugs a guest of its own.

    The guest is part of the package. It is run to its end first, and then under the debugger with a condition.
    """
    vm = uhyve.Vm.demo(memory=memory_size, cpus=cpu_count, output="stdout")
    _title(f"uhyve.Vm.demo(cpus={cpu_count}).run()")
    result = vm.run(timeout=60)
    click.echo(f"It ended with code {result.code} after {result.seconds:.3f} s on {result.backend}.")
    condition = "arg1 > 8000"
    _title(f'dbg = vm.debug(); dbg.breakpoint("handle_request", condition="{condition}"); dbg.cont()')
    with vm.debug() as dbg:
        requests = dbg.breakpoint("handle_request", condition=condition)
        while (stop := dbg.cont(timeout=60)).reason == "breakpoint":
            registers = stop.frame.registers
            click.echo(f"{stop}\n  handle_request(id={registers.rdi}, size={registers.rsi})")
        click.echo(f"{stop}; {requests.hits} of {requests.reached} requests met the condition, which Rust evaluated.")


class _Bench(click.Command):
    """``uhyve bench``, whose module is imported when it is asked for."""

    def main_command(self) -> click.Command:
        """The command itself."""
        from uhyve.bench.command import bench

        return bench

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        return self.main_command().make_context(*arguments, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        return self.main_command().invoke(ctx)


cli.add_command(_Bench("bench", short_help="Measures what an exit costs here."))


# A debugging session on the command line.


class _Session:
    """One guest under ``uhyve debug``."""

    def __init__(self, vm: uhyve.Vm, dbg: uhyve.Debugger, commands: Sequence[str], timeout: float | None) -> None:
        self.dbg = dbg
        self.commands = commands
        self.timeout = timeout
        self.scope: dict[str, Any] = {"dbg": dbg, "vm": vm, "uhyve": uhyve}

    def set_breakpoints(self, places: Iterable[str]) -> None:
        """Sets the breakpoints of the command line."""
        from uhyve.condition import split_if

        for place in places:
            location, condition = split_if(place)
            self.dbg.breakpoint(location, condition=condition)

    def run_script(self, path: Path) -> None:
        """Runs a file as the main module, with the session in its globals."""
        try:
            source = path.read_bytes()
        except OSError as error:
            raise Failure(f"{path}: can't read the script: {error.strerror}") from None
        sys.path.insert(0, str(path.resolve().parent))
        self.scope |= {"__name__": "__main__", "__file__": str(path)}
        self.execute(source, str(path))

    def execute(self, source: Any, name: str = "<commands>") -> None:
        """Runs the user's code."""
        with _user_errors():
            exec(compile(source, name, "exec"), self.scope)

    def is_over(self) -> bool:
        """Whether there is nothing left to run."""
        dbg = self.dbg
        return not dbg.attached or (not dbg.running and dbg.stop.reason in ("exit", "crash"))

    def show(self, stop: uhyve.Stop) -> None:
        """Prints a stop, and runs the commands of ``--commands``."""
        _say(str(stop))
        if stop.reason not in ("exit", "crash"):
            _say(_registers(stop))
        self.scope["stop"] = stop
        for code in self.commands:
            self.execute(code)

    def run_to_end(self) -> None:
        """Prints each stop and goes on, until the guest's end."""
        import time

        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while not self.is_over():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with _user_errors():
                stop = self.dbg.wait(left) if self.dbg.running else self.dbg.cont(left)
            if stop.reason == "timeout":
                raise uhyve.TimeoutExpired(f"the guest did not end within {self.timeout:g} s: {stop}")
            self.show(stop)

    def interact(self) -> None:
        """A Python prompt that controls the guest."""
        import code
        import importlib

        try:
            readline = importlib.import_module("readline")
            completer = importlib.import_module("rlcompleter").Completer(self.scope)
            readline.set_completer(completer.complete)
            readline.parse_and_bind("tab: complete")
        except ImportError:
            # A Python without readline has a plain prompt.
            pass
        dbg = self.dbg

        class Console(code.InteractiveConsole):
            """A prompt that answers Ctrl-C with where the guest stands now."""

            def showtraceback(self) -> None:
                if isinstance(sys.exc_info()[1], KeyboardInterrupt) and not dbg.running:
                    self.write(f"\nKeyboardInterrupt\n{dbg.stop}\n")
                else:
                    super().showtraceback()

        sys.displayhook = _display
        Console(self.scope).interact(_banner(dbg), exitmsg="")

    def exit_code(self) -> int:
        """The status to end with: the guest's code, if it has one."""
        dbg = self.dbg
        if not dbg.attached and dbg.vm.running:
            # The script has detached.
            return dbg.vm.wait(self.timeout).code
        return _exit_code(dbg)


def _banner(dbg: uhyve.Debugger) -> str:
    return f"""{dbg.stop}
  dbg.breakpoint("symbol", condition="arg1 > 8")   a breakpoint; conditions may be callables, too
  dbg.cont(), dbg.step(), Ctrl-C                   go on, execute an instruction, stop the guest
  dbg.stop.frame, dbg.registers, dbg.memory        where the guest stands, and what is there
  dbg.vcpus[1].registers, dbg.symbolize(address)   the other vCPUs, the symbol at an address
  help(dbg), Ctrl-D                                all there is, and the end of guest and prompt"""


def _display(value: object) -> None:
    """Shows stops and registers at the prompt as text for people."""
    if isinstance(value, uhyve.Stop | uhyve.Registers | uhyve.VmStats):
        print(value)
    elif value is not None:
        print(repr(value))


def _registers(stop: uhyve.Stop) -> str:
    """The registers that arguments are passed in, and where the stack is."""
    registers = stop.frame.registers
    names = ("rdi", "rsi", "rdx", "rcx", "rax", "rsp")
    return "  " + "  ".join(f"{name} {getattr(registers, name):#x}" for name in names)


# How the command ends.


def _finish(code: int) -> NoReturn:
    """Ends with an exit code as the operating system takes it."""
    raise click.exceptions.Exit(code & 0xFF)


def _to_standard_error(text: bytes) -> None:
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()


def _say(text: str) -> None:
    click.echo(text, err=True)


def _title(text: str) -> None:
    click.secho(f"\n>>> {text}", bold=True)


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the user's code raises ends the command with a traceback that begins there."""
    try:
        yield
    except (uhyve.TimeoutExpired, uhyve.HypervisorError):
        raise
    except Exception as error:  # noqa: BLE001 – a script may raise anything
        import traceback

        package = str(Path(__file__).parent)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(package):
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames or error.__traceback__))
        raise Failure("a script or a callback has failed", EXIT_SCRIPT) from None


def _render(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "note": "[cyan]note[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in diagnosis.findings:
        text = finding.value if not finding.advice else f"{finding.value}\n[dim]→ {finding.advice}[/]"
        table.add_row(marks[finding.level], finding.name, text)
    console = Console()
    console.print(table)
    console.print(
        f"\nuhyve {diagnosis.version}: " + ("guests run here" if diagnosis.usable else "[red]guests can't run here")
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command; ``arguments`` are those of the process if not given."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else "--help"
    if first not in cli.commands and first not in ("-h", "--help", "-V", "--version"):
        words.insert(0, "run")
    sys.exit(_status(words or [first]))


def _status(words: list[str]) -> int:
    """Runs the command and turns what it raises into a line for people and an exit status."""
    try:
        with cli.make_context("uhyve", words) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except Failure as error:
        return _complain(error.format_message(), error.status)
    except click.ClickException as error:
        return _complain(error.format_message(), EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPT
    except uhyve.GuestCrashError as error:
        return _complain(f"the guest has crashed: {error}", EXIT_CRASH)
    except uhyve.TimeoutExpired as error:
        return _complain(str(error), EXIT_TIMEOUT)
    except uhyve.HypervisorError as error:
        return _complain(str(error), EXIT_HOST)
    except uhyve.UhyveError as error:
        return _complain(str(error), EXIT_USAGE)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # What Python has buffered has no reader either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return EXIT_PIPE
        where = f"{error.filename}: " if error.filename else ""
        return _complain(where + (error.strerror or str(error)), EXIT_HOST)
    return 0


def _complain(text: str, status: int) -> int:
    _say(f"uhyve: error: {text}")
    return status
