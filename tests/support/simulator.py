"""A disk that can lose power: the states that it may have after a crash, given its operations.  Pure.

Theory of operation.  A `Trace` is a durable disk and the ordered operations on it since.  `Trace.cut` stops the world
after some of them and returns the state of the disk, which depends on the fate of the operations that no fsync covers:

* fsync of a file covers the earlier bytes and length of the file, not its name.
* fsync of a directory covers names that were made, moved and removed in it earlier, not the files that they name.
* A rename is one unit, and is covered once both its directories have been synced.
* A link is covered once the directory of the new name has been synced.  A file's link count is kept with its names.
* A failed fsync covers nothing.  Earlier writes to the file are never covered any more: the kernel may have dropped the
  pages, and the next fsync succeeds (fsync(2), "Errors").

A covered operation has happened.  Any other is kept, dropped or, if it is a write, torn: each of its sectors is kept,
keeps its old content or, in the harsher mode, becomes garbage.  Fates are independent, with one exception: an operation
on a name is kept only if the name exists.  So only fsync orders operations.  Every file system in use guarantees more,
so an engine that survives here survives there.

A stop between two operations is also a stop in the middle of the first, because an unfinished operation is not covered.
`Trace.pending` lists the operations that are not covered.  A `Fates` number chooses their fates, so that a crash state
has a number (`cases.Case`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

# The smallest unit that drives write as a whole.  Many write 4096, so this tears more than they do.
SECTOR_BYTES = 512

ROOT = 0  # the inode of the directory that is the world
LOST = -1  # stands among the inodes that an operation waits for, and is never synced


class Create(NamedTuple):
    """A new name for a new inode: open(2) with O_CREAT, or mkdir(2)."""

    directory: int
    name: str
    inode: int
    is_directory: bool


class Remove(NamedTuple):
    """unlink(2) or rmdir(2)."""

    directory: int
    name: str
    inode: int


class Rename(NamedTuple):
    """rename(2)."""

    source: int
    source_name: str
    target: int
    target_name: str
    inode: int


class Link(NamedTuple):
    """A further name of a file: link(2)."""

    directory: int
    name: str
    inode: int


class Write(NamedTuple):
    """pwrite(2), or a block that the ring wrote."""

    inode: int
    offset: int
    content: bytes


class Extend(NamedTuple):
    """posix_fallocate(3) from 0: the file is at least so long."""

    inode: int
    nbytes: int


class Truncate(NamedTuple):
    """ftruncate(2)."""

    inode: int
    nbytes: int


class Sync(NamedTuple):
    """fsync(2) of a file or a directory, and its result."""

    inode: int
    succeeded: bool


class Rot(NamedTuple):
    """The medium has changed by itself, in a file of a step's directory: always kept."""

    step: int
    directory: int
    inode: int
    offset: int
    content: bytes


class Note(NamedTuple):
    """A report of the engine, not an operation on the disk: see `cases.Promise`."""

    kind: str
    step: int
    payload: int


Operation = Create | Remove | Rename | Link | Write | Extend | Truncate | Sync | Rot | Note


class Fate(Enum):
    """The fate of an operation that no fsync covers.  An operation that cannot be torn is kept."""

    KEPT = "kept"
    DROPPED = "dropped"
    TORN = "torn"
    GARBLED = "garbled"


