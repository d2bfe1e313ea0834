"""Clients that vanish: a session is cut after every byte of it, and the next client finds a guest that it can use."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from gdb.rsp import ClosedError, Rsp, RspTimeoutError, frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from gdb.conftest import Served

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

WAYS = ("orderly", "reset")
"""How a client goes: it closes, or its host is gone and the kernel resets the connection."""


def session(served: Served) -> bytes:
    """What a client sends from its first word to its detaching, acknowledgements included."""
    spin, counter = served.dbg.symbol("spin"), served.dbg.symbol("spin_counter")
    packets = (
        *("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+", "?", "qXfer:features:read:target.xml:0,ffb"),
        *("Hgp1.1", "qfThreadInfo", "g", f"m{counter:x},40", f"Z0,{spin:x},1", f"Z2,{counter:x},8", "vCont;s:p1.1"),
        *(f"z2,{counter:x},8", "vCont;c", f"X{counter:x},4:}}\x03bc", f"z0,{spin:x},1", "qRcmd,68656c70", "D;1"),
    )
    first, *rest = (frame(packet.encode("latin-1")) for packet in packets)
    return first + b"".join(b"+" + packet for packet in rest) + b"+"


def vanish(served: Served, data: bytes, how: str) -> None:
    """A client that sends this, hears nothing, and is gone."""
    connection = socket.create_connection(("127.0.0.1", served.port), 10)
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
    connection.close()


def check(served: Served, note: str) -> None:
    """The next client, which gets an orderly session."""
    try:
        with Rsp.tcp("127.0.0.1", served.port) as stub:
            stub.handshake()
            counter = served.dbg.symbol("spin_counter")
            assert len(stub.read_memory(counter, 8)) == 8, note
            assert stub.step("p1.1").kind == "T", note
    except (ClosedError, RspTimeoutError) as error:
        pytest.fail(f"{note}: {error}")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("cpus", [1, 2])
def test_client_that_vanishes_after_any_byte_leaves_a_guest_for_the_next(
    serve: Callable[..., Served], cpus: int, how: str
) -> None:
    served = serve("busy", cpus=cpus)
    data = session(served)

    for length in range(len(data) + 1):
        vanish(served, data[:length], how)
        check(served, f"after {length} of {len(data)} bytes, {data[:length][-20:]!r}")

    assert served.dbg.breakpoints == []


@pytest.mark.parametrize("how", WAYS)
def test_client_that_vanishes_inside_a_reply_leaves_a_guest(serve: Callable[..., Served], how: str) -> None:
    served = serve("busy")
    counter = served.dbg.symbol("spin_counter")

    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", served.port), 10)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(frame(b"qSupported:swbreak+") + b"+" + frame(b"m%x,1000" % counter) * 30)
        connection.recv(7)
        connection.close()
        check(served, "inside a reply")
