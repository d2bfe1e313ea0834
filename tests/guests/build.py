"""Builds the test guests: bare-metal images in C and assembly that boot like a Hermit application.

`build("loop", defines=("COUNT=5",))` compiles `loop.c` with `start.S` and `guest.c` and returns the image's path.
An image's name holds a hash of everything that went into it, so a second call returns at once, and
processes that build the same image at the same time do not disturb each other.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent
SHARED_SOURCES = ("start.S", "guest.c")
SHARED_INPUTS = (*SHARED_SOURCES, "guest.h", "guest.ld")

COMPILE_FLAGS = (
    "-std=gnu11",
    "-ffreestanding",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fasynchronous-unwind-tables",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-ftls-model=local-exec",
    "-g",
    "-gdwarf-4",
    "-Wall",
    "-Wextra",
)
LINK_FLAGS = (
    "-nostdlib",
    "-Wl,--build-id=none",
    "-Wl,--hash-style=sysv",
    "-Wl,-z,noexecstack",
    "-Wl,-z,norelro",
    "-Wl,-z,max-page-size=4096",
)

ELF_OSABI_OFFSET = 7
ELF_OSABI_STANDALONE = 255
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
PT_NULL = 0


class BuildError(RuntimeError):
    """A guest could not be built; the message holds the command and what the compiler said."""


def names() -> list[str]:
    """The guests that `build` knows, sorted."""
    return sorted(path.stem for path in SOURCE_DIR.glob("*.c") if path.name not in SHARED_INPUTS)


def build(
    name: str,
    *,
    interface: int = 1,
    pie: bool = True,
    entry_version: int = 4,
    hermit_version: tuple[int, int, int] | None = None,
    optimize: str = "-O1",
    link_address: int = 0x80_0000,
    defines: Sequence[str] = (),
    announced_interface: int | None = None,
    symbolic: bool = False,
    osabi: int = ELF_OSABI_STANDALONE,
) -> Path:
    """Builds one guest, unless its image is in the cache, and returns the image's path.

    `interface` is the hypercall interface that the guest uses (1, 2 or 3); the note in the image announces
    `announced_interface`, by default the same (and there is no note for 1). `pie=False` links at `link_address`.
    `hermit_version` adds the GNU ABI tag. `defines` are preprocessor definitions (`"COUNT=5"`). `symbolic` links as
    a shared object, so that the image carries R_X86_64_64 and GLOB_DAT relocations. Raises `BuildError`.
    """
    if name not in names():
        raise BuildError(f"there is no guest named {name!r}; there are {', '.join(names())}")
    if interface not in (1, 2, 3):
        raise BuildError(f"interface is 1, 2 or 3, not {interface}")
    if symbolic and not pie:
        raise BuildError("symbolic needs pie: a fixed image has no relocations")
    if announced_interface is None and interface > 1:
        announced_interface = interface

    macros = [f"INTERFACE={interface}", f"ENTRY_VERSION={entry_version}", *defines]
    if announced_interface is not None:
        macros.append(f"ANNOUNCED_INTERFACE={announced_interface}")
    if hermit_version is not None:
        macros += [
            f"HERMIT_{part}={number}" for part, number in zip(("MAJOR", "MINOR", "PATCH"), hermit_version, strict=True)
        ]
    arguments = [*COMPILE_FLAGS, optimize, *(f"-D{macro}" for macro in macros), *LINK_FLAGS]
    if symbolic:
        # Without a PLT all relocations stay of the kinds that the loader knows.
        arguments += ["-fPIC", "-fno-plt", "-shared", "-DSYMBOLIC"]
    elif pie:
        arguments += ["-fpie", "-static-pie"]
    else:
        # Position-independent code serves any link address, above 4 GiB too.
        arguments += ["-fpie", "-static", "-no-pie"]
    arguments += [f"-Wl,--defsym=LINK_ADDRESS={0 if pie else link_address:#x}", f"-Wl,-T,{SOURCE_DIR / 'guest.ld'}"]
    return _build_cached(name, arguments, osabi)


def build_all(*, interface: int = 1, pie: bool = True) -> dict[str, Path]:
    """Builds every guest with its default options; returns the images' paths by name."""
    return {name: build(name, interface=interface, pie=pie) for name in names()}


