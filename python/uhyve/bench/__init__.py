"""What an exit costs on this machine: the library under ``uhyve bench``.

``run()`` makes guests leave in one way each, many times, and times each exit by the clock of the core, in rounds that
alternate with a bare loop around KVM_RUN: the *floor*. The result is a ``Report``: plain data, which ``as_dict()``
gives in the types of JSON (``SCHEMA`` names the version), and ``metric()`` by name, as in ``"pio.ratio"``.
"""

from __future__ import annotations

from uhyve.bench.cases import CASES, Bar, Case
from uhyve.bench.compare import Change, compare
from uhyve.bench.measure import run
from uhyve.bench.report import SCHEMA, Exits, Report, Result, Verdict, holds

__all__ = [
    "CASES",
    "SCHEMA",
    "Bar",
    "Case",
    "Change",
    "Exits",
    "Report",
    "Result",
    "Verdict",
    "compare",
    "holds",
    "run",
]
