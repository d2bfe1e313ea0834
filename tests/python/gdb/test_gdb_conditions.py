"""What the stock gdb does with conditions that the target may evaluate: our stub relies on it.

A stub of a few lines plays the guest, so that it can report what a correct target would not.
"""

from __future__ import annotations

import shutil
import socket
import struct
import threading

import pytest

from gdb.gdb import Gdb, run_gdb
from gdb.rsp import frame

pytestmark = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")

TARGET = b"<target><architecture>i386:x86-64</architecture></target>"
PLACE = 0x1000


class Guest:
    """A guest whose every run comes to ``PLACE``, with RAX one higher each time. Breakpoint packets get ``answer``."""

    def __init__(self, answer: bytes = b"OK"):
        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.rax, self.rip = 0, PLACE - 1
        self.packets: list[str] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.thread.join(10)

    def run(self) -> None:
        connection, _ = self.listener.accept()
        buffer = b""
        with connection:
            while part := connection.recv(4096):
                buffer += part
                while (end := buffer.find(b"#")) >= 0 and len(buffer) >= end + 3:
                    packet = buffer[buffer.index(b"$") + 1 : end].decode("latin-1")
                    buffer = buffer[end + 3 :]
                    self.packets.append(packet)
                    connection.sendall(b"+" + frame(self.reply(packet)))

    def reply(self, packet: str) -> bytes:
        name = packet.split(":")[0].split(";")[0].split(",")[0]
        if name.startswith("m"):
            return b"90" * int(packet.split(",")[1], 16)
        if packet.startswith("vCont;"):
            return self.resume(packet)
        if packet.startswith("qXfer:features:read:target.xml"):
            return b"l" + TARGET
        replies = {
            "qSupported": b"PacketSize=1000;vContSupported+;swbreak+;qXfer:features:read+;ConditionalBreakpoints+",
            "?": b"T05",
            "vCont?": b"vCont;c;C;s;S",
            "g": (struct.pack("<17Q7I", self.rax, *[0] * 15, self.rip, *[0] * 7)).hex().encode(),
            "Z0": self.answer,
            "z0": b"OK",
            "D": b"OK",
        }
        return replies.get(name, b"")

    def resume(self, packet: str) -> bytes:
        if packet.startswith("vCont;c"):
            self.rax, self.rip = self.rax + 1, PLACE
            return b"T05swbreak:;"
        self.rip += 1
        return b"T05"


def test_gdb_sends_the_condition_and_judges_a_reported_stop_by_it_all_the_same() -> None:
    with Guest() as guest, Gdb() as gdb:
        gdb.console(f"target remote {guest.address}")
        gdb.console(f"break *{PLACE:#x} if $rax == 5")
        stop = gdb.cont()

        assert stop.results["reason"] == "breakpoint-hit"
        assert gdb.number("$rax") == 5, "the stops before were no hits to gdb, though the target reported them"
        inserted = [packet for packet in guest.packets if packet.startswith("Z0")]
        assert {packet.split("X")[0] for packet in inserted} == {f"Z0,{PLACE:x},1;"}
        assert "260000" in inserted[0], "the bytecode reads register 0"


def test_gdb_sends_all_conditions_of_a_place_or_none() -> None:
    with Guest() as guest, Gdb() as gdb:
        gdb.console(f"target remote {guest.address}")
        gdb.console(f"break *{PLACE:#x} if $rax == 2")
        gdb.console(f"break *{PLACE:#x} if $rax == 3")
        gdb.cont()
        assert {packet.count("X") for packet in guest.packets if packet.startswith("Z0")} == {2}

        gdb.console(f"break *{PLACE:#x}")
        guest.packets.clear()
        gdb.cont()
        assert all("X" not in packet for packet in guest.packets if packet.startswith("Z0"))


def test_gdb_never_falls_back_when_a_breakpoint_is_refused() -> None:
    with Guest(b"E16") as guest:
        transcript = run_gdb(
            [f"target remote {guest.address}", f"break *{PLACE:#x} if $rax == 2", "continue", "detach"]
        )

    assert "Cannot insert breakpoint 1" in transcript.output + transcript.errors
    assert not any(packet.startswith("vCont;c") for packet in guest.packets)
