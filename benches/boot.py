"""What a boot costs as a whole process: this command, the same without ASLR, and upstream's, in turn.

Each round runs every command once on every image, in an order that rotates; the figures are wall-clock and CPU time
(user and system) of the process, from its start to its end, as minimum and median, and ratios to upstream's where it
is there. Images: those named, or hello_world and hello_c in the folder $UHYVE_HERMIT_069. Upstream: $UHYVE_UPSTREAM,
or a `uhyve` in PATH that is not this package's. $UHYVE_BOOT_ALSO names a further build of ours to compare with.

    python benches/boot.py [rounds] [--json FILE] [image…]
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 120
# 0.6.9 kernels walk an environment that ends nowhere; upstream gives them the host's.
ENVIRONMENT = {f"VARIABLE_{number}": f"value {number}" for number in range(10)}


@dataclass
class Times:
    """Seconds of each run that came to its end."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def _ours() -> Path:
    built = Path(__file__).parent.parent / "target" / "release" / "uhyve"
    beside = Path(sys.executable).with_name("uhyve")
    return built if built.exists() else beside


def _upstream(ours: Path) -> Path | None:
    if named := os.environ.get("UHYVE_UPSTREAM"):
        return Path(named)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = shutil.which("uhyve", path=folder)
        if found and Path(found).parent != Path(sys.executable).parent and not Path(found).samefile(ours):
            version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            if version.startswith("uhyve 0."):
                return Path(found)
    return None


def _images(names: list[str]) -> list[Path]:
    if any("/" in name for name in names):
        return [Path(name) for name in names]
    folder = os.environ.get("UHYVE_HERMIT_069")
    found = [Path(folder) / name for name in names or ("hello_world", "hello_c")] if folder else []
    return [image for image in found if image.exists()]


def _run(command: list[str]) -> tuple[float, float] | None:
    """Wall-clock and CPU seconds; nothing if the command failed."""
    # A variable of ours makes the native command ask Python what it means.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UHYVE_", "HERMIT_", "RUST_LOG"))}
    if backend := os.environ.get("UHYVE_BACKEND"):
        environment["UHYVE_BACKEND"] = backend
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        print(f"warning: {command[0]} with {Path(command[-1]).name} ended with {child.returncode}", file=sys.stderr)
        return None
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Prints a table for each image."""
    words, kept = sys.argv[1:], None
    if "--json" in words:
        at = words.index("--json")
        kept = Path(words[at + 1])
        del words[at : at + 2]
    rounds = int(words[0]) if words else 5
    ours = _ours()
    variables = [f"-e{key}={value}" for key, value in ENVIRONMENT.items()]
    ours_variables = [word for key, value in ENVIRONMENT.items() for word in ("-e", f"{key}={value}")]
    commands = {"ours": [str(ours), *ours_variables], "ours --no-aslr": [str(ours), "--no-aslr", *ours_variables]}
    if also := os.environ.get("UHYVE_BOOT_ALSO"):
        commands["also"] = [also, *ours_variables]
    if upstream := _upstream(ours):
        commands["upstream"] = [str(upstream), *variables]
        commands["upstream --no-aslr"] = [str(upstream), "--no-aslr", *variables]
    else:
        print("boot: upstream is not here; name its binary by UHYVE_UPSTREAM")
    images = _images(words[1:])
    if not images:
        print("boot: no images; name their folder by UHYVE_HERMIT_069")
    medians: dict[str, dict[str, float]] = {}
    for image in images:
        times = {name: Times() for name in commands}
        names = list(commands)
        for number in range(rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                if (seconds := _run([*commands[name], str(image)])) is not None:
                    times[name].wall.append(seconds[0])
                    times[name].cpu.append(seconds[1])
        print(f"{image.name}: {rounds} rounds; ms: minimum, median, CPU; ratio of medians (of minima)")
        for name, taken in times.items():
            if not taken.wall:
                print(f"  {name:20} does not boot it")
                continue
            wall, least = statistics.median(taken.wall), min(taken.wall)
            medians.setdefault(image.name, {})[name] = wall
            text = f"  {name:20} {least * 1e3:8.0f} {wall * 1e3:8.0f} {statistics.median(taken.cpu) * 1e3:8.0f}"
            if (peer := times.get("upstream")) and peer.wall:
                text += f"   {wall / statistics.median(peer.wall):.2f} ({least / min(peer.wall):.2f}) x upstream"
            print(text)
    if kept is not None:
        kept.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
