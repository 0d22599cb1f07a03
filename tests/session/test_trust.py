"""A save trusts recycled files only as this process sealed them, and tags and metrics only as they were read."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
from disk import FailingFilesystem, GatedFilesystem
from strategies import sealed

import engine
from engine.session.gate import Gate
from engine.session.save import Save
from engine.store.catalog import Catalog
from engine.store.stamps import Stamp

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}
MODEL, MANIFEST = "model.safetensors", "manifest.json"


def flip(path: Path) -> None:
    """Change a byte in place, and give the file its old mtime: with `without_ctime`, as a medium would."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(1000))


def write_and_set_the_time_back(path: Path) -> None:
    """As `rsync --inplace --times` does, and `cp --preserve` over the file."""
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 100_000)


@pytest.fixture
def arena() -> engine.Arena:
    return engine.Arena.wrap({"a": torch.arange(200_000, dtype=torch.float32)})


@pytest.fixture
def without_ctime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps do not have the ctime, which a medium that loses bits would not change, and no program can set back."""

    def of(status: os.stat_result) -> Stamp:
        return Stamp(status.st_ino, status.st_size, status.st_mtime_ns, 0)

    monkeypatch.setattr(Stamp, "of", of)


@pytest.mark.parametrize("harm", [write_in_place, write_and_set_the_time_back, cut])
def test_a_file_that_was_changed_is_written_whole_when_it_is_recycled(
    tmp_path: Path, arena: engine.Arena, harm: Any
) -> None:
    with engine.Engine(tmp_path, keep=1, max_async=1, **SMALL) as eng:
        for step in range(4):
            eng.checkpoint(arena, step=step).result()
        harm(tmp_path / "step-00000003" / MODEL)
        for step in range(4, 8):
            eng.checkpoint(arena, step=step).result()
            assert eng.verify(step) == ()


@pytest.mark.usefixtures("without_ctime")
@pytest.mark.parametrize("find", ["verify", "load", "restore"])
def test_a_step_that_a_reader_found_damaged_is_written_whole_when_it_is_recycled(
    tmp_path: Path, arena: engine.Arena, find: str
) -> None:
    with engine.Engine(tmp_path, keep=1, max_async=1, **SMALL) as eng:
        for step in range(4):
            eng.checkpoint(arena, step=step).result()
        flip(tmp_path / "step-00000003" / MODEL)
        if find == "verify":
            assert eng.verify(3)
        else:
            with pytest.raises(engine.CorruptError):
                eng.load(3) if find == "load" else eng.restore(arena, 3)
            arena = engine.Arena.wrap({"a": torch.arange(200_000, dtype=torch.float32)})
        for step in range(4, 8):
            eng.checkpoint(arena, step=step).result()
            assert eng.verify(step) == ()


@pytest.mark.usefixtures("without_ctime")
def test_no_save_takes_a_damaged_step_before_it_is_distrusted(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine.Arena.wrap({"a": torch.arange(200_000, dtype=torch.float32)})  # the same bytes, and not torn
    distrust = Catalog.distrust

    def late(catalog: Catalog, step: int) -> None:
        """Meanwhile another thread saves: the first save retires the step if it can, and the second takes it."""
        for later in (2, 3):
            eng.checkpoint(other, step=later).result()
        distrust(catalog, step)

    with engine.Engine(tmp_path, keep=1, max_async=1, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        flip(tmp_path / "step-00000001" / MODEL)
        monkeypatch.setattr(Catalog, "distrust", late)
        with pytest.raises(engine.CorruptError):
            eng.restore(arena, 1)
        assert eng.steps() == [1, 3] and eng.verify(3) == ()


def edited(path: Path, **fields: Any) -> None:
    """Give a manifest other fields, under a digest that is right."""
    body = msgspec.json.decode((path / MANIFEST).read_bytes())["body"]
    (path / MANIFEST).write_bytes(sealed(msgspec.json.encode(body | fields)))


def test_shards_are_refused_and_not_taken_for_whole_tensors(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"w": torch.ones(1, 2)})
    with engine.Engine(tmp_path, **SMALL) as eng:
        path = Path(eng.checkpoint(arena, step=1).result().path)
        body = msgspec.json.decode((path / MANIFEST).read_bytes())["body"]
        [row] = body["segments"]
        edited(path, segments=[[*row[:8], [1, 2], [0, 0]]])
        for read in (lambda: eng.load(1), lambda: eng.restore(arena, 1)):
            with pytest.raises(engine.MismatchError, match="holds w in shards"):
                read()


@pytest.mark.parametrize("harm", ["newer", "damaged"])
def test_a_step_whose_tag_cannot_be_read_is_kept_with_one_warning(
    tmp_path: Path, arena: engine.Arena, harm: str
) -> None:
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        path = Path(eng.checkpoint(arena, step=1, tag="mine").result().path)
        eng.checkpoint(arena, step=2).result()
    if harm == "newer":
        edited(path, min_reader=2, version=2)
    else:
        (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes().replace(b"mine", b"nine"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
            for step in (3, 4, 5):
                eng.checkpoint(arena, step=step).result()
            assert eng.steps() == [1, 5]
            eng.delete(1)
            assert eng.steps() == [5]
    assert sum("step 1 is kept" in str(warning.message) for warning in caught) == 1


def test_rollback_past_a_tagged_step_is_refused(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in (1, 2, 3):
            eng.checkpoint(arena, step=step, tag="mine" if step == 2 else None).result()
        with pytest.raises(engine.StepError, match=r"steps \[2\] have a tag"):
            eng.rollback(1)
        assert eng.steps() == [1, 2, 3] and eng.rollback(2) == [3]
        eng.delete(2)
        assert eng.rollback(1) == []


def test_a_committed_step_is_not_reported_as_failed_for_what_comes_after(tmp_path: Path, arena: engine.Arena) -> None:
    failing = FailingFilesystem()
    with engine.Engine(tmp_path, keep=1, max_async=1, filesystem=failing, **SMALL) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
        failing.fail_next("remove_directory", 13)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert eng.checkpoint(arena, step=3).result().step == 3
        assert 3 in eng.steps()


def test_metrics_and_tag_of_other_types_are_stored_plain_or_refused(tmp_path: Path, arena: engine.Arena) -> None:
    class Text(str):
        pass

    with engine.Engine(tmp_path, **SMALL) as eng:
        metrics = {Text("loss"): numpy.float64(2.5), "half": numpy.float32(0.5), "count": numpy.int64(3)}
        info = eng.checkpoint(arena, metrics=metrics, tag=Text("t")).result()  # type: ignore[arg-type]
        assert info.metrics == {"loss": 2.5, "half": 0.5, "count": 3.0} and info.tag == "t"
        for wrong in ({"l": 10**400}, {"\ud800": 1.0}, [1], {"l": "x"}):
            with pytest.raises(engine.ArgumentError, match="metrics"):
                eng.checkpoint(arena, metrics=wrong)  # type: ignore[arg-type]


def test_every_earlier_save_is_done_when_a_later_one_is(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Save.end
    begun = threading.Event()

    def slow(self: Save, *outcome: Any) -> None:
        if self.step == 1:
            begun.wait(0.05)
        end(self, *outcome)

    monkeypatch.setattr(Save, "end", slow)
    with engine.Engine(tmp_path, **SMALL) as eng:
        first, second = eng.checkpoint(arena, step=1), eng.checkpoint(arena, step=2)
        second.result()
        assert first.done()


def test_waiting_for_a_save_in_a_done_callback_is_refused(tmp_path: Path, arena: engine.Arena) -> None:
    told: list[BaseException | None] = []
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:

        def again(_: Any) -> None:
            save = eng.checkpoint(arena, step=2)
            for wait in (save.result, eng.wait):
                try:
                    wait()
                except engine.UsageError as error:
                    told.append(error)

        save = eng.checkpoint(arena, step=1)
        save.add_done_callback(again)
        save.result()
        while len(told) < 2:
            pass
    assert engine.open(tmp_path).steps() == [1, 2]


def test_a_callback_may_close_another_engine(tmp_path: Path, arena: engine.Arena) -> None:
    other = engine.Engine(tmp_path / "other", **SMALL)
    with engine.Engine(tmp_path / "run", **SMALL) as eng:
        save = eng.checkpoint(arena, step=1)
        save.add_done_callback(lambda _: other.close())
        save.result()
    assert not other.is_open


def test_checkpoint_in_a_signal_handler_during_opening_is_refused(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler runs in the thread that it interrupts, and so may stand in the middle of the opening."""
    opened = engine.Engine

    def interrupted(directory: Any) -> engine.Engine:
        with pytest.raises(engine.BusyError, match="is being opened"):
            engine.checkpoint(arena, directory)
        return opened(directory)

    monkeypatch.setattr("engine.defaults.Engine", interrupted)
    assert engine.checkpoint(arena, tmp_path, step=1).result().step == 1


