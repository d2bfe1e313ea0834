"""The same work by others, on this machine: what is not installed is skipped, and says so.

A false hit and a step by gdbserver and by QEMU's stub, driven by the packets that gdb sends, beside ours; boots by the
original uhyve; the software CPU by Unicorn; a callback by CPython alone; an exit by a bare KVM_RUN loop.

    python benches/peers.py [PART…]

Parts: floors, stubs, boots, callbacks, unicorn; all if none is named. What the others have found before is kept.
UPSTREAM_UHYVE names the original's program, UHYVE_HERMIT_069 the folder of the images that it boots. Figures go to
benches/results/peers.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uhyve
import uhyve.bench
from uhyve import _core
from uhyve.bench.facts import facts
from uhyve.bench.report import quantile
from uhyve.bench.rsp import Client
from uhyve.errors import UhyveError

ROOT = pathlib.Path(__file__).parent.parent
ABOVE = 1_000_000_000
HITS = 200
# Real mode, at 0x7c00: xor edi, edi; again: call work; jmp again; work: inc edi; ret.
SECTOR = bytes.fromhex("6631ffe80200ebfb6647c3").ljust(510, b"\0") + b"\x55\xaa"
SECTOR_WORK = 0x7C08
PROGRAM = """
__attribute__((noipa)) void work(unsigned long i) { __asm__ volatile("" :: "r"(i)); }
int main(void) { for (unsigned long i = 0;; i++) work(i & 0xffff); }
"""


class Peers:
    """What was found, and what was not."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []
        self.skipped: dict[str, str] = {}

    def add(self, what: str, who: str, value: str) -> None:
        self.found.append({"what": what, "who": who, "value": value})
        print(f"{what:44} {who:34} {value}", flush=True)

    def skip(self, who: str, why: str) -> None:
        self.skipped[who] = why
        print(f"skip {who}: {why}", flush=True)


def stubs(peers: Peers) -> None:
    """A false hit that the client judges, and a step, by each stub."""
    ours: list[tuple[str, Callable[[pathlib.Path], Any]]] = [("ours, software CPU", lambda f: our_stub(f, "soft"))]
    if os.access("/dev/kvm", os.W_OK):
        ours.append((f"ours, KVM ({kvm()})", lambda f: our_stub(f, "kvm")))
    for who, start in [*ours, ("QEMU's stub, TCG", qemu), ("gdbserver, a process", gdbserver)]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with start(pathlib.Path(folder)) as (client, work):
                    hit, step = of_stub(client, work)
            except FileNotFoundError as error:
                peers.skip(who, str(error))
                continue
            except (UhyveError, OSError) as error:
                peers.skip(who, f"it did not work: {error}")
                continue
        peers.add("false hit, judged by the client", who, f"{hit:.0f} µs")
        peers.add("step", who, f"{step:.0f} µs")


def of_stub(client: Client, work: int) -> tuple[float, float]:
    """Median microseconds of a false hit and of a step."""
    client.order(b"Z0,%x,1" % work)
    hits, steps = [], []
    for _ in range(HITS):
        start = time.perf_counter()
        client.judge(work, ABOVE)
        hits.append(time.perf_counter() - start)
    client.order(b"z0,%x,1" % work)
    for _ in range(HITS):
        start = time.perf_counter()
        client.request(b"vCont;s")
        steps.append(time.perf_counter() - start)
    return statistics.median(hits) * 1e6, statistics.median(steps) * 1e6


@contextmanager
def our_stub(folder: pathlib.Path, backend: str) -> Iterator[tuple[Client, int]]:
    vm = uhyve.Vm(uhyve.Image.bench(), args=["work", "100000000", "0"], backend=backend, output="none")
    with (
        vm.debug() as dbg,
        dbg.serve_gdb(f"unix:{folder / 'gdb'}") as server,
        Client(server.address, 60) as client,
    ):
        yield client, dbg.symbol("work")


@contextmanager
def qemu(folder: pathlib.Path) -> Iterator[tuple[Client, int]]:
    program = needed("qemu-system-x86_64")
    image, path = folder / "sector", folder / "gdb"
    image.write_bytes(SECTOR)
    command = [program, "-display", "none", "-accel", "tcg", "-S", "-drive", f"file={image},format=raw"]
    with running([*command, "-gdb", f"unix:{path},server=on,wait=off"]), connected(str(path), path.exists) as client:
        yield client, SECTOR_WORK


