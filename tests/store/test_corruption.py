"""Damage of every kind is found, named, and never restored.

Theory of operation.  `sound` makes a checkpoint of two files with several chunks and blocks, and an older one, once.
Every test damages a copy.  `ruined` then checks the engine: an explicit step raises and names the location, "the
newest" is the older one bit for bit, with a warning, and `verify` finds the same location.  The chunk and the tensors
of a byte are computed here from the manifest's JSON, as docs/format.md describes it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from jobs import until
from leaks import held
from strategies import sealed

import engine
from engine.errors import ArenaError, CorruptError, LockedError, MismatchError, NotFoundError, StepError, StorageError
from engine.format.layout import TensorSpec, lay_out
from engine.format.manifest import decode
from engine.io.backend import open_like
from engine.io.binding import block_checksum
from engine.state.tensors import decode as decode_extra
from engine.store import reader as reader_module
from fuzz.limits import allocating_at_most
from fuzz.manifest import BYTES_PER_BYTE

BLOCK = 4096
NEW, OLD = "step-00000002", "step-00000001"
MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"


def opened(directory: Path, **options: Any) -> engine.Engine:
    """An Engine with blocks so small that a file has several."""
    return engine.Engine(directory, **{"staging_bytes": 16 * BLOCK, "block_bytes": BLOCK, "keep": None} | options)


class Training(NamedTuple):
    """An arena that is stored in two files, and the tensors in it."""

    arena: engine.Arena

    def fill(self, value: float) -> None:
        for index, tensor in enumerate(self.arena.state_dict().values()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + value + index)

    def held(self) -> dict[str, bytes]:
        return {name: tensor.numpy().tobytes() for name, tensor in self.arena.state_dict().items()}


def training() -> Training:
    """Tensors of 4800 bytes, so that some cross blocks; and enough others for a header of two blocks in the optimizer's
    file, so that chunks of the two files do not end at the same bytes."""
    norms = (torch.nn.LayerNorm(40) for _ in range(12))
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 40), *norms)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    model(torch.ones(40)).square().sum().backward()
    optimizer.step()
    return Training(arena)


class Sound(NamedTuple):
    """A directory of two checkpoints of one layout, the content of the older one, and the manifest of the newer."""

    directory: Path
    older: dict[str, bytes]
    body: dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    directory = tmp_path_factory.mktemp("sound")
    state = training()
    with opened(directory) as eng:
        state.fill(1)
        eng.checkpoint(state.arena, step=1, chunk_bytes=2 * BLOCK).result()
        older = state.held()
        state.fill(2)
        eng.checkpoint(state.arena, step=2, chunk_bytes=2 * BLOCK).result()
        assert eng.verify() == eng.verify(1) == ()
    return Sound(directory, older, json.loads((directory / NEW / MANIFEST).read_bytes())["body"])


@pytest.fixture
def copy(sound: Sound, tmp_path: Path) -> Path:
    """A directory to damage."""
    return shutil.copytree(sound.directory, tmp_path / "copy")


def blocks(body: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """(file, chunk, offset, nbytes) of every block."""
    for chunk in body["chunks"]:
        for offset in range(chunk["offset"], chunk["offset"] + chunk["nbytes"], body["block_bytes"]):
            nbytes = min(body["block_bytes"], chunk["offset"] + chunk["nbytes"] - offset)
            yield body["files"][chunk["file"]]["name"], chunk["index"], offset, nbytes


def tensors_in(body: dict[str, Any], file: str, start: int, end: int) -> list[str]:
    """The tensors in a range of a file."""
    index = [row["name"] for row in body["files"]].index(file)
    return [s[0] for s in body["segments"] if s[5] == index and s[6] < end and s[6] + s[7] > start]


def told(names: list[str]) -> str:
    """Tensors as a message shows them."""
    if not names:
        return "the header"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} tensors more" if len(names) > 4 else "")


def ruined(directory: Path, sound: Sound, *places: str) -> tuple[engine.Damage, ...]:
    """The newer checkpoint is refused, every message names all of `places`, and the older one is restored."""
    state = training()
    with opened(directory) as eng:
        damage = eng.verify(2)
        assert damage and any(all(place in row.reason for place in places) for row in damage), damage
        assert eng.verify() == damage and eng.verify(1) == ()
        for read in (lambda: eng.restore(state.arena, step=2), lambda: eng.load(2)):
            with pytest.raises(CorruptError) as caught:
                read()
            assert all(place in str(caught.value) for place in places), caught.value
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            info = eng.restore(state.arena)
        assert info.step == 1 and [bad.step for bad in info.passed_over] == [2]
        assert all(place in info.passed_over[0].reason for place in places)
        assert state.held() == sound.older
    return damage


def at(sound: Sound, file: str, offset: int) -> tuple[str, ...]:
    """The texts that a message must have about the block of this byte."""
    for name, chunk, start, nbytes in blocks(sound.body):
        if name == file and start <= offset < start + nbytes:
            names = told(tensors_in(sound.body, file, start, start + nbytes))
            return f"{NEW}/{file}", f"byte {start} ", f"chunk {chunk},", f"affected: {names}"
    raise AssertionError("no such byte")


# -- bits -------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_block_changes_its_checksum(sound: Sound) -> None:
    checksums = []
    for chunk in sound.body["chunks"]:
        checksums += [bytes.fromhex(text) for text in chunk["checksums"]]
    for (name, _, offset, nbytes), checksum in zip(blocks(sound.body), checksums, strict=True):
        block = bytearray((sound.directory / NEW / name).read_bytes()[offset : offset + nbytes])
        assert block_checksum(block) == checksum
        for bit in range(8 * nbytes):
            block[bit // 8] ^= 1 << bit % 8
            assert block_checksum(block) != checksum, (name, offset, bit)
            block[bit // 8] ^= 1 << bit % 8


def test_every_flipped_bit_of_the_manifest_is_noticed(sound: Sound) -> None:
    raw = bytearray((sound.directory / NEW / MANIFEST).read_bytes())
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError):
            decode(bytes(raw))
        raw[bit // 8] ^= 1 << bit % 8


def test_verify_finds_one_flipped_bit_in_every_block(sound: Sound, copy: Path) -> None:
    rng = random.Random(1)
    with opened(copy) as eng:
        for _ in range(200):
            content = {file: bytearray((sound.directory / NEW / file).read_bytes()) for file in (MODEL, OPTIMIZER)}
            chosen = [block for block in blocks(sound.body) if rng.random() < 0.5]
            for file, _, offset, nbytes in chosen:
                content[file][offset + rng.randrange(nbytes)] ^= 1 << rng.randrange(8)
            for file, damaged in content.items():
                (copy / NEW / file).write_bytes(damaged)
            found = {(Path(row.path).name, row.chunk, row.offset, row.tensors) for row in eng.verify(2)}
            assert found == {
                (file, chunk, offset, tuple(tensors_in(sound.body, file, offset, offset + nbytes)))
                for file, chunk, offset, nbytes in chosen
            }


@pytest.mark.parametrize("place", range(12))
def test_a_flipped_bit_is_named(sound: Sound, copy: Path, place: int) -> None:
    rng = random.Random(place)
    all_blocks = list(blocks(sound.body))
    file, chunk, start, nbytes = all_blocks[place % len(all_blocks)]
    offset = start + rng.randrange(nbytes)
    content = bytearray((copy / NEW / file).read_bytes())
    content[offset] ^= 1 << rng.randrange(8)
    (copy / NEW / file).write_bytes(content)
    [damage] = ruined(copy, sound, *at(sound, file, offset))
    names = tuple(tensors_in(sound.body, file, start, start + nbytes))
    assert (damage.path, damage.chunk, damage.offset, damage.tensors) == (str(copy / NEW / file), chunk, start, names)


# -- blocks and files in the wrong place ------------------------------------------------------------------------------


def test_swapped_and_duplicated_blocks_are_named(sound: Sound, copy: Path) -> None:
    original = (copy / NEW / MODEL).read_bytes()
    first, second = original[BLOCK : 2 * BLOCK], original[2 * BLOCK : 3 * BLOCK]
    (copy / NEW / MODEL).write_bytes(original[:BLOCK] + second + first + original[3 * BLOCK :])
    assert [row.offset for row in ruined(copy, sound, *at(sound, MODEL, BLOCK))] == [BLOCK, 2 * BLOCK]
    (copy / NEW / MODEL).write_bytes(original[:BLOCK] + first + first + original[3 * BLOCK :])
    assert [row.offset for row in ruined(copy, sound, *at(sound, MODEL, 2 * BLOCK))] == [2 * BLOCK]


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_another_checkpoints_file_of_the_same_layout_is_found(sound: Sound, copy: Path, file: str) -> None:
    shutil.copy(copy / OLD / file, copy / NEW / file)
    damage = ruined(copy, sound, f"{NEW}/{file}")
    # The header is the same in both files, so its blocks verify.
    data = next(row["header_bytes"] for row in sound.body["files"] if row["name"] == file)
    assert [row.offset for row in damage] == [o for name, _, o, _ in blocks(sound.body) if name == file and o >= data]


def test_swapped_files_and_another_checkpoints_manifest_are_found(sound: Sound, copy: Path) -> None:
    new = copy / NEW
    (new / MODEL).rename(new / "other")
    (new / OPTIMIZER).rename(new / MODEL)
    (new / "other").rename(new / OPTIMIZER)
    ruined(copy, sound, f"{NEW}/{MODEL}")
    shutil.rmtree(new)
    shutil.copytree(sound.directory / NEW, new)
    shutil.copy(copy / OLD / MANIFEST, new / MANIFEST)
    [damage] = ruined(copy, sound, f"{NEW}/{MANIFEST}", "step 1")
    assert (damage.path, damage.chunk, damage.tensors) == (str(new / MANIFEST), None, None)


# -- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 8, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, -BLOCK, -1])
@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_a_truncated_file_is_named_with_its_missing_bytes(sound: Sound, copy: Path, file: str, nbytes: int) -> None:
    whole = (copy / NEW / file).stat().st_size
    left = nbytes % whole if nbytes < 0 else nbytes
    os.truncate(copy / NEW / file, left)
    lost = tensors_in(sound.body, file, left, whole)
    chunk = next(c for name, c, start, size in blocks(sound.body) if name == file and start <= left < start + size)
    damage = ruined(copy, sound, f"{NEW}/{file}", f"{left} bytes", f"chunk {chunk}", f"affected: {told(lost)}")
    assert (damage[0].chunk, damage[0].offset, damage[0].tensors) == (chunk, left, tuple(lost))
    beyond = [start for name, _, start, size in blocks(sound.body) if name == file and start + size > left]
    assert [row.offset for row in damage[1:]] == beyond, "and every block that is not whole"


@pytest.mark.parametrize("nbytes", [1, BLOCK])
def test_a_file_with_trailing_bytes_is_refused(sound: Sound, copy: Path, nbytes: int) -> None:
    whole = (copy / NEW / MODEL).stat().st_size
    os.truncate(copy / NEW / MODEL, whole + nbytes)
    [damage] = ruined(copy, sound, f"{NEW}/{MODEL}", f"{whole + nbytes} bytes", "no tensor")
    assert (damage.chunk, damage.offset, damage.tensors) == (None, whole, ())


def test_a_manifest_of_any_other_length_is_refused(sound: Sound) -> None:
    raw = (sound.directory / NEW / MANIFEST).read_bytes()
    for wrong in (*(raw[:nbytes] for nbytes in range(len(raw))), raw + b" ", raw + raw, b"\0" + raw):
        with pytest.raises(CorruptError):
            decode(wrong)


# -- files that are not regular ---------------------------------------------------------------------------------------


def listen(path: Path) -> None:
    directory = os.open(path.parent, os.O_PATH)  # a socket's path has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    os.close(directory)


def make_device(path: Path) -> None:
    """The number of /dev/zero: a read of it ends with success, and with zeros."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*as_root, "mknod", "-m", "666", path, "c", "1", "5"], check=True)


