"""Directory: the read side of a run.  Names of steps, and one step opened to be read.

Theory of operation.  A `Directory` takes no lock and creates nothing, so it works beside a training, on a read-only
mount and in a directory of another user.  `steps` lists afresh each time.

A step may be retired while it is read.  So `opened` opens the step's directory once, and every file relative to it.
Retiring renames the directory and recycling moves its files out of it, so a reader finds the step's own files or none,
and never the files of a later step.  An operation that fails after the directory was renamed raises `RetiredError`.

Rules: this module changes nothing on disk.  A manifest is accepted only if its step is the one of its directory.
Called by `catalog`, which is the write side, and by readers.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from engine.errors import (
    ArgumentError,
    CheckpointError,
    CorruptError,
    NotFoundError,
    RetiredError,
    StorageError,
)
from engine.format.manifest import (
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    STEP_MAX,
    Manifest,
    Summary,
    decode,
    decode_summary,
)
from engine.io.descriptor import Descriptor
from engine.store.access import OpenFile
from engine.store.filesystem import Filesystem

PRIVATE_NAME = ".engine"

NO_DIRECTORY_HERE = "no directory can be made there; use another path, on a disk"
_NO_FILE_HERE = "a directory is needed there, and not a file; use another path, or move the file away"

# ASCII: without it \d matches the digits of other scripts too.
_STEP_NAME = re.compile(r"step-(\d{8,19})", re.ASCII)


def step_name(step: int) -> str:
    """The directory name of a step: at least eight digits, so that names sort as numbers for a long time."""
    return f"step-{step:08d}"


def path_of(directory: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path given by a caller, as text.

    Raises:
        ArgumentError: it is no path, is empty, or has a NUL character in it.
    """
    if not isinstance(directory, str | bytes | os.PathLike):
        raise ArgumentError(f"the directory is {directory!r}; it must be a path: str, bytes or os.PathLike")
    path = os.fsdecode(directory)
    if not path or "\0" in path:
        raise ArgumentError(f"the directory is {path!r}; it must be a path, and '.' is the current directory")
    return path


def refuse_step(root: str) -> None:
    """Refuse a checkpoint's directory where a run's is wanted: opened as a run it would be one without checkpoints.

    Raises:
        ArgumentError: the path's last name is that of a step.
    """
    parent, name = os.path.split(root)
    if _STEP_NAME.fullmatch(name.removesuffix(".partial")):
        raise ArgumentError(f"{root} is the directory of one checkpoint; open the run that it is in: {parent!r}")


def is_directory(filesystem: Filesystem, path: str) -> bool:
    """Whether there is a directory at a real path; False if there is nothing.

    Raises:
        StorageError: there is a file, or a link, which would lead retirement, deletion and the lock elsewhere.
    """
    status = filesystem.status(path)
    if status is None or stat.S_ISDIR(status.st_mode):
        return status is not None
    if stat.S_ISLNK(status.st_mode):
        raise StorageError(errno.ELOOP, "open", path)
    raise StorageError(errno.ENOTDIR, "open", path, remedy=_NO_FILE_HERE)


class OpenedStep:
    """A committed step whose directory is open; made by `Directory.opened`."""

    def __init__(self, filesystem: Filesystem, step: int, path: str, descriptor: Descriptor) -> None:
        self.step = step
        self.path = path
        self._filesystem = filesystem
        self._descriptor = descriptor
        self._files: list[Descriptor] = []

    def manifest(self) -> tuple[Manifest, int]:
        """The manifest and its length in bytes.

        Raises:
            CorruptError: it is missing, malformed, or that of another step.
        """
        path = os.path.join(self.path, MANIFEST_NAME)
        raw = self._filesystem.read_file(path, MANIFEST_BYTES_MAX, directory=self._descriptor)
        manifest = decode(raw, lambda part: self.read_small(part.name, part.nbytes + 1))
        if manifest.step != self.step:
            raise CorruptError(f"{path} is the manifest of step {manifest.step}")
        return manifest, len(raw)

    def summary(self) -> Summary:
        """The summary in the manifest; raises as `manifest`."""
        path = os.path.join(self.path, MANIFEST_NAME)
        summary = decode_summary(self._filesystem.read_file(path, MANIFEST_BYTES_MAX, directory=self._descriptor))
        if summary.step != self.step:
            raise CorruptError(f"{path} is the manifest of step {summary.step}")
        return summary

    def read_small(self, name: str, bytes_max: int) -> bytes:
        """A small file of the step, whole.

        Raises:
            CorruptError: it is missing, no regular file, or longer than `bytes_max`.
        """
        return self._filesystem.read_file(os.path.join(self.path, name), bytes_max, directory=self._descriptor)

    def open_file(self, name: str, direct: bool) -> OpenFile:
        """Open a data file of the step to read blocks; it stays open as long as the step.

        Raises:
            CorruptError: it is missing, or no regular file.
        """
        path = os.path.join(self.path, name)
        descriptor = self._filesystem.open_for_blocks(path, write=False, direct=direct, directory=self._descriptor)
        self._files.append(descriptor)
        return OpenFile(descriptor.number, self._filesystem.size(descriptor, path))

    def is_in_place(self) -> bool:
        """Whether the step's name still leads to this directory; if not, the step was retired after it was opened."""
        try:
            return self._filesystem.is_at(self._descriptor, self.path)
        except StorageError:
            return False

    def close(self) -> None:
        """Close the directory and the files."""
        for descriptor in (*self._files, self._descriptor):
            self._filesystem.close(descriptor)


