"""Access: the interface between saves and reads, and the owner of a directory.

Theory of operation.  The owner of a directory holds its lock and changes its names; the native pipeline moves blocks
through open files.  `Writer`, `Reader` and `Verifier` call the owner through these protocols and get descriptors.  They
open, sync and close nothing themselves, so the owner may be another process: arguments and results are plain values or
descriptors, and a descriptor can be sent through a Unix socket (unix(7), SCM_RIGHTS).

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
    """A data file that a save will write, and its exact length.

    With `link_from` the file of that name of that step is linked beside it, if this process has sealed it and nothing
    has changed it since.
    """

    name: str
    nbytes: int
    link_from: int | None = None


class HeldRange(NamedTuple):
    """A range of a linked file that the new file needs too, and the content hash of its bytes."""

    offset: int
    nbytes: int
    checksum: bytes


class OpenFile(NamedTuple):
    """A data file open for reading, and its length."""

    descriptor: int
    nbytes: int


class BegunSave(NamedTuple):
    """A save whose files are open, with all their blocks reserved.

    Attributes:
        path: the partial directory.
        descriptors: of the files, in the order of the request; open until the save is published or discarded.
        recycled: the manifest of the reused files, or None if their content is not certain.
        reused: the names of the files that were moved from a spare.
        linked: the names of the files that were linked beside those to write; see `WriteAccess.settle_links`.
    """

    path: str
    descriptors: Sequence[int]
    recycled: Manifest | None
    reused: frozenset[str]
    linked: frozenset[str] = frozenset()


class Opened(Protocol):
    """A committed step whose directory is open."""

    @property
    def step(self) -> int:
        """Its number."""

    @property
    def path(self) -> str:
        """The path at which its directory was opened."""

    def manifest(self) -> tuple[Manifest, int]:
        """The manifest and its length in bytes.

        Raises:
            CorruptError: it is missing, malformed, or that of another step.
        """

    def summary(self) -> Summary:
        """The summary in the manifest; raises as `manifest`."""

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
    """A directory of checkpoints, for reading."""

    root: str

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""

    def path(self, step: int) -> str:
        """The path of a committed step."""

    def distrust(self, step: int) -> None:
        """Record that a step is damaged: no save may rely on the content of its files."""

    def opened(self, step: int) -> AbstractContextManager[Opened]:
        """Open a committed step for as long as it is read.

        Raises:
            NotFoundError: the step is not committed.
            RetiredError: the step was retired while it was read, and a part of it is gone.
        """


class WriteAccess(ReadAccess, Protocol):
    """A directory of checkpoints that is owned.

    A save is begun, its links are settled if it has any, and it is sealed and published, in this order; one that fails
    at any point is discarded.

    Attributes:
        retention: the rule in effect.
    """

    retention: Retention

    def begin_save(self, step: int, files: Sequence[NewFile], direct: bool) -> BegunSave:
        """Create the files of a save, with room for every block of those without a link.

        With `direct` they bypass the page cache.

        Raises:
            NoSpaceError: there is not enough room.
            StepError: something that is not a checkpoint has the step's name.
        """

    def settle_links(self, step: int, changed: Mapping[str, Sequence[HeldRange]]) -> None:
        """Decide about each linked file, after all blocks are written: its content is that of the save, or has changed.

        Args:
            step: of the save.
            changed: the names of those that have changed, and for each the ranges that were not written because the
                linked file holds them: they are copied into the written one.

        Raises:
            CorruptError: such a range does not have its hash; the linked file is damaged.
        """

    def seal_save(self, step: int, small_files: Mapping[str, bytes]) -> None:
        """Make the files durable, after all their blocks are written, and write the small files."""

    def publish_save(self, step: int, manifest: bytes | bytearray) -> str:
        """Make a sealed save visible, durably; close its files, and return its path."""

    def discard_save(self, step: int) -> None:
        """Close and delete the files of a failed save, none of whose blocks is in flight."""

    def retire(self) -> None:
        """Retire all steps that the rule does not keep, except those that are being read."""

    def retire_after(self, step: int) -> list[int]:
        """Retire every step later than this one, and return them."""

    def delete(self, step: int) -> None:
        """Delete a committed step."""

    def set_aside(self, step: int) -> str | None:
        """Rename a damaged step, and return its new path; None if it was deleted by hand."""

    def close(self) -> None:
        """Give the directory back.  May be called again."""