INSTEAD: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda _path, _original: None,
    "link": lambda path, original: path.symlink_to(original),
    "dangling link": lambda path, _original: path.symlink_to("nowhere"),
    "link to itself": lambda path, _original: path.symlink_to(path.name),
    "fifo": lambda path, _original: os.mkfifo(path),
    "socket": lambda path, _original: listen(path),
    "device": lambda path, _original: make_device(path),
    "directory": lambda path, _original: path.mkdir(),
}


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, MANIFEST])
def test_only_regular_files_are_read(sound: Sound, copy: Path, tmp_path: Path, file: str, instead: str) -> None:
    path, original = copy / NEW / file, tmp_path / file
    path.rename(original)  # unchanged, so that following a link would go unnoticed
    INSTEAD[instead](path, original)
    names = [] if file == MANIFEST else [f"affected: {told(tensors_in(sound.body, file, 0, 1 << 60))}"]
    [damage] = ruined(copy, sound, f"{NEW}/{file}", *names)
    assert (damage.path, damage.chunk, damage.offset) == (str(path), None, None)


@pytest.mark.parametrize("step", [None, 2])
def test_a_step_replaced_by_a_file_is_damage(sound: Sound, copy: Path, step: int | None) -> None:
    state = training()
    with opened(copy) as eng:
        shutil.rmtree(copy / NEW)
        (copy / NEW).write_text("no directory")
        [damage] = eng.verify(2)
        assert damage.path == str(copy / NEW / MANIFEST) and "is missing" in damage.reason
        if step is None:
            with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
                assert eng.restore(state.arena).step == 1
            assert state.held() == sound.older
        else:
            with pytest.raises(CorruptError, match=f"{NEW}/{MANIFEST} is missing"):
                eng.restore(state.arena, step)


