"""What is on disk: never more than the rule keeps and twice `max_async`, at any operation of any life of a run.

`Watched` counts after every operation that makes, moves or deletes a name.  A checkpoint here is one data file, and
files are moved by rename, so the number of data files is the number of checkpoints, whichever directory they are in.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import StorageError
from engine.io.descriptor import Descriptor
from engine.store.filesystem import Filesystem

STAGING: dict[str, Any] = {"staging_bytes": 64 << 10, "block_bytes": 8 << 10}


class Watched(Filesystem):
    """Counts checkpoints and directories under `root`, one operation at a time.

    Attributes:
        most: the most data files, and the most directories of checkpoints, that there ever were.
        die_at: from this operation on every operation is refused, as if the process were gone.
        fault: called with each operation's name and path; may raise.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mutex = threading.RLock()
        self.most_files = self.most_directories = self.count = 0
        self.die_at: Callable[[str, str], bool] = lambda _operation, _path: False
        self.dead = False
        self.fault: Callable[[str, str], None] = lambda _operation, _path: None

    def _do(self, operation: str, path: str, act: Callable[[], Any]) -> Any:
        with self.mutex:
            self.count += 1
            self.dead = self.dead or self.die_at(operation, path)
            if self.dead:
                raise StorageError(errno.EIO, operation, path)
            self.fault(operation, path)
            result = act()
            files, directories = look(self.root)
            self.most_files = max(self.most_files, files)
            self.most_directories = max(self.most_directories, directories)
            return result

    def make_directory(self, path: str) -> None:
        self._do("make_directory", path, lambda: Filesystem.make_directory(self, path))

    def rename(self, source: str, target: str) -> None:
        self._do("rename", target, lambda: Filesystem.rename(self, source, target))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: Filesystem.unlink(self, path))

    def remove_directory(self, path: str) -> None:
        self._do("remove_directory", path, lambda: Filesystem.remove_directory(self, path))

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self._do("allocate", path, lambda: Filesystem.allocate(self, descriptor, nbytes, path))

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        def act() -> Descriptor:
            return Filesystem.open_for_blocks(self, path, write, direct, directory)

        opened: Descriptor = self._do("open_for_blocks", path, act)
        return opened

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        self._do("sync_file", path, lambda: Filesystem.sync_file(self, descriptor, path))

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        self._do("write_new_file", path, lambda: Filesystem.write_new_file(self, path, content))


def look(root: Path) -> tuple[int, int]:
    """The data files under a run, and the directories step-*, partial and spare."""
    files = len(list(root.rglob("*.safetensors")))
    return files, len(list(root.glob("step-*"))) + len(list(root.glob(".engine/spare/*")))


def live(root: Path, filesystem: Watched, save_count: int, keep: int, max_async: int) -> None:
    """Open the run, make saves without waiting for them, and close it."""
    tensor = torch.zeros(20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", engine.EngineWarning)
        with engine.Engine(root, keep=keep, max_async=max_async, filesystem=filesystem, **STAGING) as eng:
            for _ in range(save_count):
                tensor.add_(1)
                eng.checkpoint(engine.Arena.wrap({"a": tensor.clone()}))


@pytest.mark.parametrize(("keep", "max_async"), [(1, 1), (1, 4), (2, 2), (3, 1)])
def test_a_run_stays_within_its_room(tmp_path: Path, keep: int, max_async: int) -> None:
    filesystem = Watched(tmp_path)
    for _ in range(2):
        live(tmp_path, filesystem, 12, keep, max_async)
    assert keep < filesystem.most_files <= keep + 2 * max_async
    assert filesystem.most_directories <= keep + 2 * max_async
    assert look(tmp_path)[0] <= keep + max_async


@pytest.mark.parametrize(("keep", "max_async"), [(1, 1), (2, 3)])
def test_failed_saves_stay_within_the_room(tmp_path: Path, keep: int, max_async: int) -> None:
    """Saves fail at random operations, and the deletion of what they leave fails at times, too."""
    chance = random.Random(keep)

    def fault(operation: str, path: str) -> None:
        if operation in ("allocate", "write_new_file", "sync_file", "open_for_blocks") and chance.random() < 0.1:
            raise StorageError(chance.choice([errno.EIO, errno.ENOSPC]), operation, path)
        if operation == "unlink" and ".partial" in path and chance.random() < 0.7:
            raise StorageError(errno.EIO, operation, path)

    filesystem = Watched(tmp_path)
    for _ in range(3):
        filesystem.fault = lambda _operation, _path: None
        with engine.Engine(tmp_path, keep=keep, max_async=max_async, filesystem=filesystem, **STAGING) as eng:
            filesystem.fault = fault
            failures = 0
            for _ in range(25):
                save = eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(20_000)}))
                failures += save.exception() is not None
            assert failures > 2
            filesystem.fault = lambda _operation, _path: None
            eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(20_000)})).result()
            assert look(tmp_path)[0] <= keep + max_async
    assert filesystem.most_files <= keep + 2 * max_async


