"""The benchmark as a tool: what it reports, not how fast this machine is."""

import fcntl
import importlib.resources
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import jsonschema
import pytest

import uhyve
from uhyve import bench
from uhyve.bench import measure, table
from uhyve.bench.cases import CASES_BY_NAME
from uhyve.bench.command import _progress
from uhyve.bench.compare import moved, read
from uhyve.bench.ways import Round


def _result(**changes):
    summary = dict.fromkeys(("count", "min", "p50", "p90", "p99", "p999", "max", "mean"), 100.0)
    fields = {"name": "pio", "title": "port out", "summary": summary, "ratio": 1.02, "interval": (1.0, 1.04)}
    return bench.Result(**fields | {"bars": [_verdict()]} | changes)


def _verdict(**changes):
    fields = {"what": "ratio", "value": 1.02, "limit": 1.05, "interval": (1.0, 1.04), "rounds": 5}
    return bench.Verdict(**fields | changes)


def _report(*results):
    clock = {"source": "tsc", "cost_p50_ns": 9.0}
    return bench.Report("0", "soft", True, 1.0, {}, clock, list(results), {"ipi": "one CPU"})


def test_condition_on_a_metric_is_judged_by_its_value():
    report = _report(_result())

    assert bench.holds(report, "pio.ratio>1.01")
    assert not bench.holds(report, "pio.ratio > 1.1")
    assert bench.holds(report, "pio.p99<=100")


@pytest.mark.parametrize("text", ["pio.ratio", "nothing.p50>1", "pio.none>1", "ipi.p50>1"])
def test_condition_that_makes_no_sense_raises_config_error(text):
    with pytest.raises(uhyve.ConfigError):
        bench.holds(_report(_result()), text)


def test_floor_that_moved_between_the_halves_is_told():
    report = _report(_result(floors=[100.0, 101.0, 100.0, 120.0, 121.0]))

    assert "moved by 2" in report.warnings()[0]
    assert report.as_dict()["warnings"] == report.warnings()
    assert "doubtful" in str(report)


def test_floor_that_moved_in_the_run_is_told():
    report = _report()
    report.floor = [100.0, 101.0, 120.0, 121.0]

    assert report.warnings() == ["the floor moved by 20% between the halves of the run"]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"value": 1.2, "interval": (1.1, 1.3)}, "NOT held"),
        ({"value": 1.2, "interval": (1.0, 1.3)}, "unclear"),
        ({"value": 1.2, "interval": (1.1, 1.3), "rounds": 2}, "unclear"),
    ],
)
def test_bar_is_told_in_table_and_json_with_a_verdict_by_the_noise(changes, verdict):
    report = _report(_result(bars=[_verdict(**changes)]))

    assert report.as_dict()["results"][0]["bars"][0]["verdict"] == verdict
    assert report.as_dict()["results"][0]["held"] is (verdict == "held")
    assert f"{verdict}: ratio" in str(report)


def test_bar_of_a_tail_that_was_long_in_one_round_alone_knows_noise():
    book = measure._Book(CASES_BY_NAME["hit_callable"])

    for slow in (100.0, 100.0, 100.0, 100.0, 900.0):
        book.take(Round({"total": [(100.0, 90), (slow, 10)]}), [(100.0, 1)])
    (_, tail) = book.result("kvm").bars

    assert (tail.what, tail.value, tail.verdict) == ("tail", 1.0, "held")
    assert tail.interval[1] > 1.0


def test_bar_of_a_time_has_a_sign_if_it_is_more_and_no_exponent():
    assert str(_verdict(what="more_ns", value=-110.0, limit=2000.0)) == "held: -0.11 µs ≤ +2 µs"
    assert str(_verdict(what="p50_ns", value=7817e3, limit=30e6)) == "held: 7817 µs ≤ 30000 µs"
    assert str(_verdict(what="more_ns", value=555.0, limit=2000.0)) == "held: +0.555 µs ≤ +2 µs"


