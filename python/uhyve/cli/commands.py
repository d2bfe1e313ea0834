"""The subcommands of ``uhyve``."""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import uhyve
from uhyve.cli.ending import (
    EXIT_CRASH,
    EXIT_HOST,
    EXIT_INTERRUPT,
    EXIT_KILLED,
    EXIT_PIPE,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    Failure,
    exit_code,
    give_up_streams,
    prepare_signals,
    prepare_streams,
    say,
    user_errors,
)
from uhyve.cli.session import Session
from uhyve.cli.settings import ISOLATION, Settings, settings_of, split_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from uhyve.doctor import Diagnosis

_EXIT_CODES = f"""\
The exit status is the guest's exit code (its lowest 8 bits), or {EXIT_USAGE} for wrong usage, configuration or image,
{EXIT_TIMEOUT} when --timeout is over, {EXIT_HOST} if the host fails, {EXIT_INTERRUPT} after Ctrl-C, {EXIT_CRASH} if the
guest crashes, {EXIT_KILLED} if gdb kills it."""

_ARGUMENTS = """\
Words after IMAGE are arguments of the application. If there is a "--" among them, those before it are arguments of the
kernel, and those after it the application's; a "--" right after IMAGE is dropped."""


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
        click.option("--stats/--no-stats", default=None, help="Print counters at the end, whatever that is."),
        click.option("--no-aslr/--aslr", default=None, help="Load the image at a fixed address."),
        click.option("--thp/--no-thp", default=None, help="Transparent huge pages for RAM."),
        click.option("--ksm/--no-ksm", default=None, help="Let the host merge equal pages of RAM."),
        click.option("--pit/--no-pit", default=None, help="Emulate an interval timer."),
        click.option("--cpu-pm/--no-cpu-pm", default=None, help="Let an idle guest keep its host CPU."),
        click.option("-a", "--affinity", metavar="CPUS", help="Host CPU of each vCPU, such as 0-1,2."),
        click.option("--tempdir", metavar="PATH", help="Where the scratch directory is made."),
        click.option(
            "--file-isolation", type=click.Choice(ISOLATION), help="Landlock for the guest's file calls [normal]."
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
    _finish(_run(settings_of(flags), image, words, timeout))


def _run(settings: Settings, image: str | uhyve.Image, words: Sequence[str], timeout: float | None) -> int:
    vm = uhyve.Vm(image, **settings.keywords(*split_arguments(words)))
    if (port := settings.gdb_port) is not None:
        with _counted(settings, vm), vm.debug() as dbg:
            return _serve(dbg, f"127.0.0.1:{port}", timeout)
    with _counted(settings, vm):
        return vm.run(timeout).code


@contextmanager
def _counted(settings: Settings, vm: uhyve.Vm) -> Iterator[None]:
    """Prints the counters in the end, if they are asked for: after a crash, and when the time is over, too."""
    try:
        yield
    finally:
        if settings.stats and vm.stats is not None:
            say(str(vm.stats))


def _serve(dbg: uhyve.Debugger, address: str, timeout: float | None) -> int:
    """Lets gdb's users control the guest until its end."""
    server = dbg.serve_gdb(address)
    if server.address != "-":
        say(f"uhyve: waiting for gdb: target remote {server.address}")
    with server, user_errors():
        if not server.wait(timeout):
            raise uhyve.TimeoutExpired(f"the guest did not end within {timeout:g} s: {dbg!r}")
    return exit_code(dbg)


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
    settings = settings_of(flags)
    if gdb is None and settings.gdb_port is not None:
        gdb = f"127.0.0.1:{settings.gdb_port}"
    keywords = settings.keywords(*split_arguments([*words, *ctx.meta["uhyve.tail"]]))
    if gdb == "-" and keywords["output"] == "stdout":
        # Standard output is the client's.
        keywords["output"] = "stderr"
    vm = uhyve.Vm(image, **keywords)
    prompt = not batch and gdb != "-" and sys.stdin.isatty() and sys.stdout.isatty()
    with _counted(settings, vm), vm.debug() as dbg:
        session = Session(vm, dbg, commands, timeout)
        session.set_breakpoints(places)
        if script is not None:
            session.run_script(Path(script))
        if prompt and not session.is_over():
            if gdb is not None:
                say(f"uhyve: gdb: target remote {dbg.serve_gdb(gdb).address}")
            session.interact()
        elif gdb is not None and not session.is_over():
            _serve(dbg, gdb, timeout)
        else:
            session.run_to_end()
        code = session.exit_code()
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


# How the command ends.


def _finish(code: int) -> NoReturn:
    """Ends with an exit code as the operating system takes it."""
    raise click.exceptions.Exit(code & 0xFF)


def _title(text: str) -> None:
    click.secho(f"\n>>> {text}", bold=True)


def _render(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "note": "[cyan]note[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in diagnosis.findings:
        text = finding.value if not finding.advice else f"{finding.value}\n[dim]→ {finding.advice}[/]"
        table.add_row(marks[finding.level], finding.name, text)
    console = Console()
    # By way of text: a stream that takes nothing is told of by its error, as elsewhere.
    with console.capture() as captured:
        console.print(table)
        console.print(
            f"\nuhyve {diagnosis.version}: " + ("guests run here" if diagnosis.usable else "[red]guests can't run here")
        )
    click.echo(captured.get(), nl=False)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command; ``arguments`` are those of the process if not given."""
    prepare_streams()
    prepare_signals()
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else "--help"
    if first not in cli.commands and first not in ("-h", "--help", "-V", "--version"):
        words.insert(0, "run")
    try:
        status = _status(words or [first])
    finally:
        give_up_streams()
    sys.exit(status)


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
            return EXIT_PIPE
        where = f"{error.filename}: " if error.filename else ""
        return _complain(where + (error.strerror or str(error)), EXIT_HOST)
    return 0


def _complain(text: str, status: int) -> int:
    say(f"uhyve: error: {text}")
    return status
