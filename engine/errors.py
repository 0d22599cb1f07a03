"""The exception tree: every failure of the engine, split by its cause.

Theory of operation.  A caller handles a failure by its remedy, so the tree has four
branches under `EngineError`, and the engine raises no other exception on purpose:

* `UsageError`     the call was wrong; changing the call helps, trying again does not.
* `CheckpointError` the bytes on disk are missing or not what was written.
* `StorageError`   the operating system refused an operation on a file; carries errno, operation, path,
                   offset and remedy, and is also an `OSError`.
* `PlatformError`  this host cannot do it; carries the cause and the remedy.

Beside them is `MonitorLostError`, for which there is nothing to do but save again.

Messages name the thing, the value and the remedy.  This module imports nothing of the engine.
"""

from __future__ import annotations

import errno as codes
import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep

_DEVICE = "the disk or its file system is failing: see dmesg, and go on in a directory on another one"
_REPLACED = "something else has removed or replaced it; open a new Engine, which starts from what is there"
_IN_THE_WAY = "something else has put it there; open a new Engine, which clears away what an engine has left"
_FORBIDDEN = "give this user the right to read and write there, or use another directory"
_UNFIT = "the file system does not do what is asked of it; keep checkpoints on ext4, XFS or btrfs"
_PASSING = "the kernel was short of something for a moment; save or restore again"

# The kernel's errors when the medium does not return the written bytes: an I/O error of a local or remote device, or a
# wrong checksum or structure of the file system (btrfs, XFS).
MEDIA_ERRORS = (codes.EIO, codes.EREMOTEIO, codes.ENODATA, codes.EBADMSG, codes.EUCLEAN)

# The remedy for each errno of an operation on files (errno(3), and the pages of the calls).
_REMEDIES = {
    **dict.fromkeys(MEDIA_ERRORS, _DEVICE),
    codes.ENXIO: _DEVICE,
    codes.ENODEV: _DEVICE,
    codes.ENOSPC: "free space or lower keep",
    codes.EDQUOT: "free space, lower keep, or have the quota raised",
    codes.EROFS: "mount it for writing; if the kernel has made it read-only, see dmesg for the failure",
    codes.EFBIG: "raise the limit on file size (ulimit -f), or use a file system that takes larger files",
    codes.EMFILE: "raise the limit on open files (ulimit -n), or close some",
    codes.ENFILE: "raise the system's limit on open files (sysctl fs.file-max)",
    codes.ENOMEM: "free memory, or give the Engine a smaller staging_bytes",
    codes.EINTR: _PASSING,
    codes.EAGAIN: _PASSING,
    codes.EBUSY: _PASSING,
    codes.EACCES: _FORBIDDEN,
    codes.EPERM: _FORBIDDEN,
    codes.ENOENT: _REPLACED,
    codes.ENOTDIR: _REPLACED,
    codes.ESTALE: _REPLACED,
    codes.EEXIST: _IN_THE_WAY,
    codes.ENOTEMPTY: _IN_THE_WAY,
    codes.ELOOP: "no link may stand in its place; name the real directory",
    codes.EISDIR: "move the directory away: a file of the engine's belongs in its place",
    codes.EINVAL: _UNFIT,
    codes.EOPNOTSUPP: _UNFIT,
    codes.EXDEV: "keep the run in a directory of its own on one file system, not in the lower layer of an overlay",
    codes.ENAMETOOLONG: "use a directory with a shorter path",
    # No call on files gives this one: see Catalog._demand_sound.
    codes.ENOTRECOVERABLE: "an earlier sync of a directory failed, so it is unknown which renames will last; "
    "close this Engine and open a new one, which starts from what is on disk",
    codes.ECANCELED: "it was interrupted before it was done; save again",
}
_REMEDY = "see errno(3) for what this means, and dmesg for what the kernel says"


def remedy_for(errno: int) -> str:
    """The remedy for a refused operation on files, in one line."""
    return _REMEDIES.get(errno, _REMEDY)


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
    """The step is taken, or is not after every committed step."""


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
    """A checkpoint on disk is missing or cannot be used."""


class NotFoundError(CheckpointError, LookupError):
    """No committed checkpoint answers the request."""


class RetiredError(NotFoundError):
    """The checkpoint was retired while it was read without a lock; read a newer one."""


class CorruptError(CheckpointError):
    """A checkpoint differs from the written one: a checksum, a length or the manifest is wrong."""


class NewerFormatError(CheckpointError):
    """A checkpoint was written for a later engine than this one.  It is whole, and stays as it is."""


class StorageError(EngineError, OSError):
    """The operating system refused an operation on a file.

    Attributes:
        errno: the kernel's error number (errno(3)).
        operation: the operation refused, e.g. ``"write"`` or ``"fsync"``.
        path: the file or directory it was refused on.
        offset: the file offset in bytes, or None where the operation has none.
        remedy: an action of the user that helps; by default the one that helps against this errno.
    """

    def __init__(
        self, errno: int, operation: str, path: str, offset: int | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(errno, os.strerror(errno))
        self.operation = operation
        self.path = path
        self.offset = offset
        self._remedy = remedy

    def __reduce__(self) -> tuple[type[StorageError], tuple[int, str, str, int | None, str | None]]:
        """Rebuild from the five arguments: OSError's own way would drop the last four."""
        assert self.errno is not None
        return type(self), (self.errno, self.operation, self.path, self.offset, self._remedy)

    @property
    def remedy(self) -> str:
        """An action of the user that helps, in one line."""
        return self._remedy or remedy_for(self.errno or 0)

    def __str__(self) -> str:
        at = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.operation} of {self.path}{at}: {self.strerror} (errno {self.errno}); {self.remedy}"


class NoSpaceError(StorageError):
    """A save was not begun, because the file system lacks room for it.

    Attributes:
        needed_bytes: the size of the save on disk.
        missing_bytes: the part of it that lacks room.
        only_newest: whether a rule that keeps fewer checkpoints would not help.
    """

    def __init__(self, path: str, needed_bytes: int, missing_bytes: int, only_newest: bool = False) -> None:
        super().__init__(codes.ENOSPC, "save", path)
        self.needed_bytes = needed_bytes
        self.missing_bytes = missing_bytes
        self.only_newest = only_newest

    def __reduce__(self) -> tuple[type[NoSpaceError], tuple[str, int, int, bool]]:  # type: ignore[override]
        """Rebuild from its arguments."""
        return type(self), (self.path, self.needed_bytes, self.missing_bytes, self.only_newest)

    @property
    def remedy(self) -> str:
        """Free space; a rule that keeps less helps only where more than the newest is kept."""
        if not self.only_newest:
            return super().remedy
        return (
            f"free {self.missing_bytes} bytes, or use a larger file system: no older checkpoint is there to give up, "
            "and the newest is kept until the next one is durable"
        )

    def __str__(self) -> str:
        return (
            f"the save needs {self.needed_bytes} bytes in {self.path}, and {self.missing_bytes} of them are missing; "
            f"{self.remedy}"
        )


class PlatformError(EngineError):
    """This host lacks something the engine needs.

    Attributes:
        cause: what is missing or refused.
        remedy: an action of the user that helps.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class MonitorLostError(EngineError):
    """The monitor of an Engine has ended, and with it what it had not committed; the next save starts another one."""


class EngineWarning(UserWarning):
    """Something the user should know that stops nothing: a checkpoint passed over, a slower way taken."""


def warn(message: str) -> None:
    """Warn with an `EngineWarning` that names the line outside the engine that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EngineWarning, stacklevel=level)