def test_table_without_rich_on_a_terminal_is_plain_text(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()

    table.show(_report(_result()), stream)

    assert "port out" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def _on_a_terminal(monkeypatch, columns, *results):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    table.show(_report(*results), stream, exits=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_table_on_a_terminal_has_every_case_and_remark(monkeypatch):
    exits = bench.Exits(1, "port_write", _result().summary, {}, [(100.0, 1)])

    text = _on_a_terminal(monkeypatch, 200, _result(exits=[exits]))

    assert all(word in text for word in ("port out", "port_write", "held: ratio", "skipped ipi: one CPU"))
    assert "no room" not in text


def test_columns_of_a_narrow_table_that_are_blank_go_first_and_are_not_missed():
    rows, missing = table._fitting([["case", "p90", "script", "bar"], ["a", "1.00", "", "held"]], 16)

    assert rows == [["case", "p90", "bar"], ["a", "1.00", "held"]]
    assert missing == []


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120])
def test_table_on_a_narrow_terminal_has_names_and_verdicts_and_tells_what_is_missing(monkeypatch, columns):
    exits = bench.Exits(1, "port_write", _result().summary, {}, [(100.0, 1)])
    result = _result(title="a title of several words", exits=[exits])

    text = _on_a_terminal(monkeypatch, columns, result)

    assert all(len(line) <= columns for line in text.splitlines())
    assert all(word in text for word in ("several", "held:", "0.10", "port_write"))
    assert "…" not in text
    assert ("no room for" in text) == (columns < 100)


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ([110.0, 111.0, 112.0], "slower"),
        ([90.0, 91.0, 90.0], "faster"),
        ([100.0, 101.0, 99.0], "same"),
        ([80.0, 100.0, 130.0], "unclear"),
    ],
)
def test_comparison_with_an_older_report_gives_a_verdict_by_the_noise(rounds, verdict):
    old = _report(_result(rounds=[100.0, 100.0, 101.0], floors=[50.0, 50.0, 50.5])).as_dict()

    (change,) = bench.compare(_report(_result(rounds=rounds, floors=[50.0, 50.0, 50.0])), old)

    assert change.verdict == verdict


def test_comparison_with_another_format_raises_config_error():
    with pytest.raises(uhyve.ConfigError, match="format"):
        bench.compare(_report(_result()), {"schema": "other"})


def _old(**changes):
    return {"name": "pio", "rounds": [1.0], "floors": [1.0], "floor_name": "port_out"} | changes


@pytest.mark.parametrize(
    "results",
    [
        1,
        [1],
        [_old(rounds=[], floors=[])],
        [_old(rounds="a")],
        [_old(floors=[1.0, 1.0])],
        [_old(), _old()],
        [_old(rounds=[float("nan")])],
        [_old(rounds=[1e999])],
        [_old(rounds=[10**400])],
        [_old(floors=[0])],
        [_old(rounds=[-1.0])],
    ],
)
def test_damaged_report_is_neither_read_nor_compared(results):
    old = {"schema": bench.SCHEMA, "results": results}

    with pytest.raises(uhyve.ConfigError, match="damaged"):
        bench.compare(_report(_result(rounds=[1.0])), old)
    with pytest.raises(uhyve.ConfigError, match="damaged"):
        read(json.dumps(old))


def test_comparison_with_a_report_that_had_another_floor_is_of_the_times():
    old = _report(_result(rounds=[100.0] * 3, floors=[50.0] * 3, floor_name="hit")).as_dict()

    (change,) = bench.compare(_report(_result(rounds=[100.0] * 3, floors=[10.0] * 3, floor_name="kick")), old)

    assert change.verdict == "same"


def test_report_of_another_machine_or_back_end_is_told():
    new, old = _report(_result()), _report(_result())
    new.machine, old.machine = (
        {"cpu": "one", "kernel": "6", "load": 1.0},
        {"cpu": "ot\x1bher", "kernel": "6", "load": 2.0},
    )
    old.backend = "kvm"

    assert moved(new, old.as_dict()) == [
        "backend is 'soft', in the other report 'kvm'",
        "cpu is 'one', in the other report 'ot\\x1bher'",
    ]
    assert moved(new, new.as_dict()) == []


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"schema": "uhyve-bench-1"}', "[" * 100_000])
def test_report_of_another_kind_is_not_read(text):
    with pytest.raises(uhyve.ConfigError, match="the other report"):
        read(text)


