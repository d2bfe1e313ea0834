"""docs/performance.md says what the figures say that are kept in benches/results/."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_document_is_made_of_the_figures_that_are_kept():
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "benches" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)

    assert report.document() == (ROOT / "docs" / "performance.md").read_text(), "run: python benches/report.py"
