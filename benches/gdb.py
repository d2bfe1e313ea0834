"""What a stock gdb costs at our server: false hits, steps, memory, attaching, idling, `next` over a loop. A figure is
a ratio of one run, or has an absolute bar that leaves much room.

    python benches/gdb.py [--quick] [--json FILE] [--backend kvm|soft]

The original uhyve (0.8.0) is compared on KVM, if the environment variable UPSTREAM_UHYVE names its program; else that
part is skipped, and says so. The exit status is 1 if a bar does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uhyve

TESTS = pathlib.Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS / "python"))

from gdb.gdb import run_gdb  # noqa: E402
from gdb.rsp import Rsp, frame  # noqa: E402

CALLS = 20_000
"""How often the guest `loop` calls `work(i, 2 * i)`."""


def guest(name: str, **defines: int) -> pathlib.Path:
    """A test guest."""
    spec = importlib.util.spec_from_file_location("guest_build", TESTS / "guests" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guest_build"] = module
    spec.loader.exec_module(module)
    image: pathlib.Path = module.build(name, defines=tuple(f"{key}={value}" for key, value in defines.items()))
    return image


class Bench:
    """The figures of a run, and whether their bars hold."""

    def __init__(self, quick: bool, backend: str) -> None:
        self.quick = quick
        self.backend = backend
        self.figures: list[dict[str, Any]] = []

    def bar(self, name: str, value: float, bound: float, unit: str, at_least: bool) -> None:
        """Notes a figure with its bar."""
        holds = value >= bound if at_least else value <= bound
        self.figures.append({"name": name, "value": value, "bound": bound, "unit": unit, "holds": holds})
        relation = ">=" if at_least else "<="
        print(f"{'ok  ' if holds else 'FAIL'} {name:58} {value:10.4g} {unit} ({relation} {bound:g})", flush=True)

    def debug(self, image: pathlib.Path) -> uhyve.Debugger:
        """A guest under a debugger, at its first instruction."""
        return uhyve.Vm(image, backend=self.backend, aslr=False).debug()


# The same work on any server: an address in, seconds out.


def gdb_times(
    port: int, file: pathlib.Path | None, before: list[str], timed: list[str], check: tuple[str, int] | None = None
) -> tuple[float, float]:
    """The seconds that a real gdb takes for ``timed``, without its start and end; and those of its own process.

    ``check`` is an expression and its value afterwards: a session that broke is not fast.
    """
    clock = 'python import time; print("@%.6f %.6f" % (time.monotonic(), time.process_time()))'
    commands = [f"target remote 127.0.0.1:{port}", *before, clock, *timed, clock]
    if check is not None:
        commands.append(f'printf "check %lu\\n", {check[0]}')
    shown = run_gdb(commands, file=None if file is None else str(file), timeout=300)
    marks = [(float(wall), float(own)) for wall, own in re.findall(r"@(\d+\.\d+) (\d+\.\d+)", shown.output)]
    if len(marks) != 2 or (check is not None and f"check {check[1]}\n" not in shown.output):
        raise RuntimeError(f"gdb did not come to its end:\n{shown.output}\n{shown.errors}")
    return marks[1][0] - marks[0][0], marks[1][1] - marks[0][1]


def host_side(port: int, file: pathlib.Path | None, hits: int, breaks: str = "break") -> float:
    """Seconds per false hit, by gdb's own condition."""
    before = ["set breakpoint condition-evaluation host", f"{breaks} *work if $rdi == {hits}"]
    return gdb_times(port, file, before, ["continue"], ("$rdi", hits))[0] / hits


def steps(port: int, file: pathlib.Path | None, count: int) -> tuple[float, float]:
    """Seconds per `stepi`, at the beginning of the guest; and those of gdb's own process."""
    before = ["hbreak *work", "continue", "delete", "set $before = $pc"]
    seconds, own = gdb_times(port, file, before, ["stepi"] * count, ("$pc != $before", 1))
    return seconds / count, own / count


def memory(port: int, address: int, size: int, count: int) -> float:
    """Bytes per second by `m` packets of ``size`` bytes, as they come over the wire, without gdb's own decoding."""
    with Rsp.tcp("127.0.0.1", port) as client:
        client.request("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+")
        client.start_no_ack_mode()
        client.request("Hgp0.0")
        packet, start = frame(b"m%x,%x" % (address, size)), time.monotonic()
        for _ in range(count):
            client.send_raw(packet)
            # The original's has run lengths: what the end is, the frame says.
            reply = b""
            while reply[-3:-2] != b"#":
                part = client.connection.recv(1 << 17)
                if not part:
                    raise RuntimeError("the server has closed the connection")
                reply += part
            if reply.startswith(b"$E"):
                raise RuntimeError(f"the server answers {reply!r}")
        return count * size / (time.monotonic() - start)