@dataclass
class Disk:
    """Inodes and their contents: bytes, or names of inodes.  `links` are the link counts of files that were linked."""

    files: dict[int, bytes] = field(default_factory=dict)
    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    links: dict[int, int] = field(default_factory=dict)

    def copy(self) -> Disk:
        """One that can be changed alone."""
        names = {inode: dict(names) for inode, names in self.directories.items()}
        return Disk(dict(self.files), names, dict(self.links))

    def walk(self, inode: int = ROOT, path: str = "") -> Iterator[tuple[str, int]]:
        """Every path below a directory and its inode, directories before their entries, in order of name."""
        for name, entry in sorted(self.directories[inode].items()):
            yield path + name, entry
            if entry in self.directories:
                yield from self.walk(entry, f"{path}{name}/")

    def find(self, path: str) -> int | None:
        """The inode at a path, or None."""
        inode = ROOT
        for name in path.split("/"):
            found = self.directories.get(inode, {}).get(name)
            if found is None:
                return None
            inode = found
        return inode

    def shared(self) -> dict[int, list[str]]:
        """The paths of all inodes with more than one."""
        paths: dict[int, list[str]] = {}
        for path, inode in self.walk():
            paths.setdefault(inode, []).append(path)
        return {inode: same for inode, same in paths.items() if len(same) > 1}

    def twice_named(self) -> list[str]:
        """The paths of all inodes with more of them than their link count says."""
        return [path for inode, same in self.shared().items() if len(same) > self.links.get(inode, 1) for path in same]

    def apply(self, operation: Operation, premise: bool, sectors: Sequence[Fate] | None, rng: random.Random) -> None:
        """Do an operation.

        Args:
            operation: the operation.
            premise: do an operation on a name only if the name exists.
            sectors: the fate of each sector of a write, or None to keep all.
            rng: the source of garbage.
        """
        if isinstance(operation, Create):
            self.directories[operation.directory][operation.name] = operation.inode
        elif isinstance(operation, Remove):
            names = self.directories[operation.directory]
            if names.get(operation.name) == operation.inode:
                self._lose(names.pop(operation.name))
        elif isinstance(operation, Link):
            self.directories[operation.directory][operation.name] = operation.inode
            self.links[operation.inode] = self.links.get(operation.inode, 1) + 1
        elif isinstance(operation, Rename):
            names = self.directories[operation.source]
            there = names.get(operation.source_name) == operation.inode
            if there:
                del names[operation.source_name]
            if there or not premise:
                self._lose(self.directories[operation.target].get(operation.target_name))
                self.directories[operation.target][operation.target_name] = operation.inode
        elif isinstance(operation, Write | Rot):
            self._write(operation, sectors, rng)
        elif isinstance(operation, Extend):
            self.files[operation.inode] = self.files[operation.inode].ljust(operation.nbytes, b"\0")
        elif isinstance(operation, Truncate):
            self.files[operation.inode] = self.files[operation.inode][: operation.nbytes].ljust(operation.nbytes, b"\0")

    def _lose(self, inode: int | None) -> None:
        """Count a name less, if the file was linked."""
        if inode in self.links:
            self.links[inode] -= 1

    def _write(self, write: Write | Rot, sectors: Sequence[Fate] | None, rng: random.Random) -> None:
        content = bytearray(self.files[write.inode])
        if sectors is None:
            content[len(content) :] = bytes(max(0, write.offset - len(content)))
            content[write.offset : write.offset + len(write.content)] = write.content
        else:
            for index, fate in enumerate(sectors):
                if fate is Fate.DROPPED:
                    continue
                start = index * SECTOR_BYTES
                sector = write.content[start : start + SECTOR_BYTES]
                at = write.offset + start
                content[len(content) :] = bytes(max(0, at - len(content)))
                content[at : at + len(sector)] = sector if fate is Fate.KEPT else rng.randbytes(len(sector))
        self.files[write.inode] = bytes(content)