class Directory:
    """The checkpoints of one directory, for reading.

    Args:
        root: the directory.
        filesystem: the file operations.

    Raises:
        ArgumentError: it is the directory of a step.
        NotFoundError: there is no such directory, or it has neither `.engine` nor a step.
        StorageError: the directory cannot be read.
    """

    def __init__(self, root: str, filesystem: Filesystem) -> None:
        self.root = filesystem.real_path(root)
        refuse_step(self.root)
        self.filesystem = filesystem
        status = filesystem.status(self.root)
        if status is None:
            raise NotFoundError(f"{self.root} is no run: there is no such directory; check the path")
        if not stat.S_ISDIR(status.st_mode):
            raise NotFoundError(f"{self.root} is no run: it is not a directory; check the path")
        if not filesystem.is_directory(os.path.join(self.root, PRIVATE_NAME)) and not self._list_steps():
            raise NotFoundError(f"{self.root} is no run: it holds neither {PRIVATE_NAME} nor a step; check the path")

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self._list_steps()

    def path(self, step: int) -> str:
        """The path of a committed step."""
        return os.path.join(self.root, step_name(step))

    def distrust(self, step: int) -> None:
        """Nothing to do: a reader relies only on blocks that it has verified."""

    @contextmanager
    def opened(self, step: int) -> Iterator[OpenedStep]:
        """Open a committed step for as long as it is read.

        Raises:
            NotFoundError: the step is not committed.
            RetiredError: the step was retired while it was read, and a part of it is gone.
        """
        path = self.path(step)
        if not self.filesystem.is_directory(path):
            raise self._not_found(step, self._list_steps())
        try:
            descriptor = self.filesystem.open_directory(path)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            raise self._not_found(step, self._list_steps()) from None  # it was retired just now
        opened = OpenedStep(self.filesystem, step, path, descriptor)
        try:
            yield opened
        except (CorruptError, StorageError) as error:
            if opened.is_in_place():
                raise
            raise RetiredError(
                f"step {step} of {self.root} was retired while it was read; committed steps: "
                f"{_listed(self._list_steps())}"
            ) from error
        finally:
            opened.close()

    def _not_found(self, step: int, known: Collection[int]) -> CheckpointError:
        return NotFoundError(f"{self.root} holds no step {step}; committed steps: {_listed(known)}")

    def _list_steps(self) -> list[int]:
        # Beside a training, a step that is listed may be retired before it is looked at, and its successor may be
        # committed too late to be listed.  A run that has a checkpoint at all times must not seem to have none.
        while True:
            names = self.filesystem.list_directory(self.root)
            steps = committed_steps(self.filesystem, self.root, names)
            if steps or self.filesystem.list_directory(self.root) == names:
                return steps


def committed_steps(filesystem: Filesystem, root: str, names: Collection[str]) -> list[int]:
    """The steps among the names in a directory: directories with exactly a step's name, oldest first."""
    # A set, and the names are compared: step-000000001 has the number of step-00000001, but not its name.  A manifest
    # cannot hold a step above STEP_MAX.
    steps = {int(match.group(1)) for match in map(_STEP_NAME.fullmatch, names) if match}
    named = (step for step in steps if step <= STEP_MAX and step_name(step) in names)
    return sorted(step for step in named if filesystem.is_directory(os.path.join(root, step_name(step))))


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
