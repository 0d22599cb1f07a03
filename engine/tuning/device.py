"""Device: the kind of drive below a directory, as mountinfo and sysfs know it.

Theory of operation.  The file system of a directory has a device number, and `/sys/dev/block/M:m` is that device.  A
partition is in the folder of its disk.  Device mapper and md list the devices below them in `slaves/`, and a loop
device names its file, which is on a file system again.  So the walk goes down until devices have nothing below.  Of
several the slowest decides, because a stripe waits for it.

A file system with device number 0:n has no device of its own.  btrfs and others name theirs in mountinfo, an overlay
names the directory that writes go to, and memory and network file systems have none.

The kind comes from the name that the driver gives (Documentation/admin-guide/devices.txt) and from
`queue/rotational`.  A virtio disk says nothing about the drive of its host: its rotational flag is 1 on many hosts,
whatever is behind it.

Everything is read through a `Tree`, so that a test can give any; what a tree says is not trusted: it may have cycles.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from engine.io.host import content_of

Kind = Literal["rotational", "network", "none", "unknown", "virtual", "ssd", "nvme", "memory"]

# Slowest first: of several devices the first kind decides.
_SLOWEST: tuple[Kind, ...] = ("rotational", "network", "none", "unknown", "virtual", "ssd", "nvme", "memory")

_WORDS: dict[Kind, str] = {
    "rotational": "a rotating disk",
    "network": "over a network",
    "none": "no device of its own",
    "unknown": "of an unknown kind",
    "virtual": "a virtual disk, whose host does not say what is behind it",
    "ssd": "a solid-state drive",
    "nvme": "an NVMe drive",
    "memory": "memory",
}

# The names that drivers give, by how they begin; all others are told apart by `queue/rotational`.
_NAMED: tuple[tuple[str, Kind], ...] = (
    ("nvme", "nvme"),
    ("vd", "virtual"),
    ("xvd", "virtual"),
    ("zram", "memory"),
    ("ram", "memory"),
    ("pmem", "memory"),
    ("nbd", "network"),
    ("rbd", "network"),
    ("drbd", "network"),
    ("mmcblk", "ssd"),
)

# A part of a device's path in sysfs that says how it is attached: NVMe over fabrics, iSCSI, disks of a virtio host.
_ATTACHED: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"/nvme-fabrics/|/session\d+/"), "network"),
    (re.compile(r"/virtio\d+/"), "virtual"),
)

_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|ceph|lustre|gpfs|beegfs|9p|virtiofs|afs|fuse\.(sshfs|gcsfuse|s3fs|juicefs|glusterfs|ceph)"
)
_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")

# The fastest rotating disks move 300 MB/s, and SATA's third generation 600 MB/s: what is faster is neither.
_ROTATING_BYTES_PER_SECOND = 300e6
_SATA_BYTES_PER_SECOND = 600e6


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is below a directory.

    Attributes:
        file_system: its type, as in mountinfo; "" if unknown.
        kind: of the drive.  ``"none"``: the file system has no device.
        names: the devices from the file system's down, such as ("dm-0", "nvme0n1").
    """

    file_system: str
    kind: Kind
    names: tuple[str, ...]

    def __str__(self) -> str:
        names = f" on {' over '.join(self.names)}" if self.names else ""
        return f"{self.file_system or 'a file system of an unknown type'}{names}: {_WORDS[self.kind]}"


class Mount(NamedTuple):
    """A line of mountinfo: the type, the source, and the options of the file system."""

    file_system: str
    source: str
    options: str


class Tree(Protocol):
    """The files of a host that say what its devices are."""

    def text(self, path: str) -> str:
        """The content of a file; "" if there is none."""

    def names(self, path: str) -> list[str]:
        """The names in a directory; none if there is no directory."""

    def real(self, path: str) -> str | None:
        """The path without links; None if nothing is there."""

    def file_device(self, path: str) -> tuple[int, int] | None:
        """The major and minor number of the device that a file is on; None if there is no file."""

    def node_device(self, path: str) -> tuple[int, int] | None:
        """The numbers of the device that a block special file stands for."""


class HostTree:
    """The tree of this host."""

    def text(self, path: str) -> str:
        return content_of(path)

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

    def real(self, path: str) -> str | None:
        try:
            return str(Path(path).resolve(strict=True))
        except (OSError, RuntimeError):  # RuntimeError: a cycle of links, before Python 3.13
            return None

    def file_device(self, path: str) -> tuple[int, int] | None:
        try:
            number = os.stat(path).st_dev
        except (OSError, ValueError):
            return None
        return os.major(number), os.minor(number)

    def node_device(self, path: str) -> tuple[int, int] | None:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        return (os.major(status.st_rdev), os.minor(status.st_rdev)) if stat.S_ISBLK(status.st_mode) else None


