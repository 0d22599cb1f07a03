"""Filesystem: the file operations that durability depends on, in one class that tests can replace.

Theory of operation.  Everything that this package does to names and files goes through an instance of `Filesystem`,
one small method for each operation.  A fault injector or a crash simulator subclasses it.  Data blocks go through the
native pipeline, whose seam is `eng_io_table`.  No other module of the package calls `os` or `fcntl` on a
name or a descriptor.

Rules: every refusal by the kernel becomes a `StorageError` with errno, operation and path; every descriptor is
close-on-exec (Python's default), and is owned by a `Descriptor`, so that Ctrl-C loses none; files under a checkpoint
are opened without following links, without blocking on a FIFO, and only if they are regular files.
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
from functools import partial

from engine.errors import CorruptError, StorageError
from engine.io.binding import allocate
from engine.io.descriptor import Descriptor

# fcntl(2); the fcntl module has no name for it before Python 3.13.
_F_SETSIG = 10

# The unit of st_blocks, whatever the file system's own (stat(3type)).
_STAT_BLOCK_BYTES = 512

# The user's umask decides who may access new files (open(2)).
_FILE_MODE = 0o666

# Errors of open(2) for O_TMPFILE on a file system or kernel without it.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)

# Errors of fallocate(2) if the file system does not have it, or a filter on system calls refuses it.
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS)

# The unit of allocation of every file system named in docs/durability.md, or a multiple of it.
_PAGE_BYTES = 4096

# Errors of open(2) for a file that does not exist, is a link, or whose parent is not a directory.
_NOT_THERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


@contextmanager
def telling(operation: str, path: str) -> Iterator[None]:
    """Turn the kernel's refusal of an operation into a StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:
            raise
        raise StorageError(error.errno, operation, path) from None