def test_checkpoint_in_a_signal_handler_that_interrupts_checkpoint_is_refused(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh = engine.Arena.refresh
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:

        def interrupted(self: engine.Arena) -> None:
            with pytest.raises(engine.UsageError, match="signal handler"):
                eng.checkpoint(self)
            refresh(self)

        monkeypatch.setattr(engine.Arena, "refresh", interrupted)
        assert eng.checkpoint(arena).result().step == 0


class Interrupted(threading.Thread):
    """Its start is interrupted by Ctrl-C, after the thread has begun."""

    def start(self) -> None:
        super().start()
        if self.name == "engine-commit-1":
            raise KeyboardInterrupt


def test_ctrl_c_while_the_commit_threads_start_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.Engine(tmp_path, **SMALL)
    monkeypatch.undo()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before
    engine.Engine(tmp_path, **SMALL).close()


def test_close_after_an_interrupted_close_waits_for_the_save(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = GatedFilesystem()
    eng = engine.Engine(tmp_path, filesystem=gated, **SMALL)
    save = eng.checkpoint(arena, step=1, snapshot="lazy")
    wait = Gate.wait
    interrupts = iter([True])

    def interrupted(self: Gate, timeout: float | None = None, look: Callable[[], object] = lambda: None) -> bool:
        if next(interrupts, False):
            raise KeyboardInterrupt
        return wait(self, timeout, look)

    monkeypatch.setattr(Gate, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eng.close()
    threading.Timer(0.2, gated.gate.set).start()
    eng.close()
    assert save.done() and save.result().step == 1
