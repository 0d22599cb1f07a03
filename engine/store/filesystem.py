"""Filesystem: the file operations that durability is made of, in one table that tests can replace.

Theory of operation.  Everything that `catalog`, `commit`, `writer` and `reader` do to names and files goes
through an instance of `Filesystem`, one small method an operation.  A fault injector or a crash simulator
subclasses it; the data blocks themselves go through the native pipeline, whose seam is `eng_io_table`.

Rules: every refusal by the kernel becomes a `StorageError` with errno, operation and path; every descriptor is
close-on-exec (Python's default); files under a checkpoint are opened without following links, without blocking
on a FIFO, and only if they are regular files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from engine.errors import CorruptError, StorageError
from engine.io.binding import allocate

# fcntl(2); the fcntl module has no name for it before Python 3.13.
_F_SETSIG = 10

# The unit of st_blocks, whatever the file system's own (stat(3type)).
_STAT_BLOCK_BYTES = 512

# New files are the user's to share or not: the umask decides (open(2)).
_FILE_MODE = 0o666

# What open(2) says of O_TMPFILE where the file system does not have it, or the kernel did not know it.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)

# What open(2) says of a file that is not there, is a link, or lies under something that is no directory.
_NOT_THERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


@contextmanager
def telling(operation: str, path: str) -> Iterator[None]:
    """Turn the kernel's refusal into a StorageError that says what was refused."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:
            raise
        raise StorageError(error.errno, operation, path) from None


class Filesystem:
    """The real one.  Paths are absolute; sizes and offsets are in bytes; every method may block on the disk."""

    def make_directory(self, path: str) -> None:
        """Create one directory; its parent exists."""
        with telling("mkdir", path):
            os.mkdir(path)

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        with telling("readdir", path):
            return sorted(os.listdir(path))

    def is_directory(self, path: str) -> bool:
        """Whether this is a directory itself, not a link to one."""
        with telling("stat", path):
            try:
                return stat.S_ISDIR(os.lstat(path).st_mode)
            except FileNotFoundError:
                return False

    def is_ours_alone(self, path: str) -> bool:
        """Whether nobody could see this file change: it is a regular file with one name, and nobody has it open or
        mapped.

        A write lease tells (fcntl(2), F_SETLEASE): the kernel grants it only where ours is the one open file.  Where
        it grants none, as on network file systems, the answer is no.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return False
            # Whoever opens it while we hold the lease has us sent a signal: one that is ignored, not SIGIO, which
            # ends a process by default.
            fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        finally:
            self.close(descriptor)
        return True

    def rename(self, source: str, target: str) -> None:
        """Rename within one file system; atomic for whoever looks (rename(2)), durable only after fsync of both
        directories."""
        with telling("rename", source):
            os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        with telling("unlink", path):
            os.unlink(path)

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        with telling("rmdir", path):
            os.rmdir(path)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable (fsync(2) of the directory itself)."""
        with telling("open", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with telling("fsync", path):
                os.fsync(descriptor)
        finally:
            self.close(descriptor)

    def open_for_blocks(self, path: str, write: bool, direct: bool) -> int:
        """Open a data file for aligned blocks, past the page cache if `direct`.

        With `write` the file is created if it is not there; otherwise it must be a regular file.
        """
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        return self._open_regular(path, flags | (os.O_DIRECT if direct else 0))

    def open_scratch(self, directory: str, direct: bool) -> int:
        """Open an empty file in a directory, to read and write, that has no name and is gone when it is closed."""
        flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        try:
            with telling("open", directory):
                return os.open(directory, flags | os.O_TMPFILE, 0o600)
        except StorageError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        path = os.path.join(directory, f".scratch-{secrets.token_hex(8)}")
        try:
            with telling("open", path):
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except StorageError:
            with suppress(StorageError):
                self.unlink(path)  # without O_DIRECT a file system makes the file, and then refuses to open it
            raise
        try:
            self.unlink(path)
        except StorageError:
            self.close(descriptor)
            raise
        return descriptor

    def size(self, descriptor: int, path: str) -> int:
        """A file's length."""
        with telling("stat", path):
            return os.fstat(descriptor).st_size

    def free_bytes(self, directory: str) -> int | None:
        """What a file system has left for this user, quotas aside (statvfs(3)); None where it does not say, as ramfs
        and some of FUSE."""
        with telling("statvfs", directory):
            status = os.statvfs(directory)
        # What ext4 reserves is root's to use.
        free = status.f_bfree if os.geteuid() == 0 else status.f_bavail
        return free * status.f_frsize if status.f_blocks else None

    def allocated_bytes(self, path: str) -> int:
        """What a file takes up on disk by itself, holes left out: nothing if it has another name."""
        with telling("stat", path):
            status = os.lstat(path)
        return status.st_blocks * _STAT_BLOCK_BYTES if status.st_nlink == 1 else 0

    def allocate(self, descriptor: int, nbytes: int, path: str) -> None:
        """Reserve the file's blocks, so that no write can run out of space; keeps what is there.

        A file system without fallocate allocates as blocks are written, and may run out of space then.
        """
        error = allocate(descriptor, nbytes)
        if error not in (0, errno.EOPNOTSUPP):
            raise StorageError(error, "fallocate", path)

    def truncate(self, descriptor: int, nbytes: int, path: str) -> None:
        """Set a file's exact length."""
        with telling("truncate", path):
            os.ftruncate(descriptor, nbytes)

    def sync_file(self, descriptor: int, path: str) -> None:
        """Make a file's bytes and length durable.  A failure is final: the kernel may have dropped what it could
        not write, and a second fsync would say all is well (fsync(2), "Errors")."""
        with telling("fsync", path):
            os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor; nothing depends on the result, since everything was synced before."""
        with suppress(OSError):
            os.close(descriptor)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        """Create a file that is not there yet, write it and make it durable."""
        with telling("open", path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE_MODE)
        try:
            with telling("write", path):
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
            self.sync_file(descriptor, path)
        finally:
            self.close(descriptor)

    def read_file(self, path: str, bytes_max: int) -> bytes:
        """The whole content of a regular file, which may not be longer than `bytes_max`."""
        descriptor = self._open_regular(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file, telling("read", path):
            nbytes = os.fstat(descriptor).st_size
            if nbytes > bytes_max:
                raise CorruptError(f"{path} has {nbytes} bytes, and at most {bytes_max} make sense")
            return file.read(nbytes)

    def _open_regular(self, path: str, flags: int) -> int:
        """Open a file of a checkpoint, which is a regular file and there, or else the checkpoint is damaged."""
        try:
            with telling("open", path):
                descriptor = os.open(path, flags, _FILE_MODE)
        except StorageError as error:
            if error.errno in _NOT_THERE and not flags & os.O_CREAT:
                raise CorruptError(f"{path} is missing, or a link") from None
            if not flags & os.O_CREAT and _is_irregular(path):  # a socket, or a device that may not be opened
                raise CorruptError(f"{path} is not a regular file") from None
            raise
        try:
            with telling("stat", path):
                is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if not is_regular:
                raise CorruptError(f"{path} is not a regular file")
        except BaseException:
            self.close(descriptor)
            raise
        return descriptor


def _is_irregular(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
