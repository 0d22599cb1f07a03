"""The catalog: the directories of a run, the lock, and the order in which names move.

Theory of operation.  All tests use a real directory.  `Recorded` is the real file system with a list of its calls, and
can refuse one.  The stateful test drives begin, publish, discard, retire and reopen in any order against a set of
committed steps.  The file of each checkpoint holds its own step, so a file that is recycled too early, or while a
reader has it, is noticed when it is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import plan_of

from engine.errors import CorruptError, EngineWarning, LockedError, NotFoundError, StepError, StorageError
from engine.format.layout import lay_out
from engine.format.manifest import (
    FORMAT,
    MANIFEST_NAME,
    READER,
    VERSION,
    FileRecord,
    Manifest,
    chunk_layers,
    chunk_records,
    encode,
)
from engine.format.plan import ALIGNMENT
from engine.store.catalog import Catalog
from engine.store.directory import step_name
from engine.store.filesystem import Filesystem
from engine.store.retention import KEEP_ALL, Retention, StepFacts
from engine.store.stamps import Stamp

DATA_NAME = "model.safetensors"
SPARE = Path(".engine", "spare")


class Recorded(Filesystem):
    """The real file system, which records its renames and syncs, and can refuse a later one."""

    def __init__(self) -> None:
        self.done: list[tuple[str, ...]] = []
        self.armed: tuple[str, int] | None = None

    def refuse(self, operation: str, spared: int = 0) -> None:
        """Refuse one call of this kind, after so many that succeed."""
        self.armed = (operation, spared)

    def _call(self, operation: str, path: str) -> None:
        if self.armed is None or self.armed[0] != operation:
            return
        if self.armed[1] > 0:
            self.armed = (operation, self.armed[1] - 1)
        else:
            self.armed = None
            raise StorageError(errno.EIO, operation, path)

    def rename(self, source: str, target: str) -> None:
        self._call("rename", source)
        super().rename(source, target)
        self.done.append(("rename", source, target))

    def sync_directory(self, path: str) -> None:
        self._call("sync_directory", path)
        super().sync_directory(path)
        self.done.append(("sync", path))


@pytest.fixture
def filesystem() -> Recorded:
    return Recorded()


@pytest.fixture
def catalog(tmp_path: Path, filesystem: Recorded) -> Iterator[Catalog]:
    opened = Catalog(str(tmp_path), filesystem, spare_max=2, facts=StepFacts)
    yield opened
    opened.close()


def fill(partial: str, content: bytes) -> int:
    """Write a data file as a save does, over an existing one; returns its inode number."""
    descriptor = os.open(Path(partial, DATA_NAME), os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    inode = os.fstat(descriptor).st_ino
    os.close(descriptor)
    return inode


def begin(catalog: Catalog, step: int, wanted: Sequence[str]) -> str:
    """Begin a save; returns its partial."""
    return catalog.begin(step, wanted).path


def retire(catalog: Catalog, keep: int) -> None:
    """Retire all but the newest `keep`."""
    catalog.retention = Retention(last=keep)
    catalog.retire()


def save(catalog: Catalog, step: int) -> int:
    """Begin, write and publish a step; returns the inode number of its file."""
    inode = fill(begin(catalog, step, [DATA_NAME]), str(step).encode())
    Path(catalog.partial_path(step), MANIFEST_NAME).write_text("{}")
    assert catalog.publish(step) == catalog.path(step)
    return inode


def spares(root: Path) -> list[str]:
    """The names in spare, oldest first."""
    return sorted(os.listdir(root / SPARE))


def names(root: Path) -> list[str]:
    """The names in the root, without `.engine`."""
    return sorted(set(os.listdir(root)) - {".engine"})


# -- the file system itself -------------------------------------------------------------------------------------------


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may write fewer bytes than requested: at a signal, or on a nearly full disk."""
    real_write = os.write
    written: list[int] = []

    def write(descriptor: int, content: bytes) -> int:
        written.append(real_write(descriptor, content[:7]))
        return written[-1]

    monkeypatch.setattr(os, "write", write)
    Filesystem().write_new_file(str(tmp_path / "new"), bytes(range(20)))
    assert (tmp_path / "new").read_bytes() == bytes(range(20)) and written == [7, 7, 6]


def test_write_new_file_refuses_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link"):
        with pytest.raises(StorageError, match="File exists"):
            Filesystem().write_new_file(str(tmp_path / name), b"new")
    assert (tmp_path / "there").read_text() == "precious"


def test_opening_a_leased_file_does_not_kill_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaking a lease sends SIGIO unless another signal was set, and SIGIO ends a process (fcntl(2))."""
    path = tmp_path / "file"
    path.write_text("content")
    received: list[int] = []
    real_fcntl = fcntl.fcntl

    def interfering(descriptor: int, command: int, argument: int = 0) -> int:
        result = real_fcntl(descriptor, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_WRLCK):
            with pytest.raises(BlockingIOError):  # the lease is being broken
                os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        return result

    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGIO, signal.SIGURG)
    }
    try:
        monkeypatch.setattr(fcntl, "fcntl", interfering)
        assert Filesystem().is_ours_alone(str(path))
        monkeypatch.undo()
        assert Filesystem().is_ours_alone(str(path)), "the lease was given back"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert received == [signal.SIGURG]


def descriptors() -> int:
    """The number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


class WithoutNames(Filesystem):
    """Refuses to unlink."""

    def unlink(self, path: str) -> None:
        raise StorageError(errno.EROFS, "unlink", path)


REFUSED_CALLS: dict[str, Callable[[Path], object]] = {
    "a scratch file whose name stays": lambda path: WithoutNames().open_scratch(str(path), direct=False),
    "a directory as data": lambda path: Filesystem().open_for_blocks(str(path), write=False, direct=False),
    "a FIFO as data": lambda path: Filesystem().open_for_blocks(str(path / "fifo"), write=False, direct=False),
    "a FIFO to write": lambda path: Filesystem().open_for_blocks(str(path / "fifo"), write=True, direct=False),
    "a FIFO as manifest": lambda path: Filesystem().read_file(str(path / "fifo"), 10),
    "a manifest too long": lambda path: Filesystem().read_file(str(path / "file"), 3),
    "a directory that cannot be synced": lambda path: Filesystem().sync_directory("/proc/self"),
    "a lock that is none": lambda path: Catalog(str(path / "locked"), Filesystem(), 1),
    "a directory in use": lambda path: Catalog(str(path / "used"), Filesystem(), 1),
}


@pytest.mark.parametrize("what", REFUSED_CALLS)
def test_a_refused_open_closes_its_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("content")
    (tmp_path / "locked" / ".engine").mkdir(parents=True)
    os.mkfifo(tmp_path / "locked" / ".engine" / "lock")
    user = Catalog(str(tmp_path / "used"), Filesystem(), 1)
    real_open = os.open

    def without_tmpfile(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without_tmpfile)
    before = descriptors()
    with pytest.raises((StorageError, CorruptError, LockedError)):
        REFUSED_CALLS[what](tmp_path)
    assert descriptors() == before
    user.close()


