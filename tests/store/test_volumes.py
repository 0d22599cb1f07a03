"""Volumes are of the requested kind, and are removed after use, when busy, and after a kill of their maker."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from volumes import BTRFS_BYTES_MIN, XFS_BYTES_MIN, volume

# The smallest size that tests use.
SMALL_BYTES = 16 << 20
SIZES = {"ext4": SMALL_BYTES, "xfs": XFS_BYTES_MIN, "btrfs": BTRFS_BYTES_MIN, "tmpfs": SMALL_BYTES, "ramfs": 0}

HOLD = """
import os, signal, sys
from volumes import volume
with volume("ext4", int(sys.argv[1])) as root:
    print(root, flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


SUPPORT = Path(__file__).parents[1] / "support"


def mounted() -> dict[str, str]:
    """The type of every mounted file system, by its mount point (proc(5), /proc/pid/mounts)."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return {line[1]: line[2] for line in lines}


def hold(then: str) -> subprocess.CompletedProcess[str]:
    """A process that mounts a volume, and prints its path."""
    command = [sys.executable, "-c", HOLD, str(SMALL_BYTES), then]
    return subprocess.run(command, cwd=SUPPORT, stdout=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("kind", SIZES)
def test_a_volume_is_mounted_and_removed(kind: str) -> None:
    with volume(kind, SIZES[kind]) as root:
        assert mounted()[str(root)] == kind
        (root / "file").write_bytes(b"mine")
    assert str(root) not in mounted() and not root.parent.exists()


def test_a_busy_volume_is_removed() -> None:
    with volume("ext4", SMALL_BYTES) as root:
        busy = (root / "file").open("w")
    with busy:
        assert str(root) not in mounted() and not root.parent.exists()


def test_the_next_run_removes_only_the_volumes_of_a_killed_one() -> None:
    with volume("tmpfs", SMALL_BYTES) as held:
        killed = hold("die")
        left = Path(killed.stdout.strip())
        assert killed.returncode == -signal.SIGKILL and mounted()[str(left)] == "ext4"
        assert hold("go").returncode == 0
        assert str(left) not in mounted() and not left.parent.exists()
        assert mounted()[str(held)] == "tmpfs"