class Fates:
    """The fates of pending operations, chosen by one number.

    0 keeps all, 1 drops all, `2 + 2 * i` drops the i-th alone, `3 + 2 * i` keeps it alone.  From `RANDOM` on the number
    is a seed; odd ones are the harsher mode.
    """

    RANDOM = 1 << 20  # more than twice the operations of any trace here

    @staticmethod
    def simple_count(pending_count: int) -> int:
        """How many numbers, from 0 on, choose differently without chance."""
        return 1 if pending_count == 0 else 2 if pending_count == 1 else 2 + 2 * pending_count

    def __init__(self, number: int, pending: Sequence[int]) -> None:
        self.rng = random.Random(number)
        self._number = number
        self._harsh = number >= self.RANDOM and number % 2 == 1
        # Mostly kept, mostly dropped and in between are all of interest.
        self._keep_share = self.rng.random()
        self._fates = {index: self._choose(place) for place, index in enumerate(pending)}

    def __getitem__(self, index: int) -> Fate:
        """The fate of the operation at this index of the trace; an operation that is not pending is kept."""
        return self._fates.get(index, Fate.KEPT)

    def sectors(self, count: int) -> list[Fate]:
        """The fates of a torn write's sectors."""
        choices = [Fate.KEPT, Fate.DROPPED, Fate.GARBLED] if self._harsh else [Fate.KEPT, Fate.DROPPED]
        return self.rng.choices(choices, k=count)

    def grows(self) -> bool:
        """Whether a write that was lost made its file longer all the same (delayed allocation does that)."""
        return self._harsh and self.rng.random() < 0.5

    def _choose(self, place: int) -> Fate:
        if self._number < self.RANDOM:
            alone = self._number >= 2 and (self._number - 2) // 2 == place
            return Fate.KEPT if (self._number % 2 == 0) != alone else Fate.DROPPED
        if self.rng.random() < 0.3:
            return Fate.TORN
        return Fate.KEPT if self.rng.random() < self._keep_share else Fate.DROPPED


class Trace:
    """A disk and the operations on it.  Immutable."""

    def __init__(self, disk: Disk, operations: Sequence[Operation]) -> None:
        self.disk = disk
        self.operations = tuple(operations)

    def pending(self, stop: int) -> list[int]:
        """The indices of the operations before `stop` that no fsync before `stop` has covered."""
        covered = self._covered
        return [index for index in range(stop) if index in covered and covered[index] >= stop]

    def cut(self, stop: int, fates: Fates) -> Disk:
        """The content of the disk if the power fails before the operation at `stop`."""
        disk = self.disk.copy()
        pending = set(self.pending(stop))
        for index, operation in enumerate(self.operations[:stop]):
            if isinstance(operation, Create):  # an inode that no name leads to is not there
                disk.files.update({} if operation.is_directory else {operation.inode: b""})
                disk.directories.update({operation.inode: {}} if operation.is_directory else {})
            fate = fates[index]
            if isinstance(operation, Write) and fate is not Fate.KEPT:
                if fate is Fate.TORN:
                    count = -(-len(operation.content) // SECTOR_BYTES)
                    disk.apply(operation, True, fates.sectors(count), fates.rng)
                if fates.grows():
                    disk.apply(
                        Extend(operation.inode, operation.offset + len(operation.content)), True, None, fates.rng
                    )
            elif fate is not Fate.DROPPED:
                disk.apply(operation, index in pending, None, fates.rng)
        return disk

    def live(self, stop: int) -> Disk:
        """The content that a process sees before the operation at `stop`, or after a kill there."""
        return self.cut(stop, Fates(0, self.pending(stop)))

    @functools.cached_property
    def _covered(self) -> Mapping[int, int]:
        """For each operation that changes the disk, the index of the fsync that covers it, or of the end."""
        covered: dict[int, int] = {}
        waiting: dict[int, set[int]] = {}
        for index, operation in enumerate(self.operations):
            if isinstance(operation, Sync):
                for earlier, inodes in list(waiting.items()):
                    if operation.inode not in inodes:
                        continue
                    if operation.succeeded:
                        inodes.discard(operation.inode)
                    elif isinstance(self.operations[earlier], Write):
                        inodes.add(LOST)
                    if not inodes:
                        covered[earlier] = index
                        del waiting[earlier]
            elif not isinstance(operation, Note | Rot):
                covered[index] = len(self.operations)
                waiting[index] = _waits_for(operation)
        return covered


def _waits_for(operation: Create | Remove | Rename | Link | Write | Extend | Truncate) -> set[int]:
    """The inodes that must be synced to cover an operation."""
    if isinstance(operation, Create | Remove | Link):
        return {operation.directory}
    if isinstance(operation, Rename):
        return {operation.source, operation.target}
    return {operation.inode}