@pytest.mark.parametrize("what", ["a FIFO", "a file of two names", "a file that is open"])
def test_is_ours_alone_closes_its_descriptor(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    if what == "a FIFO":
        os.mkfifo(path)
    else:
        path.write_text("content")
    if what == "a file of two names":
        (tmp_path / "other").hardlink_to(path)
    with ExitStack() as opened:
        if what == "a file that is open":
            opened.enter_context(path.open())
        before = descriptors()
        assert not Filesystem().is_ours_alone(str(path))
        assert descriptors() == before


# -- begin, publish, discard ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (0, "step-00000000"),
        (12345678, "step-12345678"),
        (123456789, "step-123456789"),
        (2**63 - 1, f"step-{2**63 - 1}"),
    ],
)
def test_names_of_steps_sort_as_numbers(step: int, name: str, catalog: Catalog) -> None:
    assert step_name(step) == name
    save(catalog, step)
    assert catalog.steps() == [step]


MOVES: dict[str, Callable[[Catalog], object]] = {
    "begin": lambda catalog: catalog.begin(4, [DATA_NAME]),
    "publish": lambda catalog: catalog.publish(3),
    "retire": lambda catalog: retire(catalog, 1),
    "rollback": lambda catalog: catalog.retire_after(1),
    "set aside": lambda catalog: catalog.set_aside(2),
    "discard": lambda catalog: catalog.discard(3),
}


@pytest.mark.parametrize("move", MOVES)
def test_nothing_is_moved_in_a_directory_that_replaced_ours(tmp_path: Path, move: str) -> None:
    """The new directory has the same names, and they belong to another engine."""
    root = tmp_path / "run"
    with ExitStack() as opened:

        def open_and_save() -> Catalog:
            catalog = Catalog(str(root), Filesystem(), spare_max=1, facts=StepFacts)
            opened.callback(catalog.close)
            save(catalog, 1)
            save(catalog, 2)
            fill(begin(catalog, 3, [DATA_NAME]), b"3")
            return catalog

        ours = open_and_save()
        root.rename(tmp_path / "moved")
        theirs = open_and_save()
        before = sorted(root.rglob("*"))
        if move == "discard":  # which raises nothing
            ours.discard(3)
        else:
            with pytest.raises(StorageError, match="open a new Engine") as refused:
                MOVES[move](ours)
            assert refused.value.errno == errno.ESTALE
        assert sorted(root.rglob("*")) == before
        MOVES[move](theirs)


def test_a_directory_is_made_with_its_parents(tmp_path: Path, filesystem: Recorded) -> None:
    root = tmp_path / "runs" / "exp1"
    with_parents = Catalog(str(root), filesystem, spare_max=1, facts=StepFacts)
    assert with_parents.steps() == []
    assert (root / SPARE).is_dir()
    for made in (root.parent, root, root / ".engine", root / SPARE):
        assert ("sync", str(made.parent)) in filesystem.done
    with_parents.close()


def test_a_published_step_is_listed(catalog: Catalog, tmp_path: Path) -> None:
    partial = begin(catalog, 5, [DATA_NAME])
    assert (partial, names(tmp_path)) == (str(tmp_path / "step-00000005.partial"), ["step-00000005.partial"])
    assert catalog.steps() == []
    fill(partial, b"5")
    catalog.publish(5)
    assert (catalog.steps(), names(tmp_path)) == ([5], ["step-00000005"])
    assert Path(catalog.path(5), DATA_NAME).read_bytes() == b"5"


def test_a_failed_save_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    fill(begin(catalog, 5, [DATA_NAME]), b"5")
    catalog.discard(5)
    catalog.discard(6)  # never begun
    assert (catalog.steps(), names(tmp_path), spares(tmp_path)) == ([], [], [])


def test_steps_are_listed_by_number_not_by_time(catalog: Catalog, tmp_path: Path) -> None:
    for step in (100_000_000, 3, 20):
        save(catalog, step)
    assert catalog.steps() == [3, 20, 100_000_000]
    catalog.close()
    again = Catalog(str(tmp_path), Filesystem(), spare_max=2, facts=StepFacts)
    assert again.steps() == [3, 20, 100_000_000]
    again.close()


@pytest.mark.parametrize("refused", ["rename", "sync_directory"])
def test_a_publish_that_fails_leaves_no_step(
    catalog: Catalog, filesystem: Recorded, tmp_path: Path, refused: str
) -> None:
    save(catalog, 1)
    fill(begin(catalog, 2, [DATA_NAME]), b"2")
    filesystem.refuse(refused)
    with pytest.raises(StorageError) as caught:
        catalog.publish(2)
    assert (caught.value.errno, caught.value.operation) == (errno.EIO, refused)
    assert catalog.steps() == [1]
    assert names(tmp_path) == ["step-00000001", "step-00000002.partial"]
    catalog.discard(2)
    save(catalog, 3)
    assert catalog.steps() == [1, 3]


# -- retire and recycle -----------------------------------------------------------------------------------------------


def test_a_save_recycles_the_files_of_a_retired_step(catalog: Catalog, tmp_path: Path) -> None:
    inode = save(catalog, 1)
    Path(catalog.path(1), "optimizer.safetensors").write_bytes(b"not wanted next time")
    save(catalog, 2)
    retire(catalog, 1)
    assert (catalog.steps(), names(tmp_path), len(spares(tmp_path))) == ([2], ["step-00000002"], 1)

    partial = Path(begin(catalog, 3, [DATA_NAME, "another.safetensors"]))
    assert os.listdir(partial) == [DATA_NAME], "neither the manifest nor unwanted files"
    assert os.stat(partial / DATA_NAME).st_ino == inode
    assert (partial / DATA_NAME).read_bytes() == b"1"
    assert [os.listdir(tmp_path / SPARE / name) for name in spares(tmp_path)] == [[]]
    catalog.publish(3)
    assert spares(tmp_path) == []


def test_spares_are_taken_oldest_first(catalog: Catalog) -> None:
    inodes = [save(catalog, step) for step in (1, 2, 3)]
    retire(catalog, 1)
    assert [save(catalog, step) for step in (4, 5)] == inodes[:2]
    assert save(catalog, 6) not in inodes


@pytest.mark.parametrize("count", [1, 5])
def test_spares_beyond_max_async_are_deleted(catalog: Catalog, tmp_path: Path, count: int) -> None:
    inodes = [save(catalog, step) for step in range(count + 1)]
    retire(catalog, 1)
    kept = [os.stat(tmp_path / SPARE / name / DATA_NAME).st_ino for name in spares(tmp_path)]
    assert kept == inodes[:-1][-2:], "the newest two"
    # They are also kept across an open.
    catalog.close()
    again = Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    assert [os.stat(tmp_path / SPARE / name / DATA_NAME).st_ino for name in spares(tmp_path)] == kept[-1:]
    again.close()


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 9])
def test_the_newest_steps_are_kept(catalog: Catalog, keep: int) -> None:
    for step in (10, 20, 30, 40):
        save(catalog, step)
    retire(catalog, keep)
    assert catalog.steps() == [10, 20, 30, 40][-keep:]


