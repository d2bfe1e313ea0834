"""Fixtures of the GDB server's tests: a guest that stands at its entry with a server beside it."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from gdb.gdb import Gdb, Transcript, run_gdb
from gdb.rsp import Rsp
from uhyve import Debugger, Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from uhyve.gdb_policy import GdbPolicy
    from uhyve.gdb_server import GdbServer


class Served:
    """A guest under a debugger with a server, and clients for it."""

    def __init__(self, debugger: Debugger, server: GdbServer) -> None:
        self.dbg = debugger
        self.server = server
        self._clients = contextlib.ExitStack()

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    def rsp(self, features: str | None = None) -> Rsp:
        """A client of the tests that has shaken hands; it is closed with the guest."""
        client = self._clients.enter_context(Rsp.tcp("127.0.0.1", self.port))
        if features is None:
            client.handshake()
        else:
            client.handshake(features)
        return client

    def gdb(self, *, extended: bool = False, file: Path | None = None) -> Gdb:
        """A real gdb that has attached, by ``target remote`` and nothing else."""
        gdb = self._clients.enter_context(Gdb(None if file is None else str(file)))
        gdb.console(f"target {'extended-remote' if extended else 'remote'} {self.server.address}")
        return gdb

    def script(self, *commands: str, timeout: float = 60) -> Transcript:
        """What a real gdb says to these commands, after ``target remote``."""
        return run_gdb([f"target remote {self.server.address}", *commands], timeout=timeout)

    def word(self, name: str) -> int:
        """A global of the guest, by the debugger in Python."""
        return self.dbg.memory.read_u64(self.dbg.symbol(name))

    def close(self) -> None:
        self._clients.close()
        self.dbg.close()


@pytest.fixture
def serve(guest: Callable[..., Path]) -> Iterator[Callable[..., Served]]:
    """``serve(name, cpus=1, defines=(), policy=None, address=…, build={…}, **vm)``: a guest with a server.

    ``name`` may be the path of an image.
    """
    opened: list[Served] = []

    def start(
        name: str | Path,
        cpus: int = 1,
        defines: Sequence[str] = (),
        policy: GdbPolicy | None = None,
        address: str = "127.0.0.1:0",
        build: dict[str, Any] | None = None,
        **vm: Any,
    ) -> Served:
        image = guest(name, defines=defines, **(build or {})) if isinstance(name, str) else name
        debugger = Vm(image, cpus=cpus, **vm).debug()
        try:
            served = Served(debugger, debugger.serve_gdb(address, policy))
        except BaseException:
            debugger.close()
            raise
        opened.append(served)
        return served

    yield start
    for served in reversed(opened):
        served.close()


@pytest.fixture(autouse=True)
def needs_gdb(request: pytest.FixtureRequest) -> None:
    """Skips what drives a debugger that is not installed: tests marked ``real_gdb`` or ``real_lldb``."""
    for mark, program in (("real_gdb", "gdb"), ("real_lldb", "lldb")):
        if request.node.get_closest_marker(mark) and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
