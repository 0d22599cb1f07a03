"""The exception tree: every failure of the engine, split by whose fault it is.

Theory of operation.  A caller handles a failure by what can be done about it, so the tree has four
branches under `EngineError`, and nothing else is ever raised on purpose:

* `UsageError`     the call was wrong; changing the call helps, trying again does not.
* `CheckpointError` the bytes on disk are missing or not what was written.
* `StorageError`   the operating system refused an operation on a file; carries errno, operation, path
                   and offset, and is also an `OSError`.
* `PlatformError`  this host cannot do it; carries the cause and the remedy.

Messages name the thing, the value and the remedy.  This module imports nothing of the engine.
"""

from __future__ import annotations

import os
from errno import ENOSPC


class EngineError(Exception):
    """Base of every error the engine raises."""


class UsageError(EngineError):
    """The caller's arguments, or the moment of the call, are wrong."""


class ArgumentError(UsageError, ValueError):
    """An argument has a value outside what the function takes."""


class ArenaError(UsageError):
    """A tensor cannot be part of an arena; the message names the tensor."""


class ExtraError(UsageError, TypeError):
    """A value in `extra` cannot be stored; the message holds the path to it."""


class MismatchError(UsageError):
    """The arena and the checkpoint disagree on names, shapes or dtypes; nothing was changed."""


class StepError(UsageError):
    """The step is taken, or is not after what is already committed."""


class BusyError(UsageError):
    """`max_async` saves are in flight and the caller asked not to wait."""


class ClosedError(UsageError):
    """The engine has been closed."""


class ForkedError(UsageError):
    """The engine belongs to the process that opened it, and this is a fork of that process."""


class LockedError(UsageError):
    """Another engine, here or in another process, is writing to the directory."""


class TornSnapshot(UsageError):
    """A writer changed the arena while it was being staged (`snapshot="checked"`)."""


class CheckpointError(EngineError):
    """What lies on disk cannot be used."""


class NotFoundError(CheckpointError, LookupError):
    """No committed checkpoint answers the request."""


class CorruptError(CheckpointError):
    """A checkpoint is not what was written: a checksum, a length or the manifest is wrong."""


class StorageError(EngineError, OSError):
    """The operating system refused an operation on a file.

    Attributes:
        errno: the kernel's error number (errno(3)).
        operation: the operation refused, e.g. ``"write"`` or ``"fsync"``.
        path: the file or directory it was refused on.
        offset: the file offset in bytes, or None where the operation has none.
    """

    def __init__(self, errno: int, operation: str, path: str, offset: int | None = None) -> None:
        super().__init__(errno, os.strerror(errno))
        self.operation = operation
        self.path = path
        self.offset = offset

    def __reduce__(self) -> tuple[type[StorageError], tuple[int, str, str, int | None]]:
        """Rebuild from the four fields: OSError's own way would drop the last three."""
        assert self.errno is not None
        return type(self), (self.errno, self.operation, self.path, self.offset)

    def __str__(self) -> str:
        at = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.operation} of {self.path}{at}: {self.strerror} (errno {self.errno})"


class NoSpaceError(StorageError):
    """A save was not begun, because the file system has not the room for it.

    Attributes:
        missing_bytes: how much more it would need.
    """

    def __init__(self, path: str, needed_bytes: int, missing_bytes: int) -> None:
        super().__init__(ENOSPC, "reserve", path)
        self.needed_bytes = needed_bytes
        self.missing_bytes = missing_bytes

    def __reduce__(self) -> tuple[type[NoSpaceError], tuple[str, int, int]]:  # type: ignore[override]
        """Rebuild from what it was made of."""
        return type(self), (self.path, self.needed_bytes, self.missing_bytes)

    def __str__(self) -> str:
        return (
            f"the save needs {self.needed_bytes} bytes in {self.path}, and {self.missing_bytes} of them are missing; "
            "free so much, or keep fewer checkpoints"
        )


class PlatformError(EngineError):
    """This host lacks something the engine needs.

    Attributes:
        cause: what is missing or refused.
        remedy: what the user can do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class EngineWarning(UserWarning):
    """Something the user should know that stops nothing: a checkpoint passed over, a slower way taken."""
