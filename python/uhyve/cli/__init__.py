"""The command ``uhyve``.

``uhyve [flags] IMAGE [args]`` runs an image and ends with its exit code, so that it can be cargo's runner for Hermit
targets; ``uhyve debug`` runs it under the debugger; ``uhyve doctor`` looks at the machine; ``uhyve demo`` shows both on
a guest that is part of the package. Flags, environment variables and the configuration file are those of the original
uhyve.
"""

from __future__ import annotations

from uhyve.cli.commands import main
from uhyve.cli.ending import (
    EXIT_CRASH,
    EXIT_HOST,
    EXIT_INTERRUPT,
    EXIT_KILLED,
    EXIT_PIPE,
    EXIT_SCRIPT,
    EXIT_TIMEOUT,
    EXIT_USAGE,
)

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
