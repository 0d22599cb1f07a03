"""Access: what saves and reads ask of the owner of a directory.

Theory of operation.  The owner of a directory has its lock and its names; the native pipeline moves blocks through open
files.  `Writer`, `Reader` and `Verifier` ask the owner through these protocols and get descriptors.  They open, sync
and close nothing themselves, so the owner may be another process: every argument and every answer but a descriptor is
a value, and a descriptor can be sent through a Unix socket (unix(7), SCM_RIGHTS).

`Directory` gives the read side, and `Owner` gives both.  Every method may block on the disk, and may be called from any
thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from engine.format.manifest import Manifest, Summary
from engine.store.retention import Retention


class NewFile(NamedTuple):
    """A data file that a save will write, and its exact length."""

    name: str
    nbytes: int


class OpenFile(NamedTuple):
    """A data file that is open to be read, and its length."""

    descriptor: int
    nbytes: int


class BegunSave(NamedTuple):
    """A save whose files are open, with all their blocks reserved.

    Attributes:
        path: the partial directory.
        descriptors: of the files, in the order asked for; open until the save is published or discarded.
        recycled: what the reused files hold, or None where that is not certain.
        reused: the names of the files that were moved from a spare.
    """

    path: str
    descriptors: Sequence[int]
    recycled: Manifest | None
    reused: frozenset[str]


class Opened(Protocol):
    """A committed step whose directory is open."""

    @property
    def step(self) -> int:
        """Which."""

    @property
    def path(self) -> str:
        """Its directory, or where that was."""

    def manifest(self) -> tuple[Manifest, int]:
        """The manifest and its length in bytes.

        Raises:
            CorruptError: it is missing, malformed, or that of another step.
        """

    def summary(self) -> Summary:
        """What a listing asks of the manifest; raises as `manifest`."""

    def read_small(self, name: str, bytes_max: int) -> bytes:
        """A small file of the step, whole.

        Raises:
            CorruptError: it is missing, no regular file, or longer than `bytes_max`.
        """

    def open_file(self, name: str, direct: bool) -> OpenFile:
        """Open a data file to read blocks; it stays open as long as the step.

        Raises:
            CorruptError: it is missing, or no regular file.
        """

    def is_in_place(self) -> bool:
        """Whether the step's name still leads to this directory."""


class ReadAccess(Protocol):
    """A directory of checkpoints, to be read."""

    root: str

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""

    def path(self, step: int) -> str:
        """Where a committed step lies."""

    def distrust(self, step: int) -> None:
        """A step was found damaged: no save may rely on the content of its files."""

    def opened(self, step: int) -> AbstractContextManager[Opened]:
        """Open a committed step for as long as it is read.

        Raises:
            NotFoundError: the step is not committed.
            RetiredError: the step was retired while it was read, and what was asked for is gone.
        """


class WriteAccess(ReadAccess, Protocol):
    """A directory of checkpoints that is owned.

    A save is begun, sealed and published in this order; one that fails at any point is discarded.

    Attributes:
        retention: the rule in effect.
    """

    retention: Retention

    def begin_save(self, step: int, files: Sequence[NewFile], direct: bool) -> BegunSave:
        """Make the files of a save, with room for every block.  With `direct` past the page cache.

        Raises:
            NoSpaceError: there is no room for it.
            StepError: something that is no checkpoint of ours has the step's name.
        """

    def seal_save(self, step: int, small_files: Mapping[str, bytes]) -> None:
        """Make the files durable, once all their blocks have been written, and write the small ones."""

    def publish_save(self, step: int, manifest: bytes | bytearray) -> str:
        """Make a sealed save visible, durably; close its files, and return its path."""

    def discard_save(self, step: int) -> None:
        """Close and delete what a failed save has left.  Its blocks are not moved any more."""

    def retire(self) -> None:
        """Take all steps out of service that the rule does not keep, save those that are being read."""

    def retire_after(self, step: int) -> list[int]:
        """Take every step later than this one out of service, and return them."""

    def delete(self, step: int) -> None:
        """Delete a committed step."""

    def set_aside(self, step: int) -> str | None:
        """Rename a damaged step out of the way, and return its new path; None where it was deleted by hand."""

    def close(self) -> None:
        """Give the directory back.  May be called again."""
