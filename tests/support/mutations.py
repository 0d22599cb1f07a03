"""Mutations: the ways to break the durability sequence, one at a time.

Theory of operation.  Each row of `MUTATIONS` changes the running code, not its files: it drops the fsync of one line of
docs/durability.md, swaps two lines, or removes a guard.  `tests/store/test_crash.py` requires that the simulator
detects each.  The row names the scenario that detects it, and whether a kill must come first.

An fsync is named by the function that calls it, the end of its path, and its number where that function calls it more
than once.  `commit_in` is `engine.store.commit.commit` with its lines in another order; a test compares it with the
real one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

from cases import KILL, PLAIN, Case, Recorder, every_plain, every_second
from recorder import Change, RecordingFilesystem, World
from scenarios import SCENARIOS
from simulator import Create, Rename

from engine.errors import StorageError
from engine.format.manifest import MANIFEST_NAME
from engine.io.descriptor import Descriptor
from engine.store import committer
from engine.store.catalog import Catalog
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner


class Drop(NamedTuple):
    """An fsync that is dropped; `place` is its number among those of this path in this function."""

    function: str
    suffix: str | tuple[str, ...]
    place: int | None = None


class Mutation(NamedTuple):
    """A way to break the code, and where to look for the damage."""

    change: Change
    scenario: str = "first_save"
    nesting: int = PLAIN

    def cases(self, recorder: Recorder) -> Iterator[Case]:
        """The scenario that shows the damage; kills only right after a name was added or removed."""
        index = list(SCENARIOS).index(self.scenario)
        if self.nesting == PLAIN:
            return every_plain(recorder, [index])
        operations = recorder.scenario(index).trace.operations
        names = [stop for stop, last in enumerate(operations, 1) if isinstance(last, Create | Rename)]
        return every_second(recorder, index, self.nesting, names)


def _called_by(function: str) -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == function:
            return True
    return False


def without(*drops: Drop) -> Change:
    """Leave fsyncs out."""

    class Forgetful(RecordingFilesystem):
        def __init__(self, world: World) -> None:
            super().__init__(world)
            self._counts: Counter[Drop] = Counter()

        def _sync(self, operation: str, path: str, sync: Callable[[str], None]) -> None:
            for drop in drops:
                if path.endswith(drop.suffix) and _called_by(drop.function):
                    place, self._counts[drop] = self._counts[drop], self._counts[drop] + 1
                    if drop.place in (None, place):
                        return
            super()._sync(operation, path, sync)

    @contextmanager
    def change() -> Iterator[type[RecordingFilesystem]]:
        yield Forgetful

    return change


def patched(target: object, name: str, value: object) -> Change:
    """Replace a function of the engine."""

    @contextmanager
    def change() -> Iterator[type[RecordingFilesystem]]:
        with mock.patch.object(target, name, value):
            yield RecordingFilesystem

    return change


def commit_in(order: str) -> Callable[..., str]:
    """`commit` with its lines in this order; C5 and C7 go with C6, and R1 retires everything."""

    def commit(
        catalog: Owner,
        step: int,
        small_files: Mapping[str, bytes],
        manifest: bytes,
        await_turn: Callable[[], None],
    ) -> str:
        filesystem, files = catalog.filesystem, catalog.files(step)
        where = catalog.partial_path(step)
        for line in order.split():
            paths = [os.path.join(where, os.path.basename(file.path)) for file in files]
            if line == "C1":
                for file, path in zip(files, paths, strict=True):
                    filesystem.truncate(file.descriptor, file.nbytes, path)
            elif line == "C2":
                for file, path in zip(files, paths, strict=True):
                    filesystem.sync_file(file.descriptor, path)
            elif line == "C3":
                await_turn()
                filesystem.write_new_file(os.path.join(where, MANIFEST_NAME), manifest)
            elif line == "C4":
                filesystem.sync_directory(where)
            elif line == "C6":
                stamps = catalog.stamps(step)
                where = catalog.publish(step)
                catalog.vouch(step, stamps, {})
            else:
                assert line == "R1", line
                catalog._retire(catalog.steps())
        catalog._close_files(step)
        return where

    return commit


def reordered(order: str) -> Change:
    """Commit in another order."""
    return patched(committer, "commit", commit_in(order))


class _Stubborn(RecordingFilesystem):
    """Tries a failed fsync of a file again, and believes the second."""

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        try:
            super().sync_file(descriptor, path)
        except StorageError:
            super().sync_file(descriptor, path)


def stubborn() -> AbstractContextManager[type[RecordingFilesystem]]:
    """Trust the second fsync after a failed one."""
    return nullcontext(_Stubborn)


def _sync_and_forget(self: Catalog, path: str) -> None:
    self.filesystem.sync_directory(path)


_recover = Catalog._recover


def _promote(self: Catalog) -> Sequence[int]:
    """Take every directory with a manifest for a checkpoint."""
    for name in self.filesystem.list_directory(self.root):
        path = os.path.join(self.root, name)
        if name.endswith(".partial") and MANIFEST_NAME in os.listdir(path):
            self.filesystem.rename(path, path.removesuffix(".partial"))
    return _recover(self)


def _retire_newest(self: Catalog) -> None:
    self._retire(self.steps()[self.retention.last :])


# By the broken part, named by the lines of docs/durability.md.
MUTATIONS: dict[str, Mutation] = {
    "C2 left out: fsync of the data files": Mutation(without(Drop("seal", ".safetensors"))),
    "C3 left out: fsync of the manifest": Mutation(without(Drop("publish", "manifest.json"))),
    "C4 left out: fsync of the partial": Mutation(without(Drop("publish", ".partial"))),
    "C7 left out: fsync of the root after the rename": Mutation(without(Drop("publish", "/run"))),
    "C5 left out: fsync of the spare that the files came from": Mutation(
        without(Drop("publish", "/00000001")), "recycled_save"
    ),
    "S1 left out: fsync of a writer's part": Mutation(without(Drop("seal", ".json")), "several_writers"),
    "S1 and C4 left out: fsync of the partial, of all writers": Mutation(
        without(Drop("publish", ".partial"), Drop("seal", ".partial")), "several_writers"
    ),
    "O6 left out: fsync of the spares": Mutation(
        without(Drop("_recover", ("/00000001", "/00000002"))), "recycled_save", KILL
    ),
    "R2 left out: fsync of spare": Mutation(without(Drop("_retire", "/spare")), "retirement"),
    "R2 left out: fsync of the root": Mutation(without(Drop("_retire", "/run")), "recycled_save"),
    "R2 left out: both, a spare is taken before its retirement is durable": Mutation(
        without(Drop("_retire", "/spare"), Drop("_retire", "/run")), "recycled_save"
    ),
    "O1 and O3 left out: fsync of the root's parent": Mutation(
        without(Drop("_make_directories", ""), Drop("_recover", "", 0))
    ),
    "O3 left out: fsync of the root's parent": Mutation(without(Drop("_recover", "", 0)), nesting=KILL),
    "O3 and O5 left out: fsync of the root": Mutation(without(Drop("_recover", "/run")), nesting=KILL),
    "O3 and O5 left out: fsync of spare": Mutation(without(Drop("_recover", "/spare")), "retirement", KILL),
    "C2 before C1: truncate after the fsync": Mutation(reordered("C2 C1 C3 C4 C6")),
    "C6 before C2: rename before the data's fsync": Mutation(reordered("C1 C3 C4 C6 C2")),
    "C6 before C3: rename before the manifest is written": Mutation(reordered("C1 C2 C6 C3 C4")),
    "C6 before C4: rename before the partial's fsync": Mutation(reordered("C1 C2 C3 C6 C4")),
    "C4 before C3: fsync of the partial before its last name": Mutation(reordered("C1 C2 C4 C3 C6")),
    "R1 before C6: retire before publishing": Mutation(reordered("C1 C2 C3 C4 R1 C6"), "recycled_save"),
    "R1 takes the newest instead of the oldest": Mutation(patched(Catalog, "retire", _retire_newest), "recycled_save"),
    "a failed fsync of a file is tried again and trusted": Mutation(stubborn, "failure_sync_file"),
    "a failed fsync of a directory is forgotten": Mutation(
        patched(Catalog, "_sync", _sync_and_forget), "failure_sync_directory/run"
    ),
    "C4 left out, with a linked file": Mutation(without(Drop("publish", ".partial")), "linked_save"),
    "B2 overwrites a file that has another name": Mutation(
        patched(Filesystem, "is_ours_alone", lambda self, path: True), "linked_leftovers"
    ),
    "B2 overwrites a retired file that a committed step shares": Mutation(
        patched(Filesystem, "is_ours_alone", lambda self, path: True), "linked_rollback"
    ),
    "L1 keeps every link, also where a block has changed": Mutation(
        patched(committer, "changed_files", lambda *_: {}), "linked_change"
    ),
    "L1 copies no block of a file that has changed": Mutation(
        patched(Owner, "_copy", lambda *_: None), "linked_change"
    ),
    "an open takes a partial with a manifest for a step": Mutation(
        patched(Catalog, "_recover", _promote), nesting=KILL
    ),
}
