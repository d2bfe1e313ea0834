"""The drivers' own tests, with the real gdb and no guest."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from gdb.gdb import DebuggerError, DebuggerTimeoutError, Gdb, _Reader, run_gdb, run_lldb

pytestmark = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")


def test_script_prints_what_its_commands_print() -> None:
    transcript = run_gdb(["print 6 * 7", "echo done\\n"])

    assert "$1 = 42" in transcript
    assert transcript.output.endswith("done\n")
    assert transcript.status == 0


def test_script_that_does_not_end_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(DebuggerTimeoutError, match="started"):
        run_gdb(["echo started\\n", "shell sleep 60"], timeout=2)
    assert time.monotonic() - started < 10


def test_session_gives_results_and_errors() -> None:
    with Gdb() as gdb:
        assert gdb.evaluate("2 + 3") == "5"
        assert gdb.number("1 << 20") == 1 << 20
        assert gdb.console("print 7") == "$1 = 7\n"
        assert gdb.console('printf "a\\"b\\n"') == 'a"b\n'
        with pytest.raises(DebuggerError, match="Undefined command"):
            gdb.console("nonsense")
    assert gdb.process.returncode == 0


def test_session_that_waits_in_vain_says_what_was_said() -> None:
    with Gdb() as gdb:
        gdb.console("echo remember\\n")
        with pytest.raises(DebuggerTimeoutError, match="remember"):
            gdb.wait_stop(0.1)


def test_session_runs_a_program_to_its_end() -> None:
    with Gdb("/bin/true") as gdb:
        gdb.console("starti")
        gdb.wait_stop()
        assert gdb.number("$pc") != 0
        assert gdb.run("-exec-next-instruction").results["reason"] == "end-stepping-range"
        assert gdb.cont().results["reason"] == "exited-normally"


def test_session_leaves_no_process_behind() -> None:
    gdb = Gdb()
    gdb.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(gdb.process.pid, 0)
    gdb.close()


def test_values_of_the_machine_interface_are_read() -> None:
    text = 'a="x\\ny",b={c="1",d=[]},e=["1","2"],f=[frame={level="0"},frame={level="1"}],g={}'

    assert _Reader(text).results() == {
        "a": "x\ny",
        "b": {"c": "1", "d": []},
        "e": ["1", "2"],
        "f": [{"level": "0"}, {"level": "1"}],
        "g": {},
    }


@pytest.mark.skipif(shutil.which("lldb") is None, reason="lldb is not installed")
def test_lldb_script_prints_what_its_commands_print() -> None:
    assert "42" in run_lldb(["expression 6 * 7"]).output
