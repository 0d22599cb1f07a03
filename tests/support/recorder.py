"""The real code at work in a real directory, with every operation on the disk recorded.

Theory of operation.  A `World` is a scratch directory that stands for a whole disk.  Engines opened by
`World.running` work in its `run`, through a `RecordingFilesystem` and a `RecordingTable`.  Both do the real operation
and then note it in terms of inodes for `simulator`.  One lock covers both, so the notes have the order of the
operations.  `sentinel` is beside `run` and must never change.

A World can start from any `Disk`, for instance the state after a crash, and with pending operations, as after a kill.
Random or time-dependent values of a checkpoint (its id, its time) are fixed, so that the same work leaves the same
trace.

A `hook` is called before each operation.  It may refuse the operation by raising, or delay it by waiting.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from faults import FaultTable
from simulator import (
    ROOT,
    Create,
    Disk,
    Extend,
    Link,
    Note,
    Operation,
    Remove,
    Rename,
    Rot,
    Sync,
    Trace,
    Truncate,
    Write,
)

import engine
from engine._native import ffi, lib
from engine.errors import EngineWarning, StorageError
from engine.io.descriptor import Descriptor
from engine.io.pipeline import Pipeline
from engine.store.filesystem import Filesystem

SENTINEL = "sentinel"
SENTINEL_CONTENT = b"not the engine's\n"
RUN = "run"

# Blocks of one page, so that a crash state is cheap to build, and slots for all the blocks of two saves: one that is
# held up keeps its slots, and must not hold up the other.
SMALL: Mapping[str, Any] = {"staging_bytes": 16 * 4096, "block_bytes": 4096}

# Far more than the operations of any trace, so that checkpoints of different Worlds have different ids.
_IDS_PER_WORLD = 1_000_000

Hook = Callable[[str, str], None]


def blank() -> Disk:
    """A disk that holds nothing but the sentinel."""
    return Disk({1: SENTINEL_CONTENT}, {ROOT: {SENTINEL: 1}})


def materialise(disk: Disk, directory: Path) -> None:
    """Build the content of a disk in an empty directory."""
    linked: dict[int, str] = {}
    for path, inode in disk.walk():
        if inode in disk.directories:
            os.mkdir(directory / path)
        elif inode in disk.links and linked.setdefault(inode, path) != path:
            os.link(directory / linked[inode], directory / path)
        else:
            descriptor = os.open(directory / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, disk.files[inode])
            os.close(descriptor)


class World:
    """A directory that stands for a disk, and the trace of the operations in it.

    Args:
        directory: empty.
        disk: its durable content at first.
        operations: the pending operations before this World began.
        number: its number among the Worlds of a case.
        filesystem: the file system of its engines.
    """

    def __init__(
        self,
        directory: Path,
        disk: Disk,
        operations: Sequence[Operation] = (),
        number: int = 0,
        filesystem: type[RecordingFilesystem] | None = None,
    ) -> None:
        self.directory = directory
        self.run = directory / RUN
        self.operations: list[Operation] = list(operations)
        self.hook: Hook = lambda operation, path: None
        self.mutex = threading.Lock()
        self.staged = threading.Event()
        self.staged.set()
        self._disk = disk
        self._number = number
        self._filesystem = filesystem or RecordingFilesystem
        live = Trace(disk, operations).live(len(operations))
        materialise(live, directory)
        self._names = live.directories
        created = [operation.inode for operation in operations if isinstance(operation, Create)]
        self._next_inode = max([*disk.files, *disk.directories, *created]) + 1
        self._descriptors: dict[int, int | None] = {}

    def trace(self) -> Trace:
        """The operations so far."""
        return Trace(self._disk, self.operations)

    def note(self, kind: str, step: int, payload: int = 0) -> None:
        """Add a note to the trace."""
        with self.mutex:
            self.operations.append(Note(kind, step, payload))

    @contextmanager
    def staging(self) -> Iterator[None]:
        """No save gets its files meanwhile: blocks staged before are written in the same order each time."""
        self.staged.clear()
        try:
            yield
        finally:
            self.staged.set()

    def damage(self, step: int) -> None:
        """Flip a bit of a committed step, as a medium that rots does."""
        path = self.run / f"step-{step:08d}" / "model.safetensors"
        content = path.read_bytes()
        flipped = bytes([content[-1] ^ 1])
        path.write_bytes(content[:-1] + flipped)
        directory, name = self._parent(str(path))
        with self.mutex:
            self.operations.append(Rot(step, directory, self._names[directory][name], len(content) - 1, flipped))

    # -- called with the mutex held, after the deed -----------------------------------------------------------

    def created(self, path: str, is_directory: bool) -> None:
        directory, name = self._parent(path)
        inode, self._next_inode = self._next_inode, self._next_inode + 1
        self._names[directory][name] = inode
        if is_directory:
            self._names[inode] = {}
        self.operations.append(Create(directory, name, inode, is_directory))

    def opened(self, path: str, descriptor: int) -> None:
        """Have the descriptor stand for the file at this path, and note the file if it is new."""
        self.noticed(path)
        directory, name = self._parent(path)
        self._descriptors[descriptor] = self._names[directory][name]

    def scratch(self, descriptor: int) -> None:
        """Have the descriptor stand for a file without a name: no crash leaves anything of it."""
        self._descriptors[descriptor] = None

    def is_scratch(self, descriptor: int) -> bool:
        """Whether it does."""
        return descriptor in self._descriptors and self._descriptors[descriptor] is None

    def noticed(self, path: str) -> None:
        """Note a new file and its content."""
        directory, name = self._parent(path)
        if name not in self._names[directory]:
            self.created(path, is_directory=False)
            content = Path(path).read_bytes()
            if content:
                self.operations.append(Write(self._names[directory][name], 0, content))

    def removed(self, path: str) -> None:
        directory, name = self._parent(path)
        self.operations.append(Remove(directory, name, self._names[directory].pop(name)))

    def renamed(self, source: str, target: str) -> None:
        old, old_name = self._parent(source)
        new, new_name = self._parent(target)
        if self._names[new].get(new_name) == self._names[old][old_name]:
            return  # two names of one file: rename(2) does nothing
        inode = self._names[old].pop(old_name)
        self._names[new][new_name] = inode
        self.operations.append(Rename(old, old_name, new, new_name, inode))

    def linked(self, source: str, target: str) -> None:
        old, old_name = self._parent(source)
        new, new_name = self._parent(target)
        inode = self._names[new][new_name] = self._names[old][old_name]
        self.operations.append(Link(new, new_name, inode))

    def written(self, descriptor: int, offset: int, content: bytes) -> None:
        self.operations.append(Write(self._inode(descriptor), offset, content))

    def extended(self, descriptor: int, nbytes: int) -> None:
        self.operations.append(Extend(self._inode(descriptor), nbytes))

    def truncated(self, descriptor: int, nbytes: int) -> None:
        self.operations.append(Truncate(self._inode(descriptor), nbytes))

    def synced(self, path: str, succeeded: bool) -> None:
        if Path(path) == self.directory:
            self.operations.append(Sync(ROOT, succeeded))
        else:
            directory, name = self._parent(path)
            self.operations.append(Sync(self._names[directory][name], succeeded))

    def _inode(self, descriptor: int) -> int:
        inode = self._descriptors[descriptor]
        assert inode is not None, "a file without a name is not a checkpoint's"
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        """The directory of a path, and its name there."""
        *above, name = Path(path).relative_to(self.directory).parts
        inode = functools.reduce(lambda inode, part: self._names[inode][part], above, ROOT)
        return inode, name

    # -- the engine at work -----------------------------------------------------------------------------------

    @contextmanager
    def running(self, filesystem: type[RecordingFilesystem] | None = None, **options: Any) -> Iterator[engine.Engine]:
        """An Engine in `run`; closed at the end."""
        table = RecordingTable(self)
        count = itertools.count(self._number * _IDS_PER_WORLD + len(self.operations))
        with (
            warnings.catch_warnings(),
            mock.patch("engine.io.backend.Pipeline", functools.partial(Pipeline, io_table=table.c_table)),
            mock.patch.object(secrets, "token_hex", lambda nbytes: f"{next(count):0{2 * nbytes}x}"),
            mock.patch.object(time, "time_ns", lambda: next(count)),
        ):
            warnings.simplefilter("ignore", EngineWarning)  # a table of our own registers no buffers
            # A guard would leave clean blocks for when there are files, and here files wait for the last block.
            with engine.Engine(self.run, filesystem=self._filesystem(self), guard="fence", **SMALL, **options) as eng:
                yield eng
        assert not table.exceptions, table.exceptions


class RecordingFilesystem(Filesystem):
    """The real one, which tells a World.  Without O_DIRECT: the table moves bytes through Python's memory, which is not
    aligned."""

    def __init__(self, world: World) -> None:
        self._world = world

    def make_directory(self, path: str) -> None:
        self._world.hook("make_directory", path)
        with self._world.mutex:
            super().make_directory(path)
            self._world.created(path, is_directory=True)

    def rename(self, source: str, target: str) -> None:
        self._world.hook("rename", target)
        with self._world.mutex:
            super().rename(source, target)
            self._world.renamed(source, target)

    def link(self, source: str, target: str) -> None:
        self._world.hook("link", target)
        with self._world.mutex:
            super().link(source, target)
            self._world.linked(source, target)

    def unlink(self, path: str) -> None:
        self._world.hook("unlink", path)
        with self._world.mutex:
            super().unlink(path)
            self._world.removed(path)

    def remove_directory(self, path: str) -> None:
        self._world.hook("remove_directory", path)
        with self._world.mutex:
            super().remove_directory(path)
            self._world.removed(path)

    def sync_directory(self, path: str) -> None:
        self._sync("sync_directory", path, super().sync_directory)

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        with self._world.mutex:
            self._world.noticed(path)
        self._sync("sync_file", path, lambda path: Filesystem.sync_file(self, descriptor, path))

    def _sync(self, operation: str, path: str, sync: Callable[[str], None]) -> None:
        try:
            self._world.hook(operation, path)
        except StorageError:
            with self._world.mutex:
                self._world.synced(path, succeeded=False)
            raise
        with self._world.mutex:
            sync(path)
            self._world.synced(path, succeeded=True)

    def open_scratch(self, directory: str, direct: bool) -> Descriptor:
        descriptor = super().open_scratch(directory, direct=False)
        self._world.scratch(descriptor.number)
        return descriptor

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        if not write:
            return super().open_for_blocks(path, write, False, directory)
        self._world.hook("open_for_blocks", path)
        self._world.staged.wait()
        with self._world.mutex:
            descriptor = super().open_for_blocks(path, write, direct=False)
            self._world.opened(path, descriptor.number)
        return descriptor

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self._world.hook("allocate", path)
        with self._world.mutex:
            super().allocate(descriptor, nbytes, path)
            self._world.extended(descriptor.number, nbytes)

    def write_range(self, descriptor: Descriptor, offset: int, content: bytes, path: str) -> None:
        self._world.hook("write_range", path)
        with self._world.mutex:
            super().write_range(descriptor, offset, content, path)
            self._world.written(descriptor.number, offset, content)

    def truncate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self._world.hook("truncate", path)
        with self._world.mutex:
            super().truncate(descriptor, nbytes, path)
            self._world.truncated(descriptor.number, nbytes)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        self._world.hook("write_new_file", path)
        super().write_new_file(path, content)  # in the middle of it comes sync_file, which notices the file
        with self._world.mutex:
            self._world.noticed(path)


# A way to change the engine while it is recorded; returns the file system that it then uses.
Change = Callable[[], AbstractContextManager[type[RecordingFilesystem]]]


def unchanged() -> AbstractContextManager[type[RecordingFilesystem]]:
    """As it is."""
    return nullcontext(RecordingFilesystem)


class RecordingTable(FaultTable):
    """The pipeline's operations, which report their writes to a World."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def _start(self, context: Any, io: Any) -> int:
        descriptor = io.fd
        if io.direction != lib.ENG_WRITE or self._world.is_scratch(descriptor):
            return super()._start(context, io)
        try:
            self._world.hook("write", str(io.file_offset))
        except StorageError as error:
            return -(error.errno or 0)
        with self._world.mutex:
            result = super()._start(context, io)
            content = bytes(ffi.buffer(ffi.cast("uint8_t *", io.address), io.nbytes))
            self._world.written(descriptor, io.file_offset, content)
        return result