def cache_dir() -> Path:
    """The folder of the images: UHYVE_GUEST_DIR, or target/guests in the repository."""
    chosen = os.environ.get("UHYVE_GUEST_DIR")
    return Path(chosen) if chosen else SOURCE_DIR.parent.parent / "target" / "guests"


def _build_cached(name: str, arguments: list[str], osabi: int) -> Path:
    compiler, version = _compiler()
    own = [path for path in (SOURCE_DIR / f"{name}.c", SOURCE_DIR / f"{name}.S") if path.exists()]
    inputs = [*(SOURCE_DIR / shared for shared in SHARED_INPUTS), *own]
    digest = hashlib.sha256(repr((version, arguments, osabi, str(SOURCE_DIR))).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    image = cache_dir() / f"{name}-{digest.hexdigest()[:16]}"
    if image.exists():
        return image

    image.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(SOURCE_DIR / shared) for shared in SHARED_SOURCES] + [str(path) for path in own]
    handle, temporary = tempfile.mkstemp(dir=image.parent, prefix=f".{name}-")
    os.close(handle)
    try:
        _run([*compiler, *sources, *arguments, "-o", temporary])
        _finish_headers(Path(temporary), osabi)
        os.chmod(temporary, 0o755)
        os.replace(temporary, image)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return image


def _finish_headers(image: Path, osabi: int) -> None:
    """Sets the OSABI byte and removes empty segments, which the linker script declares for all guests alike."""
    content = bytearray(image.read_bytes())
    content[ELF_OSABI_OFFSET] = osabi
    header = ELF_HEADER.unpack_from(content)
    offset, size, count = header[5], header[9], header[10]
    for at in range(offset, offset + size * count, size):
        fields = PROGRAM_HEADER.unpack_from(content, at)
        if fields[6] == 0:
            PROGRAM_HEADER.pack_into(content, at, PT_NULL, *fields[1:])
    image.write_bytes(content)


@functools.cache
def _compiler() -> tuple[tuple[str, ...], str]:
    """The compiler's command (CC, or cc) and the text of its --version."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"the test guests need a C compiler and {command[0]!r} is not in PATH: install gcc or clang, or set CC"
        )
    return tuple(command), _run([*command, "--version"])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\nfailed with code {done.returncode}:\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    return done.stdout


def _version(text: str) -> tuple[int, int, int]:
    major, minor, patch = (int(part) for part in text.split("."))
    return major, minor, patch


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the guests named on the command line, all by default, and prints the images' paths."""
    parser = argparse.ArgumentParser(description="Build test guests and print their paths.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="guests to build (default: all)")
    parser.add_argument("--interface", type=int, default=1, choices=(1, 2, 3), help="hypercall interface (default: 1)")
    parser.add_argument("--announced-interface", type=int, help="version in the note, if another")
    parser.add_argument("--no-pie", action="store_true", help="link at a fixed address")
    parser.add_argument("--symbolic", action="store_true", help="keep symbolic relocations")
    parser.add_argument("--link-address", type=lambda text: int(text, 0), default=0x80_0000, help="with --no-pie")
    parser.add_argument("--entry-version", type=int, default=4, help="version in the HERMIT note (default: 4)")
    parser.add_argument("--hermit-version", type=_version, metavar="X.Y.Z", help="add the GNU ABI tag")
    parser.add_argument("--optimize", default="-O1", help="optimisation flag (default: -O1; write --optimize=-O2)")
    parser.add_argument("-D", "--define", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or names():
            image = build(
                name,
                interface=options.interface,
                pie=not options.no_pie,
                entry_version=options.entry_version,
                hermit_version=options.hermit_version,
                optimize=options.optimize,
                link_address=options.link_address,
                defines=options.define,
                announced_interface=options.announced_interface,
                symbolic=options.symbolic,
            )
            print(image)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