# -- after damage -----------------------------------------------------------------------------------------------------


def flip_last(path: Path) -> None:
    """Change the last byte of a file; a second call restores it."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_restoring_a_part_leaves_a_torn_arena_torn(copy: Path) -> None:
    state = training()
    first = next(iter(state.held()))
    with opened(copy) as eng:
        flip_last(copy / NEW / OPTIMIZER)
        with pytest.raises(CorruptError):
            eng.restore(state.arena, step=2)
        flip_last(copy / NEW / OPTIMIZER)
        eng.restore(state.arena, select=first)
        assert state.arena.torn
        with pytest.raises(ArenaError, match="half-way"):
            eng.checkpoint(state.arena)
        eng.restore(state.arena)
        assert not state.arena.torn
        eng.checkpoint(state.arena).result()


def test_a_failed_partial_restore_tears_a_whole_arena(copy: Path) -> None:
    state = training()
    last = list(state.held())[-1]
    with opened(copy) as eng:
        eng.restore(state.arena, select=last)
        assert not state.arena.torn
        flip_last(copy / NEW / OPTIMIZER)
        with pytest.raises(CorruptError):
            eng.restore(state.arena, step=2, select=last)
        assert state.arena.torn
        eng.restore(state.arena, step=1, select=last)
        assert state.arena.torn, "only the part that failed is known to be whole again"
        eng.restore(state.arena, step=1)
        eng.checkpoint(state.arena).result()


@pytest.mark.parametrize("failing", ["names", "selection", "options"])
def test_a_refused_restore_does_not_tear_the_arena(copy: Path, failing: str) -> None:
    state = training()
    before = state.held()
    with opened(copy) as eng, pytest.raises(MismatchError):
        if failing == "names":
            other = engine.Arena.wrap({"a": torch.zeros(3)})
            try:
                eng.restore(other)
            finally:
                assert not other.torn
        elif failing == "selection":
            eng.restore(state.arena, select="nothing")
        else:
            wrapped = engine.Arena.wrap(state.arena.state_dict())
            try:
                eng.restore(wrapped)
            finally:
                assert not wrapped.torn
    assert not state.arena.torn and state.held() == before


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """Step 1 holds `a`.  Step 2 holds `b` and another value of `a`; its last byte, of `b`, is wrong."""
    with opened(tmp_path) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(3000)}), step=1).result()
        eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(3000), "b": torch.ones(3000)}), step=2).result()
    flip_last(tmp_path / NEW / MODEL)
    return tmp_path


def test_load_returns_nothing_of_a_checkpoint_that_was_passed_over(grown: Path) -> None:
    with opened(grown) as eng:
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            loaded = eng.load()
        assert list(loaded) == ["a"] and loaded["a"].eq(1).all()
        with (
            pytest.warns(engine.EngineWarning, match="step 2 is passed over"),
            pytest.raises(engine.ArgumentError, match="matches no tensor of step 1"),
        ):
            eng.load(select="b")
        assert eng.load(select="a")["a"].eq(0).all(), "a tensor of the newest in undamaged blocks can be loaded"


def test_an_arena_stays_torn_where_no_older_checkpoint_fits_it(grown: Path) -> None:
    """Refusing the older step does not repair the bytes that the damaged one left in the arena."""
    arena = engine.Arena.wrap({"a": torch.zeros(3000), "b": torch.zeros(3000)})
    with opened(grown) as eng:
        with (
            pytest.warns(engine.EngineWarning, match="step 2 is passed over"),
            pytest.raises(MismatchError, match="b: not in the checkpoint"),
        ):
            eng.restore(arena)
        assert arena.torn
        with pytest.raises(ArenaError, match="half-way"):
            eng.checkpoint(arena)


def test_a_checkpoint_that_does_not_fit_is_not_passed_over(copy: Path) -> None:
    """Otherwise an older step might fit, and the training would go back without notice."""
    arena = engine.Arena.wrap({"a": torch.zeros(3)})
    with opened(copy) as eng:
        eng.checkpoint(arena, step=3).result()
        eng.checkpoint(training().arena, step=4).result()
        with pytest.raises(MismatchError, match="the checkpoint has an optimizer"):
            eng.restore(arena)
        assert not arena.torn and eng.restore(arena, step=3).step == 3


def test_verify_sets_no_step_aside(copy: Path) -> None:
    """Only a training that has restored an older step reaches the damaged one again."""
    state = training()
    with opened(copy) as eng:
        flip_last(copy / NEW / OPTIMIZER)
        assert eng.verify() and eng.verify(2)
        with pytest.raises(StepError):
            eng.checkpoint(state.arena, step=2)


def test_a_step_saved_after_a_rollback_is_not_the_damaged_one(copy: Path) -> None:
    state = training()
    with opened(copy) as eng:
        flip_last(copy / NEW / OPTIMIZER)
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            eng.restore(state.arena)
        assert eng.rollback(1) == [2]
        eng.checkpoint(state.arena, step=2).result()
        with pytest.raises(StepError, match="not after the committed steps"):
            eng.checkpoint(state.arena, step=2)
        assert eng.steps() == [1, 2] and not list(copy.glob("*.damaged"))


def test_only_damaged_steps_are_set_aside(copy: Path) -> None:
    """Step 3 is sound and later than the damaged one; the number of a sound step stays taken."""
    state = training()
    with opened(copy) as eng:
        eng.checkpoint(state.arena, step=3).result()
        flip_last(copy / NEW / OPTIMIZER)
        with pytest.raises(CorruptError):
            eng.restore(state.arena, step=2)
        eng.restore(state.arena)
        for step in (1, 2, 3):
            with pytest.raises(StepError):
                eng.checkpoint(state.arena, step=step)
        assert eng.checkpoint(state.arena).result().step == 4
        assert eng.steps() == [1, 2, 3, 4] and not list(copy.glob("*.damaged"))


def test_a_save_without_a_number_comes_after_the_damaged_step(copy: Path) -> None:
    """Nothing is set aside, and a later verification finds the damage at the same location."""
    state = training()
    with opened(copy) as eng:
        flip_last(copy / NEW / OPTIMIZER)
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            eng.restore(state.arena)
        assert eng.checkpoint(state.arena).result().step == 3
        assert eng.steps() == [1, 2, 3] and not list(copy.glob("*.damaged"))


@pytest.mark.parametrize("kind", ["block", "length", "missing", "manifest"])
@pytest.mark.parametrize("block_bytes", [BLOCK, 2 * BLOCK])
def test_damage_leaves_no_descriptor_open(tmp_path: Path, kind: str, block_bytes: int) -> None:
    """For blocks larger than the slots another pipeline is opened, and closed with the restore."""
    state = training()
    with opened(tmp_path, block_bytes=block_bytes) as eng:
        eng.checkpoint(state.arena, step=2).result()
    path = tmp_path / NEW / (MANIFEST if kind == "manifest" else OPTIMIZER)
    if kind in ("block", "manifest"):
        flip_last(path)
    elif kind == "length":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with opened(tmp_path) as eng:
        before = held()
        assert eng.verify()
        for read in (lambda: eng.restore(state.arena, step=2), lambda: eng.load(2), lambda: eng.load(2, select="*")):
            with pytest.raises(CorruptError):
                read()
        until(lambda: held() == before)  # the kernel ends a ring's workers in its own time


@pytest.mark.parametrize(("step", "aside"), [(2, [2, 3]), (3, [3])])
def test_a_save_sets_every_damaged_step_from_its_own_on_aside(copy: Path, step: int, aside: list[int]) -> None:
    state = training()
    with opened(copy) as eng:
        eng.checkpoint(state.arena, step=3).result()
        for damaged in (2, 3):
            flip_last(copy / f"step-{damaged:08d}" / OPTIMIZER)
        with pytest.warns(engine.EngineWarning, match="is passed over"):
            assert eng.restore(state.arena).step == 1
        with pytest.warns(engine.EngineWarning, match="was renamed") as told:
            eng.checkpoint(state.arena, step=step).result()
        assert len(told) == len(aside) and eng.steps() == list(range(1, step + 1))
        assert sorted(path.name for path in copy.glob("*.damaged")) == [f"step-{n:08d}.damaged" for n in aside]


# -- verification -----------------------------------------------------------------------------------------------------


def test_verify_raises_not_found_without_a_checkpoint(tmp_path: Path, copy: Path) -> None:
    with opened(tmp_path / "empty") as eng, pytest.raises(NotFoundError):
        eng.verify()
    with opened(copy) as eng, pytest.raises(NotFoundError, match="holds no step 7"):
        eng.verify(7)


def test_verify_finds_every_damaged_file(sound: Sound, copy: Path) -> None:
    (copy / NEW / MODEL).unlink()
    content = bytearray((copy / NEW / OPTIMIZER).read_bytes())
    content[-1] ^= 1
    (copy / NEW / OPTIMIZER).write_bytes(content)
    with opened(copy) as eng:
        missing, flipped = eng.verify()
    assert Path(missing.path).name == MODEL and Path(flipped.path).name == OPTIMIZER
    last = list(blocks(sound.body))[-1]
    assert (flipped.chunk, flipped.offset) == (last[1], last[2])


def test_verify_does_not_take_missing_descriptors_for_damage(copy: Path) -> None:
    class Starved(engine.store.filesystem.Filesystem):
        def open_for_blocks(self, path: str, *_: Any, **__: Any) -> NoReturn:
            raise StorageError(24, "open", path)  # EMFILE

    with opened(copy, filesystem=Starved()) as eng, pytest.raises(StorageError, match="errno 24"):
        eng.verify()


def test_slots_for_larger_blocks_are_no_larger_than_the_files(
    sound: Sound, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile manifest has the largest allowed block size, 1 GiB."""
    body = json.loads(json.dumps(sound.body))
    body["block_bytes"] = 1 << 30
    names = [row["name"] for row in body["files"]]
    for chunk in body["chunks"]:
        content = (copy / NEW / names[chunk["file"]]).read_bytes()[chunk["offset"] :][: chunk["nbytes"]]
        chunk["checksums"] = [block_checksum(content).hex()]
    (copy / NEW / MANIFEST).write_bytes(sealed(json.dumps(body).encode()))
    made: list[int] = []

    def watched(like: Any, slot_count: int, slot_bytes: int) -> Any:
        made.append(slot_bytes)
        return open_like(like, slot_count, slot_bytes)

    monkeypatch.setattr(reader_module, "open_like", watched)
    with opened(copy, staging_bytes=2 * BLOCK) as eng:
        assert eng.verify() == ()
        assert eng.restore(training().arena).step == 2
    assert made and max(made) <= max(chunk["nbytes"] for chunk in body["chunks"]) + BLOCK


