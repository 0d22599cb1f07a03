"""Lock: one engine at a time in a directory.

Theory of operation.  `.engine/lock` is locked by flock(2) on a descriptor that the ring never gets and that a forked
child closes, so neither can hold the lock after the engine has ended.  The holder writes into the file: its process
number, its PID namespace, and the inode number of `.engine`.

A copy made of hard links (``cp -al``) shares the lock's inode, so a lock on one is a lock on both.  A lock file with a
second name is therefore replaced by a new file, renamed over it.  That is done only if no process holds the shared
inode, or if its holder has written another `.engine` into it.  A lock on `.engine` itself serialises two openers that
replace at the same time.  A lock counts only if its file still has the name after it was locked.

Called by `catalog`.
"""

from __future__ import annotations

import os
import stat
import weakref
from contextlib import suppress

from engine.errors import CorruptError, LockedError, StorageError
from engine.io.descriptor import Descriptor
from engine.store.filesystem import Filesystem

# Three numbers of at most 20 digits, and the ends of their lines.
_CONTENT_BYTES_MAX = 64


class Lock:
    """A lock that is held; made by `take_lock`.

    Attributes:
        path: of its file.
    """

    def __init__(self, filesystem: Filesystem, path: str, descriptor: Descriptor) -> None:
        self.path = path
        self._filesystem = filesystem
        self._descriptor = descriptor
        _open_locks.add(self)

    @property
    def is_held(self) -> bool:
        """Whether it has not been closed."""
        return self._descriptor.number >= 0

    def is_in_place(self) -> bool:
        """Whether its name still leads to the locked file; StorageError (ENOENT) if the name is gone."""
        return self._filesystem.is_at(self._descriptor, self.path)

    def close(self) -> None:
        """Give the lock back.  May be called again."""
        self._filesystem.close(self._descriptor)

    def close_in_child(self) -> None:
        """Close a forked child's copy."""
        self._descriptor.close_in_child()


_open_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_all_in_child() -> None:
    """A forked child shares the lock's open file, and would hold the lock after its parent has died."""
    for lock in tuple(_open_locks):
        lock.close_in_child()


os.register_at_fork(after_in_child=_close_all_in_child)


def holder_of(private: str) -> int | None:
    """The process that has locked a directory, as this host's kernel lists it (proc_locks(5)); None if none is listed.

    Takes no lock.  The holder may be on another host, or in a PID namespace that this process does not see.

    Args:
        private: its `.engine`.
    """
    try:
        status = os.stat(os.path.join(private, "lock"))
        with open("/proc/locks", encoding="ascii") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = [line.split() for line in lines]
    return next((int(row[4]) for row in rows if len(row) > 5 and (row[1], row[5]) == ("FLOCK", device)), None)


def take_lock(filesystem: Filesystem, private: str, root: str) -> Lock:
    """Lock a directory.

    Args:
        filesystem: the file operations.
        private: its `.engine`.
        root: the directory, for messages.

    Raises:
        CorruptError: the lock is not a regular file.
        LockedError: another engine has the directory.
    """
    path = os.path.join(private, "lock")
    while True:
        descriptor = filesystem.open_lock(path)
        try:
            lock = Lock(filesystem, path, descriptor)  # before it is taken: a fork may come at any time
            if _lock(filesystem, descriptor, path, root):
                return lock
        except BaseException:
            filesystem.close(descriptor)
            raise
        filesystem.close(descriptor)  # another file has the name now


def _lock(filesystem: Filesystem, descriptor: Descriptor, path: str, root: str) -> bool:
    """Lock an open lock file; False if another file has its name now, which must be opened instead."""
    status = filesystem.descriptor_status(descriptor, path)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError(f"{path} is not a regular file; remove it")
    if not filesystem.lock(descriptor, path):
        if status.st_nlink > 1 and _is_of_another(filesystem, descriptor, path):
            _replace(filesystem, path)
            return False
        raise LockedError(
            f"{root} is in use by another Engine ({_holder(filesystem, descriptor)}); close that one, or use another "
            "directory"
        )
    if filesystem.status(path) is None or not filesystem.is_at(descriptor, path):
        return False
    if status.st_nlink > 1:
        _replace(filesystem, path)
        return False
    content = f"{os.getpid()}\n{filesystem.pid_namespace()}\n{_inode(filesystem, os.path.dirname(path))}\n"
    filesystem.write_lock(descriptor, content.encode())
    return True


def _replace(filesystem: Filesystem, path: str) -> None:
    """Replace a lock file that has a second name by a new one."""
    private, new = os.path.dirname(path), path + ".new"
    directory = filesystem.open_directory(private)
    try:
        filesystem.lock(directory, private, wait=True)
        status = filesystem.status(path)
        if status is None or status.st_nlink == 1:
            return  # another opener has replaced it
        with suppress(StorageError):
            filesystem.unlink(new)  # left by a kill
        filesystem.write_new_file(new, b"")
        filesystem.rename(new, path)
    finally:
        filesystem.close(directory)


def _is_of_another(filesystem: Filesystem, descriptor: Descriptor, path: str) -> bool:
    """Whether the holder has written the inode of another `.engine`."""
    _, _, inode = _content(filesystem, descriptor)
    # Not the device number: it differs between two clients of a network file system.
    return inode not in (0, _inode(filesystem, os.path.dirname(path)))


def _holder(filesystem: Filesystem, descriptor: Descriptor) -> str:
    pid, namespace, _ = _content(filesystem, descriptor)
    if not pid:
        return "process unknown"
    if namespace and namespace != filesystem.pid_namespace():
        return f"a process of another PID namespace, {pid} there"
    return f"process {pid}"


def _content(filesystem: Filesystem, descriptor: Descriptor) -> tuple[int, int, int]:
    """The three numbers that a holder writes; 0 for a missing one."""
    words = filesystem.read_lock(descriptor, _CONTENT_BYTES_MAX).split()
    pid, namespace, inode, *_ = [int(word) if word.isdigit() else 0 for word in words] + [0, 0, 0]
    return pid, namespace, inode


def _inode(filesystem: Filesystem, path: str) -> int:
    status = filesystem.status(path)
    return 0 if status is None else status.st_ino