def test_a_leftover_of_a_failed_save_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    filesystem = Watched(tmp_path)
    with engine.Engine(tmp_path, filesystem=filesystem, **STAGING) as eng:

        def refuse(operation: str, path: str) -> None:
            if operation in ("sync_file", "unlink"):
                raise StorageError(errno.EIO, operation, path)

        for _ in range(3):
            filesystem.fault = refuse
            assert eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(20_000)})).exception() is not None
        assert look(tmp_path)[0] == 1
        filesystem.fault = lambda _operation, _path: None
        eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(20_000)}), step=9).result()
        assert os.listdir(tmp_path / ".engine" / "spare") == [] and look(tmp_path) == (1, 1)


@pytest.mark.parametrize(("keep", "max_async"), [(1, 1), (2, 2)])
def test_kills_in_a_row_between_commit_and_retirement_stay_within_the_room(
    tmp_path: Path, keep: int, max_async: int
) -> None:
    """Each leaves one more checkpoint than the rule keeps."""
    most = 0
    for number in range(8):
        filesystem = Watched(tmp_path)
        filesystem.die_at = lambda operation, path, number=number: (  # type: ignore[misc]
            number >= keep
            and operation == "rename"
            and Path(path).parent.name == "spare"
            and ".partial" not in path
            and any(name == f"step-{number:08d}" for name in os.listdir(tmp_path))
        )
        live(tmp_path, filesystem, 1, keep, max_async)
        most = max(most, filesystem.most_files)
    assert keep + 1 <= most <= keep + 2 * max_async


@pytest.mark.parametrize(("keep", "max_async"), [(1, 1), (2, 3)])
def test_kills_at_any_operation_stay_within_the_room(tmp_path: Path, keep: int, max_async: int) -> None:
    chance = random.Random(max_async)
    most = 0
    for _ in range(25):
        filesystem = Watched(tmp_path)
        last = chance.randint(15, 120)
        filesystem.die_at = lambda _operation, _path, filesystem=filesystem, last=last: filesystem.count > last  # type: ignore[misc]
        live(tmp_path, filesystem, 8, keep, max_async)
        most = max(most, filesystem.most_files)
    assert most <= keep + 2 * max_async
    live(tmp_path, Watched(tmp_path), 3, keep, max_async)
    assert look(tmp_path)[0] <= keep + max_async


def test_a_damaged_newest_step_keeps_older_ones_until_the_next_commit(tmp_path: Path) -> None:
    """Though there are more of them than the rule keeps and saves in flight need."""
    arena = engine.Arena.wrap({"a": torch.zeros(20_000)})
    with engine.Engine(tmp_path, keep=None, **STAGING) as eng:
        for step in range(6):
            eng.checkpoint(arena, step=step).result()
    data = tmp_path / "step-00000005" / "model.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    seen: list[list[str]] = []
    filesystem = Watched(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", engine.EngineWarning)
        with engine.Engine(tmp_path, keep=1, max_async=1, filesystem=filesystem, **STAGING) as eng:
            assert eng.restore(arena).step == 4

            def fault(operation: str, path: str) -> None:
                if operation == "sync_file":
                    seen.append(sorted(path.name for path in tmp_path.glob("step-*") if path.suffix != ".partial"))

            filesystem.fault = fault
            eng.checkpoint(arena, step=9).result()
            assert eng.steps() == [9]
    assert seen and all("step-00000004" in names for names in seen)
