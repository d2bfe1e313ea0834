"""A strict client of GDB's remote serial protocol, for tests of a stub.

It says what a real debugger never says and sees what a real debugger forgives: a stray byte, a wrong checksum or a
missing acknowledgement is a :class:`ProtocolError`. Everything has a timeout.

Source: GDB manual, appendix "Remote Serial Protocol".
"""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

TIMEOUT = 10.0
ESCAPED = b"#$}*"


class RspError(Exception):
    """Something that this client did not get."""


class RspTimeoutError(RspError):
    """Nothing came in time."""


class ClosedError(RspError):
    """The connection is closed."""


class ProtocolError(RspError):
    """The stub sent what the protocol does not have."""


class UnsupportedError(RspError):
    """The stub does not know the packet."""


class ErrorReplyError(RspError):
    """The stub answered with an error."""

    def __init__(self, packet: bytes, reply: bytes):
        self.reply = reply.decode("latin-1")
        self.code = int(reply[1:3], 16) if re.fullmatch(rb"E[0-9a-fA-F]{2}", reply) else None
        super().__init__(f"{packet[:60]!r} got {self.reply}")


def frame(payload: bytes) -> bytes:
    """A payload, escaped where it needs to be, as it goes over the wire."""
    return b"$%s#%02x" % (payload, sum(payload) & 0xFF)


def escape(data: bytes) -> bytes:
    """Binary data as a payload holds it."""
    return b"".join(b"}%c" % (byte ^ 0x20) if byte in ESCAPED else b"%c" % byte for byte in data)


def unescape(data: bytes) -> bytes:
    """What escaped binary data stands for."""
    return re.sub(rb"\}(.)", lambda match: bytes([match[1][0] ^ 0x20]), data, flags=re.DOTALL)


def expand(payload: bytes) -> bytes:
    """A payload without run-length encoding: ``0* `` is ``0000``."""
    return re.sub(rb"(.)\*(.)", lambda match: match[1] * (match[2][0] - 28), payload, flags=re.DOTALL)


@dataclass(frozen=True)
class StopReply:
    """A stop: its kind (``T``, ``S``, ``W`` or ``X``), its signal or exit status, and what else it says."""

    kind: str
    code: int
    thread: str | None = None
    registers: dict[int, bytes] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, payload: bytes) -> StopReply:
        match = re.fullmatch(rb"([TSWX])([0-9a-f]{2})(.*)", payload, flags=re.DOTALL)
        if match is None:
            raise ProtocolError(f"{payload!r} is no stop reply")
        thread, registers, values = None, {}, {}
        for part in match[3].decode("latin-1").split(";"):
            name, _, value = part.partition(":")
            if name == "thread":
                thread = value
            elif re.fullmatch("[0-9a-f]+", name):
                registers[int(name, 16)] = bytes.fromhex(value)
            elif name:
                values[name] = value
        return cls(match[1].decode(), int(match[2], 16), thread, registers, values)


@dataclass(frozen=True)
class Register:
    """A register of the target description."""

    name: str
    number: int
    size: int
    """In bytes."""
    offset: int
    """Where it lies in the reply to ``g``, in bytes."""


