"""Stamps: whether a file is still as this process sealed it.

Theory of operation.  A write to a file changes its mtime and its ctime.  A new, moved or removed name changes the ctime
too, and a file that several checkpoints share often gets and loses names.  So this process does these operations here:
after each, the stamp of a shared file is taken again, if nothing but the ctime has changed.  An earlier stamp of the
file leads to the newest one by the inode.

Only files that have been linked here are shared.  For all others the operation is done and nothing else.

Rules: any thread may call; one lock makes an operation and the looks before and after it a single step.  Called by
`spares` and `catalog`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from engine.errors import CorruptError, StorageError
from engine.store.filesystem import Filesystem

# Errors of link(2) on a file system without hard links, for too many links, for another user's file
# (fs.protected_hardlinks), across file systems and overlay layers, or if the source is gone.
_NO_LINK = (errno.EPERM, errno.EMLINK, errno.EACCES, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT)


class Stamp(NamedTuple):
    """Values that change with a write to a file or its replacement: inode, length, and its times of change.

    A program may set the mtime back after a write (`rsync --times`), but none can set the ctime.
    """

    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp of a file with this status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Stamps:
    """The shared files of one run, and the operations on their names."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._shared: dict[int, Stamp] = {}  # by inode, the newest stamp of a file that has been linked
        self._lock = threading.RLock()

    def holds(self, stamp: Stamp, path: str) -> bool:
        """Whether the file at this path is unchanged since it got the stamp."""
        with self._lock:
            status = self._filesystem.status(path)
            return status is not None and Stamp.of(status) == self._newest(stamp)

    def forget(self, inodes: Iterable[int]) -> None:
        """Files with these inodes have been written: what was known of them no longer holds."""
        with self._lock:
            for inode in inodes:
                self._shared.pop(inode, None)

    def link(self, source: str, target: str, stamp: Stamp) -> bool:
        """Give the file at `source` a second name; False if it has changed, or if the file system has no links."""
        with self._lock:
            if not self.holds(stamp, source):
                return False
            before = self._newest(stamp)
            try:
                self._filesystem.link(source, target)
            except StorageError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
            self._shared[before.inode] = before
            self._renew(before, self._filesystem.status(target))
            return True

    def rename(self, source: str, target: str) -> None:
        """Rename a file or a directory."""
        with self._lock:
            before = self._shared_at(source)
            self._filesystem.rename(source, target)
            if before is not None:
                self._renew(before, self._filesystem.status(target))

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        with self._lock:
            before = self._shared_at(path)
            if before is None:
                self._filesystem.unlink(path)
                return
            descriptor = None
            with suppress(CorruptError, StorageError):  # then the file's stamp no longer holds, which is safe
                descriptor = self._filesystem.open_for_blocks(path, write=False, direct=False)
            try:
                self._filesystem.unlink(path)
                if descriptor is not None:
                    self._renew(before, self._filesystem.descriptor_status(descriptor, path))
            finally:
                if descriptor is not None:
                    self._filesystem.close(descriptor)

    def _newest(self, stamp: Stamp) -> Stamp:
        return self._shared.get(stamp.inode, stamp)

    def _shared_at(self, path: str) -> Stamp | None:
        """The newest stamp of a shared file, if it is the one at this path, unchanged."""
        if not self._shared:
            return None
        status = self._filesystem.status(path)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        known = self._shared.get(status.st_ino)
        return known if known == Stamp.of(status) else None

    def _renew(self, before: Stamp, status: os.stat_result | None) -> None:
        """Take the stamp of a shared file after an operation of ours on one of its names."""
        if status is None:
            return
        if status.st_nlink == 0:  # the number may become another file's
            self._shared.pop(before.inode, None)
        elif Stamp.of(status)._replace(ctime_ns=before.ctime_ns) == before:
            self._shared[before.inode] = Stamp.of(status)
