"""What the command is asked for: flags and environment variables, and a configuration file below them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhyve.cli.ending import Failure, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
_LONGEST = 1 << 20
"""Bytes of a configuration file, at most."""
ISOLATION = ("none", "normal", "strict")
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
        port = _decimal(text)
        if port is None:
            raise Failure(f"--gdb-port {text!r} is no port: write -s=PORT, or -s -- IMAGE for port 6677")
        return port

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


def settings_of(flags: dict[str, Any]) -> Settings:
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
        with file.open("rb") as stream:
            text = stream.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise Failure(f"{file}: this is no configuration file: it has more than {_LONGEST >> 20} MiB")
        document = tomllib.loads(text.decode())
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
    say(f"uhyve: warning: {file}: unknown key {name}")
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
        begin, dash, end = str(part).strip().partition("-")
        first, last = _decimal(begin), _decimal(end if dash else begin)
        if first is None or last is None or last < first:
            raise Failure(f"affinity {text!r}: write host CPUs as in 0-1,2")
        cpus += range(first, last + 1)
    return cpus


def _decimal(text: str) -> int | None:
    """A number of 16 bits that is written in digits."""
    number = int(text) if text.isdecimal() and len(text) <= 5 else -1
    return number if 0 <= number <= 0xFFFF else None


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