# The parts.


def false_hits(bench: Bench) -> None:
    """A false hit of gdb's own condition against conditions in the target, on the same guest."""
    image, hits = guest("loop", COUNT=CALLS), 200 if bench.quick else 1000

    def run(prepare: Callable[[uhyve.Debugger], object] | None) -> float:
        with bench.debug(image) as dbg:
            if prepare is not None:
                prepare(dbg)
            start = time.monotonic()
            stop = dbg.cont(timeout=300)
            assert stop.reason == "exit", stop
            return time.monotonic() - start

    def by_gdb() -> float:
        with bench.debug(image) as dbg, dbg.serve_gdb() as server:
            return host_side(int(server.address.rpartition(":")[2]), None, hits)

    def by_agent() -> float:
        with bench.debug(image) as dbg, dbg.serve_gdb() as server:
            port = int(server.address.rpartition(":")[2])
            return gdb_times(port, None, ["break *work if $rdi == 0xffffffff"], ["continue"])[0]

    kinds: dict[str, Callable[[], float]] = {
        "plain": lambda: run(None),
        "compiled": lambda: run(lambda dbg: dbg.breakpoint("work", condition="arg0 == 0xffffffff")),
        "callable": lambda: run(lambda dbg: dbg.breakpoint("work", condition=lambda hit: hit.arg(0) < 0)),
        "agent": by_agent,
        "gdb": by_gdb,
    }
    rounds = 2 if bench.quick else 3
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, measure in kinds.items():
            times[kind].append(measure())
    median = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, bound in (("compiled", 100), ("callable", 50), ("agent", 50)):
        cost = (median[kind] - median["plain"]) / CALLS
        if cost < 1e-7:
            # The software CPU goes on after a hit, and is faster than this KVM: all of the guest's time is the bound.
            cost = median[kind] / CALLS
        print(f"     false hit, {kind}: {cost * 1e6:.2f} µs; by gdb {median['gdb'] * 1e6:.0f} µs")
        bench.bar(f"false hit: gdb on the host / {kind} in the target", median["gdb"] / cost, bound, "x", True)


def attaching(bench: Bench) -> None:
    """From gdb's start to its prompt, beyond a gdb that does nothing."""
    image = guest("loop", COUNT=CALLS)
    beyond = []
    for _ in range(2 if bench.quick else 5):
        with bench.debug(image) as dbg, dbg.serve_gdb() as server:
            bare = run_gdb(["print 1"]).seconds
            attached = run_gdb([f"target remote {server.address}", "print 1", "disconnect"]).seconds
            beyond.append((attached - bare) * 1e3)
    bench.bar("connect to the first prompt beyond gdb's own start", min(beyond), 100, "ms", False)


def idling(bench: Bench) -> None:
    """CPU time of a process whose server has a client and whose guest stands still, without the thread that looks."""
    image, seconds = guest("loop", COUNT=CALLS), 3 if bench.quick else 10

    def ticks() -> int:
        used = 0
        for task in pathlib.Path("/proc/self/task").iterdir():
            if task.name != str(threading.get_native_id()):
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                used += int(fields[11]) + int(fields[12])
        return used

    with (
        bench.debug(image) as dbg,
        dbg.serve_gdb() as server,
        Rsp.tcp("127.0.0.1", int(server.address.rpartition(":")[2])) as client,
    ):
        client.handshake()
        before = ticks()
        time.sleep(seconds)
        used = (ticks() - before) / os.sysconf("SC_CLK_TCK")
    bench.bar(f"CPU of an idle server over {seconds} s", 100 * used / seconds, 0.0, "%", False)


def next_over_a_loop(bench: Bench) -> None:
    """How often gdb resumes the guest for a `next` over a line that is a loop of 1,000 iterations."""
    image = guest("steps")
    with bench.debug(image) as dbg, dbg.serve_gdb() as server:
        client = Rsp.tcp("127.0.0.1", int(server.address.rpartition(":")[2]))
        with client:
            client.handshake()
            # In the place of the guest's code: mov ecx, 1000; dec ecx; jnz to the dec; nop.
            stop = dbg.symbol("steps")
            dbg.memory.write(stop, b"\xb9\xe8\x03\x00\x00\xff\xc9\x75\xfc\x90")
            client.insert(stop)
            client.cont(30)
            client.remove(stop)
            sent = client.sent
            client.resume(f"r{stop:x},{stop + 9:x}:1")
            client.wait(30)
            assert dbg.registers.rcx == 0, "the loop is done"
            assert dbg.registers.rip == stop + 9, "and was left"
            bench.bar("packets of `next` over 1,000 iterations", client.sent - sent, 3, "", False)