def test_bench_of_the_software_cpu_tells_percentiles_parts_and_ratio():
    report = bench.run(["pio", "mmio_read", "serial_byte", "write_4k", "stop_2"], backend="soft", quick=True)

    assert "answers this itself" in report.skipped["mmio_read"]
    assert [result.name for result in report.results] == ["pio", "serial_byte", "write_4k", "stop_2"]
    for result in report.results[:3]:
        summary = result.summary
        assert 0 < summary["min"] <= summary["p50"] <= summary["p99"] <= summary["max"]
        assert {"run", "dispatch"} <= set(result.parts)
    assert report.metric("pio.ratio") > 0.5
    assert "handler" in report.results[1].parts


def test_bench_of_the_software_cpu_measures_stops_hits_gdb_and_lives():
    names = ["resume_2", "step", "hit_compiled", "hit_hardware", "watch", "create", "close_vm", "boot"]
    names += [f"gdb_{transport}_{side}" for transport in ("tcp", "unix") for side in ("client", "target")]

    report = bench.run(names, backend="soft", quick=True)

    assert report.skipped == {}
    assert {result.name for result in report.results} == set(names)
    assert all(result.summary["min"] > 0 for result in report.results)
    assert all(result.floors for result in report.results if result.name.startswith(("hit", "gdb", "boot")))


def test_bench_of_the_firmware_area_measures_it_wherever_chance_would_have_ram(monkeypatch):
    launch = uhyve.Vm._launch
    monkeypatch.setattr(
        uhyve.Vm, "_launch", lambda vm, run, changed=None: launch(vm, run, {"guest_address": 0} | (changed or {}))
    )

    report = bench.run(["mmio_write"], backend="soft", quick=True)

    assert report.skipped == {}


def test_quick_bench_whose_time_is_over_skips_what_is_left_and_says_so(monkeypatch):
    monkeypatch.setattr("uhyve.bench.measure._QUICK", 0.0)

    report = bench.run(["pio", "boot"], backend="soft", quick=True)

    assert report.results == []
    assert all("no time was left" in report.skipped[name] for name in ("pio", "boot"))


def test_quick_bench_of_a_slow_machine_measures_first_what_bars_are_about(monkeypatch):
    monkeypatch.setattr("uhyve.bench.measure._SLOW", 0.0)
    titles = []

    bench.run(
        ["pio", "write_1"], backend="soft", quick=True, progress=lambda text: titles.append(text.split(" ", 1)[1])
    )

    assert titles[:3] == ["port out"] * 3
    assert "file write, 1 bytes" in titles[3:]


def test_bench_of_the_software_cpu_skips_the_floor_under_stops_and_says_why():
    report = bench.run(["crowd_1"], backend="soft", quick=True)

    assert "no KVM_RUN" in report.skipped["crowd_1"]


def test_bench_whose_interpreters_fail_skips_their_cases_with_one_line(monkeypatch):
    monkeypatch.setattr("uhyve.bench.ways._WHOLE", "import nothing_of_this_name")

    report = bench.run(["process"], backend="soft", quick=True)

    reason = "an interpreter of its own ends with 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert report.skipped == {"process": reason}


def test_exits_of_two_vcpus_are_told_apart_by_vcpu_and_reason():
    report = bench.run(["wake"], backend="soft", quick=True)

    found = {(exits.vcpu, exits.reason): exits for exits in report.results[0].exits}
    assert found[0, "serial_write_buffer"].summary["count"] > 0
    assert (
        sum(count for _, count in found[0, "serial_write_buffer"].histogram)
        == found[0, "serial_write_buffer"].summary["count"]
    )


