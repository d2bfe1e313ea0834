"""How fast the software CPU is, beside Unicorn (`pip install unicorn`) on the same guest code, in one interleaved run.

    python benches/soft_cpu.py [--rounds N] [--only NAME,…] [--program PATH] [--json]

The guest code (`soft_cpu/guest.c`, and 2,000 functions that are written here) is compiled by the system's C compiler.
Each round runs every workload once here and once there; figures are medians of the rounds, in millions of guest
instructions a second of the thread's CPU time, and both must give the same result. `first run` is code that is executed
once by a CPU that has not seen it. Only the ratios of one run mean something. Without Unicorn, only ours is measured.
Where `UHYVE_HERMIT_069` names a folder with the images of Hermit 0.6.9, they are booted on the software CPU as well,
each in a process of its own: the shortest time from after `import uhyve` to the guest's end counts. The end of the
output lists what the project has set itself, and whether this run held it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
CODE, STACK, MEMORY = 0x10_0000, 0x8_0000, 64 << 20
END = CODE + 5  # the HLT behind `call work`
FUNCTIONS = 2000

# Name, number in the guest, and how often it does its work.
WORKLOADS = [
    ("integer", 0, 1000),
    ("sieve", 1, 10),
    ("memory", 2, 200),
    ("sse copy", 3, 200),
    ("sha256", 4, 40),
    ("crc32", 5, 40),
    ("fib", 6, 50),
    ("quicksort", 7, 4),
    ("list", 8, 20),
    ("large", 9, 100),
]
ONCE = 10

# Name of a figure in the report, its limit, and whether it is the least or the most.
BARS = [
    ("geometric mean", 1.5, "least"),
    ("smallest ratio", 0.2, "least"),
    ("first run ratio", 10, "least"),
    ("step ns", 25, "most"),
    ("time with a breakpoint elsewhere", 1.02, "most"),
    ("hello_world s", 0.06, "most"),
    ("hello_c s", 0.12, "most"),
    ("rusty_demo s", 15, "most"),
]
BOOT = """
import sys, time, uhyve
start = time.perf_counter()
result = uhyve.Vm(sys.argv[1], backend="soft", env={f"V{n}": "1" for n in range(8)}).run(timeout=120)
print(time.perf_counter() - start)
sys.exit(result.code)
"""


def functions() -> str:
    """C text of functions that differ in constants and shape."""
    draw = random.Random(1)
    text = ["#include <stdint.h>", "typedef uint64_t u64;"]
    for n in range(FUNCTIONS):
        lines = []
        for _ in range(draw.randint(3, 8)):
            k, s, i = draw.getrandbits(31), draw.randint(1, 60), draw.randint(0, 4000)
            lines.append(
                draw.choice(
                    [
                        f"a ^= a << {s};",
                        f"a = a * {k} + {i};",
                        f"m[{i}] += a;",
                        f"a += m[{i}] >> {s % 8};",
                        f"if (a & {1 << s % 16}) a += {k}; else a ^= m[{i}];",
                        f"for (u64 i = a & 3; i; i--) a += {k} ^ m[{i}];",
                        f"a = (uint32_t)a | (a >> {s % 32}) << 32;",
                    ]
                )
            )
        text.append(f"static u64 f{n}(u64 a, u64 *m) {{ {' '.join(lines)} return a; }}")
    names = ", ".join(f"f{n}" for n in range(FUNCTIONS))
    text.append(f"u64 (*const functions[])(u64, u64 *) = {{ {names} }};\nconst u64 function_count = {FUNCTIONS};")
    return "\n".join(text)


def build(folder: pathlib.Path) -> pathlib.Path:
    """Compile the guest into a flat file."""
    (folder / "functions.c").write_text(functions())
    kept = "*(.entry) *(.text*) *(.rodata*) *(.data*) *(.bss*)"
    (folder / "guest.ld").write_text(f"SECTIONS {{ . = {CODE}; .all : {{ {kept} }} /DISCARD/ : {{ *(*) }} }}")
    flags = "-O2 -march=x86-64 -ffreestanding -fno-pic -no-pie -nostdlib -static -mno-red-zone -fno-stack-protector"
    more = "-fno-tree-vectorize -fno-tree-loop-distribute-patterns -fcf-protection=none -fno-asynchronous-unwind-tables"
    image = folder / "guest.bin"
    script = f"-Wl,-T,{folder / 'guest.ld'},--oformat=binary,--build-id=none"
    sources = [str(HERE / "soft_cpu" / "guest.c"), str(folder / "functions.c")]
    subprocess.run(["cc", *flags.split(), *more.split(), script, *sources, "-o", str(image)], check=True)
    return image


class Ours:
    """The bench program of the crate."""

    def __init__(self, image: pathlib.Path, program: str | None) -> None:
        pipe = subprocess.PIPE
        command = [program or self._built(), str(image)]
        self._program = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    @staticmethod
    def _built() -> str:
        command = ["cargo", "bench", "--bench", "soft_cpu", "--no-run", "--quiet", "--message-format=json"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent).stdout.splitlines()
        messages = [m for m in map(json.loads, lines) if m.get("executable")]
        return next(str(m["executable"]) for m in messages if m["target"]["name"] == "soft_cpu")

    def tell(self, request: str) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(request + "\n")

    def run(self, request: str) -> tuple[int, int, int]:
        """Nanoseconds, instructions, result."""
        self.tell(request)
        assert self._program.stdout is not None
        took, count, result = map(int, self._program.stdout.readline().split())
        return took, count, result

    def close(self) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait()


class Theirs:
    """Unicorn."""

    def __init__(self, image: pathlib.Path) -> None:
        unicorn: Any = importlib.import_module("unicorn")
        self._make: Any = lambda: unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._x86: Any = unicorn.x86_const
        self._code = image.read_bytes()
        self.version: str = unicorn.__version__
        self.fresh()

    def fresh(self) -> None:
        self._uc = self._make()
        self._uc.mem_map(0, MEMORY)
        self._uc.mem_write(CODE, self._code)

    def run(self, workload: int, count: int) -> tuple[int, int]:
        """Nanoseconds, result."""
        for register, value in [("RSP", STACK), ("RDI", workload), ("RSI", count)]:
            self._uc.reg_write(getattr(self._x86, f"UC_X86_REG_{register}"), value)
        start = time.thread_time_ns()
        self._uc.emu_start(CODE, END)
        took = time.thread_time_ns() - start
        return took, self._uc.reg_read(self._x86.UC_X86_REG_RAX)

    def step(self) -> float:
        """Nanoseconds of a step."""
        count = 2000
        start = time.thread_time_ns()
        for _ in range(count):
            self._uc.emu_start(CODE + 16, END, 0, 1)
        return (time.thread_time_ns() - start) / count


Samples = dict[str, list[float]]


def boots(rounds: int) -> Samples:
    """Seconds of each image's life, if they are there."""
    folder = os.environ.get("UHYVE_HERMIT_069")
    samples: Samples = {}
    for name in ("hello_world", "hello_c", "rusty_demo") if folder else ():
        for _ in range(1 if name == "rusty_demo" else rounds):
            command = [sys.executable, "-c", BOOT, str(pathlib.Path(folder or "") / name)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            samples.setdefault(f"{name} s", []).append(float(done.stdout.splitlines()[-1]))
    return samples


def bars(report: dict[str, Any]) -> list[str]:
    """A line for each of what the project has set itself."""
    lines = []
    for name, limit, kind in BARS:
        value = report.get(name)
        if value is None:
            verdict = "not measured"
        else:
            is_held = value >= limit if kind == "least" else value <= limit
            verdict = f"{value:.3f}: {'held' if is_held else 'not held'}"
        lines.append(f"  {name}: at {kind} {limit:g}, {verdict}")
    return lines


def measure(ours: Ours, theirs: Theirs | None, rounds: int, only: list[str]) -> tuple[Samples, Samples, Samples]:
    """Samples by workload: MIPS of ours, MIPS of theirs, other figures."""
    mine: Samples = {}
    other: Samples = {}
    more: Samples = {}
    chosen = [w for w in WORKLOADS if not only or w[0] in only]
    for number in range(rounds + 1):
        for name, workload, count in chosen:
            took, instructions, result = ours.run(f"{workload} {count}")
            if number:
                mine.setdefault(name, []).append(instructions / took * 1e3)
            if theirs:
                took, their_result = theirs.run(workload, count)
                assert result == their_result, f"{name}: {result:#x} here, {their_result:#x} in Unicorn"
                if number:
                    other.setdefault(name, []).append(instructions / took * 1e3)
        if only and "first run" not in only:
            continue
        ours.tell("fresh")
        took, instructions, result = ours.run(f"{ONCE} 1")
        mine.setdefault("first run", []).append(instructions / took * 1e3)
        if theirs:
            theirs.fresh()
            took, their_result = theirs.run(ONCE, 1)
            assert result == their_result
            other.setdefault("first run", []).append(instructions / took * 1e3)
        more.setdefault("step ns", []).append(ours.run("step 500000")[0] / 5e5)
        name, workload, count = WORKLOADS[2]
        ratio = 1.0
        for request in ("clear", "break", "clear", "break"):
            ours.tell(request)
            took = ours.run(f"{workload} {count}")[0]
            ratio *= took if request == "break" else 1 / took
        ours.tell("clear")
        more.setdefault("time with a breakpoint elsewhere", []).append(math.sqrt(ratio))
    return mine, other, more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="names of workloads, separated by commas")
    parser.add_argument("--program", help="a built bench program, instead of this crate's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = build(pathlib.Path(folder))
        ours = Ours(image, options.program)
        try:
            theirs = Theirs(image)
        except ImportError:
            theirs = None
        only = [name for name in options.only.split(",") if name]
        mine, other, more = measure(ours, theirs, options.rounds, only)
        ours.close()
    report: dict[str, Any] = {"unicorn": theirs.version if theirs else None, "workloads": {}}
    for name, samples in mine.items():
        row = {"mips": statistics.median(samples)}
        if theirs:
            row["unicorn mips"] = statistics.median(other[name])
            row["ratio"] = row["mips"] / row["unicorn mips"]
        report["workloads"][name] = row
    if theirs:
        ratios = [row["ratio"] for name, row in report["workloads"].items() if name != "first run"]
        if ratios:
            report["geometric mean"] = statistics.geometric_mean(ratios)
            report["smallest ratio"] = min(ratios)
        if "first run" in report["workloads"]:
            report["first run ratio"] = report["workloads"]["first run"]["ratio"]
    report.update({name: statistics.median(samples) for name, samples in more.items()})
    if not only:
        report.update({name: min(samples) for name, samples in boots(options.rounds).items()})
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        print()
        return
    print(
        f"software CPU, MIPS (Unicorn {theirs.version})"
        if theirs
        else "software CPU, MIPS (Unicorn: skipped, not installed)"
    )
    for name, row in report["workloads"].items():
        print(f"  {name:10}" + "".join(f" {value:9.2f}" for value in row.values()))
    for name, value in report.items():
        if isinstance(value, float):
            print(f"  {name}: {value:.3f}")
    if not only:
        print("bars")
        print("\n".join(bars(report)))


if __name__ == "__main__":
    main()