def describe(tree: Tree, directory: str) -> Device:
    """What is below a directory, given by its real path."""
    seen: set[str] = set()
    file_system, found = _below_file(tree, directory, seen)
    leaves = list(found)
    kinds = [kind for _, kind in leaves]
    names = tuple(dict.fromkeys(name for chain, _ in leaves for name in chain))
    return Device(file_system, min(kinds, key=_SLOWEST.index, default="unknown"), names)


# A device at the bottom: the names from the file system's device down, and its kind.
_Leaf = tuple[tuple[str, ...], Kind]


def _below_file(tree: Tree, path: str, seen: set[str]) -> tuple[str, Iterable[_Leaf]]:
    """The type of a file's file system, and the devices at the bottom."""
    mount = mount_of(tree.text("/proc/self/mountinfo"), path)
    number = tree.file_device(path)
    if path in seen or number is None:
        return mount.file_system, [((), "unknown")]
    seen.add(path)
    if number[0] == 0:
        return _without_number(tree, mount, seen)
    return mount.file_system, _below_number(tree, number, (), seen)


def _without_number(tree: Tree, mount: Mount, seen: set[str]) -> tuple[str, Iterable[_Leaf]]:
    if mount.file_system in _MEMORY:
        return mount.file_system, [((), "memory")]
    if _NETWORK.fullmatch(mount.file_system):
        return mount.file_system, [((), "network")]
    if mount.file_system == "overlay":
        upper = next((word[9:] for word in mount.options.split(",") if word.startswith("upperdir=")), "")
        if upper and tree.file_device(upper) is not None:  # a container does not see its host's paths
            below, leaves = _below_file(tree, upper, seen)
            return f"overlay over {below}", leaves
    number = tree.node_device(mount.source) if mount.source.startswith("/dev/") else None
    if number is not None:
        return mount.file_system, _below_number(tree, number, (), seen)
    return mount.file_system, [((), "none")]


def _below_number(tree: Tree, number: tuple[int, int], above: tuple[str, ...], seen: set[str]) -> Iterator[_Leaf]:
    path = tree.real(f"/sys/dev/block/{number[0]}:{number[1]}")
    if path is None:
        yield above, "unknown"
        return
    yield from _below_device(tree, path, above, seen)


def _below_device(tree: Tree, path: str, above: tuple[str, ...], seen: set[str]) -> Iterator[_Leaf]:
    """The devices at the bottom of the device with this folder in sysfs."""
    if tree.text(f"{path}/partition"):
        path = os.path.dirname(path)
    name = os.path.basename(path)
    chain = (*above, name)
    if path in seen:  # of two partitions of one disk the second, or a cycle
        return
    seen.add(path)
    slaves = tree.names(f"{path}/slaves")
    backing = tree.text(f"{path}/loop/backing_file")
    if slaves:
        for slave in slaves:
            below = tree.real(f"{path}/slaves/{slave}")
            if below is None:
                yield (*chain, slave), "unknown"
            else:
                yield from _below_device(tree, below, chain, seen)
    elif backing:
        for names, kind in _below_file(tree, backing, seen)[1]:
            yield (*chain, *names), kind
    else:
        yield chain, _kind(name, path, tree.text(f"{path}/queue/rotational"))


def _kind(name: str, path: str, rotational: str) -> Kind:
    attached = next((kind for pattern, kind in _ATTACHED if pattern.search(path)), None)
    named = next((kind for start, kind in _NAMED if name.startswith(start)), None)
    if attached is not None or named is not None:
        return attached or named or "unknown"
    return "rotational" if rotational == "1" else "ssd" if rotational == "0" else "unknown"


def mount_of(mountinfo: str, path: str) -> Mount:
    """The mount that a real path is on: the last one with the longest mount point above it (proc_pid_mountinfo(5))."""
    best, found = -1, Mount("", "", "")
    for line in mountinfo.splitlines():
        fields, separator, rest = line.partition(" - ")
        words, last = fields.split(" "), rest.split(" ")
        if not separator or len(words) < 5 or len(last) < 3:
            continue
        point = _unescaped(words[4])
        prefix = point if point.endswith("/") else point + "/"
        if (path == point or path.startswith(prefix)) and len(point) >= best:
            best, found = len(point), Mount(last[0], _unescaped(last[1]), _unescaped(last[2]))
    return found


def _unescaped(text: str) -> str:
    r"""mountinfo writes a space, tab, newline and backslash as \ and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def chunk_counts(kind: Kind, bytes_per_second: float) -> tuple[int, int]:
    """The fewest and most chunks that are advised for a checkpoint: NVMe 2 to 3, SATA 1 to 2, a rotating disk 1.

    Where the kind says nothing about the drive, its measured speed decides.
    """
    if kind == "rotational":
        return 1, 1
    if kind == "ssd":
        return 1, 2
    if kind in ("nvme", "memory") or bytes_per_second > _SATA_BYTES_PER_SECOND:
        return 2, 3
    return (1, 2) if bytes_per_second > _ROTATING_BYTES_PER_SECOND else (1, 1)