def test_a_file_with_another_name_is_not_overwritten(catalog: Catalog, tmp_path: Path) -> None:
    inode = save(catalog, 1)
    copy = tmp_path / "best.safetensors"
    os.link(Path(catalog.path(1), DATA_NAME), copy)
    save(catalog, 2)
    retire(catalog, 1)
    assert save(catalog, 3) != inode
    assert copy.read_bytes() == b"1"
    assert os.stat(copy).st_nlink == 1


def test_a_link_is_not_followed(catalog: Catalog, tmp_path: Path) -> None:
    elsewhere = tmp_path / "cold-storage"
    elsewhere.write_bytes(b"1")
    save(catalog, 1)
    data = Path(catalog.path(1), DATA_NAME)
    data.unlink()
    data.symlink_to(elsewhere)
    save(catalog, 2)
    retire(catalog, 1)
    save(catalog, 3)
    assert not Path(catalog.path(3), DATA_NAME).is_symlink()
    assert elsewhere.read_bytes() == b"1"


def test_files_of_users_are_retired_with_their_step(catalog: Catalog, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    for step in range(5):
        save(catalog, step)
        plots = Path(catalog.path(step), "plots")
        (plots / "deep").mkdir(parents=True)
        (plots / "deep" / "loss.png").write_bytes(b"png")
        (plots / "link").symlink_to(outside)
        retire(catalog, 1)
    partial = begin(catalog, 5, [DATA_NAME])
    assert os.listdir(partial) == [DATA_NAME]
    catalog.discard(5)
    assert (outside / "precious").read_bytes() == b"precious"


def test_a_partly_refused_retirement_is_durable(catalog: Catalog, filesystem: Recorded, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(catalog, step)
    filesystem.refuse("rename", spared=1)
    with pytest.raises(StorageError):
        retire(catalog, 1)
    assert catalog.steps() == [2, 3, 4]
    assert names(tmp_path) == [step_name(step) for step in (2, 3, 4)]
    catalog.begin(5, [DATA_NAME])
    check_order(filesystem.done, str(tmp_path))


@pytest.mark.parametrize("which", [0, 1], ids=["spare", "root"])
def test_an_unsynced_retirement_is_not_recycled(
    catalog: Catalog, filesystem: Recorded, tmp_path: Path, which: int
) -> None:
    first, second = save(catalog, 1), save(catalog, 2)
    filesystem.refuse("sync_directory", spared=which)
    with pytest.raises(StorageError):
        retire(catalog, 1)
    assert save(catalog, 3) not in (first, second)
    check_order(filesystem.done, str(tmp_path))
    assert {Path(catalog.path(step), DATA_NAME).read_bytes() for step in catalog.steps()} == {b"2", b"3"}


def begin_two(catalog: Catalog) -> None:
    """Saves 4 and 5, each with its own spare; 3 is committed."""
    for step in (1, 2, 3):
        save(catalog, step)
    retire(catalog, 1)
    for step in (4, 5):
        fill(begin(catalog, step, [DATA_NAME]), str(step).encode())


def test_moves_from_a_spare_are_durable_before_publishing(
    catalog: Catalog, filesystem: Recorded, tmp_path: Path
) -> None:
    begin_two(catalog)
    root = str(tmp_path)
    filesystem.done.clear()
    for step in (5, 4):
        catalog.publish(step)
    published = [("rename", f"{catalog.path(step)}.partial", catalog.path(step)) for step in (5, 4)]
    taken = [("sync", str(tmp_path / SPARE / name)) for name in ("00000002", "00000001")]
    assert filesystem.done == [taken[0], published[0], ("sync", root), taken[1], published[1], ("sync", root)]


def test_unsynced_moves_fail_only_the_save_that_made_them(catalog: Catalog, filesystem: Recorded) -> None:
    begin_two(catalog)
    filesystem.refuse("sync_directory", spared=0)
    with pytest.raises(StorageError):
        catalog.publish(5)
    catalog.discard(5)
    catalog.publish(4)
    assert catalog.steps() == [3, 4]
    for step in (5, 6):
        save(catalog, step)
    assert catalog.steps() == [3, 4, 5, 6]


@pytest.mark.parametrize("which", [0, 1], ids=["spare", "root"])
def test_rollback_and_deletion_are_refused_after_a_failed_sync(
    catalog: Catalog, filesystem: Recorded, tmp_path: Path, which: int
) -> None:
    for step in (1, 2, 3, 4, 5):
        save(catalog, step)
    filesystem.refuse("sync_directory", spared=which)
    with pytest.raises(StorageError):
        retire(catalog, 4)  # which a power cut may undo
    before = names(tmp_path), spares(tmp_path)
    for change, asked in ((catalog.retire_after, 2), (catalog.delete, 3)):
        with pytest.raises(StorageError, match=rf"{step_name(asked)}.*open a new one"):
            change(asked)
    assert (names(tmp_path), spares(tmp_path)) == before and catalog.steps() == [2, 3, 4, 5]
    with pytest.raises(NotFoundError):
        catalog.delete(9)  # the caller's own error first
    catalog.close()
    again = Catalog(str(tmp_path), filesystem, 2, KEEP_ALL, StepFacts)
    assert again.retire_after(2) == [5, 4, 3]
    again.close()


@pytest.mark.parametrize("change", ["retire_after", "delete"])
@pytest.mark.parametrize("place", ["rename", "sync_directory", "_forget"])
def test_an_interrupted_move_to_spare_is_known_and_synced_later(
    catalog: Catalog, filesystem: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, change: str
) -> None:
    for step in (1, 2):
        save(catalog, step)
    target = Catalog if place == "_forget" else Recorded
    real = getattr(target, place)
    interrupts = iter([True])

    def interrupted(self: object, *arguments: object) -> None:
        first = next(interrupts, False)
        if place == "rename" or not first:  # Ctrl-C comes just after the rename
            real(self, *arguments)
        if first:
            raise KeyboardInterrupt

    monkeypatch.setattr(target, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(catalog, change)(1 if change == "retire_after" else 2)
    monkeypatch.undo()
    assert catalog.steps() == [1]
    save(catalog, 3)
    assert catalog.steps() == [1, 3]
    check_order(filesystem.done, str(tmp_path))


def check_order(done: list[tuple[str, ...]], root: str) -> None:
    """I4 and I5 of docs/durability.md, in terms of the recorded calls.

    After a directory was renamed into spare, spare and then root are synced before a file is moved out of it.  After
    that, the directory in spare is synced before the partial that the file was moved to gets its final name.
    """
    spare = str(Path(root) / SPARE)
    arrived: dict[str, int] = {}
    moved: dict[str, tuple[str, int]] = {}
    for now, (operation, *paths) in enumerate(done):
        if operation != "rename":
            continue
        source, target = paths
        directory = os.path.dirname(source)
        if os.path.dirname(target) == spare:
            arrived[target] = now
        elif os.path.dirname(directory) == spare:
            since = done[arrived.get(directory, -1) + 1 : now]
            assert ("sync", spare) in since, f"{source} was taken before its arrival was durable"
            assert ("sync", root) in since[since.index(("sync", spare)) :], f"{source} was taken before it had left"
            moved[os.path.dirname(target)] = directory, now
        elif source in moved:
            taken_from, at = moved.pop(source)
            assert ("sync", taken_from) in done[at:now], f"{target} was published before its files had left the spare"


# -- the content of reused files --------------------------------------------------------------------------------------


def test_a_spare_manifest_is_trusted_if_this_process_retired_the_step(
    catalog: Catalog, stored: tuple[Manifest, Path], tmp_path: Path
) -> None:
    """A spare found at open may have been overwritten before a power cut that brought it back: it is not trusted."""
    save(catalog, 2)
    Path(catalog.path(2), MANIFEST_NAME).write_bytes(encode(msgspec.structs.replace(stored[0], step=2)))
    save(catalog, 3)
    retire(catalog, 1)
    begun = catalog.begin(4, [DATA_NAME])
    assert begun.recycled == stored[0] and begun.reused == {DATA_NAME}
    catalog.discard(4)
    catalog.close()
    with_spare = Catalog(str(tmp_path), Filesystem(), spare_max=2, facts=StepFacts)
    begun = with_spare.begin(4, [DATA_NAME])
    assert begun.recycled is None and begun.reused == {DATA_NAME}
    with_spare.close()


@pytest.mark.parametrize("how", ["failed save", "manifest of another step", "damaged manifest"])
def test_no_other_spare_manifest_is_trusted(
    catalog: Catalog, stored: tuple[Manifest, Path], tmp_path: Path, how: str
) -> None:
    if how == "manifest of another step":
        stored[1].write_bytes(encode(msgspec.structs.replace(stored[0], step=7)))
    elif how == "damaged manifest":
        stored[1].write_bytes(stored[1].read_bytes()[:-5])
    save(catalog, 2)
    retire(catalog, 1)
    if how == "failed save":  # the save took the spare, and its files are deleted
        fill(begin(catalog, 3, [DATA_NAME]), b"3")
        catalog.discard(3)
        assert spares(tmp_path) == []
    begun = catalog.begin(3, [DATA_NAME])
    assert begun.recycled is None and begun.reused == (frozenset() if how == "failed save" else {DATA_NAME})


def test_a_file_that_is_not_moved_is_not_reused(catalog: Catalog, tmp_path: Path) -> None:
    save(catalog, 1)
    os.link(Path(catalog.path(1), DATA_NAME), tmp_path / "best.safetensors")
    save(catalog, 2)
    retire(catalog, 1)
    begun = catalog.begin(3, [DATA_NAME, "new.safetensors"])
    assert begun.reused == frozenset() and os.listdir(begun.path) == []


def test_a_directory_handle_of_a_retired_step_never_leads_to_a_later_step(catalog: Catalog) -> None:
    """As rsync or tar does inside it."""
    save(catalog, 1)
    handle = os.open(catalog.path(1), os.O_RDONLY | os.O_DIRECTORY)
    for step in (2, 3, 4):
        save(catalog, step)
        retire(catalog, 1)
        for name in os.listdir(handle):
            descriptor = os.open(name, os.O_RDONLY, dir_fd=handle)
            assert os.read(descriptor, 100) in (b"1", b"{}")
            os.close(descriptor)
    assert os.listdir(handle) == []
    os.close(handle)


# -- steps and spares that cannot be moved or deleted -----------------------------------------------------------------


class Stubborn(Filesystem):
    """Refuses to rename or unlink paths of a given name, with an errno."""

    def __init__(self, name: str, error: int) -> None:
        self.name, self.error = name, error

    def _refuse(self, operation: str, path: str) -> None:
        if self.name in path.split(os.sep):
            raise StorageError(self.error, operation, path)

    def rename(self, source: str, target: str) -> None:
        self._refuse("rename", source)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        if self.error != errno.EXDEV:
            self._refuse("unlink", path)
        super().unlink(path)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.EBUSY], ids=errno.errorcode.__getitem__)
def test_a_step_that_cannot_be_retired_is_passed_over_with_one_warning(tmp_path: Path, error: int) -> None:
    catalog = Catalog(
        str(tmp_path), Stubborn(step_name(1), error), spare_max=1, retention=Retention(last=2), facts=StepFacts
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(8):
            save(catalog, step)
            catalog.retire()
    assert catalog.steps() == [1, 6, 7]
    assert [str(w.message).split(": ")[0] for w in told] == [f"rename of {catalog.path(1)}"]
    with pytest.raises(StorageError):  # if it is named, it is an error
        catalog.delete(1)
    catalog.close()
    again = Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    again.retire()
    assert again.steps() == [6, 7]
    again.close()


def test_saves_go_on_beside_a_file_that_cannot_be_moved_or_deleted(tmp_path: Path) -> None:
    catalog = Catalog(
        str(tmp_path), Stubborn("stuck", errno.EPERM), spare_max=1, retention=Retention(last=1), facts=StepFacts
    )
    save(catalog, 0)
    Path(catalog.path(0), "stuck").touch()
    with pytest.warns(EngineWarning, match="stays, and is not used") as told:
        inodes = []
        for step in range(1, 6):
            inodes.append(save(catalog, step))
            catalog.retire()
    assert len(told) == 1 and len(set(inodes[1:])) == 2, "the others are recycled all the same"
    catalog.close()
    with pytest.warns(EngineWarning, match="is passed over"):
        again = Catalog(str(tmp_path), Stubborn("stuck", errno.EPERM), spare_max=1, facts=StepFacts)
    assert again.steps() == [5]
    again.close()


@pytest.mark.parametrize("damaged", [None, 3, 2])
def test_a_full_disk_costs_no_step_where_one_is_damaged(tmp_path: Path, damaged: int | None) -> None:
    """Those that the rule no longer keeps may be the last good ones."""
    catalog = Catalog(str(tmp_path), Filesystem(), spare_max=1, retention=Retention(last=3), facts=StepFacts)
    for step in (1, 2, 3):
        save(catalog, step)
    catalog.retention = Retention(last=1)
    if damaged is not None:
        catalog.distrust(damaged)
    assert catalog.free_surplus() is (damaged is None)
    assert catalog.steps() == ([3] if damaged is None else [1, 2, 3])
    begin(catalog, 4, [DATA_NAME])  # which gives up what is too much, too
    assert catalog.steps() == ([3] if damaged is None else [1, 2, 3])
    catalog.close()


def test_a_directory_that_cannot_be_renamed_to_spare_is_deleted(tmp_path: Path) -> None:
    """As for a directory in the lower layer of an overlay."""
    before = Catalog(str(tmp_path), Filesystem(), spare_max=1, retention=Retention(last=2), facts=StepFacts)
    save(before, 1)
    save(before, 2)
    fill(begin(before, 9, [DATA_NAME]), b"9")
    before.close()
    filesystem = Stubborn(step_name(1), errno.EXDEV)
    catalog = Catalog(str(tmp_path), filesystem, spare_max=1, facts=StepFacts)
    save(catalog, 3)
    catalog.retire()
    assert catalog.steps() == [2, 3] and names(tmp_path) == [step_name(2), step_name(3)]
    catalog.close()
    (tmp_path / f"{step_name(4)}.partial").mkdir()
    filesystem.name = f"{step_name(4)}.partial"
    Catalog(str(tmp_path), filesystem, spare_max=1, facts=StepFacts).close()
    assert names(tmp_path) == [step_name(2), step_name(3)]


# -- the rule ---------------------------------------------------------------------------------------------------------


def reopened(root: Path, retention: Retention | None = None) -> tuple[Retention, list[str], list[int]]:
    """The rule in effect after an open, the warnings, and the steps after one more save."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        catalog = Catalog(str(root), Filesystem(), spare_max=1, retention=retention, facts=StepFacts)
        save(catalog, max(catalog.steps(), default=0) + 1)
        catalog.retire()
    rule, steps = catalog.retention, catalog.steps()
    catalog.close()
    return rule, [str(warning.message) for warning in told], steps


def test_a_retention_rule_is_stored_with_the_run(tmp_path: Path) -> None:
    assert reopened(tmp_path / "new") == (Retention(last=2), [], [1])
    assert reopened(tmp_path / "new") == (Retention(last=2), [], [1, 2])
    for _ in range(9):
        reopened(tmp_path / "run", KEEP_ALL)
    assert reopened(tmp_path / "run") == (KEEP_ALL, [], list(range(1, 11)))
    rule, [told], steps = reopened(tmp_path / "run", Retention(last=2, every=5))
    assert "8 of 10 are retired" not in told and "7 of 10 are retired" in told, told
    assert (rule, steps) == (Retention(last=2, every=5), [5, 10, 11])
    assert reopened(tmp_path / "run") == (Retention(last=2, every=5), [], [5, 10, 11, 12])
    assert reopened(tmp_path / "run", Retention(last=2, every=5)) == (Retention(last=2, every=5), [], [5, 10, 12, 13])


def test_a_run_without_a_rule_keeps_everything_until_one_is_given(tmp_path: Path) -> None:
    for _ in range(3):
        reopened(tmp_path)
        (tmp_path / ".engine" / "retention.json").unlink(missing_ok=True)
    rule, told, steps = reopened(tmp_path)
    assert (rule, told, len(steps)) == (KEEP_ALL, [], 4)
    assert not (tmp_path / ".engine" / "retention.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"last": 0, "every": null, "best": null}', b"9" * 5000, b"\xff"]
)
def test_an_unreadable_stored_rule_keeps_everything(tmp_path: Path, content: bytes) -> None:
    for _ in range(3):
        reopened(tmp_path, KEEP_ALL)
    (tmp_path / ".engine" / "retention.json").write_bytes(content)
    rule, [told], steps = reopened(tmp_path)
    assert rule == KEEP_ALL and len(steps) == 4 and "every checkpoint is kept until" in told
    rule, told_again, steps = reopened(tmp_path, Retention(last=2))
    assert rule == Retention(last=2) and len(told_again) == 1 and len(steps) == 2


def test_a_directory_in_the_place_of_the_stored_rule_is_to_be_moved_away(tmp_path: Path) -> None:
    reopened(tmp_path, KEEP_ALL)
    path = tmp_path / ".engine" / "retention.json"
    path.unlink()
    path.mkdir()
    rule, [told], _ = reopened(tmp_path)
    assert rule == KEEP_ALL and told.count(str(path)) == 1 and "move it away" in told
    with pytest.raises(StorageError, match="move the directory away") as caught:
        reopened(tmp_path, Retention(last=2))
    assert caught.value.path == str(path) and not path.with_suffix(".json.new").exists()
    path.rmdir()
    assert reopened(tmp_path, Retention(last=2))[0] == Retention(last=2)


def test_a_rule_that_cannot_be_stored_is_kept_in_memory(tmp_path: Path) -> None:
    class Full(Filesystem):
        def write_new_file(self, path: str, content: bytes | bytearray) -> None:
            raise StorageError(errno.ENOSPC, "write", path)

    with pytest.warns(EngineWarning, match="could not be stored"):
        catalog = Catalog(str(tmp_path), Full(), spare_max=1, retention=Retention(last=3), facts=StepFacts)
    assert catalog.retention == Retention(last=3)
    catalog.close()


def test_tags_and_metrics_are_read_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def facts(step: int) -> StepFacts:
        asked.append(step)
        return StepFacts(step, tag="kept" if step == 2 else None)

    catalog = Catalog(str(tmp_path), Filesystem(), 1, Retention(last=1), facts)
    for step in range(6):
        save(catalog, step)
        catalog.retire()
    assert catalog.steps() == [2, 5] and asked == [0, 1, 2, 3, 4]
    catalog.close()


def test_delete_removes_a_step_and_frees_its_blocks(catalog: Catalog, filesystem: Recorded, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(catalog, step)
    fill(begin(catalog, 4, [DATA_NAME]), b"4")
    with pytest.raises(StepError, match="step 4 is being saved"):
        catalog.delete(4)
    with pytest.raises(NotFoundError, match="no step 7; committed steps: 1, 2, 3"):
        catalog.delete(7)
    with catalog.pinned(2), pytest.raises(StepError, match="step 2 is being read"):
        catalog.delete(2)
    filesystem.done.clear()
    catalog.delete(2)
    catalog.delete(3)
    assert [operation for operation, *_ in filesystem.done] == ["rename", "sync", "sync"] * 2
    assert (catalog.steps(), spares(tmp_path)) == ([1], [])
    catalog.publish(4)
    assert catalog.steps() == [1, 4]


# -- pins, rollback, damage -------------------------------------------------------------------------------------------


def test_a_pinned_step_is_not_retired(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        save(catalog, step)
    with catalog.pinned(1):
        with catalog.pinned(1):
            retire(catalog, 1)
            assert catalog.steps() == [1, 3]
        retire(catalog, 1)
        assert catalog.steps() == [1, 3]
        assert Path(catalog.path(1), DATA_NAME).read_bytes() == b"1"
    retire(catalog, 1)
    assert catalog.steps() == [3]


def test_a_pin_ends_when_its_reader_raises(catalog: Catalog) -> None:
    save(catalog, 1)
    save(catalog, 2)
    with pytest.raises(ZeroDivisionError), catalog.pinned(1):
        raise ZeroDivisionError
    retire(catalog, 1)
    assert catalog.steps() == [2]


def test_a_pin_ends_though_ctrl_c_strikes_in_place_of_its_end(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    save(catalog, 1)
    save(catalog, 2)
    reading = catalog.pinned(1)
    reading.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_mutex", Interrupting())
        with suppress(KeyboardInterrupt):
            reading.__exit__(None, None, None)
    retire(catalog, 1)
    assert catalog.steps() == [2]


def test_pinning_a_missing_step_is_refused(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match=r"no step 4; committed steps: none"), catalog.pinned(4):
        raise AssertionError
    save(catalog, 1)
    save(catalog, 3)
    with pytest.raises(NotFoundError, match=r"no step 4; committed steps: 1, 3"), catalog.pinned(4):
        raise AssertionError


def test_later_steps_are_retired_newest_first(catalog: Catalog, filesystem: Recorded, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(catalog, step)
    filesystem.done.clear()
    assert catalog.retire_after(2) == [4, 3]
    assert catalog.steps() == [1, 2]
    moved = [Path(source).name for operation, source, *_ in filesystem.done if operation == "rename"]
    assert moved == ["step-00000004", "step-00000003"]
    assert filesystem.done[-2:] == [("sync", str(tmp_path / SPARE)), ("sync", str(tmp_path))]
    assert catalog.retire_after(2) == []


def test_rollback_refuses_a_pinned_later_step(catalog: Catalog) -> None:
    for step in (1, 2, 3):
        save(catalog, step)
    with catalog.pinned(3), pytest.raises(StepError, match=r"\[3\] are being read"):
        catalog.retire_after(1)
    assert catalog.steps() == [1, 2, 3]


def test_a_damaged_step_is_set_aside_and_not_deleted(catalog: Catalog, filesystem: Recorded, tmp_path: Path) -> None:
    for _ in range(3):
        save(catalog, 1)
        aside = catalog.set_aside(1)
        assert aside is not None and catalog.steps() == []
        assert filesystem.done[-1] == ("sync", str(tmp_path))
        assert Path(aside, DATA_NAME).read_bytes() == b"1"
    assert names(tmp_path) == [f"step-00000001.damaged{again}" for again in ("", "-again", "-again-again")]
    save(catalog, 2)
    catalog.close()
    again = Catalog(str(tmp_path), Filesystem(), spare_max=2, facts=StepFacts)
    assert again.steps() == [2]
    again.close()


def test_a_damaged_step_that_was_deleted_by_hand_is_forgotten(catalog: Catalog) -> None:
    for step in (1, 2):
        save(catalog, step)
    shutil.rmtree(catalog.path(2))
    with pytest.raises(CorruptError, match="missing"), catalog.opened(2):
        raise AssertionError
    assert catalog.set_aside(2) is None
    save(catalog, 2)
    assert catalog.steps() == [1, 2]


@pytest.mark.parametrize("what", ["file", "link", "directory"])
def test_a_foreign_file_named_like_the_step_is_refused_before_anything_is_written(
    catalog: Catalog, tmp_path: Path, what: str
) -> None:
    path = tmp_path / step_name(3)
    {"file": path.touch, "link": lambda: path.symlink_to(tmp_path), "directory": path.mkdir}[what]()
    remedy = "open a new Engine" if what == "directory" else "move it away"
    with pytest.raises(StepError, match=rf"in the way of step 3.*{remedy}"):
        catalog.begin(3, [DATA_NAME])
    assert names(tmp_path) == [step_name(3)]
    save(catalog, 4)


def test_a_step_set_aside_without_a_sync_is_not_listed(catalog: Catalog, filesystem: Recorded, tmp_path: Path) -> None:
    save(catalog, 1)
    filesystem.refuse("sync_directory")
    with pytest.raises(StorageError):
        catalog.set_aside(1)
    assert (catalog.steps(), names(tmp_path)) == ([], ["step-00000001.damaged"])


# -- manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(catalog: Catalog) -> tuple[Manifest, Path]:
    """A committed step 1 with a manifest."""
    layout = lay_out([])
    plan = plan_of(layout, [], ALIGNMENT, ALIGNMENT)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        min_reader=READER,
        step=1,
        checkpoint_id="0" * 32,
        created_ns=0,
        block_bytes=ALIGNMENT,
        files=tuple(FileRecord(*file) for file in plan.files),
        chunks=chunk_records(plan, chunk_layers(plan, layout), [bytes(16)]),
        segments=(),
        aliases={},
        optimizers={},
        extra=None,
    )
    save(catalog, 1)
    path = Path(catalog.path(1), MANIFEST_NAME)
    path.write_bytes(encode(manifest))
    catalog.vouch(1, {DATA_NAME: Stamp.of(os.stat(Path(catalog.path(1), DATA_NAME)))}, {})
    return manifest, path


def read_manifest(catalog: Catalog, step: int) -> tuple[Manifest, int]:
    with catalog.opened(step) as opened:
        return opened.manifest()


def test_a_manifest_is_read(catalog: Catalog, stored: tuple[Manifest, Path]) -> None:
    manifest, path = stored
    assert read_manifest(catalog, 1) == (manifest, path.stat().st_size)


def damage(path: Path) -> dict[str, Callable[[], object]]:
    """Ways in which a manifest can be damaged."""
    elsewhere = path.with_name("elsewhere")

    def link() -> None:
        path.rename(elsewhere)
        path.symlink_to(elsewhere)

    def directory() -> None:
        path.unlink()
        path.mkdir()

    def fifo() -> None:
        path.unlink()
        os.mkfifo(path)

    def no_directory() -> None:
        path.unlink()
        (path.parent / DATA_NAME).unlink()
        path.parent.rmdir()

    return {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "a bit flipped": lambda: path.write_bytes(path.read_bytes().replace(b'"step":1,', b'"step":2,')),
        "a link": link,
        "a directory": directory,
        "a fifo": fifo,
        "no directory": no_directory,
    }


@pytest.mark.parametrize("how", damage(Path("any")))
def test_a_missing_or_unreadable_manifest_is_an_error(
    catalog: Catalog, stored: tuple[Manifest, Path], how: str
) -> None:
    damage(stored[1])[how]()
    with pytest.raises((CorruptError, StorageError)):
        read_manifest(catalog, 1)


def test_a_manifest_of_another_step_is_refused(catalog: Catalog, stored: tuple[Manifest, Path]) -> None:
    save(catalog, 2)
    Path(catalog.path(2), MANIFEST_NAME).write_bytes(stored[1].read_bytes())
    with pytest.raises(CorruptError, match="manifest of step 1"):
        read_manifest(catalog, 2)


# -- opening ----------------------------------------------------------------------------------------------------------


def test_an_unfinished_save_becomes_a_spare(tmp_path: Path, filesystem: Recorded) -> None:
    inodes = []
    for name in ("step-00000007.partial", "step-123456789.partial"):
        (tmp_path / name).mkdir()
        inodes.append(fill(str(tmp_path / name), b"unfinished"))
    catalog = Catalog(str(tmp_path), filesystem, spare_max=2, facts=StepFacts)
    assert (catalog.steps(), names(tmp_path), len(spares(tmp_path))) == ([], [], 2)
    assert {save(catalog, 8), save(catalog, 9)} == set(inodes)
    assert Path(catalog.path(8), DATA_NAME).read_bytes() == b"8"
    check_order(filesystem.done, str(tmp_path))
    catalog.close()


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    save_one = Catalog(str(tmp_path), Filesystem(), spare_max=2, facts=StepFacts)
    save(save_one, 5)
    save_one.close()
    directories = ["step-5", "step-000000005", "step-00000006.damaged", "step-00000006.partial.old", "xstep-00000007"]
    directories += ["step-00000008x", "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669", "notes"]
    for name in directories:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    (tmp_path / "step-00000011").symlink_to(tmp_path / "step-00000005")
    (tmp_path / "step-00000012.partial").write_text("a file")
    (tmp_path / "step-00000013.partial").symlink_to(tmp_path / "notes")
    before = names(tmp_path)
    catalog = Catalog(str(tmp_path), Filesystem(), spare_max=2, facts=StepFacts)
    assert catalog.steps() == [5]
    assert names(tmp_path) == before
    assert spares(tmp_path) == []
    catalog.close()


def test_renames_of_an_earlier_process_are_synced_at_open(tmp_path: Path, filesystem: Recorded) -> None:
    (tmp_path / "step-00000001").mkdir()
    catalog = Catalog(str(tmp_path), filesystem, spare_max=2, facts=StepFacts)
    assert catalog.steps() == [1]
    assert ("sync", str(tmp_path)) in filesystem.done
    catalog.close()

    filesystem.refuse("sync_directory")
    with pytest.raises(StorageError):
        Catalog(str(tmp_path), filesystem, spare_max=2, facts=StepFacts)
    Catalog(
        str(tmp_path), filesystem, spare_max=2, facts=StepFacts
    ).close()  # the failed catalog does not hold the lock


def test_a_path_where_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        Catalog(str(tmp_path / "file" / "runs"), Filesystem(), spare_max=1, facts=StepFacts)
    assert caught.value.errno == errno.ENOTDIR


def test_a_path_too_long_for_a_save_is_refused_at_open(tmp_path: Path) -> None:
    root = tmp_path
    while len(str(root)) < 3_900:
        root = root / ("d" * 200)
    with pytest.raises(StorageError, match="use a directory with a shorter path"):
        Catalog(str(root), Filesystem(), spare_max=1, facts=StepFacts)
    assert os.listdir(tmp_path) == []


# -- the lock ---------------------------------------------------------------------------------------------------------


def test_a_directory_has_one_catalog_at_a_time(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(LockedError, match=rf"{tmp_path} is in use by another Engine \(process {os.getpid()}\)"):
        Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    catalog.close()
    catalog.close()
    Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts).close()


def test_a_refused_catalog_changes_nothing(catalog: Catalog, tmp_path: Path) -> None:
    catalog.begin(1, [DATA_NAME])
    with pytest.raises(LockedError):
        Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    assert names(tmp_path) == ["step-00000001.partial"], "another's save in flight was taken for a leftover"


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".engine").mkdir()
    (tmp_path / ".engine" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError) as caught:
        Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", [".engine", ".engine/spare"])
def test_a_link_to_the_directories_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    Catalog(str(other), Filesystem(), spare_max=1, facts=StepFacts).close()
    before = (other / ".engine/lock").stat().st_mtime_ns
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(other / name)
    with pytest.raises(StorageError) as caught:
        Catalog(str(run), Filesystem(), spare_max=1, facts=StepFacts)
    assert caught.value.errno == errno.ELOOP and caught.value.path == str(run / name)
    assert (other / ".engine/lock").stat().st_mtime_ns == before


def test_a_started_program_does_not_hold_the_lock(catalog: Catalog, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], close_fds=False) as sleeper:
        catalog.close()
        try:
            Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts).close()
        finally:
            sleeper.kill()


HOLD = """
import os, sys, time
from engine.store.catalog import Catalog
from engine.store.filesystem import Filesystem

catalog = Catalog(sys.argv[1], Filesystem(), spare_max=1)
forked = sys.argv[2] == "forked"
if not forked or os.fork() == 0:
    print(os.getpid() if forked else 0, flush=True)  # in the child, once it has closed its copy of the lock
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "forked"])
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, how: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), how], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(LockedError, match=rf"process {holder.pid}\b"):
            Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        Catalog(
            str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts
        ).close()  # the forked child is alive, and does not hold the lock
    finally:
        holder.stdout.close()
        holder.kill()
        if child:
            os.kill(child, signal.SIGKILL)


