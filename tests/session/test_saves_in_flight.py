"""Several saves in flight: each with its own files and bytes, whatever happens to the others.

The device is a table that completes what a test releases, or everything late and in random order, with a pool smaller
than one arena.  So many blocks of many chunks and saves are in flight together, and share few slots.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import GatedFilesystem, stored
from faults import FaultTable, refused
from jobs import until
from torch import Tensor

import engine

BLOCK_BYTES = 8 << 10
SLOT_COUNT = 6
POOL: dict[str, Any] = {"staging_bytes": SLOT_COUNT * BLOCK_BYTES, "block_bytes": BLOCK_BYTES, "guard": "fence"}
HANG_S = 60


class SlowTable(FaultTable):
    """A device that completes nothing while it is held, and then one operation at a time in random order.

    Attributes:
        together: for each operation started, the files and offsets in flight with it.
        refused_fds: descriptors whose operations fail.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.held = threading.Event()
        self.together: list[set[tuple[int, int]]] = []
        self.refuse_at: Callable[[int], bool] = lambda _number: False
        self._moving: dict[int, tuple[int, int]] = {}

    def _start(self, context: Any, io: Any) -> int:
        number = len(self.operations)
        if self.refuse_at(number):
            self._script[number] = refused(errno.EIO)
        result = super()._start(context, io)
        self._moving[io.slot] = (io.fd, io.file_offset)
        self.together.append(set(self._moving.values()))
        return result

    def _reap(self, context: Any, completions: Any, capacity: int, wait: int) -> int:
        if self.held.is_set():
            threading.Event().wait(0.001)
            return 0
        if not wait and self.chance.random() < 0.7:
            return 0
        self._order = self.chance
        count = super()._reap(context, completions, capacity, wait)
        for index in range(count):
            del self._moving[completions[index].slot]
        return count


@contextmanager
def opened(directory: Path, table: FaultTable, **options: Any) -> Iterator[engine.Engine]:
    with table.moving_blocks(), engine.Engine(directory, keep=None, backend="buffered", **POOL, **options) as eng:
        yield eng
    assert not table.exceptions and not table.files


def tensors(seed: int, block_count: int = 40) -> dict[str, Tensor]:
    """Distinct bytes at every offset, and for every seed."""
    count = block_count * BLOCK_BYTES // 4
    numbers = torch.arange(count, dtype=torch.int32) + seed * count
    return {"a.w": numbers[: count // 3].clone(), "b.w": numbers[count // 3 :].clone()}


def assert_stored(directory: Path, step: int, expected: dict[str, Tensor]) -> None:
    there = stored(directory, step)
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[name], expected[name]) for name in expected)


def begin(eng: engine.Engine, table: SlowTable, seeds: range, **options: Any) -> list[engine.Save]:
    """Saves of distinct arenas from as many threads, since a call waits for staging; in the order of their steps.

    The device is held until all are in flight.
    """
    saves: dict[int, engine.Save] = {}

    def call(seed: int) -> None:
        saves[seed] = eng.checkpoint(engine.Arena.wrap(tensors(seed)), step=seed, **options)

    threads = []
    table.held.set()
    for seed in seeds:
        threads.append(threading.Thread(target=call, args=(seed,)))
        threads[-1].start()
        until(lambda seed=seed: seed in eng._in_flight.steps())  # type: ignore[misc]
    until(lambda: all(permit.handed_over for permit in tuple(eng._in_flight._permits)))
    table.held.clear()
    for thread in threads:
        thread.join(HANG_S)
    assert len(saves) == len(seeds)
    return [saves[seed] for seed in seeds]


@pytest.mark.parametrize("seed", range(3))
def test_every_chunk_of_every_save_lands_where_it_belongs(tmp_path: Path, seed: int) -> None:
    """A buffer that several chunks or saves copied to the same front of would hold the bytes of the last of them."""
    table = SlowTable(seed)
    with opened(tmp_path, table, max_async=4) as eng:
        for round_number in range(3):
            saves = begin(eng, table, range(4 * round_number, 4 * round_number + 4), chunk_count=7 + round_number)
            for save in saves:
                save.result(HANG_S)
    for step in range(12):
        assert_stored(tmp_path, step, tensors(step))
    assert max(len({fd for fd, _ in moving}) for moving in table.together) >= 3, "saves were in flight together"


def test_chunks_of_a_save_are_concurrent_though_there_are_more_than_saves_may_be(tmp_path: Path) -> None:
    table = SlowTable()
    with opened(tmp_path, table, max_async=1) as eng:
        table.held.set()
        saves: list[engine.Save] = []
        arena = engine.Arena.wrap(tensors(1))
        thread = threading.Thread(target=lambda: saves.append(eng.checkpoint(arena, 1, chunk_count=40)))
        thread.start()
        until(lambda: len(table.together[-1]) == SLOT_COUNT)
        moving = table.together[-1]
        table.held.clear()
        thread.join(HANG_S)
        eng.wait(HANG_S)
    assert_stored(tmp_path, 1, tensors(1))
    chunks = [chunk for chunk in saves[0].chunks() for _, offset in moving if 0 <= offset - chunk.offset < chunk.nbytes]
    assert len({chunk.index for chunk in chunks}) >= SLOT_COUNT // 2, "a chunk has one or two blocks"


