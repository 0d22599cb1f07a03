"""Owner: a catalog with the files of its saves in flight.

Theory of operation.  `begin_save` creates a save's files and keeps their descriptors; sealing and publishing use those,
so the writer of the blocks needs no path and syncs nothing.  The descriptors are closed when the save ends.  This class
is `access.WriteAccess` in the process that holds the lock.

Called by `store`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from engine.errors import StorageError
from engine.format.layout import align_up
from engine.format.plan import ALIGNMENT
from engine.store.access import BegunSave, NewFile
from engine.store.catalog import Catalog
from engine.store.commit import WrittenFile, publish, seal
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention
from engine.store.spares import Stamp


class Owner(Catalog):
    """The checkpoints of one directory, and the files of the saves in flight.  Arguments as of `Catalog`."""

    def __init__(self, root: str, filesystem: Filesystem, spare_max: int, retention: Retention | None = None) -> None:
        self._files: dict[int, list[WrittenFile]] = {}  # by step in flight
        super().__init__(root, filesystem, spare_max, retention)

    def begin_save(self, step: int, files: Sequence[NewFile], direct: bool) -> BegunSave:
        """Make the files of a save, with room for every block; see `WriteAccess.begin_save`."""
        self.check_room(sum(align_up(file.nbytes, ALIGNMENT) for file in files))
        begun = self.begin(step, [file.name for file in files])
        written = self._files[step] = []
        for file in files:
            path = os.path.join(begun.path, file.name)
            descriptor = self.filesystem.open_for_blocks(path, write=True, direct=direct)
            written.append(WrittenFile(descriptor, path, file.nbytes))
            self._allocate(written[-1])
        return BegunSave(begun.path, [file.descriptor.number for file in written], begun.recycled, begun.reused)

    def seal_save(self, step: int, small_files: Mapping[str, bytes]) -> None:
        """Make the files of a save durable, and write its small ones."""
        seal(self.filesystem, self.partial_path(step), self.files(step), small_files)

    def publish_save(self, step: int, manifest: bytes | bytearray) -> str:
        """Make a sealed save visible, durably; close its files, and return its path."""
        stamps = self.stamps(step)
        path = publish(self, step, manifest)
        self.vouch(step, stamps)
        self._close_files(step)
        return path

    def discard_save(self, step: int) -> None:
        """Close and delete the files of a failed save."""
        self._close_files(step)
        self.discard(step)

    def stamps(self, step: int) -> Mapping[str, Stamp]:
        """The stamps of the files of a sealed save, which change with any later write."""
        statuses = {f.path: self.filesystem.descriptor_status(f.descriptor, f.path) for f in self.files(step)}
        return {os.path.basename(path): Stamp.of(status) for path, status in statuses.items()}

    def files(self, step: int) -> Sequence[WrittenFile]:
        """The files of a save in flight."""
        return self._files[step]

    def _allocate(self, file: WrittenFile) -> None:
        """Reserve a file's blocks.  If there is no room, delete checkpoints that no rule keeps, and try once more."""
        nbytes = align_up(file.nbytes, ALIGNMENT)
        try:
            self.filesystem.allocate(file.descriptor, nbytes, file.path)
        except StorageError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.free_surplus(spares=0):
                raise
            self.filesystem.allocate(file.descriptor, nbytes, file.path)

    def _close_files(self, step: int) -> None:
        for file in self._files.pop(step, ()):
            self.filesystem.close(file.descriptor)