def _command(*words):
    command = [sys.executable, "-m", "uhyve", "bench", "--quick", "--backend", "soft", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fail-if", "pio.ratio"], "no comparison"),
        (["--fail-if", "nothing.p50>1"], "no case 'nothing'"),
        (["--fail-if", "timer.p50>1"], "no case 'timer'"),
        (["--fail-if", "pio.p98>1"], "pio has no 'p98'"),
        (["--fail-if", "write_1.ratio>1", "write_1"], "write_1 has no 'ratio'"),
        (["--plot", "/nowhere/a.svg"], "missing, or not writable"),
    ],
)
def test_command_that_makes_no_sense_ends_before_it_measures(words, expected):
    done = _command("pio", *words)

    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stdout == ""


def test_command_that_compares_with_bytes_that_are_no_text_says_so(tmp_path):
    (tmp_path / "old.json").write_bytes(b"\x7fELF\xff\xfe")

    done = _command("pio", "--compare", tmp_path / "old.json")

    assert done.returncode == 2
    assert "is no report" in done.stderr
    assert done.stdout == ""


def test_command_that_compares_with_other_cases_says_that_there_are_none(tmp_path):
    report = bench.run(["pio"], backend="soft", quick=True)
    (tmp_path / "old.json").write_text(json.dumps(report.as_dict()))

    done = _command("pio_in", "--compare", tmp_path / "old.json")

    assert done.returncode == 0, done.stderr
    assert "the other report has none of these cases" in done.stdout


@pytest.mark.parametrize("cases", ["nothing", ["pio", "nothing"]])
def test_bench_of_a_case_that_there_is_not_raises_config_error(cases):
    with pytest.raises(uhyve.ConfigError, match="no case 'nothing'"):
        bench.run(cases, backend="soft", quick=True)


def _shown(monkeypatch, term):
    """What the progress writes to a terminal of 20 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 10, 20, 0, 0))
    monkeypatch.setenv("TERM", term)
    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with _progress() as tell:
            tell("2/5 a title that is longer than the line")
        stream.flush()
        text = b""
        # What was written comes through in parts, a little later.
        while select.select([ours], [], [], 0.5)[0]:
            text += os.read(ours, 1000)
    os.close(ours)
    return text.decode()


def test_progress_on_a_narrow_terminal_stays_in_its_line_and_is_erased(monkeypatch):
    assert _shown(monkeypatch, "xterm") == "\r\x1b[K2/5 a title that is\r\x1b[K"


def test_progress_on_a_dumb_terminal_is_not_told(monkeypatch):
    assert _shown(monkeypatch, "dumb") == ""


def test_command_that_lists_cases_names_each():
    done = subprocess.run(
        [sys.executable, "-m", "uhyve", "bench", "--list"], capture_output=True, text=True, timeout=60
    )

    assert [line.split()[0] for line in done.stdout.splitlines()] == [case.name for case in bench.CASES]


def test_command_tells_each_limit_that_is_passed_and_each_that_was_not_measured():
    unmeasured, passed = ("--fail-if", "mmio_read.p50>0"), ("--fail-if", "pio.p50>0")

    one = _command("pio", "mmio_read", *unmeasured)
    both = _command("pio", "mmio_read", *unmeasured, *passed)

    assert (one.returncode, both.returncode) == (2, 1)
    assert "answers this itself" in one.stderr
    assert "answers this itself" in both.stderr
    assert "pio.p50>0 is true" in both.stderr


def test_command_whose_limit_is_passed_ends_with_1_where_it_can_not_be_told():
    words = [sys.executable, "-m", "uhyve", "bench", "--quick", "--backend", "soft", "pio"]

    with open("/dev/full", "w") as full:
        done = subprocess.run([*words, "--fail-if", "pio.p50>0"], stdout=subprocess.PIPE, stderr=full, timeout=60)

    assert done.returncode == 1


def test_command_with_json_and_a_limit_that_is_passed_ends_with_1():
    words = [sys.executable, "-m", "uhyve", "bench", "--quick", "--backend", "soft", "--json", "pio"]

    done = subprocess.run([*words, "--fail-if", "pio.ratio>0.001"], capture_output=True, text=True, timeout=60)

    assert done.returncode == 1, done.stderr
    schema = json.loads(importlib.resources.files(bench).joinpath("schema.json").read_text())
    jsonschema.validate(json.loads(done.stdout), schema)
    assert "pio.ratio>0.001 is true" in done.stderr