def test_a_failed_save_does_not_hurt_the_others(tmp_path: Path) -> None:
    table = SlowTable()
    victims: set[int] = set()
    table.refuse_at = lambda number: number == 60
    with opened(tmp_path, table, max_async=4) as eng:
        saves = begin(eng, table, range(4))
        for save in saves:
            if isinstance(save.exception(HANG_S), engine.StorageError):
                victims.add(save.step)
        assert len(victims) == 1
        assert eng.steps() == sorted(set(range(4)) - victims)
        assert {chunk.status for chunk in saves[victims.copy().pop()].chunks()} == {"failed"}
        table.refuse_at = lambda _number: False
        eng.checkpoint(engine.Arena.wrap(tensors(9)), step=9).result(HANG_S)
    for step in {*range(4), 9} - victims:
        assert_stored(tmp_path, step, tensors(step))


def test_a_restore_ends_beside_saves_that_wait_for_the_device(tmp_path: Path) -> None:
    table = SlowTable()
    with opened(tmp_path, table, max_async=2) as eng:
        eng.checkpoint(engine.Arena.wrap(tensors(0)), step=0).result(HANG_S)
        ended: list[int] = []

        def save_all() -> None:
            for first in (1, 3, 5):
                for save in begin(eng, table, range(first, first + 2)):
                    save.result(HANG_S)

        saving = threading.Thread(target=save_all)
        saving.start()
        while saving.is_alive():
            loaded = eng.load(0)
            assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(0).items())
            ended.append(len(eng.steps()))
        saving.join(HANG_S)
        eng.wait(HANG_S)
    assert len(ended) >= 3 and ended[0] < 7
    for step in range(7):
        assert_stored(tmp_path, step, tensors(step))


def test_the_status_of_every_chunk_of_every_save_is_known(tmp_path: Path) -> None:
    """While files are missing, while the device works, in the order of steps, and at the end."""
    gated, table = GatedFilesystem(), SlowTable()
    order = ["pending", "staged", "written", "durable"]
    gated.gates["step-00000000"] = threading.Event()
    with opened(tmp_path, table, max_async=2, filesystem=gated) as eng:
        arenas = [engine.Arena.wrap(tensors(seed, block_count=1)) for seed in range(2)]
        saves = [eng.checkpoint(arena, step=step, chunk_count=2) for step, arena in enumerate(arenas)]
        assert all({chunk.status for chunk in save.chunks()} == {"staged"} for save in saves)
        gated.gate.set()
        until(lambda: all(chunk.status == "written" for save in saves[1:] for chunk in save.chunks()))
        assert {chunk.status for chunk in saves[0].chunks()} == {"staged"}
        assert eng.steps() == [] and not any(save.done() for save in saves), "steps become visible in order"
        before = [chunk.status for save in saves for chunk in save.chunks()]
        gated.gates["step-00000000"].set()
        while not saves[1].done():
            now = [chunk.status for save in saves for chunk in save.chunks()]
            assert all(order.index(a) <= order.index(b) for a, b in zip(before, now, strict=True)), "none goes back"
            before = now
        assert {chunk.status for save in saves for chunk in save.chunks()} == {"durable"}


@pytest.mark.parametrize("act", ["load", "verify", "restore"])
def test_a_done_callback_may_read_while_the_next_save_waits_for_its_thread(tmp_path: Path, act: str) -> None:
    """The next save fills the slots, and has no files before the callback returns."""
    with engine.Engine(tmp_path, max_async=1, **POOL) as eng:
        arena = engine.Arena.wrap(tensors(1))
        entered, begun, read = threading.Event(), threading.Event(), threading.Event()

        def callback(_save: object) -> None:
            entered.set()
            assert begun.wait(HANG_S)
            if act == "restore":
                eng.restore(arena, 1)
            elif act == "verify":
                eng.verify(1)
            else:
                eng.load(1)
            read.set()

        eng.checkpoint(engine.Arena.wrap(tensors(1)), step=1).add_done_callback(callback)
        assert entered.wait(HANG_S)
        saving = threading.Thread(target=eng.checkpoint, args=(engine.Arena.wrap(tensors(2)), 2))
        saving.start()
        until(lambda: eng._in_flight.steps() == [2])
        until(lambda: any(permit.handed_over for permit in eng._in_flight._permits))
        begun.set()
        assert read.wait(HANG_S), "the callback and the save wait for each other"
        saving.join(HANG_S)
        eng.wait(HANG_S)
    assert_stored(tmp_path, 2, tensors(2))
