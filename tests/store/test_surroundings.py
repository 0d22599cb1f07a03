"""Surroundings of a run: full disks, overlays, files without O_DIRECT, odd paths and clocks.

Each works, or is an error that names a remedy, and the named remedy is tried.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from disk import FailingFilesystem
from volumes import XFS_BYTES_MIN, as_root, volume

import engine
from engine.store.directory import OpenedStep
from engine.store.filesystem import Filesystem

SMALL: dict[str, Any] = {"staging_bytes": 8 << 20, "block_bytes": 1 << 20, "max_async": 1}


@contextmanager
def opened(root: Path | str | bytes, **options: Any) -> Iterator[engine.Engine]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'io_uring_plain' is used", engine.EngineWarning)
        eng = engine.Engine(root, **{**SMALL, **options})
    with eng:
        yield eng


def arena_of(nbytes: int) -> engine.Arena:
    return engine.Arena.wrap({"w": torch.zeros(nbytes, dtype=torch.uint8)})


def save(eng: engine.Engine, arena: engine.Arena, step: int) -> None:
    arena.state_dict()["w"].fill_(step)
    eng.checkpoint(arena, step=step).result()


def holds(eng: engine.Engine, step: int) -> bool:
    return bool(eng.load(step)["w"].eq(step).all())


def fill_up(root: Path, left: int) -> None:
    """Fill the disk up to this many free bytes."""
    free = Filesystem().free_bytes(str(root))
    assert free is not None
    with (root / "hog").open("ab") as hog:
        os.posix_fallocate(hog.fileno(), hog.tell(), free - left)


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "nbytes"), [("ext4", 128 << 20), ("xfs", XFS_BYTES_MIN)])
def test_recycled_saves_need_no_free_room(kind: str, nbytes: int) -> None:
    """XFS refuses fallocate(2) over existing blocks unless as many are free."""
    arena = arena_of((24 << 20) + 100)
    with volume(kind, nbytes) as root, opened(root / "run", keep=2) as eng:
        for step in range(4):
            save(eng, arena, step)
        fill_up(root, 8 << 20)
        for step in range(4, 9):
            save(eng, arena, step)
        assert eng.steps() == [7, 8] and holds(eng, 7) and holds(eng, 8)


def test_only_the_missing_blocks_of_a_longer_file_are_allocated() -> None:
    """Existing blocks are not allocated again, and no hole is left."""
    with volume("ext4", 64 << 20) as root:
        filesystem, path = Filesystem(), str(root / "file")
        for nbytes in (5000, 4096 * 4, 4096 * 4 + 1, 4096 * 9):
            descriptor = filesystem.open_for_blocks(path, write=True, direct=False)
            filesystem.allocate(descriptor, nbytes, path)
            assert os.fstat(descriptor.number).st_size == nbytes
            assert os.fstat(descriptor.number).st_blocks * 512 >= nbytes
            os.pwrite(descriptor.number, b"x" * nbytes, 0)
            os.fsync(descriptor.number)
            filesystem.close(descriptor)
        descriptor = filesystem.open_for_blocks(path, write=True, direct=False)
        os.truncate(path, 0)
        os.pwrite(descriptor.number, b"x", 4096 * 5)
        filesystem.allocate(descriptor, 4096 * 9, path)
        assert os.fstat(descriptor.number).st_blocks * 512 >= 4096 * 9
        filesystem.close(descriptor)


def test_the_remedies_for_a_full_disk_help(tmp_path: Path) -> None:
    arena = arena_of(20 << 20)
    with volume("ext4", 64 << 20) as root:
        with opened(root / "run", keep=2) as eng:
            save(eng, arena, 1)
            save(eng, arena, 2)
            fill_up(root, 2 << 20)
            with pytest.raises(engine.NoSpaceError, match="free space or lower keep"):
                save(eng, arena, 3)
        with pytest.warns(engine.EngineWarning, match="1 of 2 are retired"), opened(root / "run", keep=1) as eng:
            assert eng.steps() == [1, 2]
            save(eng, arena, 3)
            assert eng.steps() == [3]
            save(eng, arena, 4)  # which recycles step 2
        for spare in (root / "run/.engine/spare").iterdir():
            shutil.rmtree(spare)
        fill_up(root, 2 << 20)
        with opened(root / "run", keep=1) as eng:
            with pytest.raises(engine.NoSpaceError, match="no older checkpoint is there") as refused:
                save(eng, arena, 5)
            assert "lower keep" not in str(refused.value) and eng.steps() == [4] and holds(eng, 4)
            (root / "hog").unlink()
            save(eng, arena, 5)
            assert eng.steps() == [5]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.__getitem__)
def test_surplus_steps_are_deleted_when_the_quota_is_reached(tmp_path: Path, error: int) -> None:
    """statvfs(3) does not report quotas: the file system refuses when blocks are allocated."""
    arena = arena_of(100)
    with opened(tmp_path, keep=None) as eng:
        for step in range(3):
            save(eng, arena, step)
    filesystem = FailingFilesystem()
    with pytest.warns(engine.EngineWarning, match="2 of 3 are retired"):
        eng = engine.Engine(tmp_path, filesystem=filesystem, keep=1, **SMALL)
    with eng:
        filesystem.fail_next("allocate", error)
        save(eng, arena, 3)
        assert eng.steps() == [3]
        filesystem.fail_next("allocate", error)
        with pytest.raises(engine.StorageError):  # only the newest is left
            for spare in (tmp_path / ".engine/spare").iterdir():
                shutil.rmtree(spare)
            save(eng, arena, 4)
        assert eng.steps() == [3]


def test_a_save_that_has_begun_gets_the_room_of_every_spare_left(tmp_path: Path) -> None:
    """With two spares a save takes one; at a quota the other must not refuse it."""
    arena = arena_of(100)
    filesystem = FailingFilesystem()
    with engine.Engine(tmp_path, filesystem=filesystem, keep=1, **SMALL) as eng:
        for step in range(3):
            save(eng, arena, step)
        spares = tmp_path / ".engine/spare"
        [spare] = spares.iterdir()
        shutil.copytree(spare, spares / "00000099")  # as saves that overlap leave it
        filesystem.fail_next("allocate", errno.EDQUOT)
        save(eng, arena, 3)
        assert len(list(spares.iterdir())) == 1, "step 2 alone, which was retired after the save"


# -- file systems -----------------------------------------------------------------------------------------------------


def test_a_run_in_the_lower_layer_of_an_overlay_can_be_continued() -> None:
    arena = arena_of(1 << 20)
    with volume("ext4", 64 << 20) as root:
        for name in ("lower", "upper", "work", "merged"):
            (root / name).mkdir()
        with opened(root / "lower/run", keep=2) as eng:
            for step in range(4):
                save(eng, arena, step)
        (root / "lower/run/step-00000007.partial").mkdir()
        layers = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
        subprocess.run(
            [*as_root(), "mount", "-t", "overlay", "overlay", "-o", layers, str(root / "merged")], check=True
        )
        try:
            with opened(root / "merged/run", keep=2) as eng:
                assert eng.steps() == [2, 3] and holds(eng, 2) and holds(eng, 3)
                for step in range(10, 14):
                    save(eng, arena, step)
                assert eng.steps() == [12, 13] and holds(eng, 12) and holds(eng, 13)
        finally:
            subprocess.run([*as_root(), "umount", str(root / "merged")], check=True)


@contextmanager
def without_direct(suffix: str) -> Iterator[list[str]]:
    """Files with these endings refuse O_DIRECT; returns the refused paths."""
    real, refused = os.open, []

    def refusing(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT and str(path).endswith(suffix):
            refused.append(str(path))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *arguments, **options)

    with mock.patch("os.open", refusing):
        yield refused


def test_a_file_that_refuses_direct_io_is_opened_buffered() -> None:
    """The directory took O_DIRECT when the backend was chosen."""
    arena = arena_of((3 << 20) + 77)
    with volume("ext4", 64 << 20) as root, opened(root / "run") as eng:
        assert eng.backend != "buffered"
        with without_direct("model.safetensors") as refused:
            save(eng, arena, 1)
            arena.state_dict()["w"].zero_()
            assert eng.restore(arena).step == 1 and holds(eng, 1) and eng.verify() == ()
        assert len(refused) == 4


def test_a_host_without_fallocate_saves(tmp_path: Path) -> None:
    with mock.patch("engine.store.filesystem.allocate", lambda *_: errno.ENOSYS), opened(tmp_path) as eng:
        save(eng, arena_of(10_000), 1)
        assert holds(eng, 1)


# -- user actions -----------------------------------------------------------------------------------------------------


def test_a_step_deleted_by_hand_is_passed_over_and_can_be_saved_again(tmp_path: Path) -> None:
    arena = arena_of(100)
    with opened(tmp_path) as eng:
        save(eng, arena, 1)
        save(eng, arena, 2)
        shutil.rmtree(tmp_path / "step-00000002")
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            assert eng.restore(arena).step == 1
        save(eng, arena, 2)
        assert eng.steps() == [1, 2] and holds(eng, 2)


def test_opening_with_defaults_deletes_nothing(tmp_path: Path) -> None:
    arena = arena_of(100)
    with opened(tmp_path, keep=None) as eng:
        for step in range(10):
            save(eng, arena, step)
    with opened(tmp_path) as eng:
        save(eng, arena, 10)
        assert eng.steps() == list(range(11))


@pytest.mark.parametrize("path", ["", b"", "run\0", b"run\0"])
def test_an_invalid_path_is_refused(path: Any) -> None:
    for act in (engine.Engine, engine.probe, lambda path: engine.checkpoint(arena_of(1), path)):
        with pytest.raises(engine.ArgumentError, match="it must be a path"):
            act(path)


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    with opened(os.fsencode(tmp_path / "run")) as eng:
        save(eng, arena_of(100), 1)
    assert (tmp_path / "run" / "step-00000001").is_dir()


def test_a_clock_before_1970_stops_no_save(tmp_path: Path) -> None:
    with opened(tmp_path) as eng:
        with mock.patch.object(time, "time_ns", lambda: -5):
            save(eng, arena_of(100), 1)
        assert holds(eng, 1) and eng.verify(1) == ()


def test_a_step_retired_while_it_is_verified_is_retired_and_not_damaged(tmp_path: Path) -> None:
    arena = arena_of(100)
    with opened(tmp_path, keep=1) as eng:
        save(eng, arena, 1)
        manifest = OpenedStep.manifest

        def late(step: OpenedStep) -> Any:
            mock.patch.stopall()  # a recycled save reads a manifest too
            for number in (2, 3, 4):
                save(eng, arena, number)
            return manifest(step)

        mock.patch.object(OpenedStep, "manifest", late).start()
        with engine.open(tmp_path) as run, pytest.raises(engine.errors.RetiredError, match=r"step 1 .* was retired"):
            run.verify(1)
        assert eng.steps() == [4] and eng.verify(4) == ()


@pytest.mark.parametrize(
    ("act", "path", "place", "remedy"),
    [
        (engine.Engine, "file", "file", "a directory is needed there, and not a file"),
        (engine.Engine, "file/runs/x", "file", "a directory is needed there, and not a file"),
        (engine.Engine, "loop", "loop", "name the real directory"),
        (engine.probe, "file", "file", "a directory is needed there, and not a file"),
        (engine.probe, "nowhere", "nowhere", "probe a directory that exists, such as its parent"),
    ],
)
def test_a_path_that_is_no_directory_is_named_with_what_helps(
    tmp_path: Path, act: Callable[..., Any], path: str, place: str, remedy: str
) -> None:
    """And not with what helps while an Engine is open: nothing has been removed or replaced."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(engine.StorageError, match=remedy) as caught:
        act(tmp_path / path)
    assert caught.value.path == str(tmp_path / place) and str(tmp_path / place) in str(caught.value)
    assert "something else" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.remedy, str(again)) == (caught.value.remedy, str(caught.value))


def test_where_no_directory_can_be_made_another_path_helps() -> None:
    with pytest.raises(engine.StorageError, match=r"mkdir of /proc/runs: No such .*; no directory can be made there"):
        engine.Engine("/proc/runs")


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(engine.NotFoundError, match=f"{tmp_path}/file is no run: it is not a directory; check"):
        engine.open(tmp_path / "file")
