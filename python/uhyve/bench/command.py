"""The command ``uhyve bench``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from uhyve.cli.ending import EXIT_USAGE, say
from uhyve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bench"]


@click.command()
@click.option("--quick", is_flag=True, help="Under 20 seconds.")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "kvm", "soft"]))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--exits", is_flag=True, help="Every reason of every vCPU, too.")
@click.option(
    "--fail-if",
    "limits",
    multiple=True,
    metavar="'CASE.METRIC>N'",
    help="End with 1 if so, with 2 if it could not be measured. May be repeated.",
)
@click.option(
    "--compare",
    "other",
    type=click.File(encoding="utf-8"),
    metavar="OLD.json",
    help="What has changed since that report.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Draw it: an .svg, .png or .html file. Needs uhyve[plot].",
)
@click.option("--list", "is_list", is_flag=True, help="Say which cases there are, and measure nothing.")
@click.argument("cases", nargs=-1)
def bench(
    cases: tuple[str, ...],
    quick: bool,
    backend: str,
    as_json: bool,
    exits: bool,
    limits: tuple[str, ...],
    other: TextIO | None,
    plot: Path | None,
    is_list: bool,
) -> None:
    """Measures what an exit costs here: all CASES, or those that are named."""
    from uhyve.bench import CASES, compare, holds, run
    from uhyve.bench.cases import named
    from uhyve.bench.compare import moved, read
    from uhyve.bench.plot import check, save
    from uhyve.bench.report import checked
    from uhyve.bench.table import show

    if is_list:
        for case in CASES:
            click.echo(f"{case.name:<18} {case.title}")
        return
    # What was asked for wrongly is told before anything is measured.
    wanted = named(cases)
    for limit in limits:
        checked(limit, wanted)
    old = None if other is None else read(_text(other))
    if plot is not None:
        check(plot)
    with _progress() as tell:
        report = run(cases, backend=backend, quick=quick, progress=tell)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=1))
    else:
        show(report, sys.stdout, exits)
    if plot is not None:
        save(report, plot)
    if old is not None:
        changes = [str(change) for change in compare(report, old)]
        for line in moved(report, old) + (changes or ["the other report has none of these cases"]):
            (say if as_json else click.echo)(line)
    passed = unknown = False
    for limit in limits:
        try:
            if holds(report, limit):
                passed = True
                say(f"uhyve: {limit} is true")
        except ConfigError as error:
            unknown = True
            say(f"uhyve: {limit}: {error}")
    if passed or unknown:
        raise click.exceptions.Exit(1 if passed else EXIT_USAGE)


def _text(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.name} is no report: {error}") from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What tells a terminal what comes next, in one line, which is gone in the end."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _: None
        return

    def tell(title: str) -> None:
        # A line that the terminal breaks is not erased whole.
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        click.echo("\r\x1b[K" + f"{title} …"[: columns - 1], nl=False, err=True)

    try:
        yield tell
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)
