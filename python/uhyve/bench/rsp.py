"""The least of a gdb: a client of the remote serial protocol that sets a breakpoint, judges its hits, and goes on.

It sends what gdb sends for a false hit, and nothing that gdb does not, so that what a hit costs over a socket can be
measured where no gdb is installed. Source: GDB manual, appendices "Remote Serial Protocol" and "Agent Expressions".
"""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Final

from uhyve.errors import GdbConnectionError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Client", "never"]

_RDI: Final = 5
"""gdb's number of the register, as in its amd64 target description."""
_MOST: Final = 1 << 20


def never(above: int) -> bytes:
    """The agent expression ``rdi > above``, in gdb's bytecode.

    >>> never(16).hex()
    '24000000102600051427'
    """
    # const32, reg, less_signed, end.
    return b"\x24" + above.to_bytes(4, "big") + b"\x26" + _RDI.to_bytes(2, "big") + b"\x14\x27"


class Client:
    """A connection to a server at ``HOST:PORT`` or at a path, as ``GdbServer.address`` gives it."""

    def __init__(self, address: str, timeout: float) -> None:
        self._received, self._acknowledges = b"", True
        if address.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout)
            self._socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request(b"qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+")
        if self.request(b"QStartNoAckMode") == b"OK":
            self._acknowledges = False
        self.request(b"?")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def request(self, packet: bytes) -> bytes:
        """Sends a packet and gives the reply's payload. Raises ``GdbConnectionError`` if none comes."""
        self._socket.sendall(b"$%s#%02x" % (packet, sum(packet) & 0xFF))
        return self._reply()

    def order(self, packet: bytes) -> None:
        """Sends a packet that must be answered by OK."""
        if (reply := self.request(packet)) != b"OK":
            raise GdbConnectionError(f"{packet.decode()} was answered by {reply.decode(errors='replace')!r}")

    def judge(self, address: int, above: int) -> bool:
        """Goes on to the next hit and judges ``rdi > above`` as gdb does, then steps over the breakpoint.

        Returns False when the guest has ended instead.
        """
        place = b"0,%x,1" % address
        stop = self.request(b"vCont;c")
        if stop[:1] != b"T":
            return False
        value = int.from_bytes(bytes.fromhex(self.request(b"p%x" % _RDI).decode()), "little")
        if value > above:
            raise GdbConnectionError("the condition is true, and should not be")
        self.order(b"z" + place)
        self.request(b"vCont;s")
        self.order(b"Z" + place)
        return True

    def _reply(self) -> bytes:
        while True:
            start = self._received.find(b"$")
            end = self._received.find(b"#", start)
            if 0 <= start < end <= len(self._received) - 3:
                payload, self._received = self._received[start + 1 : end], self._received[end + 3 :]
                if self._acknowledges:
                    self._socket.sendall(b"+")
                return re.sub(rb"(.)\*(.)", lambda run: run[1] * (run[2][0] - 28), payload, flags=re.DOTALL)
            part = self._socket.recv(65536)
            if not part or len(self._received) > _MOST:
                raise GdbConnectionError("the server has closed the connection, or sends no packets")
            self._received += part
