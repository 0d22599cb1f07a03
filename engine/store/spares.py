"""Spares: the retired checkpoints of a run, kept for their written extents, and how a save takes their files.

Theory of operation.  `.engine/spare/` holds directories K, numbered in the order in which they came.  A save takes the
oldest: its wanted files are moved into the save's partial directory, one rename each, and its others are deleted.  The
empty directory stays until the save has ended, so that the moves can be made durable by its fsync.

A spare's manifest is trusted only if this process sealed its files itself, each still has the inode, length and times
of change that it had then, and no reader has found the step damaged.  A file of any other spare may have been
overwritten before a power cut that then brought it back here (docs/durability.md, I13).

A file of a spare that a checkpoint shares by a hard link is never overwritten: it has a second name.  No link is ever
made from a spare, so a file that is found to have one name keeps it.

A file or directory that may not be moved or deleted (immutable, another user's, a mount point) is passed over with one
warning, and the others are still processed.

Rules: the caller holds the catalog's lock for everything but `move_files` and `manifest_of`.  Called by `catalog`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from engine.errors import CheckpointError, StorageError, warn
from engine.format.manifest import MANIFEST_NAME, Manifest
from engine.store.directory import OpenedStep
from engine.store.filesystem import Filesystem
from engine.store.stamps import Stamp, Stamps

# ASCII: without it \d matches the digits of other scripts too.
_SPARE_NAME = re.compile(r"\d{8,19}", re.ASCII)

# Errors of rename(2) and unlink(2) about one file or directory: it is immutable, another user's, or a mount point.
_NOT_OURS = (errno.EPERM, errno.EACCES, errno.EBUSY)


def linked_name(path: str) -> str:
    """The name of a linked file until it is known whether the save keeps it: beside the file that would be written."""
    return path + ".linked"


class Spares:
    """The spares of one run.

    Args:
        filesystem: the file operations.
        path: `.engine/spare`.
    """

    def __init__(self, filesystem: Filesystem, path: str) -> None:
        self.path = path
        self.stamps = Stamps(filesystem)
        self._filesystem = filesystem
        self._taken: dict[int, str] = {}  # by step in flight, the spare that its files came from
        self._sealed: dict[int, Mapping[str, Stamp]] = {}  # by committed step, its files as this process sealed them
        self._known: dict[str, tuple[int, Mapping[str, Stamp]]] = {}  # the same by spare, once it is moved here
        self._rotten: set[int] = set()  # the inodes of files of damaged steps
        self._stuck: set[str] = set()  # paths that could not be moved or deleted

    def names(self) -> list[str]:
        """The spares that a save may take, oldest first: directories with a number for a name, never links."""
        passed = {*self._taken.values(), *map(os.path.basename, self._stuck)}
        names = [name for name in self._all_names() if name not in passed]
        return [name for name in names if self._filesystem.is_directory(os.path.join(self.path, name))]

    def room(self) -> int:
        """The bytes that the next save can write into the files of the spare that it will take."""
        if not (names := self.names()):
            return 0
        path = os.path.join(self.path, names[0])
        files = self._filesystem.list_directory(path)
        return sum(self._filesystem.allocated_bytes(os.path.join(path, name)) for name in files)

    # -- adding -----------------------------------------------------------------------------------------------

    def add(self, path: str, step: int | None = None) -> None:
        """Move a directory here, as the newest spare; not durable yet.

        Args:
            path: the directory.
            step: the committed step that it was; None for any other directory.
        """
        name = f"{max(map(int, self._all_names()), default=0) + 1:08d}"
        try:
            self._filesystem.rename(path, os.path.join(self.path, name))
        except StorageError as error:
            # An overlay renames no directory of its lower layer (Documentation/filesystems/overlayfs.rst).
            if error.errno != errno.EXDEV:
                raise
            self._delete_checkpoint(path)
            return
        self._known.pop(name, None)  # of an earlier spare of this number
        if step is not None and step in self._sealed:
            self._known[name] = step, self._sealed.pop(step)

    def are_sealed(self, spare: str, wanted: Collection[str], stamps: Mapping[str, Stamp]) -> bool:
        """Whether the wanted files that have a stamp still have it.  Not after their move, which changes the ctime."""
        return all(self.stamps.holds(stamps[name], os.path.join(spare, name)) for name in stamps.keys() & wanted)

    def vouch(self, step: int, written: Mapping[str, Stamp], linked: Mapping[str, Stamp]) -> None:
        """Record that this process committed a step with these files: those that it wrote, and those that it linked."""
        inodes = {stamp.inode for stamp in written.values()}
        self.stamps.forget(inodes)
        self._rotten -= inodes
        if self._rotten.isdisjoint(stamp.inode for stamp in linked.values()):
            self._sealed[step] = {**written, **linked}

    def link(self, source: str, partial: str, name: str, stamp: Stamp) -> bool:
        """Link a file of a committed step into a partial; False if it has changed, or cannot be linked."""
        return self.stamps.link(os.path.join(source, name), linked_name(os.path.join(partial, name)), stamp)

    def sealed(self, step: int) -> Mapping[str, Stamp]:
        """The stamps of a committed step's files; {} if this process has not sealed it, or does not trust it."""
        return self._sealed.get(step, {})

    def distrust(self, step: int) -> None:
        """Record that a step is damaged: neither its manifest is trusted nor that of a step that shares a file."""
        known = [stamps for of, stamps in self._known.values() if of == step]
        inodes = {stamp.inode for stamps in [self.sealed(step), *known] for stamp in stamps.values()}
        self._rotten |= inodes

        def is_sound(stamps: Mapping[str, Stamp]) -> bool:
            return inodes.isdisjoint(stamp.inode for stamp in stamps.values())

        self._sealed = {of: stamps for of, stamps in self._sealed.items() if of != step and is_sound(stamps)}
        self._known = {name: known for name, known in self._known.items() if known[0] != step and is_sound(known[1])}

    def _delete_checkpoint(self, path: str) -> None:
        """Delete a directory, durably the manifest first: without it the rest does not count as a checkpoint."""
        manifest = os.path.join(path, MANIFEST_NAME)
        if self._filesystem.status(manifest) is not None:
            self.unlink(manifest)
            self._filesystem.sync_directory(path)
        self.remove(path)

    # -- taking -----------------------------------------------------------------------------------------------

    def take(self, step: int) -> str | None:
        """Give the oldest spare to a save; returns its path, or None if there is none."""
        if not (names := self.names()):
            return None
        self._taken[step] = names[0]
        return os.path.join(self.path, names[0])

    def taken_by(self, step: int) -> str | None:
        """The path of the spare that a save has taken."""
        name = self._taken.get(step)
        return None if name is None else os.path.join(self.path, name)

    def known(self, spare: str) -> tuple[Manifest | None, Mapping[str, Stamp]]:
        """The manifest and the stamps of a spare that was just taken; None and {} if it is not trusted."""
        step, stamps = self._known.pop(os.path.basename(spare), (None, {}))
        if step is None:
            return None, {}
        try:
            descriptor = self._filesystem.open_directory(spare)
        except StorageError:
            return None, {}
        try:
            return OpenedStep(self._filesystem, step, spare, descriptor).manifest()[0], stamps
        except (CheckpointError, StorageError):
            return None, {}
        finally:
            self._filesystem.close(descriptor)

    def move_files(self, spare: str, partial: str, wanted: Sequence[str]) -> frozenset[str]:
        """Move the wanted files of a spare into a partial, and delete its others; returns the names of those moved."""
        reused = set()
        failed: list[StorageError] = []
        for name in self._filesystem.list_directory(spare):
            source, target = os.path.join(spare, name), os.path.join(partial, name)
            with passing_over(failed):
                if name not in wanted:
                    self.unlink(source)
                    continue
                self.stamps.rename(source, target)
                # Checked after the move, when no reader of the spare can open the file.  A file with a second name (of
                # another checkpoint, or of cp --link), or that a reader has mapped (safetensors does), must not be
                # overwritten.
                if self._filesystem.is_ours_alone(target):
                    reused.add(name)
                else:
                    self.unlink(target)
        if failed:
            self._stuck.add(spare)
            warn(f"{failed[0]}; {spare} stays, and is not used")
        return frozenset(reused)

    def release(self, step: int) -> None:
        """Delete the empty spare of a save that has ended, if it took one."""
        name = self._taken.pop(step, None)
        if name is not None:
            path = os.path.join(self.path, name)
            try:
                self._filesystem.remove_directory(path)
            except StorageError as error:
                if error.errno == errno.ENOTEMPTY:
                    return  # the save failed before it moved every file: the next save takes the spare, unless stuck
                self._stuck.add(path)
                warn(f"{error}; {path} stays, and is not used")

    def forget_taken(self, step: int) -> None:
        """Forget which spare a failed save took: its leftovers must stay as they are."""
        self._taken.pop(step, None)

    def trim(self, count: int) -> None:
        """Delete empty spares, which kills leave, and all others but the newest `count`."""
        names = self.names()
        empty = [n for n in names if not self._filesystem.list_directory(os.path.join(self.path, n))]
        full = [name for name in names if name not in empty]
        for name in [*empty, *full[: max(0, len(full) - count)]]:
            self._known.pop(name, None)
            self.pass_over(os.path.join(self.path, name), self.remove)

    def delete_newest(self) -> None:
        """Delete the newest spare."""
        if names := self.names():
            self._known.pop(names[-1], None)
            self.remove(os.path.join(self.path, names[-1]))

    # -- deleting ---------------------------------------------------------------------------------------------

    def pass_over(self, path: str, act: Callable[[str], object]) -> bool:
        """Apply `act` to one of several directories; False, with one warning for each, if that is not permitted."""
        with passing_over() as failed:
            act(path)
        if failed and path not in self._stuck:
            self._stuck.add(path)
            warn(f"{failed[0]}; {path} is passed over")
        return not failed

    def remove(self, path: str) -> None:
        """Delete a directory with all its content, if it exists."""
        if not self._filesystem.is_directory(path):
            return
        # An explicit stack: directories may nest deeper than Python's recursion limit.
        pending = [(path, iter(self._filesystem.list_directory(path)))]
        while pending:
            directory, names = pending[-1]
            for name in names:
                inner = os.path.join(directory, name)
                if self._filesystem.is_directory(inner):
                    pending.append((inner, iter(self._filesystem.list_directory(inner))))
                    break
                self.stamps.unlink(inner)
            else:
                self._filesystem.remove_directory(directory)
                pending.pop()

    def unlink(self, path: str) -> None:
        """Delete a file, or a directory in its place."""
        if self._filesystem.is_directory(path):
            self.remove(path)
        else:
            self.stamps.unlink(path)

    def _all_names(self) -> list[str]:
        return [name for name in self._filesystem.list_directory(self.path) if _SPARE_NAME.fullmatch(name)]


@contextmanager
def passing_over(failed: list[StorageError] | None = None) -> Iterator[list[StorageError]]:
    """Suppress the error that one file or directory may not be moved or deleted, and append it to the list."""
    failed = [] if failed is None else failed
    try:
        yield failed
    except StorageError as error:
        if error.errno not in _NOT_OURS:
            raise
        failed.append(error)