class Filesystem:
    """The real operations.  Paths are absolute; sizes and offsets are in bytes; every method may block on the disk."""

    def make_directory(self, path: str) -> None:
        """Create one directory; its parent exists."""
        with telling("mkdir", path):
            os.mkdir(path)

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        with telling("readdir", path):
            return sorted(os.listdir(path))

    def real_path(self, path: str) -> str:
        """The absolute path without links; components that do not exist are kept (realpath(3))."""
        return os.path.realpath(path)

    def status(self, path: str) -> os.stat_result | None:
        """The result of lstat(2) for a name; None if it does not exist."""
        with telling("stat", path):
            try:
                return os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def is_directory(self, path: str) -> bool:
        """Whether this is a directory itself, not a link to one."""
        status = self.status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def open_directory(self, path: str) -> Descriptor:
        """Open a directory, not a link to one, so that its files can be reached even after it is renamed."""
        with telling("open", path):
            return _open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def descriptor_status(self, descriptor: Descriptor, path: str) -> os.stat_result:
        """The result of fstat(2) for a descriptor."""
        with telling("stat", path):
            return os.fstat(descriptor.number)

    def is_at(self, descriptor: Descriptor, path: str) -> bool:
        """Whether the name still leads to the file or directory of the descriptor.

        Raises:
            StorageError: the name is gone (ENOENT), or stat is refused.
        """
        with telling("stat", path):
            return os.path.samestat(os.lstat(path), os.fstat(descriptor.number))

    def is_ours_alone(self, path: str) -> bool:
        """Whether no process could see this file change: it is a regular file with one name, and no process has it open
        or mapped.

        A write lease decides (fcntl(2), F_SETLEASE): the kernel grants it only if our descriptor is the only one.  If
        it grants none, as on network file systems, the answer is no.
        """
        try:
            descriptor = _open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor.number)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return False
            # If a process opens the file while we hold the lease, the kernel sends us a signal: SIGURG, which is
            # ignored by default, instead of SIGIO, which would end the process.
            fcntl.fcntl(descriptor.number, _F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor.number, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor.number, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        finally:
            self.close(descriptor)
        return True

    def rename(self, source: str, target: str) -> None:
        """Rename within one file system; atomic (rename(2)), durable only after fsync of both directories."""
        with telling("rename", source):
            os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name (link(2)), durable only after fsync of the directory of that name."""
        with telling("link", target):
            os.link(source, target, follow_symlinks=False)

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
        descriptor = self.open_directory(path)
        try:
            with telling("fsync", path):
                os.fsync(descriptor.number)
        finally:
            self.close(descriptor)

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        """Open a data file for aligned blocks, past the page cache if `direct` and if the file allows that.

        With `write` the file is created if it does not exist; otherwise it must be a regular file.  With `directory` it
        is the file of this name in that open directory, and `path` is for messages.
        """
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        if direct:
            try:
                return self._open_regular(path, flags | os.O_DIRECT, directory)
            except StorageError as error:
                # A file may refuse O_DIRECT though its directory takes it: a file of an overlay's other layer.  The
                # page cache takes aligned blocks too.
                if error.errno != errno.EINVAL:
                    raise
        return self._open_regular(path, flags, directory)

    def open_scratch(self, directory: str, direct: bool) -> Descriptor:
        """Open an empty file without a name, to read and write; it is deleted when it is closed."""
        flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        try:
            with telling("open", directory):
                return _open(directory, flags | os.O_TMPFILE, 0o600)
        except StorageError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        path = os.path.join(directory, f".scratch-{secrets.token_hex(8)}")
        try:
            with telling("open", path):
                descriptor = _open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
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

    def size(self, descriptor: Descriptor, path: str) -> int:
        """A file's length."""
        with telling("stat", path):
            return os.fstat(descriptor.number).st_size

    def free_bytes(self, directory: str) -> int | None:
        """The free bytes for this user, without quotas (statvfs(3)); None if the file system does not report them, as
        ramfs and some FUSE file systems."""
        with telling("statvfs", directory):
            status = os.statvfs(directory)
        # The blocks that ext4 reserves are for root.
        free = status.f_bfree if os.geteuid() == 0 else status.f_bavail
        return free * status.f_frsize if status.f_blocks else None

    def allocated_bytes(self, path: str) -> int:
        """The bytes of a file's blocks on disk; 0 if it has another name, as deleting this one frees nothing."""
        with telling("stat", path):
            status = os.lstat(path)
        return status.st_blocks * _STAT_BLOCK_BYTES if status.st_nlink == 1 else 0

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        """Reserve the blocks that a file of this length lacks, so that no write can run out of space.

        Only holes are allocated: for blocks that exist XFS still requires free space for the whole range of
        fallocate(2) (xfs_alloc_file_space in fs/xfs/xfs_bmap_util.c), so a full disk would refuse to overwrite.  A file
        system without fallocate allocates when blocks are written, and may run out of space then.
        """
        for offset, end in self._holes(descriptor, nbytes, path):
            error = allocate(descriptor.number, offset, end - offset)
            if error in _NO_FALLOCATE:
                return
            if error:
                raise StorageError(error, "fallocate", path)
        with telling("truncate", path):
            if os.fstat(descriptor.number).st_size < nbytes:  # the rest of its last block
                os.ftruncate(descriptor.number, nbytes)

    def _holes(self, descriptor: Descriptor, nbytes: int, path: str) -> Iterator[tuple[int, int]]:
        """The ranges of a file's first `nbytes` without blocks, according to lseek(2)."""
        with telling("stat", path):
            size = min(os.fstat(descriptor.number).st_size, nbytes)
        offset = 0
        while offset < size:
            try:
                hole = min(os.lseek(descriptor.number, offset, os.SEEK_HOLE), size)
            except OSError:  # unknown: the rest may be a hole
                hole = offset
            if hole == size:
                break
            try:
                offset = min(os.lseek(descriptor.number, hole, os.SEEK_DATA), size)
            except OSError:  # ENXIO: no data follows
                offset = size
            yield hole, offset
        beyond = -(-size // _PAGE_BYTES) * _PAGE_BYTES
        if beyond < nbytes:
            yield beyond, nbytes

    def read_range(self, descriptor: Descriptor, offset: int, nbytes: int, path: str) -> bytes:
        """A range of a file; shorter where the file ends."""
        with telling("read", path):
            return os.pread(descriptor.number, nbytes, offset)

    def write_range(self, descriptor: Descriptor, offset: int, content: bytes, path: str) -> None:
        """Write a range of a file, through the page cache."""
        view = memoryview(content)
        with telling("write", path):
            while view:
                written = os.pwrite(descriptor.number, view, offset)
                view, offset = view[written:], offset + written

    def truncate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        """Set a file's exact length."""
        with telling("truncate", path):
            os.ftruncate(descriptor.number, nbytes)

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        """Make a file's bytes and length durable.

        A failure is final: the kernel may have dropped the pages that it could not write, and a second fsync would
        report success (fsync(2), "Errors").
        """
        with telling("fsync", path):
            os.fsync(descriptor.number)

    def close(self, descriptor: Descriptor) -> None:
        """Close a descriptor.  Its result does not matter, because everything was synced before."""
        descriptor.close()

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        """Create a new file, write it and make it durable."""
        with telling("open", path):
            descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        try:
            with telling("write", path):
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor.number, view) :]
            self.sync_file(descriptor, path)
        finally:
            self.close(descriptor)

    def read_file(self, path: str, bytes_max: int, directory: Descriptor | None = None) -> bytes:
        """The whole content of a regular file, which may not be longer than `bytes_max`; `directory` as for blocks."""
        descriptor = self._open_regular(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, directory)
        try:
            with telling("read", path), os.fdopen(descriptor.number, "rb", closefd=False) as file:
                nbytes = os.fstat(descriptor.number).st_size
                if nbytes > bytes_max:
                    raise CorruptError(f"{path} has {nbytes} bytes, and at most {bytes_max} make sense")
                return file.read(nbytes)
        finally:
            self.close(descriptor)

    # -- the lock ---------------------------------------------------------------------------------------------

    def open_lock(self, path: str) -> Descriptor:
        """Open a lock file, and create it if it does not exist."""
        with telling("open", path):
            return _open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)

    def lock(self, descriptor: Descriptor, path: str, wait: bool = False) -> bool:
        """Lock an open file or directory exclusively (flock(2)); False if another process holds the lock."""
        try:
            with telling("flock", path):
                fcntl.flock(descriptor.number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except StorageError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        return True

    def read_lock(self, descriptor: Descriptor, bytes_max: int) -> bytes:
        """The content of a lock file, written by its holder; empty if it cannot be read."""
        with suppress(OSError):
            return os.pread(descriptor.number, bytes_max, 0)
        return b""

    def write_lock(self, descriptor: Descriptor, content: bytes) -> None:
        """Write the holder into a lock file.  Best effort: a full disk must not prevent a restore."""
        with suppress(OSError):
            os.ftruncate(descriptor.number, 0)
            os.pwrite(descriptor.number, content, 0)

    def pid_namespace(self) -> int:
        """The number of this process's PID namespace, or 0 where /proc is not mounted (namespaces(7))."""
        try:
            return os.stat("/proc/self/ns/pid").st_ino
        except OSError:
            return 0

    # -- opening ----------------------------------------------------------------------------------------------

    def _open_regular(self, path: str, flags: int, directory: Descriptor | None = None) -> Descriptor:
        """Open a file of a checkpoint.  If it is missing or not a regular file, the checkpoint is damaged."""
        name = path if directory is None else os.path.basename(path)
        try:
            with telling("open", path):
                descriptor = _open(name, flags, directory=directory)
        except StorageError as error:
            if error.errno in _NOT_THERE and not flags & os.O_CREAT:
                raise CorruptError(f"{path} is missing, or a link") from None
            if not flags & os.O_CREAT and _is_irregular(
                name, directory
            ):  # a socket, or a device that may not be opened
                raise CorruptError(f"{path} is not a regular file") from None
            raise
        try:
            with telling("stat", path):
                is_regular = stat.S_ISREG(os.fstat(descriptor.number).st_mode)
            if not is_regular:
                raise CorruptError(f"{path} is not a regular file")
        except BaseException:
            self.close(descriptor)
            raise
        return descriptor


def _open(path: str, flags: int, mode: int = _FILE_MODE, directory: Descriptor | None = None) -> Descriptor:
    """open(2), or openat(2) with a directory."""
    descriptor = Descriptor()
    descriptor.fill(partial(os.open, path, flags, mode, dir_fd=_number(directory)))
    return descriptor


def _is_irregular(name: str, directory: Descriptor | None) -> bool:
    try:
        return not stat.S_ISREG(os.stat(name, dir_fd=_number(directory), follow_symlinks=False).st_mode)
    except OSError:
        return False


def _number(directory: Descriptor | None) -> int | None:
    """A directory as os's `dir_fd`."""
    return None if directory is None else directory.number
