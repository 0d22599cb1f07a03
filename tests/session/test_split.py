"""Files of untrained tensors are linked from the checkpoint before as long as nothing in them changes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same, stored
from hooked import HookedFilesystem
from torch import nn

import engine
from engine.errors import CorruptError, StorageError
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner
from engine.store.stamps import Stamp, Stamps

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 16 << 10, "split_untrained": True}

TRAINED, FROZEN, BUFFERS = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


class Adapted(nn.Module):
    """A frozen layer of some blocks, an adapter that is trained, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(200, 200)
        self.adapter = nn.Linear(4, 200)
        self.norm = nn.BatchNorm1d(200)
        self.base.requires_grad_(False)


@pytest.fixture
def model() -> Adapted:
    return Adapted()


@pytest.fixture
def arena(model: Adapted) -> engine.Arena:
    trained = [param for param in model.parameters() if param.requires_grad]
    return engine.Arena.adopt(model, torch.optim.AdamW(trained))


@pytest.fixture
def eng(tmp_path: Path) -> Iterator[engine.Engine]:
    with engine.Engine(tmp_path, keep=2, max_async=1, **SMALL) as opened:
        yield opened


def file_of(eng: engine.Engine, step: int, name: str = FROZEN) -> Path:
    return Path(eng.info(step).path, name)


def save(eng: engine.Engine, arena: engine.Arena, step: int) -> int:
    """Save, check what is stored with the stock library, and return the inode of the frozen parameters' file."""
    now = {name: tensor.clone() for name, tensor in arena.state_dict().items()}
    info = eng.checkpoint(arena, step).result()
    there = stored(Path(info.path).parent, step)
    assert there.keys() == now.keys() and all(same(there[name], now[name]) for name in now)
    assert eng.verify(step) == ()
    return file_of(eng, step).stat().st_ino


def train(model: Adapted) -> None:
    """Change the adapter, as a step does."""
    with torch.no_grad():
        model.adapter.weight.add_(1)


def test_unchanged_files_are_linked(eng: engine.Engine, model: Adapted, arena: engine.Arena) -> None:
    inodes = set()
    for step in range(1, 8):
        train(model)
        inodes.add(save(eng, arena, step))
        assert eng.steps() == [step - 1, step][-min(step, 2) :]
    assert len(inodes) == 1
    assert file_of(eng, 7, BUFFERS).stat().st_ino == file_of(eng, 6, BUFFERS).stat().st_ino
    assert file_of(eng, 7, TRAINED).stat().st_ino != file_of(eng, 6, TRAINED).stat().st_ino
    names = {"manifest.json", "model.safetensors.index.json", "optimizer.safetensors", TRAINED, FROZEN, BUFFERS}
    assert set(os.listdir(eng.info(7).path)) == names