FORK_IN_CLOSE = """
import os, select, signal, sys, threading, warnings
from engine.store.catalog import Catalog
from engine.store.filesystem import Filesystem

class Stopping(Filesystem):
    def close(self, descriptor):
        if sys.argv[2] == "after":
            super().close(descriptor)
        if threading.current_thread() is closing:
            inside.set()
            assert forked.wait(60)
        if sys.argv[2] == "before":
            super().close(descriptor)

inside, forked, closing = threading.Event(), threading.Event(), None
catalog = Catalog(sys.argv[1], Stopping(), spare_max=1)
closing = threading.Thread(target=catalog.close)
closing.start()
assert inside.wait(60)
told, tell = os.pipe()
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads is the point
child = os.fork()
if child == 0:
    catalog.close()
    os.write(tell, b"x")
    signal.pause()
try:
    assert select.select([told], [], [], 20)[0], "the child hangs"
    forked.set()
    closing.join()
    Catalog(sys.argv[1], Filesystem(), spare_max=1).close()  # the child lives on, and does not hold the lock
finally:
    forked.set()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_fork_while_another_thread_closes_the_lock_harms_neither_process(tmp_path: Path, moment: str) -> None:
    """The child's one thread is not the one that has the lock of close, which nobody there gives back."""
    result = subprocess.run(
        [sys.executable, "-c", FORK_IN_CLOSE, str(tmp_path), moment],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("first", ["run", "copy"])
def test_a_copy_made_of_hard_links_is_not_in_use(tmp_path: Path, first: str) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    running = Catalog(str(root), Filesystem(), spare_max=1, facts=StepFacts)
    if first == "copy":  # copied while no engine has it open
        running.close()
    subprocess.run(["cp", "-al", str(root), str(copy)], check=True)
    if first == "copy":
        running = Catalog(str(root), Filesystem(), spare_max=1, facts=StepFacts)
    of_copy = Catalog(str(copy), Filesystem(), spare_max=1, facts=StepFacts)
    for taken in (root, copy):
        with pytest.raises(LockedError, match=rf"{taken} is in use by another Engine \(process {os.getpid()}\)"):
            Catalog(str(taken), Filesystem(), spare_max=1, facts=StepFacts)
    for catalog in (running, of_copy):
        save(catalog, 1)
        catalog.close()
    assert sorted(os.listdir(copy / ".engine")) == ["lock", "retention.json", "spare"]


def test_one_of_many_concurrent_opens_of_a_copy_succeeds(tmp_path: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    with ExitStack() as opened:
        opened.callback(Catalog(str(root), Filesystem(), spare_max=1, facts=StepFacts).close)
        subprocess.run(["cp", "-al", str(root), str(copy)], check=True)
        got: list[Catalog | None] = []

        def attempt() -> None:
            try:
                got.append(Catalog(str(copy), Filesystem(), spare_max=1, facts=StepFacts))
            except LockedError:
                got.append(None)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [catalog for catalog in got if catalog is not None]
        for catalog in winners:
            opened.callback(catalog.close)
    assert len(got) == 8 and len(winners) == 1


def test_a_holder_in_another_pid_namespace_is_not_named_as_a_process_here(tmp_path: Path) -> None:
    class Elsewhere(Filesystem):
        def pid_namespace(self) -> int:
            return 1

    holder = Catalog(str(tmp_path), Elsewhere(), spare_max=1, facts=StepFacts)
    with pytest.raises(LockedError, match=rf"a process of another PID namespace, {os.getpid()} there"):
        Catalog(str(tmp_path), Filesystem(), spare_max=1, facts=StepFacts)
    holder.close()


# -- operations in any order ------------------------------------------------------------------------------------------

REFUSALS = ["rename", "sync_directory"]


class Directory(RuleBasedStateMachine):
    """A catalog, compared with the set of steps that must exist."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = ExitStack()
        self.root = self.exit.enter_context(tempfile.TemporaryDirectory())
        self.filesystem = Recorded()
        self.committed: set[int] = set()
        self.partial: set[int] = set()
        self.pins: dict[int, ExitStack] = {}
        self.next_step = 0
        self.armed: tuple[str, int] | None = None
        self.sound = True  # nothing was refused since the last open

    @initialize(spare_max=st.integers(1, 3))
    def open(self, spare_max: int) -> None:
        self.spare_max = spare_max
        self.catalog = Catalog(self.root, self.filesystem, spare_max, facts=StepFacts)

    def teardown(self) -> None:
        for pin in self.pins.values():
            pin.close()
        if hasattr(self, "catalog"):
            self.catalog.close()
        self.exit.close()

    def attempt(self, call: Callable[[], object]) -> bool:
        """Whether an operation succeeded; only an armed fault may make it fail."""
        armed, self.filesystem.armed = self.armed, self.armed
        self.armed = None
        try:
            call()
        except StorageError as error:
            demanded = error.errno == errno.ENOTRECOVERABLE and not self.sound
            assert armed is not None or demanded, "refused, though nothing was armed"
            return False
        finally:
            self.sound &= armed is None or self.filesystem.armed is not None
            self.filesystem.armed = None
        return True

    @rule(operation=st.sampled_from(REFUSALS), spared=st.integers(0, 2))
    def arm(self, operation: str, spared: int) -> None:
        """Refuse a call of the next rule; `spared` of the same kind succeed before it."""
        self.armed = (operation, spared)

    @rule(skipped=st.integers(1, 3))
    def begin(self, skipped: int) -> None:
        self.next_step += skipped
        step = self.next_step
        if self.attempt(lambda: fill(begin(self.catalog, step, [DATA_NAME]), str(step).encode())):
            self.partial.add(step)
        else:
            self.catalog.discard(step)

    @precondition(lambda self: self.partial)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.partial)))
        self.partial.discard(step)
        if self.attempt(lambda: self.catalog.publish(step)):
            self.committed.add(step)
        else:
            self.catalog.discard(step)

    @precondition(lambda self: self.partial)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.partial)))
        self.partial.discard(step)
        self.catalog.discard(step)

    @rule(keep=st.integers(1, 3))
    def retire(self, keep: int) -> None:
        newest, may_stay = set(sorted(self.committed)[-keep:]), self.committed
        sound = self.sound
        succeeded = self.attempt(lambda: retire(self.catalog, keep))
        self.committed = set(self.catalog.steps())
        assert newest | self.pins.keys() & may_stay <= self.committed <= may_stay
        if succeeded and sound and self.sound:
            assert self.committed == newest | self.pins.keys()
            assert len(os.listdir(Path(self.root) / SPARE)) <= self.spare_max

    @precondition(lambda self: self.committed - self.pins.keys())
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed - self.pins.keys())))
        self.pins[step] = ExitStack()
        self.pins[step].enter_context(self.catalog.pinned(step))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pins.pop(data.draw(st.sampled_from(sorted(self.pins)))).close()

    @precondition(lambda self: self.committed and not self.pins)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed)))
        before = self.committed
        succeeded = self.attempt(lambda: self.catalog.retire_after(step))
        self.committed = set(self.catalog.steps())
        assert {s for s in before if s <= step} <= self.committed <= before
        assert not succeeded or max(self.committed) == step

    @precondition(lambda self: self.committed - self.pins.keys())
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed - self.pins.keys())))
        self.attempt(lambda: self.catalog.set_aside(step))
        self.committed = set(self.catalog.steps())

    @precondition(lambda self: self.committed - self.pins.keys())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed - self.pins.keys())))
        before = self.committed
        succeeded = self.attempt(lambda: self.catalog.delete(step))
        self.committed = set(self.catalog.steps())
        assert before - {step} <= self.committed <= before
        assert not succeeded or step not in self.committed

    @rule()
    def reopen(self) -> None:
        """As after a kill: partials become spares."""
        self.armed = None
        for pin in self.pins.values():
            pin.close()
        self.pins = {}
        self.catalog.close()
        self.catalog = Catalog(self.root, self.filesystem, self.spare_max, facts=StepFacts)
        self.partial, self.sound = set(), True
        assert len(os.listdir(Path(self.root) / SPARE)) <= self.spare_max

    @invariant()
    def what_is_listed_is_there_and_is_its_own(self) -> None:
        if not hasattr(self, "catalog"):
            return
        assert self.catalog.steps() == sorted(self.committed)
        on_disk = {name for name in os.listdir(self.root) if name.startswith("step-") and "." not in name}
        assert on_disk == {step_name(step) for step in self.committed}
        for step in self.committed:
            assert Path(self.catalog.path(step), DATA_NAME).read_bytes() == str(step).encode()
        for step in self.partial:
            assert Path(self.catalog.partial_path(step), DATA_NAME).read_bytes() == str(step).encode()

    @invariant()
    def names_move_in_order(self) -> None:
        check_order(self.filesystem.done, self.root)


TestDirectory = Directory.TestCase
TestDirectory.settings = settings(max_examples=60, stateful_step_count=30)
