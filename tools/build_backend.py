"""The build backend of pyproject.toml: maturin's, with the native command ``uhyve`` built first.

maturin builds the extension module or programs, not both. The program is built here and lies in ``data/scripts``, from
where it goes into the wheel, only while maturin builds. Where the C library is there for static linking, it is linked
statically: the loader's work is a tenth of a short run. ``maturin develop`` knows nothing of this, and installs the
script in Python that lies there otherwise: the same command, with a slower start.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import maturin
from maturin import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = ROOT / "data" / "scripts" / "uhyve"
TARGET = ROOT / "target"


def build_command() -> None:
    """Builds the native command, in the place where cargo puts it."""
    build = ["cargo", "rustc", "--release", "--quiet", "--bin", "uhyve", "--target-dir", str(TARGET)]
    static = ["--", "-C", "target-feature=+crt-static"]
    if subprocess.run([*build, *static], cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(build, cwd=ROOT, check=True)


@contextmanager
def _native_command() -> Iterator[None]:
    build_command()
    script = COMMAND.read_bytes()
    try:
        COMMAND.unlink()
        shutil.copy2(TARGET / "release" / "uhyve", COMMAND)
        yield
    finally:
        COMMAND.unlink(missing_ok=True)
        COMMAND.write_bytes(script)
        COMMAND.chmod(0o755)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel with the native command in it."""
    with _native_command():
        return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel that refers to this folder, with the native command in it."""
    with _native_command():
        return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    build_command()
