"""SystemCalls: the system calls of `store.filesystem`, recorded, and refused on request.

Theory of operation.  That module reaches the kernel through `os`, `fcntl.flock` and `allocate`, and no other module of
the store does.  An installed `SystemCalls` replaces these with stand-ins.  A stand-in notes the call and its path,
refuses it if `refuse` has named it, and otherwise does it.  One exception: an fsync that is not refused does nothing.
No test here cuts the power, and a sweep over thousands of refusals would wait for the disk most of its time.

A refused call has not happened.  close(2) is not among the calls: a `Descriptor` closes itself, and no result matters.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from engine.io.binding import allocate

# The calls that can be refused, and their names in a StorageError.
_OPERATIONS = {
    "mkdir": "mkdir",
    "listdir": "readdir",
    "lstat": "stat",
    "statvfs": "statvfs",
    "fstat": "stat",
    "rename": "rename",
    "unlink": "unlink",
    "rmdir": "rmdir",
    "open": "open",
    "fsync": "fsync",
    "ftruncate": "truncate",
    "write": "write",
    "pread": "read",
    "pwrite": "write",
}

# How a file is opened, and whether it is made: `Filesystem.is_ours_alone` opens an existing file to write.
_ACCESS = os.O_ACCMODE | os.O_CREAT | os.O_TMPFILE


class Call(NamedTuple):
    """A call: its name in a StorageError, and its path.

    `is_probe`: it asks whether a file is ours alone, or writes a pid for people to read, and a refusal is no failure.
    `is_scratch`: it makes a file without a name, and no room for that is no failure either.
    """

    operation: str
    path: str
    is_probe: bool = False
    is_scratch: bool = False


class SystemCalls:
    """The calls since `installed`, and which of them are refused."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.refused: list[Call] = []
        self._error = 0
        self._refusals = range(0)
        self._paths: dict[int, tuple[str, bool]] = {}  # of open descriptors, and whether it was opened to ask
        self._mutex = threading.Lock()

    def refuse(self, error: int, start: int, count: int = 1) -> None:
        """Refuse so many calls with an errno, from the `start`-th from now on."""
        self._error = error
        self._refusals = range(len(self.calls) + start, len(self.calls) + start + count)

    def heal(self) -> None:
        """Refuse nothing any more."""
        self._refusals = range(0)

    @contextmanager
    def installed(self) -> Iterator[SystemCalls]:
        """The engine's modules see the stand-ins meanwhile."""
        wrapped = {name: self._wrap(name, getattr(os, name)) for name in _OPERATIONS}
        stand_in = _Module(os, {**wrapped, "fdopen": self._fdopen})
        locking = _Module(fcntl, {"flock": self._wrap("flock", fcntl.flock)})
        with (
            mock.patch("engine.store.filesystem.os", stand_in),
            mock.patch("engine.store.filesystem.fcntl", locking),
            mock.patch("engine.store.filesystem.allocate", self._allocate),
        ):
            yield self

    def _note(self, call: Call) -> None:
        """Record a call, and refuse it if it is one of those."""
        with self._mutex:
            is_refused = len(self.calls) in self._refusals
            self.calls.append(call)
            if is_refused:
                self.refused.append(call)
        if is_refused:
            raise OSError(self._error, os.strerror(self._error))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        operation = _OPERATIONS.get(name, name)

        def call(target: str | int, *arguments: Any, **options: Any) -> Any:
            if isinstance(target, int):
                path, is_probe = self._paths[target]
                noted = Call(operation, path, is_probe or (name in ("ftruncate", "pwrite") and path.endswith("/lock")))
            else:
                directory = options.get("dir_fd")
                path = target if directory is None else os.path.join(self._paths[directory][0], target)
                access = arguments[0] & _ACCESS if name == "open" else None
                noted = Call(operation, path, access == os.O_RDWR, access == os.O_RDWR | os.O_TMPFILE)
            self._note(noted)
            if name == "fsync":
                return None
            result = real(target, *arguments, **options)
            if name == "open":
                self._paths[result] = noted.path, noted.is_probe
            return result

        return call

    def _allocate(self, descriptor: int, offset: int, nbytes: int) -> int:
        try:
            self._note(Call("fallocate", self._paths[descriptor][0]))
        except OSError as error:
            return error.errno or errno.EIO
        return _allocate(descriptor, offset, nbytes)

    def _fdopen(self, descriptor: int, mode: str, *, closefd: bool) -> _File:
        return _File(self._note, self._paths[descriptor][0], os.fdopen(descriptor, mode, closefd=closefd))


_allocate = allocate


class _Module:
    """A module, but for some of its functions."""

    def __init__(self, real: Any, functions: dict[str, Any]) -> None:
        self.__dict__.update(functions)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _File:
    """An open file whose read can be refused."""

    def __init__(self, note: Callable[[Call], None], path: str, file: Any) -> None:
        self._note, self._path, self._file = note, path, file

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, nbytes: int) -> bytes:
        self._note(Call("read", self._path))
        content: bytes = self._file.read(nbytes)
        return content
