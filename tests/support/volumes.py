"""Volumes: real file systems for tests, on loop devices or in memory, mounted while a test uses them.

Theory of operation.  `volume` makes a directory with a sparse image file and a mount point, and removes both at the
end, even after a failure.  The image is in memory if it fits there completely, else in the system's temporary
directory: tests need the code of the file system, not a flush of the disk below for every fsync.  Mounting needs root.
Other users run sudo, without a password if that works, and otherwise on the terminal.  The mounted root belongs to the
caller.

A killed run cannot clean up.  The maker of a volume holds a flock(2) on its directory while it lives, so the next run
finds volumes without a holder, and removes them first.

A killed process may hold its files a moment longer than its parent can see, because the kernel tears down its io_uring
in the background.  Unmounting a busy volume is therefore lazy: its name goes at once, and the kernel releases the
image with the last file.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "engine-volume-"
_IMAGE, _MOUNT = "image", "mount"

# Commands that make an empty file system in an image file, quietly.  ext4 has the settings of a disk in a small image
# too: blocks of a page.  None are kept for root, so that root and others run out of space at the same byte.
_MAKERS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}

# The smallest images that the makers take (Debian 12: xfsprogs 6.1, btrfs-progs 6.2); they are sparse files.
XFS_BYTES_MIN = 300 << 20
BTRFS_BYTES_MIN = 110 << 20

# Memory that looks like a directory, on every Linux with glibc (shm_overview(7)).
_MEMORY = "/dev/shm"

# Debian keeps mkfs, mount and umount where an ordinary user's PATH may not lead.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


@contextmanager
def volume(kind: str, nbytes: int, *, mkfs: Sequence[str] = (), mount: Sequence[str] = ()) -> Iterator[Path]:
    """A new file system, as the directory it is mounted on.

    Args:
        kind: ext4, xfs, btrfs, tmpfs or ramfs.
        nbytes: its size; ramfs has none.
        mkfs: more arguments for mkfs.
        mount: more options for mount.
    """
    _remove_leftovers()
    base, lock = _make_base(nbytes)
    try:
        _mount(kind, nbytes, base, mkfs, mount)
        yield base / _MOUNT
    finally:
        _remove(base)
        os.close(lock)


@contextmanager
def mounted_read_only(directory: Path, target: Path) -> Iterator[Path]:
    """A second mount of a directory, on which nothing can be written."""
    target.mkdir()
    _run([*as_root(), "mount", "--bind", "-o", "ro", str(directory), str(target)])
    try:
        yield target
    finally:
        _run([*as_root(), "umount", str(target)])


def _make_base(nbytes: int) -> tuple[Path, int]:
    """A directory with room for an image, and the descriptor by which it is held."""
    while True:
        base = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY if _fits_in_memory(nbytes) else None))
        # Before it is held another run may take it for a leftover.
        with suppress(FileNotFoundError):
            lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if base.exists():
                return base, lock
            os.close(lock)


def _fits_in_memory(nbytes: int) -> bool:
    if not os.access(_MEMORY, os.W_OK):
        return False
    status = os.statvfs(_MEMORY)
    return status.f_bavail * status.f_frsize > nbytes


def _mount(kind: str, nbytes: int, base: Path, mkfs: Sequence[str], options: Sequence[str]) -> None:
    image, mount = base / _IMAGE, base / _MOUNT
    mount.mkdir()
    if kind in _MAKERS:
        image.touch()
        os.truncate(image, nbytes)
        # As root: mkfs.btrfs asks every loop device whether the image is mounted, and others' images may be private.
        _run([*as_root(), *_MAKERS[kind], *mkfs, str(image)])
        # With "loop" the device is made by the mount and goes with it.
        where = ["-t", kind, "-o", ",".join(["loop", *options]), str(image)]
    else:
        where = ["-t", kind, "-o", ",".join([f"size={nbytes}", *options]), "none"]
    _run([*as_root(), "mount", *where, str(mount)])
    _run([*as_root(), "chown", f"{os.getuid()}:{os.getgid()}", str(mount)])


def _remove(base: Path) -> None:
    """Unmount and delete, however much of it is there."""
    mount = base / _MOUNT
    if os.path.ismount(mount):
        try:
            _run([*as_root(), "umount", str(mount)])
        except RuntimeError:
            _run([*as_root(), "umount", "--lazy", str(mount)])
    # By name, not as a tree: a mounted file system must not be deleted.
    with suppress(FileNotFoundError):
        mount.rmdir()
    (base / _IMAGE).unlink(missing_ok=True)
    base.rmdir()


@functools.cache
def _remove_leftovers() -> None:
    """Remove the volumes of killed runs, once per process."""
    for base in [found for place in (_MEMORY, tempfile.gettempdir()) for found in Path(place).glob(_PREFIX + "*")]:
        # Another user's, or gone in the meantime, or held by a run that lives.
        with suppress(PermissionError, FileNotFoundError, BlockingIOError):
            lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(base)
            finally:
                os.close(lock)


@functools.cache
def as_root() -> tuple[str, ...]:
    """The prefix of a command that only root may run."""
    if os.getuid() == 0:
        return ()
    quiet = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
    return ("sudo", "-n") if quiet.returncode == 0 else ("sudo",)


def _run(command: Sequence[str]) -> None:
    """Run a command that must succeed; sudo may ask for a password on the terminal."""
    done = subprocess.run(command, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
