"""Request: what a caller asks of `checkpoint()`, checked and copied.

Theory of operation.  The caller may change what was passed while the save is in flight.  So metrics and files are read
once, in the call, and a wrong value is refused before anything has begun.

Rules: called by the facade, in the caller's thread.
"""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, SupportsFloat

from engine.errors import ArgumentError
from engine.format.checks import is_user_name
from engine.format.manifest import STEP_MAX
from engine.io.descriptor import Descriptor
from engine.options import check_choice, check_range
from engine.session.snapshot import Snapshot

OnBusy = Literal["wait", "skip", "raise"]

# The length of a tag and of a metric's name: that of a file's name (NAME_MAX of limits.h).  Every listing reads them.
NAME_CHARS_MAX = 255
_NAME = f"printable text of 1 to {NAME_CHARS_MAX} characters"

# The user's files are read in the caller's time and kept in memory until they are written, like `extra`, which has the
# same limit (`values.BINARY_BYTES_MAX`).
FILES_BYTES_MAX = 64 << 20

FileContent = bytes | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Request:
    """What `checkpoint()` was asked for beside the arena; see `Engine.checkpoint`.

    Raises:
        ArgumentError: a value is out of range.
    """

    step: int | None = None
    extra: Any = None
    chunk_count: int | None = None
    chunk_bytes: int | None = None
    snapshot: Snapshot = "auto"
    on_busy: OnBusy = "wait"
    metrics: Mapping[str, float] | None = None
    tag: str | None = None
    files: Mapping[str, FileContent] | None = None
    plain_metrics: Mapping[str, float] = field(init=False)
    contents: Mapping[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        for name, low, high in (("step", 0, STEP_MAX), ("chunk_count", 1, None), ("chunk_bytes", 1, None)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_range(name, value, low, high))
        check_choice("snapshot", self.snapshot, Snapshot)
        check_choice("on_busy", self.on_busy, OnBusy)
        object.__setattr__(self, "plain_metrics", {} if self.metrics is None else _plain_metrics(self.metrics))
        if self.tag is not None:
            if not _is_name(self.tag):
                raise ArgumentError(f"tag is {_shortened(self.tag)}; it must be {_NAME}, or None")
            object.__setattr__(self, "tag", str.__str__(self.tag))  # of a subclass the plain text
        object.__setattr__(self, "contents", {} if self.files is None else _contents(self.files))

    def waiting(self) -> Request:
        """The same, but it waits for a permit."""
        twin = copy.copy(self)  # not `replace`, which would read the files again
        object.__setattr__(twin, "on_busy", "wait")
        return twin


def _contents(files: object) -> dict[str, bytes]:
    """The bytes of the user's files, as they are now: the caller may change them while the save is in flight."""
    if not isinstance(files, Mapping):
        raise ArgumentError(f"files is {files!r}; it must map names to bytes or paths")
    room = FILES_BYTES_MAX
    contents = {}
    for name, content in files.items():
        if not isinstance(name, str) or not is_user_name(name) or not isinstance(content, (bytes, str, os.PathLike)):
            raise ArgumentError(
                f"files has {name!r}; it must map plain names (letters, digits, '.', '_', '-') to bytes or paths, and "
                "none that the engine gives"
            )
        contents[name] = content if isinstance(content, bytes) else _read_file(name, content, room)
        room -= len(contents[name])
        if room < 0:
            raise ArgumentError(
                f"files brings {name!r} to over {FILES_BYTES_MAX} bytes in all, which are kept in memory during the "
                "save; put tensors into the arena, and keep big files outside the checkpoint"
            )
    return contents


def _read_file(name: str, path: str | os.PathLike[str], size_max: int) -> bytes:
    """The content of a regular file, of which no more than a byte beyond `size_max` is read."""
    descriptor = Descriptor()
    try:
        # O_NONBLOCK: open(2) of a pipe without a writer would block.
        descriptor.fill(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
            raise ArgumentError(f"files has {name!r} from {os.fspath(path)!r}, which is not a regular file")
        with open(descriptor.number, "rb", closefd=False) as file:
            return file.read(size_max + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"files has {name!r} from {os.fspath(path)!r}, which cannot be read: {error}") from None
    finally:
        descriptor.close()


def _plain_metrics(metrics: object) -> dict[str, float]:
    """Metrics as plain floats by plain names; numbers of numpy are accepted."""
    if not isinstance(metrics, Mapping):
        raise ArgumentError(f"metrics is {metrics!r}; it must map names to numbers")
    plain = {}
    for name, value in metrics.items():
        if not _is_name(name):
            raise ArgumentError(f"metrics has {_shortened(name)} as a name; it must be {_NAME}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ArgumentError(f"metrics has {name!r}: {value!r}; it must map names to numbers{_as_number(value)}")
        try:
            plain[str.__str__(name)] = float(value)
        except OverflowError:
            raise ArgumentError(f"metrics has {name!r}, an integer that no float can hold") from None
    return plain


def _as_number(value: object) -> str:
    """How to make a number of a value, for a message; nothing where there is no way."""
    if hasattr(value, "item"):  # a tensor's or array's
        return ": pass .item()"
    return f": pass float({_shortened(value)})" if isinstance(value, str | SupportsFloat) else ""


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 1 <= len(name) <= NAME_CHARS_MAX


def _shortened(value: object) -> str:
    """A value for a message, and of a long text its begin and its length."""
    if isinstance(value, str) and len(value) > NAME_CHARS_MAX:
        return f"{value[:40]!r}... of {len(value)} characters"
    return repr(value)
