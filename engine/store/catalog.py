"""Catalog: what lies in a directory of checkpoints.  Lock, list, begin, publish, retire, recycle.

Theory of operation.  A checkpoint's directory is in exactly one of three places, and moves by rename only:

    step-N.partial/   a save is writing it          begin()
    step-N/           committed                     publish()
    .engine/spare/K/  retired, kept for its extents retire()

Overwriting extents that are already written is several times faster than writing fresh ones, so a save begins by
taking a spare directory, files and all, and a retired checkpoint becomes a spare.  What makes that safe is an
order: `retire` makes its renames durable before anything may take the spare, and `publish` makes that of `begin`
durable before its own (docs/durability.md, I4 and I5).

One engine at a time: `.engine/lock` is held by flock(2) on a descriptor that the ring never sees, and that a
forked child closes, so that neither can hold the lock on after the engine has gone.

After a failed sync of a directory nobody knows which renames will last, so from then on nothing is retired, taken
from spare or deleted; saves go on in fresh directories, and the next open starts from what is there.  Their names
are numbered, step-N.1.partial, since a save of the same step may have failed and must stay as it is.

A reader pins the step it reads, and a pinned step is not retired.  All methods may be called from any thread.
Called by `commit`, `writer`, `reader` and `engine`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from engine.errors import CorruptError, LockedError, NoSpaceError, NotFoundError, StepError, StorageError
from engine.format.manifest import MANIFEST_BYTES_MAX, MANIFEST_NAME, STEP_MAX, Manifest, decode
from engine.store.filesystem import Filesystem, telling

# ASCII: the digits of other scripts are digits for a regular expression, and names of nobody's.
_STEP_NAME = re.compile(r"step-(\d{8,19})", re.ASCII)
_PARTIAL_NAME = re.compile(r"step-\d{8,19}(?:\.\d+)?\.partial", re.ASCII)
_SPARE_NAME = re.compile(r"\d{8,19}", re.ASCII)


def step_name(step: int) -> str:
    """The directory name of a step: at least eight digits, so that names sort as numbers for a long time."""
    return f"step-{step:08d}"


class Catalog:
    """The checkpoints of one directory, owned by one engine.

    Args:
        root: the directory; created, with its parents, if it is not there.
        filesystem: how to reach it.
        spare_max: how many spare directories to keep; more are deleted.

    Raises:
        CorruptError: the lock is not a regular file.
        LockedError: another engine has the directory.
        StorageError: the directory cannot be made, read or synced, or a link stands where ours should be.
    """

    def __init__(self, root: str, filesystem: Filesystem, spare_max: int) -> None:
        self.root = os.path.realpath(root)  # the directory itself, where `root` is a link to it
        self.filesystem = filesystem
        self._spare_max = spare_max
        self._private = os.path.join(self.root, ".engine")
        self._spare = os.path.join(self._private, "spare")
        self._mutex = threading.RLock()
        self._sound = True  # no sync of a directory has failed
        self._taken: set[int] = set()  # steps written in a spare whose taking is not known to be durable
        self._fresh_paths: dict[int, str] = {}  # partials of another name than their step gives them
        self._pins: set[tuple[int, object]] = set()  # one for each reader
        self._make_directories()
        self._lock: int | None = _take_lock(os.path.join(self._private, "lock"), self.root)
        try:
            self._steps = self._recover()
        except BaseException:
            self.close()
            raise
        _open_catalogs.add(self)

    # -- what is there ----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Committed steps, oldest first.  Does not wait for whoever is moving directories."""
        return list(self._steps)

    def path(self, step: int) -> str:
        """Where a committed step lies."""
        return os.path.join(self.root, step_name(step))

    def partial_path(self, step: int) -> str:
        """Where a step lies while it is being written."""
        return self._fresh_paths.get(step) or self.path(step) + ".partial"

    def manifest(self, step: int) -> tuple[Manifest, int]:
        """The manifest of a committed step, and its length in bytes.

        Raises:
            CorruptError: it is missing, malformed, or another step's.
        """
        path = os.path.join(self.path(step), MANIFEST_NAME)
        raw = self.filesystem.read_file(path, MANIFEST_BYTES_MAX)
        manifest = decode(raw)
        if manifest.step != step:
            raise CorruptError(f"{path} is the manifest of step {manifest.step}")
        return manifest, len(raw)

    @contextmanager
    def pinned(self, step: int) -> Iterator[None]:
        """Keep a step from being retired while it is read.

        Raises:
            NotFoundError: the step is not committed.
        """
        pin = (step, object())
        try:
            with self._mutex:
                if step not in self._steps:
                    known = ", ".join(map(str, self._steps)) or "none"
                    raise NotFoundError(f"{self.root} holds no step {step}; committed steps: {known}")
                self._pins.add(pin)
            yield
        finally:
            with self._mutex:
                self._pins.discard(pin)

    # -- a save's way through the directory -------------------------------------------------------------------

    def check_room(self, nbytes: int) -> None:
        """See whether a save of so many bytes has the room, before anything of it is there.

        What the spare that it will take holds is room too: files of the same names are overwritten, others deleted.
        Of two saves that begin at the same time both may find the same room, and one is refused when it allocates.

        Raises:
            NoSpaceError: it has not; says how much is missing.
        """
        with self._mutex:
            room = self.filesystem.free_bytes(self.root)
            if room is None:
                return
            for spare in self._spares()[:1] if self._sound else ():
                path = os.path.join(self._spare, spare)
                names = self.filesystem.list_directory(path)
                room += sum(self.filesystem.allocated_bytes(os.path.join(path, name)) for name in names)
        if room < nbytes:
            raise NoSpaceError(self.root, nbytes, nbytes - room)

    def check_place(self) -> None:
        """See whether the directory is still the one that was locked: another Engine may have the one in its place.

        Asked before anything there is made, moved or deleted, so that what is wrong is found before it does harm.

        Raises:
            StorageError: it was removed (ENOENT) or replaced (ESTALE).
        """
        assert self._lock is not None
        path = os.path.join(self._private, "lock")
        with telling("stat", path):
            is_ours = os.path.samestat(os.lstat(path), os.fstat(self._lock))
        if not is_ours:
            raise StorageError(errno.ESTALE, "stat", path)

    def begin(self, step: int, names: Sequence[str]) -> str:
        """Make `step-N.partial` and return its path: a spare, with those of its files that are wanted, or new."""
        self.check_place()
        partial = self.partial_path(step)
        if self._sound:
            self._remove(partial)  # there only if an earlier save of this step failed and could not be deleted
        with self._mutex:
            if not self._sound:
                partial = self._fresh_paths[step] = self._fresh_path(step)
                self._taken.discard(step)  # an earlier save of this step had, and has failed
            spares = self._spares() if self._sound else []
            if not spares:
                self.filesystem.make_directory(partial)
                return partial
            self.filesystem.rename(os.path.join(self._spare, spares[0]), partial)
            self._taken.add(step)
        for name in self.filesystem.list_directory(partial):
            path = os.path.join(partial, name)
            # A file with a second name (cp --link), or that a reader has mapped (safetensors does), is not ours to
            # overwrite.
            if name not in names or not self.filesystem.is_ours_alone(path):
                self._unlink(path)
        return partial

    def publish(self, step: int) -> str:
        """The commit point: rename to `step-N`, and make that durable."""
        self.check_place()
        with self._mutex:
            assert step not in self._steps, f"step {step} is committed already"
            self._sync_taken(step)
            self.filesystem.rename(self.partial_path(step), self.path(step))
            try:
                self._sync(self.root)
            except StorageError:
                # Visible but not known to be durable is not committed: take it back.
                with suppress(StorageError):
                    self.filesystem.rename(self.path(step), self.partial_path(step))
                raise
            self._steps = tuple(sorted([*self._steps, step]))
        return self.path(step)

    def discard(self, step: int) -> None:
        """Delete what a failed save has left.  Best effort: what stays is found by the next open."""
        if not self._sound:
            return  # a power cut may yet show it under its final name, and then it must be whole
        with suppress(StorageError):
            self.check_place()  # another engine may be writing a partial of the same name
            self._remove(self.partial_path(step))

    def retire(self, keep: int) -> None:
        """Take all but the newest `keep` steps out of service, save those that are being read.

        Called only once a newer step is durable.  Deletes the spares that are too many.
        """
        assert keep >= 1
        with self._mutex:
            if not self._sound:
                return
            self._retire([step for step in self._steps[:-keep] if step not in self._read_steps()])

    def retire_after(self, step: int) -> list[int]:
        """Take every step later than this one out of service, newest first, and return them.

        Raises:
            NotFoundError: this step is not committed.
            StepError: a later one is being read.
        """
        with self._mutex, self.pinned(step):
            later = [s for s in reversed(self._steps) if s > step]
            read = sorted(self._read_steps().intersection(later))
            if read:
                raise StepError(f"steps {read} are being read; wait for that before rolling back")
            self._retire(later)
            return later

    def set_aside(self, step: int) -> str:
        """Rename a damaged step to `step-N.damaged`, out of the way of a new one, and leave it to the user."""
        self.check_place()
        with self._mutex:
            names = self.filesystem.list_directory(self.root)
            aside = step_name(step) + ".damaged"
            while aside in names:
                aside += "-again"
            self._sync_taken(step)
            self.filesystem.rename(self.path(step), os.path.join(self.root, aside))
            self._forget(step)
            self._sync(self.root)
        return os.path.join(self.root, aside)

    def close(self) -> None:
        """Give the directory back."""
        if self._lock is not None:
            self.filesystem.close(self._lock)
            self._lock = None

    # -- how --------------------------------------------------------------------------------------------------

    def _make_directories(self) -> None:
        """Create what is missing of the root and our own directories, each made durable in its parent."""
        for path in (self._private, self._spare):
            if os.path.islink(path):  # it would lead what is retired, deleted and locked out of the directory
                raise StorageError(errno.ELOOP, "open", path)
        missing = []
        path = self._spare
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            try:
                self.filesystem.make_directory(path)
            except StorageError as error:
                if error.errno != errno.EEXIST:  # another process was as quick
                    raise
            self._sync(os.path.dirname(path))

    def _recover(self) -> tuple[int, ...]:
        """Make durable what an earlier process left, move what it did not finish to spare, and list the steps."""
        names = self.filesystem.list_directory(self.root)
        # A process killed between a rename or mkdir and its fsync leaves a name that is visible but could still
        # vanish, and older steps must not be retired on its word.
        try:
            self.filesystem.sync_directory(os.path.dirname(self.root))
        except StorageError as error:
            if error.errno != errno.EACCES:  # a parent that may be passed through and not read cannot be synced
                raise
        self._sync(self._private)
        self._sync_moves()
        for name in names:
            path = os.path.join(self.root, name)
            if _PARTIAL_NAME.fullmatch(name) and self.filesystem.is_directory(path):
                self._make_spare(path)
        self._sync_moves()
        self._trim_spares()
        # A set: step-000000001 has the number of step-00000001, but is not its name.  No manifest has a step beyond
        # STEP_MAX, and the step after one could not be named.
        steps = {int(match.group(1)) for match in map(_STEP_NAME.fullmatch, names) if match}
        steps = {s for s in steps if s <= STEP_MAX and step_name(s) in names}
        whole = (s for s in steps if self.filesystem.is_directory(self.path(s)))
        return tuple(sorted(whole))

    def _retire(self, steps: Sequence[int]) -> None:
        self.check_place()
        try:
            for step in steps:
                try:
                    self._make_spare(self.path(step))
                except StorageError as error:
                    if error.errno != errno.ENOENT:  # somebody has deleted it: out of service all the same
                        raise
                self._forget(step)
        finally:  # if one of several is refused, the next save may take those before it
            if steps:
                self._sync_moves()
        if self._sound:  # else a power cut may give what was retired before this its old name
            self._trim_spares()

    def _sync(self, path: str) -> None:
        """Sync a directory; once that has failed, no rename can be relied on until the next open."""
        try:
            self.filesystem.sync_directory(path)
        except StorageError:
            self._sound = False
            raise
        if path == self._spare and self._sound:
            self._taken.clear()

    def _sync_taken(self, step: int) -> None:
        """Make durable what has been taken from spare, by whom it may be, before the root is synced for this step.

        Not when it is taken: it would hold up the first write, and here the data's fsync has done most of it.
        """
        if self._taken and self._sound:
            self._sync(self._spare)
        elif step in self._taken:
            raise StorageError(errno.EIO, "fsync", self._spare)  # it has failed for somebody else

    def _fresh_path(self, step: int) -> str:
        """Where to write a step, when what lies there already must stay as it is."""
        names = self.filesystem.list_directory(self.root)
        numbered = (f"{step_name(step)}.{number}.partial" for number in itertools.count(1))
        return os.path.join(self.root, next(name for name in numbered if name not in names))

    def _forget(self, step: int) -> None:
        # One assignment of a new tuple: steps() reads it without the lock.
        self._steps = tuple(s for s in self._steps if s != step)

    def _read_steps(self) -> set[int]:
        return {step for step, _ in self._pins}

    def _make_spare(self, path: str) -> None:
        """Move a directory to spare, as the last in line."""
        taken = [int(name) for name in self._spares()]
        self.filesystem.rename(path, os.path.join(self._spare, f"{max(taken, default=0) + 1:08d}"))

    def _spares(self) -> list[str]:
        """The spare directories, oldest first.  What else may lie there, a link above all, is none of ours."""
        names = [name for name in self.filesystem.list_directory(self._spare) if _SPARE_NAME.fullmatch(name)]
        return [name for name in names if self.filesystem.is_directory(os.path.join(self._spare, name))]

    def _sync_moves(self) -> None:
        """Make renames to spare durable: where it arrived before where it left, so that nothing is nowhere."""
        self._sync(self._spare)
        self._sync(self.root)

    def _trim_spares(self) -> None:
        for name in self._spares()[: -self._spare_max]:
            self._remove(os.path.join(self._spare, name))

    def _remove(self, path: str) -> None:
        """Delete a directory, if it is there, with all that the user may have put in it."""
        if not self.filesystem.is_directory(path):
            return
        # A stack of our own: directories nest deeper than Python's does.
        pending = [(path, iter(self.filesystem.list_directory(path)))]
        while pending:
            directory, names = pending[-1]
            for name in names:
                inner = os.path.join(directory, name)
                if self.filesystem.is_directory(inner):
                    pending.append((inner, iter(self.filesystem.list_directory(inner))))
                    break
                self.filesystem.unlink(inner)
            else:
                self.filesystem.remove_directory(directory)
                pending.pop()

    def _unlink(self, path: str) -> None:
        if self.filesystem.is_directory(path):
            self._remove(path)
        else:
            self.filesystem.unlink(path)


def _take_lock(path: str, root: str) -> int:
    with telling("open", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        with telling("stat", path):
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptError(f"{path} is not a regular file; remove it")
        _lock(descriptor, path, root)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    if status.st_nlink == 1:  # else it is also a file of another directory's, say of a copy made with cp --link
        with suppress(OSError):  # for whoever finds it locked; a full disk must not keep a restore out
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _lock(descriptor: int, path: str, root: str) -> None:
    """Lock the open lock file, or say who has it."""
    try:
        with telling("flock", path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except StorageError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        owner = ""
        with suppress(OSError):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        raise LockedError(
            f"{root} is in use by another Engine (process {owner if owner.isdecimal() else 'unknown'}); close that "
            "one, or use another directory"
        ) from None


_open_catalogs: weakref.WeakSet[Catalog] = weakref.WeakSet()


def _close_all_in_child() -> None:
    """A forked child shares the lock's open file, and would hold the lock after its parent has died."""
    for catalog in tuple(_open_catalogs):
        catalog.close()


os.register_at_fork(after_in_child=_close_all_in_child)