# -- a hostile writer: the digest is right ----------------------------------------------------------------------------


def rows(body: dict[str, Any], table: str, **values: Any) -> None:
    body[table][0] |= values


def segment(body: dict[str, Any], place: int, value: Any) -> None:
    body["segments"][0][place] = value


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "an overlap": lambda body: segment(body, 6, body["segments"][1][6]),
    "an offset before the data": lambda body: segment(body, 6, 0),
    "a negative offset": lambda body: segment(body, 6, -4096),
    "a negative length": lambda body: segment(body, 7, -4),
    "a negative extent": lambda body: segment(body, 2, [-1]),
    "a product of 2^64": lambda body: segment(body, 2, [1 << 32, 1 << 32]),
    "a product of 2^64 and a bit": lambda body: segment(body, 2, [(1 << 62) + 1, 4]),
    "an extent of 2^63": lambda body: segment(body, 2, [0, 1 << 63]),
    "many large extents": lambda body: segment(body, 2, [1 << 62] * 20000),
    "an unknown dtype": lambda body: segment(body, 1, "float128"),
    "another dtype": lambda body: segment(body, 1, "float64"),
    "an unknown role": lambda body: segment(body, 3, "pickle"),
    "a file that is not there": lambda body: segment(body, 5, 2),
    "a negative file": lambda body: segment(body, 5, -1),
    "a name twice": lambda body: segment(body, 0, body["segments"][1][0]),
    "a segment twice": lambda body: body["segments"].insert(0, body["segments"][0]),
    "no segments": lambda body: body.update(segments=[]),
    "..": lambda body: rows(body, "files", name=".."),
    "a parent": lambda body: rows(body, "files", name="../model.safetensors"),
    "a place of its own": lambda body: rows(body, "files", name="/model.safetensors"),
    "a subdirectory": lambda body: rows(body, "files", name="a/model.safetensors"),
    "a NUL": lambda body: rows(body, "files", name="model\0.safetensors"),
    "a newline": lambda body: rows(body, "files", name="model.safetensors\n"),
    "the manifest": lambda body: rows(body, "files", name=MANIFEST),
    "a file twice": lambda body: rows(body, "files", name=OPTIMIZER),
    "a long name": lambda body: rows(body, "files", name="a" * 200 + ".safetensors"),
    "files that no chunk lies in": lambda body: body["files"].extend(
        {**body["files"][0], "name": f"more-{index}.safetensors"} for index in range(9)
    ),
    "a file of 2^63": lambda body: rows(body, "files", nbytes=1 << 63),
    "a file of 2^62": lambda body: rows(body, "files", nbytes=1 << 62),
    "a header beyond its file": lambda body: rows(body, "files", header_bytes=1 << 40),
    "a header of nothing": lambda body: rows(body, "files", header_bytes=0),
    "a chunk of 2^62": lambda body: rows(body, "chunks", nbytes=1 << 62),
    "a chunk of -1": lambda body: rows(body, "chunks", nbytes=-1),
    "a chunk elsewhere": lambda body: rows(body, "chunks", offset=4096),
    "a chunk of another file": lambda body: rows(body, "chunks", file=1),
    "a chunk of no file": lambda body: rows(body, "chunks", file=1 << 40),
    "a checksum too many": lambda body: body["chunks"][0]["checksums"].append("0" * 32),
    "a checksum of other digits": lambda body: rows(body, "chunks", checksums=["\N{FULLWIDTH DIGIT ONE}" * 32] * 3),
    "no chunks": lambda body: body.update(chunks=[]),
    "blocks of 0": lambda body: body.update(block_bytes=0),
    "blocks of -4096": lambda body: body.update(block_bytes=-4096),
    "blocks of 4095": lambda body: body.update(block_bytes=4095),
    "blocks of 2 GiB": lambda body: body.update(block_bytes=2 << 30),
    "blocks of 2^62": lambda body: body.update(block_bytes=1 << 62),
    "step -1": lambda body: body.update(step=-1),
    "step 2^63": lambda body: body.update(step=1 << 63),
    "a step of 5000 digits": lambda body: body.update(step=float("1e308")),
    "another format": lambda body: body.update(format="pickle"),
    "an alias of nothing": lambda body: body.update(aliases={"a": "b"}),
    "an alias that hides": lambda body: body.update(aliases={body["segments"][0][0]: body["segments"][1][0]}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_allocated(sound: Sound, what: str) -> None:
    body = json.loads(json.dumps(sound.body))
    HOSTILE[what](body)
    raw = sealed(json.dumps(body).encode())
    with allocating_at_most(BYTES_PER_BYTE * len(raw)), pytest.raises(CorruptError):
        decode(raw)


def test_an_engine_refuses_a_hostile_manifest(sound: Sound, copy: Path) -> None:
    body = json.loads(json.dumps(sound.body))
    rows(body, "files", name="../model.safetensors")
    shutil.copy(copy / NEW / MODEL, copy)
    (copy / NEW / MANIFEST).write_bytes(sealed(json.dumps(body).encode()))
    ruined(copy, sound, "manifest.json", "'../model.safetensors' cannot be a data file's name")


@pytest.mark.parametrize(
    "options",
    [
        {"dict": [["param_groups", [1]], ["state", {"dict": []}], ["absent", []]]},
        {"dict": [["param_groups", []], ["state", {"dict": []}], ["absent", [[]]]]},
        {"dict": [["param_groups", []], ["state", {"dict": [[1, 2]]}], ["absent", []]]},
    ],
)
def test_options_of_the_right_names_and_the_wrong_types_are_damage(
    sound: Sound, copy: Path, options: dict[str, Any]
) -> None:
    body = sound.body | {"optimizers": {"": options}}
    (copy / NEW / MANIFEST).write_bytes(sealed(json.dumps(body).encode()))
    ruined(copy, sound, "options are not an optimizer's")


def test_a_shape_that_no_tensor_can_have_is_damage(tmp_path: Path) -> None:
    """It has no elements, so no length is wrong, but torch cannot make it."""
    with opened(tmp_path) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(3), "b": torch.empty(0)}), step=1).result()
    path = tmp_path / OLD / MANIFEST
    body = json.loads(path.read_bytes())["body"]
    next(row for row in body["segments"] if row[0] == "b")[2] = [0, 1 << 62, 1 << 62]
    path.write_bytes(sealed(json.dumps(body).encode()))
    with opened(tmp_path) as eng, pytest.raises(CorruptError, match="impossible shape"):
        eng.load(1)