@contextmanager
def gdbserver(folder: pathlib.Path) -> Iterator[tuple[Client, int]]:
    program, path = needed("gdbserver"), folder / "guest"
    (folder / "guest.c").write_text(PROGRAM)
    subprocess.run(["cc", "-O1", "-static", "-no-pie", str(folder / "guest.c"), "-o", str(path)], check=True)
    names = subprocess.run(["nm", str(path)], check=True, capture_output=True, text=True).stdout
    work = next(int(line.split()[0], 16) for line in names.splitlines() if line.endswith(" work"))
    port = 20000 + os.getpid() % 10000
    listening = f":{port:04X} "

    def is_there() -> bool:
        return any(listening in pathlib.Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))

    address = f"127.0.0.1:{port}"
    with running([program, "--once", address, str(path)]), connected(address, is_there) as client:
        yield client, work


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"{program} is not installed")
    return found


@contextmanager
def running(command: list[str]) -> Iterator[None]:
    """A process in a group of its own, which is ended."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def connected(address: str, is_there: Callable[[], bool]) -> Iterator[Client]:
    for _ in range(1000):
        if is_there():
            break
        time.sleep(0.01)
    with Client(address, 30) as client:
        yield client


def boots(peers: Peers) -> None:
    """Whole processes, by benches/boot.py."""
    program, folder = os.environ.get("UPSTREAM_UHYVE"), os.environ.get("UHYVE_HERMIT_069")
    if not program or not folder:
        return peers.skip("the original uhyve", "UPSTREAM_UHYVE or UHYVE_HERMIT_069 is not set")
    if not os.access("/dev/kvm", os.W_OK):
        return peers.skip("the original uhyve", "it has KVM alone, and /dev/kvm can't be opened")
    with tempfile.NamedTemporaryFile() as file:
        environment = os.environ | {"UHYVE_UPSTREAM": program}
        command = [sys.executable, str(ROOT / "benches" / "boot.py"), "3", "--json", file.name]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        for image, figures in json.loads(pathlib.Path(file.name).read_text()).items():
            for who, seconds in figures.items():
                peers.add(f"boot of {image}, whole process", who, f"{seconds * 1e3:.0f} ms")
            if "upstream" not in figures:
                peers.skip(f"the original uhyve with {image}", "it ends with an error on this machine")
    return None


def unicorn(peers: Peers) -> None:
    """The software CPU, by benches/soft_cpu.py."""
    command = [sys.executable, str(ROOT / "benches" / "soft_cpu.py"), "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return peers.skip("the software CPU", done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    for name, row in report["workloads"].items():
        peers.add(f"software CPU, {name}", "ours", f"{row['mips']:.0f} MIPS")
        if "unicorn mips" in row:
            peers.add(f"software CPU, {name}", f"Unicorn {report['unicorn']}", f"{row['unicorn mips']:.0f} MIPS")
    if report["unicorn"] is None:
        peers.skip("Unicorn", "it is not installed: pip install unicorn")
    return None


def callbacks(peers: Peers) -> None:
    """A call of a lambda from C, and ours at a hit beyond a bare one."""
    repeat, count = 9, 100_000
    calls = min(
        timeit.repeat("for _ in map(f, x): pass", "f = lambda hit: False; x = range(100000)", repeat=repeat, number=1)
    )
    peers.add("call of a lambda", f"CPython {sys.version.split()[0]}, by map()", f"{calls / count * 1e9:.0f} ns")
    report = uhyve.bench.run(["hit", "hit_callable"], backend="soft", quick=True)
    bare, called = (report.metric(f"{name}.p50") for name in ("hit", "hit_callable"))
    peers.add("call of a lambda at a hit, beyond a bare hit", "ours, software CPU", f"{called - bare:.0f} ns")


def floors(peers: Peers) -> None:
    """A port exit by a bare loop, beside ours."""
    if not os.access("/dev/kvm", os.W_OK):
        return peers.skip("the bare KVM_RUN loop", "/dev/kvm can't be opened")
    floor = quantile(_core.bench_floor("kvm", "port_out", 5000, 500, None), 0.5)
    report = uhyve.bench.run(["pio"], backend="kvm", quick=True)
    peers.add("port exit", f"a bare KVM_RUN loop ({kvm()})", f"{floor / 1000:.2f} µs")
    peers.add("port exit", "ours", f"{report.metric('pio.p50') / 1000:.2f} µs, ratio {report.metric('pio.ratio'):.3f}")
    return None


def kvm() -> str:
    return ", ".join(name for name in facts()["kvm"] if name != "kvm")


def main() -> None:
    """Asks all of them."""
    parts = {part.__name__: part for part in (floors, stubs, boots, callbacks, unicorn)}
    file = ROOT / "benches" / "results" / "peers.json"
    file.parent.mkdir(exist_ok=True)
    kept = json.loads(file.read_text())["figures"] if file.exists() else {}
    for name in sys.argv[1:] or parts:
        peers = Peers()
        parts[name](peers)
        kept[name] = {"found": peers.found, "skipped": peers.skipped}
    figures = {"machine": facts(), "figures": {name: kept[name] for name in parts if name in kept}}
    file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