def upstream_server(program: str, image: pathlib.Path) -> tuple[subprocess.Popen[bytes], int]:
    """The original, waiting for gdb."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [program, "--no-aslr", "--file-isolation", "none", f"--gdb-port={port}", str(image)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = f":{port:04X} "
    for _ in range(500):
        if wanted in pathlib.Path("/proc/net/tcp").read_text():
            return process, port
        time.sleep(0.01)
    process.kill()
    raise RuntimeError("the original does not listen")


def against_upstream(bench: Bench) -> None:
    """The same gdb at the original and here."""
    program = os.environ.get("UPSTREAM_UHYVE")
    if not program or not pathlib.Path(program).exists():
        print("skip the original uhyve: UPSTREAM_UHYVE does not name its program")
        return
    if bench.backend != "kvm":
        print("skip the original uhyve: it has KVM alone")
        return
    # Of its breakpoints, those in debug registers work on a KVM that emulates ring 0, too.
    image, count = guest("loop", COUNT=CALLS), 50 if bench.quick else 200

    with bench.debug(image) as dbg:
        code = dbg.symbol("work") & ~0xFFF

    def theirs(measure: Callable[[int], float]) -> float:
        process, port = upstream_server(program, image)
        try:
            return measure(port)
        finally:
            process.kill()
            process.wait()

    def ours(measure: Callable[[int], float]) -> float:
        with bench.debug(image) as dbg, dbg.serve_gdb() as server:
            return measure(int(server.address.rpartition(":")[2]))

    def pair(measure: Callable[[int], float]) -> tuple[float, float]:
        rounds = [(ours(measure), theirs(measure)) for _ in range(1 if bench.quick else 3)]
        return statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)

    alone: list[float] = []

    def one_step(port: int) -> float:
        seconds, own = steps(port, image, count)
        alone.append(own)
        return seconds

    ours_step, their_step = pair(one_step)
    gdb_alone = min(alone)
    print(f"     stepi: {ours_step * 1e3:.3f} ms, the original {their_step * 1e3:.3f} ms")
    # What no server can save: gdb's own work for a step of three packets, which is the least that it makes.
    print(f"     stepi: gdb alone {gdb_alone * 1e3:.3f} ms, {gdb_alone / their_step:.2f} of the original's")
    bench.bar("stepi: ours / the original's", ours_step / their_step, 0.2, "x", False)
    # In packets of the size that each says it takes.
    pieces = 20 if bench.quick else 100
    ours_rate = ours(lambda port: memory(port, code, 16 << 10, pieces))
    their_rate = theirs(lambda port: memory(port, code, 1024, pieces))
    print(f"     memory: {ours_rate / 1e6:.1f} MB/s, the original {their_rate / 1e6:.2f} MB/s")
    bench.bar("memory reads: ours / the original's", ours_rate / their_rate, 20, "x", True)
    ours_hit, their_hit = pair(lambda port: host_side(port, image, count, "hbreak"))
    print(f"     false hit by gdb: {ours_hit * 1e3:.3f} ms, the original {their_hit * 1e3:.3f} ms")
    bench.bar("false hit by gdb on the host: ours / the original's", ours_hit / their_hit, 0.3, "x", False)


def main() -> int:
    """Prints the figures; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--backend", choices=("kvm", "soft"), help="one back end; both, if not given")
    arguments = parser.parse_args()
    backends = [arguments.backend] if arguments.backend else ["kvm", "soft"]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) and "kvm" in backends:
        print("skip kvm: /dev/kvm can't be opened")
        backends.remove("kvm")
    benches = [Bench(arguments.quick, backend) for backend in backends]
    for bench in benches:
        print(f"{bench.backend}:")
        for part in (false_hits, attaching, next_over_a_loop, idling, against_upstream):
            part(bench)
    if arguments.json:
        arguments.json.write_text(json.dumps({bench.backend: bench.figures for bench in benches}, indent=2))
    return 0 if all(figure["holds"] for bench in benches for figure in bench.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