def test_the_path_of_an_extra_value_is_built_only_for_an_error() -> None:
    key, depth = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 25_000, 95
    tree: Any = {"tuple": 0}
    for _ in range(depth - 1):
        tree = {"dict": [["a", tree]]}
    tree = {"dict": [[key, tree]]}
    text = json.dumps(tree, ensure_ascii=False).encode()
    with allocating_at_most(16 * len(text)), pytest.raises(CorruptError, match="is not a list"):
        decode_extra(tree)


# -- a hostile directory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [".engine", ".engine/spare"])
def test_a_link_in_place_of_the_private_directory_is_not_followed(copy: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    (outside / "00000001").mkdir(parents=True)
    shutil.rmtree(copy / link)
    (copy / link).symlink_to(outside)
    with pytest.raises(StorageError, match="no link may stand in its place"):
        opened(copy)
    assert sorted(path.name for path in outside.rglob("*")) == ["00000001"]


def test_a_lock_file_with_a_second_name_is_not_written_to(copy: Path, tmp_path: Path) -> None:
    """A directory that was copied with cp --link has such a file, and must still open."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (copy / ".engine/lock").unlink()
    (copy / ".engine/lock").hardlink_to(precious)
    with opened(copy) as eng:
        assert eng.steps() == [1, 2]
        with pytest.raises(LockedError, match=rf"\(process {os.getpid()}\)"):
            opened(copy)
    assert precious.read_text() == "precious" and precious.stat().st_nlink == 1


def test_a_lock_that_is_a_device_is_refused(copy: Path) -> None:
    (copy / ".engine/lock").unlink()
    make_device(copy / ".engine/lock")
    with pytest.raises(CorruptError, match="lock is not a regular file"):
        opened(copy)


def test_a_leftover_may_be_nested_deeper_than_python_calls(copy: Path) -> None:
    for name in ("step-00000008.partial", "step-00000009.partial"):
        os.makedirs(copy / name / "/".join("d" * 600))
    with opened(copy, max_async=1) as eng:
        assert eng.steps() == [1, 2]
        assert len(list((copy / ".engine/spare").iterdir())) == 1


def test_a_step_number_beyond_the_limit_is_no_checkpoint(copy: Path) -> None:
    (copy / "step-9999999999999999999").mkdir()
    (copy / ("step-" + "\N{FULLWIDTH DIGIT ONE}" * 8)).mkdir()
    arena = engine.Arena.wrap({"a": torch.ones(3)})
    with opened(copy) as eng:
        assert eng.steps() == [1, 2]
        assert eng.checkpoint(arena).result().step == 3
        eng.checkpoint(arena, step=(1 << 63) - 1).result()
        with pytest.raises(StepError, match="the last that there can be"):
            eng.checkpoint(arena)


@pytest.mark.parametrize("alias", ["\ud800", "__metadata__"])
def test_an_alias_must_be_a_valid_header_name(alias: str) -> None:
    with pytest.raises(ArenaError, match="cannot be called"):
        lay_out([TensorSpec("a", "float32", (1,), "model", "")], {alias: "a"})


def test_a_part_restored_from_an_older_step_leaves_a_whole_arena_whole(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Linear(50, 50))
    arena = engine.Arena.adopt(model)
    with opened(tmp_path, keep=None) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
        flip_last(tmp_path / "step-00000002/model.safetensors")
        with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
            assert eng.restore(arena, select="*.*").step == 1
        assert not arena.torn
        eng.checkpoint(arena, step=3).result()
