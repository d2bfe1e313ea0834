"""The protocol client's own tests, against a stub that says what it is told to say."""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gdb.rsp import (
    ClosedError,
    ErrorReplyError,
    ProtocolError,
    Rsp,
    RspTimeoutError,
    StopReply,
    UnsupportedError,
    escape,
    expand,
    frame,
    unescape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGET = b'<target><xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="core.xml"/></target>'
CORE = b'<feature name="core"><reg name="rax" bitsize="64"/><reg name="rip" bitsize="64" regnum="16"/></feature>'


class FakeStub:
    """Answers packets from a table: a reply, raw bytes (a list), or nothing (None)."""

    def __init__(self, connection: socket.socket, replies: dict[bytes, bytes | list[bytes] | None]):
        self.connection = connection
        self.replies = replies
        self.packets: list[bytes] = []
        self.acks = True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        buffer = b""
        while part := self.connection.recv(4096):
            buffer += part
            while (
                b"$" in buffer and len(rest := buffer[buffer.index(b"$") :].split(b"#", 1)) == 2 and len(rest[1]) >= 2
            ):
                payload, buffer = rest[0][1:], rest[1][2:]
                self.packets.append(payload)
                self.answer(payload)

    def answer(self, payload: bytes) -> None:
        if self.acks:
            self.connection.sendall(b"+")
        reply = self.replies.get(payload, b"")
        if isinstance(reply, list):
            self.connection.sendall(b"".join(reply))
        elif reply is not None:
            self.connection.sendall(frame(reply))
        if payload == b"QStartNoAckMode":
            self.acks = False


@pytest.fixture
def connect() -> Iterator[Callable[[dict[bytes, bytes | list[bytes] | None]], tuple[Rsp, FakeStub]]]:
    made: list[tuple[Rsp, FakeStub]] = []

    def make(replies: dict[bytes, bytes | list[bytes] | None]) -> tuple[Rsp, FakeStub]:
        ours, theirs = socket.socketpair()
        client = Rsp(ours)
        client.timeout = 2
        made.append((client, FakeStub(theirs, replies)))
        return made[-1]

    yield make
    for client, stub in made:
        client.close()
        stub.thread.join(5)
        stub.connection.close()


def test_binary_data_survives_escaping() -> None:
    data = bytes(range(256))

    assert unescape(escape(data)) == data
    assert not set(escape(data)) & set(b"#$*")


def test_run_lengths_are_expanded() -> None:
    assert expand(b"0* x") == b"0000x"
    assert expand(b'1*"') == b"111111"


def test_handshake_turns_acks_off_and_keeps_the_features(connect) -> None:
    client, stub = connect(
        {
            b"qSupported:multiprocess+": b"PacketSize=1000;multiprocess+;ConditionalBreakpoints+",
            b"QStartNoAckMode": b"OK",
            b"?": b"T05thread:p1.1;swbreak:;10:0010000000000000;",
            b"g": b"00",
        }
    )

    stop = client.handshake("multiprocess+")

    assert client.features == {"PacketSize": "1000", "multiprocess": "+", "ConditionalBreakpoints": "+"}
    assert stop == StopReply("T", 5, "p1.1", {16: b"\0\x10" + bytes(6)}, {"swbreak": ""})
    assert client.ask("g") == b"00"
    assert stub.packets == [b"qSupported:multiprocess+", b"QStartNoAckMode", b"?", b"g"]


def test_registers_are_named_by_the_description_with_its_includes(connect) -> None:
    client, _ = connect(
        {
            b"qXfer:features:read:target.xml:0,800": b"l" + TARGET,
            b"qXfer:features:read:core.xml:0,800": b"m" + CORE[:40],
            b"qXfer:features:read:core.xml:28,800": b"l" + CORE[40:],
            b"g": b"0100000000000000xxxxxxxxxxxxxxxx",
            b"p10": b"0002000000000000",
            b"P0=ff00000000000000": b"OK",
        }
    )

    assert client.read_registers() == {"rax": 1, "rip": None}
    assert client.read_register("rip") == 0x200
    client.write_register("rax", 255)


def test_memory_is_read_in_parts_and_up_to_what_is_mapped(connect) -> None:
    client, _ = connect({b"m10,6": b"00010203", b"m14,2": b"E0e", b"m20,1": b"E0e", b"X10,2:a}\x03": b"OK"})

    assert client.read_memory(0x10, 6) == bytes([0, 1, 2, 3])
    with pytest.raises(ErrorReplyError, match="E0e") as error:
        client.read_memory(0x20, 1)
    assert error.value.code == 14
    client.write_memory(0x10, b"a#")


def test_conditions_follow_a_breakpoint(connect) -> None:
    client, stub = connect({b"Z0,10,1;X2,2227X3,222700": b"OK", b"z0,10,1": b"OK"})

    client.insert(0x10, conditions=[b"\x22\x27", b"\x22\x27\0"])
    client.remove(0x10)

    assert stub.packets == [b"Z0,10,1;X2,2227X3,222700", b"z0,10,1"]


def test_console_text_and_notifications_are_set_aside(connect) -> None:
    text = [frame(b"O6869"), b"%Stop:T05#" + b"%02x" % (sum(b"Stop:T05") & 0xFF), frame(b"OK")]
    client, _ = connect({b"qRcmd,68656c70": text, b"vCont;c": [frame(b"O6a"), frame(b"W07;process:1")]})

    assert client.monitor("help") == "hi"
    assert client.notifications == [b"Stop:T05"]
    assert client.cont() == StopReply("W", 7, values={"process": "1"})
    assert client.console == "j"


def test_files_are_read_to_their_end(connect) -> None:
    client, _ = connect(
        {
            b"vFile:open:2f61,0,0": b"F5",
            b"vFile:pread:5,800,0": b"F3;a}\x03b",
            b"vFile:pread:5,800,3": b"F0;",
            b"vFile:close:5": b"F0",
            b"vFile:open:2f62,0,0": b"F-1,2",
        }
    )

    assert client.read_file("/a") == b"a#b"
    with pytest.raises(OSError, match="open failed") as error:
        client.read_file("/b")
    assert error.value.errno == 2


def test_threads_are_listed_until_the_end(connect) -> None:
    client, _ = connect({b"qfThreadInfo": b"mp1.1,p1.2", b"qsThreadInfo": b"l"})

    assert client.threads() == ["p1.1", "p1.2"]


def test_unknown_packet_and_error_are_told_apart(connect) -> None:
    client, _ = connect({b"m1,1": b"E.not now"})

    with pytest.raises(UnsupportedError):
        client.request("bc")
    with pytest.raises(ErrorReplyError, match="not now"):
        client.request("m1,1")


@pytest.mark.parametrize(
    "reply",
    [[b"x", frame(b"OK")], [b"+", frame(b"OK")], [b"$OK#00"], [b"$O", frame(b"OK")]],
    ids=["stray byte", "stray ack", "checksum", "cut off"],
)
def test_what_the_protocol_does_not_have_is_an_error(connect, reply: list[bytes]) -> None:
    client, _ = connect({b"g": reply})

    with pytest.raises(ProtocolError):
        client.ask("g")


def test_missing_acknowledgement_is_an_error(connect) -> None:
    client, stub = connect({b"g": b"00"})
    stub.acks = False

    with pytest.raises(ProtocolError, match="acknowledgement"):
        client.ask("g")


def test_silence_ends_in_a_timeout_and_the_end_of_the_stub_is_seen(connect) -> None:
    client, stub = connect({b"g": None})
    client.timeout = 0.2

    started = time.monotonic()
    with pytest.raises(RspTimeoutError):
        client.ask("g")
    assert time.monotonic() - started < 2
    assert client.is_quiet(0.05)
    stub.connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ClosedError):
        client.receive()


def test_stub_on_a_pipe_is_spoken_to_by_its_standard_streams() -> None:
    script = (
        "import sys; sys.stdin.buffer.raw.read(5); sys.stdout.write('+$00#60'); sys.stdout.flush(); sys.stdin.read()"
    )

    with Rsp.command([sys.executable, "-c", script]) as client:
        assert client.ask("g") == b"00"
    assert client.process is not None
    assert client.process.returncode == 0