def test_a_linked_file_is_not_written(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        save(eng, arena, 1)
        frozen = file_of(eng, 1).stat()
        second = eng.checkpoint(arena, 2)
        second.result()
        written = sum(
            path.stat().st_size for path in Path(eng.info(2).path).glob("*.safetensors") if path.stat().st_nlink == 1
        )
        assert second.stats()["io_bytes"] <= written + 3 * 4096
        after = file_of(eng, 2).stat()
        assert (after.st_ino, after.st_mtime_ns) == (frozen.st_ino, frozen.st_mtime_ns)


def test_a_changed_block_makes_a_new_file(eng: engine.Engine, model: Adapted, arena: engine.Arena) -> None:
    first = save(eng, arena, 1)
    before = file_of(eng, 1).read_bytes()
    model.base.weight[7, 7] = 3
    second = save(eng, arena, 2)
    assert second != first and file_of(eng, 1).read_bytes() == before
    assert save(eng, arena, 3) == second
    for step in range(4, 12):  # a file that changes each time takes turns with a recycled one, a block at a time
        model.base.weight[step, step] = 3
        save(eng, arena, step)


def test_changed_buffers_leave_the_frozen_parameters_linked(
    eng: engine.Engine, model: Adapted, arena: engine.Arena
) -> None:
    inodes = set()
    for step in range(1, 6):
        assert model.norm.running_mean is not None
        model.norm.running_mean.add_(1)
        inodes.add(save(eng, arena, step))
    assert len(inodes) == 1


def test_a_file_that_changes_back_is_right(eng: engine.Engine, model: Adapted, arena: engine.Arena) -> None:
    """Links, recycled files and written ones in every order."""
    old = model.base.weight.clone()
    for step in range(1, 30):
        if (step * 7) % 5 in (0, 3):
            model.base.weight[step % 200] = float(step % 3)
        elif step % 11 == 0:
            model.base.weight.copy_(old)
        train(model)
        save(eng, arena, step)


@pytest.mark.parametrize("take_back", [lambda eng: eng.rollback(1), lambda eng: eng.delete(2)])
def test_a_step_that_is_saved_again_is_not_taken_for_the_first_one(
    eng: engine.Engine, model: Adapted, arena: engine.Arena, take_back: Callable[[engine.Engine], object]
) -> None:
    save(eng, arena, 1)
    save(eng, arena, 2)
    take_back(eng)
    first = model.base.weight.clone()
    model.base.weight.add_(1)
    save(eng, arena, 2)
    model.base.weight.copy_(first)  # as in the first step 2, whose files are gone
    save(eng, arena, 3)


def test_files_are_linked_after_a_rollback(eng: engine.Engine, model: Adapted, arena: engine.Arena) -> None:
    save(eng, arena, 1)
    save(eng, arena, 9)
    eng.rollback(1)
    train(model)
    assert save(eng, arena, 2) == save(eng, arena, 3)


def test_a_rolled_back_step_is_not_overwritten_where_it_is_shared(
    eng: engine.Engine, model: Adapted, arena: engine.Arena
) -> None:
    save(eng, arena, 1)
    save(eng, arena, 2)
    eng.rollback(1)
    model.base.weight.add_(1)
    save(eng, arena, 2)
    model.base.weight.add_(1)
    eng.checkpoint(arena, 3).result()
    assert eng.verify(2) == () and eng.verify(3) == ()


def test_an_engine_links_only_what_it_has_sealed_itself(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        first = save(eng, arena, 1)
    with engine.Engine(tmp_path, **SMALL) as eng:
        second = save(eng, arena, 2)
        assert second != first and save(eng, arena, 3) == second


def test_rewrite_all_links_nothing(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, keep=None, rewrite_all=True, **SMALL) as eng:
        assert len({save(eng, arena, step) for step in range(1, 4)}) == 3


def write_in_place(path: Path) -> None:
    """As `rsync --inplace --times` does."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(50_000)
        file.write(bytes([1]) * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def touch(path: Path) -> None:
    os.chmod(path, 0o600)


@pytest.mark.parametrize("harm", [write_in_place, replace, touch, Path.unlink])
def test_a_file_that_others_have_touched_is_not_linked(
    eng: engine.Engine, arena: engine.Arena, harm: Callable[[Path], object]
) -> None:
    save(eng, arena, 1)
    save(eng, arena, 2)
    harm(file_of(eng, 2))
    third = save(eng, arena, 3)
    assert third not in {path.stat().st_ino for path in Path(eng.info(2).path).iterdir()}
    assert save(eng, arena, 4) == third


def rot(path: Path, offset: int) -> None:
    """Flip a bit, as a medium does: no time changes (see `without_ctime`)."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def without_ctime(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(status: os.stat_result) -> Stamp:
        return Stamp(status.st_ino, status.st_size, status.st_mtime_ns, 0)

    monkeypatch.setattr(Stamp, "of", of)


@pytest.mark.usefixtures("without_ctime")
def test_bit_rot_in_a_linked_file_is_found_in_every_step_that_has_it(
    tmp_path: Path, model: Adapted, arena: engine.Arena
) -> None:
    with engine.Engine(tmp_path, keep=None, max_async=1, **SMALL) as eng:
        shared = [save(eng, arena, step) for step in (1, 2, 3)]
        rot(file_of(eng, 2), 70_000)
        eng.checkpoint(arena, 4).result()
        for step in (1, 2, 3, 4):
            (damage,) = eng.verify(step)
            assert (damage.path, damage.offset) == (str(file_of(eng, step)), 65_536)
        assert save(eng, arena, 5) not in shared, "what a reader has found damaged in any step is written anew"


@pytest.mark.usefixtures("without_ctime")
def test_damage_found_while_a_save_links_the_file_ends_the_links(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.Engine(tmp_path, keep=None, max_async=1, **SMALL) as eng:
        first = save(eng, arena, 1)
        catalog = eng._store.catalog
        assert isinstance(catalog, Owner)
        settle = catalog.settle_links

        def verify_first(step: int, changed: Any) -> None:
            rot(file_of(eng, 1), 70_000)
            assert eng.verify(1)
            settle(step, changed)

        with monkeypatch.context() as patch:
            patch.setattr(eng._store.catalog, "settle_links", verify_first)
            eng.checkpoint(arena, 2).result()
        assert save(eng, arena, 3) != first


@pytest.mark.usefixtures("without_ctime")
def test_bit_rot_is_not_copied_into_a_new_file(eng: engine.Engine, model: Adapted, arena: engine.Arena) -> None:
    save(eng, arena, 1)
    rot(file_of(eng, 1), 70_000)
    model.base.weight[0, 0] = 3
    with pytest.raises(CorruptError, match="the next save writes the file whole"):
        eng.checkpoint(arena, 2).result()
    assert eng.steps() == [1]
    save(eng, arena, 2)


class Refusing(HookedFilesystem):
    """Refuses one operation with an error."""

    def __init__(self, operation: str, error: int) -> None:
        self.refused, self.error, self.is_armed = operation, error, True

    def before(self, operation: str, path: str, target: str = "") -> None:
        if self.is_armed and operation == self.refused:
            raise StorageError(self.error, operation, path)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_where_links_are_refused_every_file_is_written(tmp_path: Path, arena: engine.Arena, error: int) -> None:
    with engine.Engine(tmp_path, keep=2, max_async=1, filesystem=Refusing("link", error), **SMALL) as eng:
        saves = [save(eng, arena, step) for step in range(1, 6)]
        assert saves[0] != saves[1] and saves[3] == saves[0], "and recycled, as without links"
        last = eng.checkpoint(arena, 6)
        last.result()
        assert last.stats()["io_bytes"] < 100_000, "and unchanged blocks are elided"


@pytest.mark.parametrize("operation", ["link", "read_range", "write_range"])
def test_a_failing_disk_fails_the_save_and_the_next_one_writes_everything(
    tmp_path: Path, model: Adapted, arena: engine.Arena, operation: str
) -> None:
    disk = Refusing(operation, errno.EIO)
    with engine.Engine(tmp_path, keep=2, max_async=1, filesystem=disk, **SMALL) as eng:
        first = save(eng, arena, 1)
        model.base.weight[0, 0] = 3
        with pytest.raises(StorageError):
            eng.checkpoint(arena, 2).result()
        assert eng.steps() == [1] and eng.verify(1) == ()
        disk.is_armed = False
        second = save(eng, arena, 2)
        assert second != first and save(eng, arena, 3) == second


def test_a_shared_spare_is_never_overwritten(tmp_path: Path, model: Adapted, arena: engine.Arena) -> None:
    """The partial of a killed save has a link to a committed step's file, and the next engine takes it for a spare."""
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:
        save(eng, arena, 1)
        partial = tmp_path / "step-00000002.partial"
        partial.mkdir()
        os.link(file_of(eng, 1), partial / FROZEN)
    with engine.Engine(tmp_path, keep=2, max_async=1, **SMALL) as eng:
        model.base.weight.add_(1)
        save(eng, arena, 2)
        assert eng.verify(1) == ()


def test_the_option_lays_an_adopted_arena_out_at_its_first_save(
    tmp_path: Path, model: Adapted, arena: engine.Arena
) -> None:
    assert [file.name for file in arena.layout.files] == ["model.safetensors", "optimizer.safetensors"]
    with engine.Engine(tmp_path, **SMALL) as eng:
        save(eng, arena, 1)
    assert [file.name for file in arena.layout.files] == [TRAINED, FROZEN, BUFFERS, "optimizer.safetensors"]
    early = engine.Arena.adopt(Adapted(), split_untrained=True)
    assert [file.name for file in early.layout.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_split_checkpoint_is_restored_into_any_layout(tmp_path: Path) -> None:
    model = Adapted().requires_grad_(False)
    model.adapter.requires_grad_(True)
    arena = engine.Arena.adopt(model, torch.optim.AdamW(model.adapter.parameters()))
    want = {name: tensor.clone() for name, tensor in arena.state_dict().items()}
    with engine.Engine(tmp_path, **SMALL) as eng:
        for step in (1, 2, 3):
            eng.checkpoint(arena, step).result()
    other = Adapted().requires_grad_(False)
    other.adapter.requires_grad_(True)
    whole = engine.Arena.adopt(other, torch.optim.AdamW(other.adapter.parameters()))
    engine.open(tmp_path).restore(whole)
    assert all(same(tensor, want[name]) for name, tensor in whole.state_dict().items())


def test_stamps_follow_our_own_operations_and_no_others(tmp_path: Path) -> None:
    stamps, path = Stamps(Filesystem()), tmp_path / "a"
    path.write_bytes(b"content")
    stamp = Stamp.of(path.stat())
    assert stamps.link(str(path), str(tmp_path / "b"), stamp)
    stamps.rename(str(tmp_path / "b"), str(tmp_path / "c"))
    stamps.unlink(str(path))
    assert Stamp.of((tmp_path / "c").stat()) != stamp, "the ctime has changed"
    assert stamps.holds(stamp, str(tmp_path / "c"))
    write_and_set_the_time_back = (tmp_path / "c").stat().st_mtime_ns
    (tmp_path / "c").write_bytes(b"CONTENT")
    os.utime(tmp_path / "c", ns=(0, write_and_set_the_time_back))
    assert not stamps.holds(stamp, str(tmp_path / "c"))
    assert not stamps.link(str(tmp_path / "c"), str(tmp_path / "d"), stamp)
    stamps.rename(str(tmp_path / "c"), str(tmp_path / "d"))
    assert not stamps.holds(stamp, str(tmp_path / "d")), "a move of ours does not hide the write before it"
