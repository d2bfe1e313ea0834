"""How a client of gdb comes and goes: by the command ``uhyve``, over pipes and sockets, with ``run`` and ``kill``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gdb.gdb import Gdb, run_gdb
from gdb.rsp import ErrorReplyError
from uhyve import VmStateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.real_gdb, pytest.mark.timeout(100)]

SESSION = ["break work if i == 3", "continue", "print i", "info threads", "delete", "continue"]


def arguments_seen(output: str) -> list[str]:
    """What the guest ``args`` has printed of its arguments, but for its own name."""
    return re.findall(r"^argv\[[1-9]\d*\]=(.*)$", output, flags=re.MULTILINE)


def test_command_serves_gdb_on_its_standard_streams(guest: Callable[..., Path]) -> None:
    image = guest("loop", defines=("COUNT=5",))
    said = run_gdb([f"target remote | {sys.executable} -m uhyve debug --gdb - -c 2 {image}", *SESSION])
    assert "$1 = 3" in said
    assert '"vCPU 1"' in said
    assert "exited normally" in said
    # Standard output is gdb's: the guest's text is on the other one.
    assert "calls=5 total=30" in said.errors


@pytest.mark.parametrize("flags", [("-s=0",), ("debug", "--gdb", "0"), ("debug", "--gdb", "127.0.0.1:0")])
def test_command_serves_gdb_on_loopback_and_says_where(
    command: Callable, guest: Callable[..., Path], flags: tuple[str, ...]
) -> None:
    served = command(*flags, guest("loop", defines=("COUNT=5",)))
    announced = re.search(r"127\.0\.0\.1:\d+", served.process.stderr.readline().decode())
    assert announced is not None
    said = run_gdb([f"target remote {announced[0]}", *SESSION])
    assert "$1 = 3" in said
    status, output, _ = served.finish()
    assert (status, output) == (0, b"calls=5 total=30\n")


def test_command_serves_gdb_on_a_unix_socket_and_ends_as_killed(
    command: Callable, guest: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., bool]
) -> None:
    path = tmp_path / "gdb"
    served = command("debug", "--gdb", f"unix:{path}", guest("busy"))
    assert wait_until(path.exists)
    assert path.stat().st_mode & 0o777 == 0o600
    said = run_gdb([f"target remote {path}", "info threads", "kill"])
    assert '"vCPU 0"' in said
    assert served.finish()[0] == 137
    assert not path.exists()


def test_run_passes_its_arguments_to_a_fresh_guest_each_time(serve: Callable[..., Served]) -> None:
    served = serve("args", args=["one", "two"])
    gdb = served.gdb(extended=True)
    assert gdb.cont().results["reason"] == "exited-normally"
    assert arguments_seen(served.dbg.output) == ["one", "two"]
    for words, expected in (("'a b' c", ["a b", "c"]), ("", ["a b", "c"])):
        gdb.run(f'-interpreter-exec console "run {words}"')
        assert arguments_seen(served.dbg.output) == expected


def test_kill_and_run_again_in_extended_mode(serve: Callable[..., Served]) -> None:
    served = serve("loop", cpus=2, defines=["COUNT=5"])
    gdb = served.gdb(extended=True)
    gdb.console("break work if i == 2")
    for _ in range(3):
        assert gdb.cont().results["reason"] == "breakpoint-hit"
        assert served.word("calls") == 2
        gdb.console("kill")
        assert "No threads" in gdb.console("info threads")
        gdb.console("starti")
        gdb.wait_stop()
    assert gdb.cont().results["reason"] == "breakpoint-hit"


def test_detach_in_extended_mode_keeps_the_connection_for_attach_and_run(
    serve: Callable[..., Served], wait_until: Callable[..., bool]
) -> None:
    served = serve("events", cpus=2, defines=["COUNT=0", "WITHOUT_NAPS"])
    gdb = served.gdb(extended=True)
    for _ in range(3):
        gdb.console("detach")
        assert wait_until(lambda: served.dbg.running)
        assert served.server.client is not None
        assert "No threads" in gdb.console("info threads")
        gdb.console("attach 1")
        assert not served.dbg.running
        assert "vCPU 1" in gdb.console("info threads")
        gdb.console("break event if $rdi == 1")
        assert gdb.cont().results["reason"] == "breakpoint-hit"
        gdb.console("delete")
    gdb.console("detach")
    gdb.console("starti")
    gdb.wait_stop()
    assert gdb.number("calls[0]") == 0


def test_client_of_extended_mode_that_has_detached_has_no_process(
    serve: Callable[..., Served], wait_until: Callable[..., bool]
) -> None:
    served = serve("busy", cpus=2)
    client = served.rsp()
    client.expect_ok("!")
    client.detach()

    for packet in ("Z0,1000,1", "m1000,4", "g", "vCont;c", "c", "D;1", "vKill;1", "QCatchSyscalls:1"):
        with pytest.raises(ErrorReplyError):
            client.request(packet)
    assert served.dbg.running
    # Python decides again, and the guest is not stopped when such a client goes.
    served.dbg.interrupt()
    assert served.dbg.wait(30).reason == "interrupt"
    served.dbg.cont(wait=False)
    client.close()
    assert wait_until(lambda: served.server.client is None)
    assert served.dbg.running
    assert served.rsp().request("?").startswith(b"T")


def test_kill_ends_the_vm_and_python_is_told(serve: Callable[..., Served], wait_until: Callable[..., bool]) -> None:
    served = serve("busy", cpus=2)
    served.script("kill")

    def is_over() -> bool:
        try:
            return served.dbg.stop is None
        except VmStateError:
            return True

    assert wait_until(is_over)


def test_client_detaches_and_comes_back_to_breakpoints_of_its_own(serve: Callable[..., Served]) -> None:
    served = serve("events", cpus=2, defines=["COUNT=0", "WITHOUT_NAPS"])
    last = -1
    for _ in range(3):
        with Gdb() as gdb:
            gdb.console(f"target remote {served.server.address}")
            gdb.console("break event if $rdi == 1")
            assert gdb.cont().results["reason"] == "breakpoint-hit"
            assert gdb.number("$rdi") == 1
            assert gdb.number("$rsi") > last
            last = gdb.number("$rsi")
            gdb.console("detach")
        # Nothing of the client's is left: the guest runs through the place.
        assert served.dbg.running
        assert served.dbg.breakpoints == []
