"""Owner: a catalog with the files of its saves in flight.

Theory of operation.  `begin_save` creates a save's files and keeps their descriptors; sealing and publishing use those,
so the writer of the blocks needs no path and syncs nothing.  The descriptors are closed when the save ends.  This class
is `access.WriteAccess` in the process that holds the lock.

A file that may be unchanged is linked beside the one to write, which is empty until a block that has changed is written
to it.  At the end one of the two stays.  A linked file is not synced again: it was where it was written.

Called by `store`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.errors import CorruptError, StorageError
from engine.format.layout import align_up
from engine.format.plan import ALIGNMENT
from engine.io.binding import block_checksum
from engine.store.access import BegunSave, HeldRange, NewFile
from engine.store.catalog import Catalog
from engine.store.commit import WrittenFile, publish, seal
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention
from engine.store.spares import linked_name
from engine.store.stamps import Stamp


class _Linked(NamedTuple):
    """A linked file: the step that it came from, and its stamp there."""

    step: int
    stamp: Stamp


class Owner(Catalog):
    """The checkpoints of one directory, and the files of the saves in flight.  Arguments as of `Catalog`."""

    def __init__(self, root: str, filesystem: Filesystem, spare_max: int, retention: Retention | None = None) -> None:
        self._files: dict[int, list[WrittenFile]] = {}  # by step in flight
        self._linked: dict[int, dict[str, _Linked]] = {}  # the same, by name
        super().__init__(root, filesystem, spare_max, retention)

    def begin_save(self, step: int, files: Sequence[NewFile], direct: bool) -> BegunSave:
        """Make the files of a save; see `WriteAccess.begin_save`."""
        self.check_room(sum(align_up(file.nbytes, ALIGNMENT) for file in files if file.link_from is None))
        begun = self.begin(step, [file.name for file in files])
        linked = self._linked[step] = self._link(step, files)
        written = self._files[step] = []
        for file in files:
            path = os.path.join(begun.path, file.name)
            descriptor = self.filesystem.open_for_blocks(path, write=True, direct=direct)
            written.append(WrittenFile(descriptor, path, file.nbytes))
            if file.name not in linked or file.name in begun.reused:
                self._allocate(written[-1])
        descriptors = [file.descriptor.number for file in written]
        return BegunSave(begun.path, descriptors, begun.recycled, begun.reused, frozenset(linked))

    def settle_links(self, step: int, changed: Mapping[str, Sequence[HeldRange]]) -> None:
        """Keep each linked file, or the written one in its place; see `WriteAccess.settle_links`."""
        linked = self._linked[step]
        for file in [file for file in self._files[step] if os.path.basename(file.path) in linked]:
            name = os.path.basename(file.path)
            if name in changed:
                self._copy(linked[name].step, file.path, changed[name])
                self.drop_link(step, name)
                del linked[name]
            else:
                self._files[step].remove(file)
                self.filesystem.close(file.descriptor)
                self.keep_link(step, name)

    def seal_save(self, step: int, small_files: Mapping[str, bytes]) -> None:
        """Make the files of a save durable, and write its small ones."""
        seal(self.filesystem, self.partial_path(step), self.files(step), small_files)

    def publish_save(self, step: int, manifest: bytes | bytearray) -> str:
        """Make a sealed save visible, durably; close its files, and return its path."""
        written, linked = self.stamps(step), {name: link.stamp for name, link in self._linked[step].items()}
        path = publish(self, step, manifest)
        self.vouch(step, written, linked)
        self._close_files(step)
        return path

    def discard_save(self, step: int) -> None:
        """Close and delete the files of a failed save."""
        self._close_files(step)
        self.discard(step)

    def stamps(self, step: int) -> Mapping[str, Stamp]:
        """The stamps of the written files of a sealed save, which change with any later write."""
        statuses = {f.path: self.filesystem.descriptor_status(f.descriptor, f.path) for f in self.files(step)}
        return {os.path.basename(path): Stamp.of(status) for path, status in statuses.items()}

    def files(self, step: int) -> Sequence[WrittenFile]:
        """The files of a save in flight."""
        return self._files[step]

    def _allocate(self, file: WrittenFile) -> None:
        """Reserve a file's blocks.  If there is no room, delete checkpoints that no rule keeps, and try once more.

        A reused file has its blocks.  Its fallocate(2) waits all the same for direct writes under way to it: the kernel
        may still do those of a process that was killed, and they must not come after ours.
        """
        nbytes = align_up(file.nbytes, ALIGNMENT)
        try:
            self.filesystem.allocate(file.descriptor, nbytes, file.path)
        except StorageError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.free_surplus(spares=0):
                raise
            self.filesystem.allocate(file.descriptor, nbytes, file.path)

    def _link(self, step: int, files: Sequence[NewFile]) -> dict[str, _Linked]:
        linked: dict[str, _Linked] = {}
        for source in {file.link_from for file in files if file.link_from is not None}:
            names = [file.name for file in files if file.link_from == source]
            linked |= {name: _Linked(source, stamp) for name, stamp in self.link(step, source, names).items()}
        return linked

    def _copy(self, source_step: int, path: str, ranges: Sequence[HeldRange]) -> None:
        """Copy ranges of a linked file into the one that is written, through the page cache.

        Raises:
            CorruptError: a range is damaged.
        """
        if not ranges:
            return
        source = self.filesystem.open_for_blocks(linked_name(path), write=False, direct=False)
        try:
            target = self.filesystem.open_for_blocks(path, write=True, direct=False)
            try:
                for offset, nbytes, checksum in ranges:
                    content = self.filesystem.read_range(source, offset, nbytes, path)
                    if block_checksum(content) != checksum:
                        self.distrust(source_step)
                        raise CorruptError(
                            f"{os.path.join(self.path(source_step), os.path.basename(path))} is damaged at byte "
                            f"{offset}; verify step {source_step}, and save again: the next save writes the file whole"
                        )
                    self.filesystem.write_range(target, offset, content, path)
            finally:
                self.filesystem.close(target)
        finally:
            self.filesystem.close(source)

    def _close_files(self, step: int) -> None:
        self._linked.pop(step, None)
        for file in self._files.pop(step, ()):
            self.filesystem.close(file.descriptor)
