"""Pictures of reports."""

import os
import subprocess
import sys

import pytest

import uhyve
from bench.test_bench import _report, _result
from uhyve import bench
from uhyve.bench import plot


def _several():
    summary = _result().summary
    parts = {"run": summary, "dispatch": summary, "floor": summary}
    histogram = [(100.0, 3), (200.0, 1)]
    return _report(
        _result(histogram=histogram, parts=parts),
        *(_result(name=name, histogram=histogram) for name in ("write_4k", "stop_4", "hit", "boot")),
    )


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.html", b"<!doctype")])
def test_plot_of_each_format_is_such_a_file(tmp_path, name, begins):
    plot.save(_several(), tmp_path / name)

    assert (tmp_path / name).read_bytes().startswith(begins)


def test_plot_of_a_machine_whose_name_looks_like_a_formula_is_drawn(tmp_path):
    report = _several()
    report.machine["cpu"] = r"$\frac{1$ <b>"

    plot.save(report, tmp_path / "a.html")

    assert "<b>" not in (tmp_path / "a.html").read_text()


def test_panel_of_each_case_is_that_of_its_kind():
    panels = {case.name: plot._panel(case.name) for case in bench.CASES}

    assert panels["pio"] == "exits"
    assert panels["stop_4"] == panels["crowd_4"] == "interrupts and stops"
    assert panels["gdb_unix_client"] == "debugging"
    assert panels["import"] == "lives of a VM"


def test_bars_that_are_longer_than_others_are_cut_and_that_is_told():
    long = dict.fromkeys(_result().summary, 1e6)
    many = [_result(name=f"r{n}", parts={"run": _result().summary}) for n in range(3)]

    figure = plot._drawn(_report(*many, _result(name="long", parts={"run": long})))

    assert "cut" in figure.axes[-1].get_title()


def test_page_where_the_locale_has_no_greek_letters_is_utf_8(tmp_path):
    page = tmp_path / "a.html"
    words = [sys.executable, "-m", "uhyve", "bench", "--quick", "--backend", "soft", "pio", "--plot", str(page)]

    subprocess.run(
        words, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}, check=True, capture_output=True, timeout=60
    )

    assert "µs" in page.read_text(encoding="utf-8")


def test_page_holds_the_picture_and_the_table(tmp_path):
    plot.save(_several(), tmp_path / "a.html")

    text = (tmp_path / "a.html").read_text()
    assert text.count("<svg") == 1
    assert "skipped ipi: one CPU" in text


def test_plot_of_a_report_without_results_is_empty(tmp_path):
    plot.save(_report(), tmp_path / "a.svg")

    assert (tmp_path / "a.svg").stat().st_size > 0


def test_plot_of_another_format_raises_config_error(tmp_path):
    with pytest.raises(uhyve.ConfigError, match=r"\.svg, \.png or \.html"):
        plot.check(tmp_path / "a.pdf")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(uhyve.ConfigError, match=r"pip install 'uhyve\[plot\]'"):
        plot.check(tmp_path / "a.svg")
