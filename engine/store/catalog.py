"""Catalog: the write side of a directory of checkpoints.  Lock, begin, publish, retire, recycle, delete.

Theory of operation.  A checkpoint's directory is in exactly one of three locations, and gets there by rename only:

    step-N.partial/   a save is writing it          begin()
    step-N/           committed                     publish()
    .engine/spare/K/  retired, kept for its extents retire()

Overwriting extents that are already written is several times faster than writing fresh ones, so `begin` makes a new
partial directory and moves the wanted files of a spare into it, one by one; the rest of the spare is deleted.  Files
move and directories do not, so a reader that has an old step's directory open finds files gone, never the files of a
later step.  A save may link a file of the step before in place of writing it; a file with two names is never
overwritten.  `retire` makes its renames durable before anything may be taken from the spare, and `publish` makes the
moves out of the spare durable before the rename to the final name (docs/durability.md, I4 and I5).

A move that is not durable may revert at a power cut, after the file was overwritten.  So a spare found at open may
hold torn files under a valid manifest, which is not trusted.  The manifest of a spare is trusted only if this process
sealed and retired the step, and its files have not changed since.

After a failed sync of a directory it is unknown which renames will last.  From then on nothing is retired, taken from
spare or deleted, and a rollback or deletion raises; saves go on in fresh directories, and the next open starts from the
directory as it is.  The fresh names are numbered, step-N.1.partial, because the leftover of a failed save of the same
step must stay as it is.

A reader pins the step that it reads, and a pinned step is not retired.  All methods may be called from any thread.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import re
import stat
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from engine.errors import ClosedError, CorruptError, NoSpaceError, StepError, StorageError
from engine.format.manifest import MANIFEST_NAME, Manifest
from engine.store.directory import (
    NO_DIRECTORY_HERE,
    PRIVATE_NAME,
    Directory,
    OpenedStep,
    committed_steps,
    is_directory,
    refuse_step,
    step_name,
)
from engine.store.facts import Facts
from engine.store.filesystem import Filesystem
from engine.store.lock import take_lock
from engine.store.retention import Retention, StepFacts, to_retire
from engine.store.rule_file import RuleFile
from engine.store.spares import Spares, linked_name, passing_over
from engine.store.stamps import Stamp

_log = logging.getLogger("engine")

# ASCII: without it \d matches the digits of other scripts too.
_PARTIAL_NAME = re.compile(r"step-\d{8,19}(?:\.\d+)?\.partial", re.ASCII)

# Linux's PATH_MAX without the final NUL; below the root a path has a partial's name and a file's (NAME_MAX) at most.
_ROOT_BYTES_MAX = 4095 - len("/step-9223372036854775807.99.partial/") - 255


class Begun(NamedTuple):
    """A partial directory that a save may write to.

    Attributes:
        path: the directory.
        recycled: the manifest of the reused files, or None if their content is not certain.
        reused: the names of the files that were moved into it from a spare.
    """

    path: str
    recycled: Manifest | None
    reused: frozenset[str]


class _Pin:
    """Keeps a step from being retired, until it is removed or collected."""

    def __init__(self, step: int) -> None:
        self.step = step


class Catalog(Directory):
    """The checkpoints of one directory, owned by one engine.

    Args:
        root: the directory; created, with its parents, if it does not exist.
        filesystem: the file operations.
        spare_max: the number of spare directories to keep; more are deleted.
        retention: the rule that says which checkpoints are kept; None for the rule stored with the run.
        facts: returns the facts of a committed step; by default from its manifest.

    Attributes:
        retention: the rule in effect.

    Raises:
        CorruptError: the lock is not a regular file.
        LockedError: another engine has the directory.
        StorageError: the directory cannot be created, read or synced, its path is too long to write files below it, or
            a link is in place of one of our directories.
    """

    def __init__(
        self,
        root: str,
        filesystem: Filesystem,
        spare_max: int,
        retention: Retention | None = None,
        facts: Callable[[int], StepFacts | None] | None = None,
    ) -> None:
        # Not Directory.__init__, which refuses a directory that does not exist yet.
        self.filesystem = filesystem
        self.root = filesystem.real_path(root)  # the directory itself, where `root` is a link to it
        refuse_step(self.root)
        self._spare_max = spare_max
        self._private = os.path.join(self.root, PRIVATE_NAME)
        self._spares = Spares(filesystem, os.path.join(self._private, "spare"))
        self._mutex = threading.RLock()
        self._sound = True  # no sync of a directory has failed
        self._unsynced = False  # moves to spare may not be durable: Ctrl-C came before their sync
        self._in_flight: set[int] = set()  # steps begun, and neither published nor discarded
        self._fresh_paths: dict[int, str] = {}  # partials of another name than their step gives them
        self._leftovers: set[str] = set()  # partials of failed saves that could not be deleted yet
        self._distrusted: set[int] = set()
        # One for each reader.  Weak: Ctrl-C may keep a reader from removing its pin, which must not stay for ever.
        self._pins: weakref.WeakSet[_Pin] = weakref.WeakSet()
        self._make_directories()
        self._facts = Facts(Directory(self.root, filesystem), facts)
        self._lock = take_lock(filesystem, self._private, self.root)
        try:
            self._steps = self._recover()
            rule_file = RuleFile(filesystem, self._private, self._sync)
            self.retention = rule_file.settle(retention, self._steps, self._facts.of)
        except BaseException:
            self.close()
            raise

    # -- reading ----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Committed steps, oldest first.  Does not wait for a thread that is moving directories."""
        return list(self._steps)

    def partial_path(self, step: int) -> str:
        """The path of a step while it is being written."""
        return self._fresh_paths.get(step) or self.path(step) + ".partial"

    @contextmanager
    def opened(self, step: int) -> Iterator[OpenedStep]:
        """Open a committed step, pinned, for as long as it is read; raises as `Directory.opened`.

        Raises:
            CorruptError: the step's directory has been deleted or replaced by hand.
        """
        with self.pinned(step):
            if not self.filesystem.is_directory(self.path(step)):
                manifest = os.path.join(self.path(step), MANIFEST_NAME)
                raise CorruptError(f"{manifest} is missing: its directory was deleted or replaced")
            with super().opened(step) as opened:
                yield opened

    @contextmanager
    def pinned(self, step: int) -> Iterator[None]:
        """Keep a step from being retired while it is read.

        Raises:
            NotFoundError: the step is not committed.
        """
        pin = _Pin(step)
        try:
            with self._mutex:
                if step not in self._steps:
                    raise self._not_found(step, self._steps)
                self._pins.add(pin)
            yield
        finally:
            with self._mutex:
                self._pins.discard(pin)

    # -- begin, publish, discard ------------------------------------------------------------------------------

    def check_room(self, nbytes: int) -> None:
        """Check that there is room for a save of this many bytes, before it begins.

        What the spare that it will take holds is room too: files of the same names are overwritten, others deleted.
        Where that is not enough, what the rule does not keep is given up first.
        Of two saves that begin at the same time both may find the same room, and one is refused when it allocates.

        Raises:
            NoSpaceError: it has not; says how much is missing.
        """
        with self._mutex:
            room = self._room()
            if room is not None and room < nbytes and self.free_surplus():
                room = self._room()
            if room is not None and room < nbytes:
                lower = to_retire(Retention(last=1), self._steps, self._facts.of)
                raise NoSpaceError(self.root, nbytes, nbytes - room, only_newest=not lower)

    def free_surplus(self, spares: int = 1) -> bool:
        """Retire the steps that the rule does not keep, and delete all but this many spares; True if there was any.

        Asked for when a disk is full: one spare stays for a save that will take it, and none for one that has begun.
        The newest committed step always stays.
        """
        with self._mutex:
            if not self._sound:
                return False
            before = len(self._steps), len(self._spares.names())
            if self._distrusted.isdisjoint(self._steps):  # else a surplus step may be the last good one
                self._retire(self._surplus())
            self._spares.trim(spares)
            return (len(self._steps), len(self._spares.names())) != before

    def check_place(self) -> None:
        """Check that the directory is still the locked one: another Engine may own a directory in its place.

        Called before anything there is created, moved or deleted.

        Raises:
            StorageError: it was removed (ENOENT) or replaced (ESTALE).
        """
        if not self._lock.is_held:
            raise ClosedError(f"{self.root} has been given back; open a new Engine")
        if not self._lock.is_in_place():
            raise StorageError(errno.ESTALE, "stat", self._lock.path)

    def begin(self, step: int, names: Sequence[str]) -> Begun:
        """Make `step-N.partial`, and move the wanted files of a spare into it.

        Raises:
            StepError: something that is no checkpoint of ours has the step's name.
        """
        self.check_place()
        self._check_name_free(step)
        self._limit_room()
        if self._sound:
            # Exists only if an earlier save of this step failed and could not be deleted.
            with passing_over() as failed:
                self._spares.remove(self.partial_path(step))
        with self._mutex:
            if not self._sound or failed:
                self._fresh_paths[step] = self._fresh_path(step)
                self._spares.forget_taken(step)
            partial = self.partial_path(step)
            self._leftovers.discard(partial)  # from here on it is the new save's
            self.filesystem.make_directory(partial)
            self._in_flight.add(step)
            if self._unsynced and self._sound:
                self._sync_moves()
            spare = self._spares.take(step) if self._sound else None
        if spare is None:
            return Begun(partial, None, frozenset())
        recycled, stamps = self._spares.known(spare)
        is_sealed = self._spares.are_sealed(spare, names, stamps)
        reused = self._spares.move_files(spare, partial, names)
        return Begun(partial, recycled if is_sealed else None, reused)

    def link(self, step: int, source: int, names: Collection[str]) -> Mapping[str, Stamp]:
        """Link files of a committed step into the partial of a save, under `linked_name`; returns those linked.

        A file that this process has not sealed there, or that has changed since, is not linked.  While it is, no save
        overwrites it, whatever becomes of the step that it came from.
        """
        partial = self.partial_path(step)
        with self._mutex:  # so that the step is not retired meanwhile, and no link is made from a spare
            if not self._sound or source not in self._steps:
                return {}
            sealed = self._spares.sealed(source)
            link = functools.partial(self._spares.link, self.path(source), partial)
            return {name: sealed[name] for name in names if name in sealed and link(name, sealed[name])}

    def keep_link(self, step: int, name: str) -> None:
        """Let a linked file take the place of the one of that name in the partial."""
        path = os.path.join(self.partial_path(step), name)
        self._spares.stamps.rename(linked_name(path), path)

    def drop_link(self, step: int, name: str) -> None:
        """Remove a linked file from the partial."""
        self._spares.stamps.unlink(linked_name(os.path.join(self.partial_path(step), name)))

    def vouch(self, step: int, written: Mapping[str, Stamp], linked: Mapping[str, Stamp]) -> None:
        """Record that this process sealed and published a step whose files had these stamps: written or linked."""
        with self._mutex:
            self._spares.vouch(step, written, linked)

    def distrust(self, step: int) -> None:
        """Record that a step is damaged: no save may rely on the content of its files."""
        with self._mutex:
            self._distrusted.add(step)
            self._spares.distrust(step)

    def publish(self, step: int) -> str:
        """The commit point: rename to `step-N`, and make that durable."""
        self.check_place()
        spare = self._spares.taken_by(step)
        if spare is not None:
            # Not in `begin`, where it would delay the first write.  Here the data's fsync has done most of the work.
            self._sync(spare)
        with self._mutex:
            assert step not in self._steps, f"step {step} is committed already"
            self.filesystem.rename(self.partial_path(step), self.path(step))
            try:
                self._sync(self.root)
            except StorageError:
                # A visible step that may not be durable is not committed: rename it back.
                with suppress(StorageError):
                    self.filesystem.rename(self.path(step), self.partial_path(step))
                raise
            self._steps = tuple(sorted([*self._steps, step]))
            try:
                self._end(step)
            except Exception as error:  # the step is committed, and must not be reported as failed
                _log.warning("what is left of a spare could not be deleted: %s", error)
        return self.path(step)

    def discard(self, step: int) -> None:
        """Delete the leftovers of a failed save.  Best effort: the next open finds the rest."""
        if not self._sound:
            # After a power cut it may have its final name, and must then be whole.
            self._in_flight.discard(step)
            return
        path = self.partial_path(step)
        try:
            self.check_place()  # another engine may be writing a partial of the same name
            self._spares.remove(path)
        except StorageError:
            self._leftovers.add(path)
        with self._mutex:
            self._end(step)

    # -- out of service ---------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Retire all steps that the rule does not keep, except those that are being read.

        Called only once a newer step is durable.  Deletes the spares that are too many.  A step that cannot be moved is
        passed over with one warning.
        """
        with self._mutex:
            if self._sound:
                self._retire(self._surplus())
                self._spares.trim(self._spare_max)

    def retire_after(self, step: int) -> list[int]:
        """Retire every step later than this one, newest first, and return them.

        Raises:
            NotFoundError: this step is not committed.
            StepError: a later one is being read, or has a tag.
            StorageError: a sync of a directory has failed before.
        """
        with self._mutex, self.pinned(step):
            self._demand_sound("rollback", step)
            later = [s for s in reversed(self._steps) if s > step]
            read = sorted(self._read_steps().intersection(later))
            if read:
                raise StepError(f"steps {read} are being read; wait for that before rolling back")
            tagged = [s for s in reversed(later) if (facts := self._facts.of(s)) is not None and facts.tag is not None]
            if tagged:
                raise StepError(f"steps {tagged} have a tag; delete(step) each of them, or roll back to {tagged[-1]}")
            self._retire(later, demanded=True)
            self._spares.trim(self._spare_max)
            return later

    def delete(self, step: int) -> None:
        """Delete a committed step, even a tagged one, and free its room.  Durable when it returns.

        Raises:
            NotFoundError: there is no such step.
            StepError: it is being read or saved.
            StorageError: a sync of a directory has failed before.
        """
        with self._mutex:
            if step in self._in_flight:
                raise StepError(f"step {step} is being saved; wait for that before deleting it")
            if step not in self._steps:
                raise self._not_found(step, self._steps)
            if step in self._read_steps():
                raise StepError(f"step {step} is being read; wait for that before deleting it")
            self._demand_sound("delete", step)
            before = self._spares.names()
            self._retire([step], demanded=True)
            if self._spares.names() != before:
                self._spares.delete_newest()

    def set_aside(self, step: int) -> str | None:
        """Rename a damaged step to `step-N.damaged`, which only the user deletes; its number is free then.

        Returns the new path, or None where the step's directory has been deleted by hand.
        """
        self.check_place()
        with self._mutex:
            if self.filesystem.status(self.path(step)) is None:
                self._forget(step)
                return None
            names = self.filesystem.list_directory(self.root)
            aside = step_name(step) + ".damaged"
            while aside in names:
                aside += "-again"
            self.filesystem.rename(self.path(step), os.path.join(self.root, aside))
            self._forget(step)
            self._sync(self.root)
        return os.path.join(self.root, aside)

    def close(self) -> None:
        """Give the directory back."""
        self._lock.close()

    # -- how: opening -----------------------------------------------------------------------------------------

    def _make_directories(self) -> None:
        """Create the missing ones of the root and our own directories, each durable in its parent."""
        if len(os.fsencode(self.root)) > _ROOT_BYTES_MAX:  # every save would fail
            raise StorageError(errno.ENAMETOOLONG, "mkdir", self.root)
        # From the outside in: an error names the outermost, and a link to another run's directory has a `spare` in it.
        for path in (self.root, self._private):
            is_directory(self.filesystem, path)
        missing = []
        path = self._spares.path
        while not is_directory(self.filesystem, path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            try:
                self.filesystem.make_directory(path)
            except StorageError as error:
                if error.errno == errno.ENOENT:  # its parent was there just now
                    raise StorageError(error.errno, "mkdir", path, remedy=NO_DIRECTORY_HERE) from None
                if error.errno != errno.EEXIST:  # another process has made it
                    raise
            self._sync(os.path.dirname(path))

    def _recover(self) -> tuple[int, ...]:
        """Make the state of an earlier process durable, move its unfinished saves to spare, and list the steps."""
        names = self.filesystem.list_directory(self.root)
        # A process killed between a rename or mkdir and its fsync leaves a name that is visible but could still
        # vanish, and no older step may be retired because of it.
        try:
            self.filesystem.sync_directory(os.path.dirname(self.root))
        except StorageError as error:
            if error.errno != errno.EACCES:  # a parent without read permission cannot be synced
                raise
        self._sync(self._private)
        self._sync_moves()
        for name in names:
            path = os.path.join(self.root, name)
            if _PARTIAL_NAME.fullmatch(name) and self.filesystem.is_directory(path):
                self._spares.pass_over(path, self._spares.add)
        self._sync_moves()
        # A kill may have come between a move of a file from a spare and its fsync.  Moved once more, it could be in
        # both locations after a power cut.
        for spare in self._spares.names():
            self._sync(os.path.join(self._spares.path, spare))
        self._spares.trim(self._spare_max)
        return tuple(committed_steps(self.filesystem, self.root, names))

    # -- how: moving ------------------------------------------------------------------------------------------

    def _retire(self, steps: Sequence[int], demanded: bool = False) -> None:
        """Move steps to spare, durably.  A step that may not be moved is passed over, or with `demanded` raises."""
        self.check_place()
        self._unsynced = self._unsynced or bool(steps)
        try:
            for step in steps:
                retire = functools.partial(self._retire_one, step)
                if demanded:
                    retire(self.path(step))
                else:
                    self._spares.pass_over(self.path(step), retire)
        finally:  # if one of several is refused, the next save may take the earlier ones
            for step in set(steps).intersection(self._steps):  # Ctrl-C may have come just after its move
                if self.filesystem.status(self.path(step)) is None:
                    self._forget(step)
            if self._unsynced:
                self._sync_moves()

    def _retire_one(self, step: int, path: str) -> None:
        try:
            self._spares.add(path, step)
        except StorageError as error:
            if error.errno != errno.ENOENT:  # it was deleted by hand, which is as good
                raise
        self._forget(step)

    def _limit_room(self) -> None:
        """Before a save begins, see to it that what is on disk stays within what the rule keeps and twice the spares.

        Leftovers of failed saves are deleted.  Processes that were killed between a commit and its retirement have left
        one surplus step each.  The newest of these, as many as there may be spares, are retired after the next commit,
        like others, and the rest now.  If a damaged step was found, they may be needed, and stay until then.
        """
        with self._mutex:
            if not self._sound:
                return
            for path in tuple(self._leftovers):
                with suppress(StorageError):
                    self._spares.remove(path)
                    self._leftovers.discard(path)
            surplus = self._surplus()[: -self._spare_max]
            if surplus and self._distrusted.isdisjoint(self._steps):
                self._retire(surplus)
                self._spares.trim(self._spare_max)

    def _surplus(self) -> list[int]:
        """The steps that the rule does not keep and that are not being read."""
        return to_retire(self.retention, self._steps, self._facts.of, self._read_steps())

    def _end(self, step: int) -> None:
        """Forget a save in flight, and delete the spare that it took."""
        self._in_flight.discard(step)
        if self._sound:
            self._spares.release(step)

    def _room(self) -> int | None:
        """The bytes that a save can write; None if the file system does not report them."""
        free = self.filesystem.free_bytes(self.root)
        return None if free is None else free + (self._spares.room() if self._sound else 0)

    def _sync(self, path: str) -> None:
        """Sync a directory; once that has failed, no rename can be relied on until the next open."""
        try:
            self.filesystem.sync_directory(path)
        except StorageError:
            self._sound = False
            raise

    def _demand_sound(self, operation: str, step: int) -> None:
        """Refuse an operation that builds on renames, once a sync has failed and they may not last."""
        if not self._sound:
            raise StorageError(errno.ENOTRECOVERABLE, operation, self.path(step))

    def _check_name_free(self, step: int) -> None:
        path = self.path(step)
        status = self.filesystem.status(path)
        if status is not None:
            remedy = (
                "open a new Engine, which starts from what is there"
                if stat.S_ISDIR(status.st_mode)
                else "move it away; it is no directory"
            )
            raise StepError(f"{path} is in the way of step {step}, and this Engine has not made it: {remedy}")

    def _fresh_path(self, step: int) -> str:
        """A path for a step whose partial directory already exists and must stay as it is."""
        names = self.filesystem.list_directory(self.root)
        numbered = (f"{step_name(step)}.{number}.partial" for number in itertools.count(1))
        return os.path.join(self.root, next(name for name in numbered if name not in names))

    def _forget(self, step: int) -> None:
        # One assignment of a new tuple: steps() reads it without the lock.
        self._steps = tuple(s for s in self._steps if s != step)
        self._facts.forget(step)

    def _read_steps(self) -> set[int]:
        return {pin.step for pin in self._pins}

    def _sync_moves(self) -> None:
        """Make renames to spare durable: the target directory first, so that a crash never loses both names."""
        self._sync(self._spares.path)
        self._sync(self.root)
        self._unsynced = False