class Rsp:
    """A connection to a stub.

    ``with Rsp.tcp("127.0.0.1", port) as stub: stub.handshake(); stub.read_memory(0x1000, 16)``
    """

    def __init__(self, connection: socket.socket, *, process: subprocess.Popen[bytes] | None = None):
        self.connection = connection
        self.process = process
        self.acks = True
        self.timeout = TIMEOUT
        self.features: dict[str, str] = {}
        self.console = ""
        """What the stub had the console show since this was last emptied."""
        self.notifications: list[bytes] = []
        self.sent = 0
        """How many packets were sent."""
        self._buffer = bytearray()
        self._registers: dict[str, Register] | None = None

    @classmethod
    def tcp(cls, host: str, port: int, timeout: float = TIMEOUT) -> Rsp:
        connection = socket.create_connection((host, port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection)

    @classmethod
    def unix(cls, path: str) -> Rsp:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(path)
        return cls(connection)

    @classmethod
    def command(cls, arguments: Sequence[str]) -> Rsp:
        """A stub that speaks on its standard input and output; its errors go to this process' own."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(arguments, stdin=theirs.fileno(), stdout=theirs.fileno())
        return cls(ours, process=process)

    def __enter__(self) -> Rsp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection without a word; ends the process of :meth:`command`."""
        self.connection.close()
        if self.process is not None:
            try:
                self.process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise

    # Bytes.

    def send_raw(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self.connection.settimeout(self.timeout)
        try:
            self.connection.sendall(data)
        except TimeoutError:
            raise RspTimeoutError("the stub does not read") from None
        except OSError as error:
            raise ClosedError(str(error)) from error

    def read_raw(self, timeout: float) -> bytes:
        """What comes within ``timeout`` seconds of silence; empty at the end of the connection."""
        data = bytes(self._buffer)
        self._buffer.clear()
        while select.select([self.connection], [], [], timeout)[0]:
            part = self._read()
            if not part:
                break
            data += part
        return data

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        if not self._buffer and select.select([self.connection], [], [], seconds)[0]:
            self._buffer += self._read()
        return not self._buffer

    def _read(self) -> bytes:
        try:
            return self.connection.recv(1 << 16)
        except ConnectionError:
            return b""

    def _byte(self, deadline: float) -> bytes:
        if not self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.connection], [], [], left)[0]:
                raise RspTimeoutError("nothing came in time")
            self._buffer += self._read()
            if not self._buffer:
                raise ClosedError("the stub has closed the connection")
        first = bytes(self._buffer[:1])
        del self._buffer[:1]
        return first

    # Packets.

    def send(self, payload: str | bytes) -> None:
        """Sends a packet and takes its acknowledgement."""
        data = payload.encode("latin-1") if isinstance(payload, str) else payload
        self.send_raw(frame(data))
        self.sent += 1
        if self.acks:
            ack = self._byte(time.monotonic() + self.timeout)
            if ack != b"+":
                raise ProtocolError(f"{ack!r} where an acknowledgement of {data[:60]!r} belongs")

    def receive(self, timeout: float | None = None) -> bytes:
        """The payload of the next packet, run lengths expanded, escapes kept.

        Text for the console goes to :attr:`console`, notifications go to :attr:`notifications`.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            start = self._byte(deadline)
            if start not in (b"$", b"%"):
                raise ProtocolError(f"{start!r} between packets")
            payload = self._payload(deadline)
            if start == b"%":
                self.notifications.append(payload)
                continue
            if self.acks:
                self.send_raw(b"+")
            if re.fullmatch(rb"O([0-9a-f]{2})*", payload):
                self.console += bytes.fromhex(payload[1:].decode()).decode(errors="replace")
                continue
            return expand(payload)

    def _payload(self, deadline: float) -> bytes:
        payload = bytearray()
        while (byte := self._byte(deadline)) != b"#":
            if byte == b"$":
                raise ProtocolError(f"a packet within the packet {bytes(payload)!r}")
            payload += byte
        checksum = self._byte(deadline) + self._byte(deadline)
        if checksum != b"%02x" % (sum(payload) & 0xFF):
            raise ProtocolError(f"checksum {checksum!r} of {bytes(payload)!r}")
        return bytes(payload)

    def ask(self, payload: str | bytes, timeout: float | None = None) -> bytes:
        """The reply to a packet, whatever it is."""
        self.send(payload)
        return self.receive(timeout)

    def request(self, payload: str | bytes, timeout: float | None = None) -> bytes:
        """The reply to a packet that is to succeed."""
        data = payload.encode("latin-1") if isinstance(payload, str) else payload
        reply = self.ask(data, timeout)
        if not reply:
            raise UnsupportedError(f"{data[:60]!r} is not supported")
        if re.fullmatch(rb"E[0-9a-fA-F]{2}|E\..*", reply, flags=re.DOTALL):
            raise ErrorReplyError(data, reply)
        return reply

    def expect_ok(self, payload: str | bytes) -> None:
        """A packet whose reply is to be ``OK``."""
        reply = self.request(payload)
        if reply != b"OK":
            raise ProtocolError(f"{payload[:60]!r} got {reply!r}, not OK")

    # The session.

    def handshake(
        self, features: str = "multiprocess+;swbreak+;hwbreak+;vContSupported+", *, acks: bool = False
    ) -> StopReply:
        """What gdb does first: features, no more acknowledgements, the state of the guest."""
        for feature in self.request("qSupported:" + features).decode().split(";"):
            name, equals, value = feature.partition("=")
            if equals:
                self.features[name] = value
            else:
                self.features[feature[:-1]] = feature[-1:]
        if not acks:
            self.start_no_ack_mode()
        return StopReply.parse(self.request("?"))

    def start_no_ack_mode(self) -> None:
        self.expect_ok("QStartNoAckMode")
        self.acks = False

    def detach(self) -> None:
        self.expect_ok("D;1" if self.features.get("multiprocess") == "+" else "D")

    def kill(self) -> None:
        self.expect_ok("vKill;1")

    def transfer(self, kind: str, annex: str = "", size: int = 0x800) -> bytes:
        """A document of ``qXfer``."""
        document = b""
        while True:
            reply = self.request(f"qXfer:{kind}:read:{annex}:{len(document):x},{size:x}")
            if reply[:1] not in (b"m", b"l"):
                raise ProtocolError(f"{reply[:60]!r} as a part of {kind}")
            part = unescape(reply[1:])
            if len(part) > size or (reply[:1] == b"m" and not part):
                raise ProtocolError(f"a part of {len(part)} bytes, {size} were asked for")
            document += part
            if reply[:1] == b"l":
                return document

    def monitor(self, command: str) -> str:
        """The output of a monitor command; one with an error reply raises."""
        self.console = ""
        reply = self.request("qRcmd," + command.encode().hex())
        text = self.console + ("" if reply == b"OK" else bytes.fromhex(reply.decode()).decode())
        self.console = ""
        return text

    # Threads.

    def threads(self) -> list[str]:
        """Thread ids as the stub writes them."""
        threads: list[str] = []
        reply = self.request("qfThreadInfo")
        while reply != b"l":
            if not reply.startswith(b"m") or len(reply) == 1:
                raise ProtocolError(f"{reply!r} as a list of threads")
            threads += reply[1:].decode().split(",")
            reply = self.request("qsThreadInfo")
        return threads

    def thread_names(self) -> dict[str, str]:
        """Names of the threads, from ``qXfer:threads:read``."""
        root = ElementTree.fromstring(self.transfer("threads"))
        return {thread.attrib["id"]: thread.attrib.get("name", "") for thread in root.findall("thread")}

    def select_thread(self, thread: str) -> None:
        self.expect_ok(f"Hg{thread}")

    # Registers.

    def registers(self) -> dict[str, Register]:
        """The registers of the target description, by name."""
        if self._registers is None:
            features = list(self._features("target.xml", set()))
            found: dict[str, Register] = {}
            number = offset = 0
            for element in features:
                number = int(element.attrib.get("regnum", number))
                bits = int(element.attrib["bitsize"])
                register = Register(element.attrib["name"], number, bits // 8, offset)
                found[register.name] = register
                number, offset = number + 1, offset + register.size
            self._registers = found
        return self._registers

    def _features(self, annex: str, seen: set[str]) -> Iterable[ElementTree.Element]:
        if annex in seen:
            raise ProtocolError(f"{annex} includes itself")
        seen.add(annex)
        for element in ElementTree.fromstring(self.transfer("features", annex)).iter():
            if element.tag.endswith("include"):
                yield from self._features(element.attrib["href"], seen)
            elif element.tag == "reg":
                yield element

    def read_registers(self) -> dict[str, int | None]:
        """All registers of the selected thread by ``g``; ``None`` for one that is not available."""
        text = self.request("g").decode()
        values: dict[str, int | None] = {}
        for register in self.registers().values():
            digits = text[2 * register.offset : 2 * (register.offset + register.size)]
            if len(digits) != 2 * register.size:
                raise ProtocolError(f"the reply to g has {len(text) // 2} bytes, {register.name} lies behind")
            values[register.name] = None if "x" in digits else int.from_bytes(bytes.fromhex(digits), "little")
        return values

    def read_register(self, name: str) -> int:
        register = self.registers()[name]
        data = bytes.fromhex(self.request(f"p{register.number:x}").decode())
        if len(data) != register.size:
            raise ProtocolError(f"{name} has {len(data)} bytes, {register.size} by the description")
        return int.from_bytes(data, "little")

    def write_register(self, name: str, value: int) -> None:
        register = self.registers()[name]
        self.expect_ok(f"P{register.number:x}={value.to_bytes(register.size, 'little').hex()}")

    # Memory.

    def read_memory(self, address: int, length: int) -> bytes:
        """As many bytes as can be read, in as many packets as it takes; an error if not even one can."""
        data = b""
        while len(data) < length:
            reply = self.ask(f"m{address + len(data):x},{length - len(data):x}")
            if data and reply.startswith(b"E"):
                return data
            if reply.startswith(b"E"):
                raise ErrorReplyError(f"m{address:x},{length:x}".encode(), reply)
            part = bytes.fromhex(reply.decode())
            if not part or len(part) > length - len(data):
                raise ProtocolError(f"{len(part)} bytes of memory, {length - len(data)} were asked for")
            data += part
        return data

    def write_memory(self, address: int, data: bytes, *, binary: bool = True) -> None:
        if binary:
            self.expect_ok(b"X%x,%x:" % (address, len(data)) + escape(data))
        else:
            self.expect_ok(f"M{address:x},{len(data):x}:{data.hex()}")

    # Breakpoints: type 0 software, 1 hardware, 2 write, 3 read, 4 access.

    def insert(self, address: int, *, type: int = 0, kind: int = 1, conditions: Sequence[bytes] = ()) -> None:
        tail = "".join(f"X{len(code):x},{code.hex()}" for code in conditions)
        self.expect_ok(f"Z{type},{address:x},{kind:x}" + (f";{tail}" if tail else ""))

    def remove(self, address: int, *, type: int = 0, kind: int = 1) -> None:
        self.expect_ok(f"z{type},{address:x},{kind:x}")

    # Running.

    def resume(self, actions: str = "c") -> None:
        """Lets the guest run, by the actions of ``vCont``; :meth:`wait` has the stop."""
        self.send("vCont;" + actions)

    def wait(self, timeout: float | None = None) -> StopReply:
        """The stop that ends :meth:`resume`."""
        return StopReply.parse(self.receive(timeout))

    def cont(self, timeout: float | None = None) -> StopReply:
        """Lets all threads run until a stop."""
        self.resume()
        return self.wait(timeout)

    def step(self, thread: str, *, others: bool = False) -> StopReply:
        """Lets one thread execute an instruction."""
        self.resume(f"s:{thread}" + (";c" if others else ""))
        return self.wait()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.send_raw(b"\x03")

    # Files of the stub's host.

    def file_call(self, operation: str, arguments: bytes) -> tuple[int, bytes]:
        """Result and attachment of a ``vFile`` request; OSError with the protocol's number if it fails."""
        reply = self.request(b"vFile:%s:%s" % (operation.encode(), arguments))
        match = re.fullmatch(rb"F(-?[0-9a-f]+)(?:,([0-9a-f]+))?(?:;(.*))?", reply, flags=re.DOTALL)
        if match is None:
            raise ProtocolError(f"{reply[:60]!r} as the result of vFile:{operation}")
        if match[1].startswith(b"-"):
            raise OSError(int(match[2] or b"0", 16), f"vFile:{operation} failed")
        return int(match[1], 16), unescape(match[3] or b"")

    def read_file(self, path: str, size: int = 0x800) -> bytes:
        """A whole file, as gdb reads it."""
        descriptor, _ = self.file_call("open", b"%s,0,0" % path.encode().hex().encode())
        data = b""
        while True:
            count, part = self.file_call("pread", b"%x,%x,%x" % (descriptor, size, len(data)))
            if count != len(part):
                raise ProtocolError(f"{len(part)} bytes of a file, {count} were announced")
            if not part:
                break
            data += part
        self.file_call("close", b"%x" % descriptor)
        return data
