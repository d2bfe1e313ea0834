"""Everything in the README works where there is no /dev/kvm: its tests, in a mount namespace whose /dev has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ENTER = ["unshare", "--user", "--map-root-user", "--mount"]
HIDE = """
set -eu
mount -t tmpfs tmpfs "$1"
for device in null zero full random urandom tty; do touch "$1/$device"; mount --bind "/dev/$device" "$1/$device"; done
mkdir "$1/shm" "$1/pts"
mount --bind /dev/shm "$1/shm"
mount --rbind /dev/pts "$1/pts"
ln -s pts/ptmx "$1/ptmx"
ln -s /proc/self/fd "$1/fd"
mount --rbind "$1" /dev
test ! -e /dev/kvm
shift
exec "$@"
"""


def test_readme_holds_where_there_is_no_dev_kvm(tmp_path: Path) -> None:
    tried = subprocess.run(
        [*ENTER, "sh", "-c", HIDE, "sh", tmp_path, "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no mount namespace here to hide /dev/kvm in: {tried.stderr.strip()}")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("UHYVE_BACKEND", "UHYVE_REQUIRE", "PYTEST_"))
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", HERE / "test_readme.py"]

    result = subprocess.run(
        [*ENTER, "sh", "-c", HIDE, "sh", tmp_path, *tests],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout.splitlines()[-1]
