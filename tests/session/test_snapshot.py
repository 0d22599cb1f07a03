"""A checkpoint holds the arena as it was when `checkpoint()` was called, for every later change by training.

Holding back the save's files stops staging in the middle: with room for two blocks, nothing more is staged until the
gate opens.  So these tests are deterministic and do not race.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from disk import GatedFilesystem, same, stored
from torch import Tensor, nn

import engine
from engine.options import GuardChoice
from engine.session.snapshot import Snapshot

pytestmark = [pytest.mark.every_backend, pytest.mark.remote_owner]

BLOCK_BYTES = 64 << 10
TINY: dict[str, Any] = {"staging_bytes": 3 * BLOCK_BYTES, "block_bytes": BLOCK_BYTES}


class Held:
    """An engine whose saves stop at two staged blocks until `release`."""

    def __init__(self, directory: Path, guard: GuardChoice = "auto") -> None:
        self.directory = directory
        self.filesystem = GatedFilesystem()
        self.engine = engine.Engine(directory, filesystem=self.filesystem, guard=guard, **TINY)
        self.pool = ThreadPoolExecutor(4)

    def release(self) -> None:
        self.filesystem.gate.set()

    def close(self) -> None:
        self.release()
        self.engine.close()
        self.pool.shutdown()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    opened = Held(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(params=["detect", "fence"])
def fenced(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    """Under guards that hold writers back by the fence."""
    opened = Held(tmp_path, request.param)
    yield opened
    opened.close()


def make_training(buffers: bool = False) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    layers: list[nn.Module] = [nn.Linear(300, 300) for _ in range(6)]
    if buffers:
        layers.append(nn.BatchNorm1d(300))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, optimizer


def copies(arena: engine.Arena) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in arena.state_dict().items()}


def assert_stored(directory: Path, step: int, want: dict[str, Tensor]) -> None:
    there = stored(directory, step)
    assert there.keys() == want.keys()
    torn = [name for name in want if not same(there[name], want[name])]
    assert not torn, f"these reached disk changed: {torn}"


def is_blocked(future: Future[Any]) -> bool:
    return not wait([future], timeout=0.1).done


def test_the_step_waits_until_the_arena_is_staged(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    stepping = held.pool.submit(optimizer.step)
    assert is_blocked(stepping), "optimizer.step() ran while the arena was being staged"
    held.release()
    stepping.result()
    save.result()
    assert not same(arena.state_dict()["0.weight"], want["0.weight"]), "the step did nothing"
    assert_stored(held.directory, 1, want)


def test_a_loop_that_steps_at_once_never_tears_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    history, saves = {}, []
    with engine.Engine(tmp_path, keep=None, max_async=3, **TINY) as eng:
        for step in range(15):
            history[step] = copies(arena)
            saves.append(eng.checkpoint(arena, step=step))
            optimizer.step()
        for save in saves:
            save.result()
    for step, want in history.items():
        assert_stored(tmp_path, step, want)


def test_loading_a_state_dict_waits_too(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save = held.engine.checkpoint(arena, step=1)
    loading = held.pool.submit(model.load_state_dict, other)
    assert is_blocked(loading)
    held.release()
    loading.result()
    save.result()
    assert_stored(held.directory, 1, want)


def test_the_call_returns_before_the_rest_is_staged_but_after_module_buffers(fenced: Held) -> None:
    held = fenced
    model, optimizer = make_training(buffers=True)
    arena = engine.Arena.adopt(model, optimizer)
    model(torch.randn(8, 300))
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    assert not save.wait_staged(timeout=0)
    model(torch.randn(8, 300) + 5)  # forward changes running_mean, running_var and num_batches_tracked
    assert not same(arena.state_dict()["6.running_mean"], want["6.running_mean"])
    held.release()
    save.result()
    assert_stored(held.directory, 1, want)


def by_another_optimizer(model: nn.Sequential, trained: list[nn.Parameter]) -> Callable[[], object]:
    return torch.optim.SGD(model[-1].parameters(), lr=0.1).step


def by_forward(model: nn.Sequential, trained: list[nn.Parameter]) -> Callable[[], object]:
    """A frozen teacher that forward averages the student into, left out of the optimizer."""
    model[-1].requires_grad_(False)
    return lambda: [teacher.mul_(0.5) for teacher in model[-1].parameters()]


def by_forward_though_owned(model: nn.Sequential, trained: list[nn.Parameter]) -> Callable[[], object]:
    """The same, with the optimizer made of all of `model.parameters()`."""
    trained += model[-1].parameters()
    return by_forward(model, trained)


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("make_writer", [by_another_optimizer, by_forward, by_forward_though_owned])
def test_parameters_that_the_step_does_not_train_are_staged_before_the_call_returns(
    held: Held, make_writer: Callable[[nn.Sequential, list[nn.Parameter]], Callable[[], object]], late: bool
) -> None:
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(6)), nn.Linear(50, 50))
    trained = list(model[:-1].parameters())
    write = make_writer(model, trained)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    arena = engine.Arena.adopt(model, torch.optim.SGD(trained, lr=0.1))
    if late:
        model[-1].requires_grad_(True)
        held.filesystem.gates["step-00000000"] = open_gate()
        held.engine.checkpoint(arena, step=0).result()  # with another plan
        model[-1].requires_grad_(False)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    assert not save.wait_staged(timeout=0), "everything was staged, not only the unfenced part"
    with torch.no_grad():
        write()
    assert not same(arena.state_dict()["6.weight"], want["6.weight"]), "nothing was written"
    held.release()
    save.result()
    assert_stored(held.directory, 1, want)


def open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


def test_a_step_hook_that_was_there_first_waits_too(held: Held) -> None:
    model, optimizer = make_training()

    def disturb(*_: object) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    optimizer.register_step_pre_hook(disturb)
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    stepping = held.pool.submit(optimizer.step)
    assert is_blocked(stepping)
    held.release()
    stepping.result()
    save.result()
    assert_stored(held.directory, 1, want)


def test_a_module_added_later_waits_too(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    more = nn.Linear(300, 300)
    model.add_module("more", more)
    optimizer.add_param_group({"params": more.parameters()})
    arena.refresh()
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    loading = held.pool.submit(more.load_state_dict, {n: t + 1 for n, t in more.state_dict().items()})
    assert is_blocked(loading)
    held.release()
    loading.result()
    save.result()
    assert_stored(held.directory, 1, want)


def test_a_restore_waits_for_a_save_of_the_same_arena(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(held.directory / "other", **TINY) as other:  # has slots to spare, and so need not wait for any
        other.checkpoint(arena, step=0).result()
        optimizer.step()
        want = copies(arena)
        save = held.engine.checkpoint(arena, step=1)
        restoring = held.pool.submit(other.restore, arena)
        assert is_blocked(restoring), "the restore wrote to the arena while it was being staged"
        held.release()
        assert restoring.result().step == 0
    save.result()
    assert_stored(held.directory, 1, want)


def test_a_tensor_dropped_during_a_save_is_saved(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    del model, optimizer, arena
    gc.collect()
    trash = [torch.full((300, 300), 7.0) for _ in range(50)]
    held.release()
    save.result()
    assert_stored(held.directory, 1, want)
    assert len(trash) == 50


def test_tensors_moved_to_shared_memory_during_a_save_are_saved(held: Held) -> None:
    model = make_training()[0]
    optimizer = torch.optim.SGD(model.parameters())  # without state, which would keep the pages
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    model.share_memory()  # as sending it to another process does; it replaces the memory of the storages in place
    del model, optimizer, arena
    gc.collect()
    trash = [torch.full((300, 300), 7.0) for _ in range(50)]
    held.release()
    save.result()
    assert_stored(held.directory, 1, want)
    assert len(trash) == 50


@pytest.mark.parametrize("snapshot", ["eager", "auto"])
def test_a_wrapped_arena_is_staged_before_the_call_returns(held: Held, snapshot: Snapshot) -> None:
    tensors = {"a": torch.zeros(100_000)}
    calling = held.pool.submit(held.engine.checkpoint, engine.Arena.wrap(tensors), step=1, snapshot=snapshot)
    assert is_blocked(calling)
    held.release()
    save = calling.result()
    tensors["a"].fill_(1)
    save.result()
    assert stored(held.directory, 1)["a"].eq(0).all()


def test_an_adopted_arena_can_be_saved_eagerly(held: Held) -> None:
    arena = engine.Arena.adopt(*make_training())
    calling = held.pool.submit(held.engine.checkpoint, arena, step=1, snapshot="eager")
    assert is_blocked(calling)
    held.release()
    calling.result().result()


def test_an_arena_adopted_without_optimizer_has_no_fence_and_is_staged_eagerly(fenced: Held) -> None:
    held = fenced
    arena = engine.Arena.adopt(make_training()[0])
    calling = held.pool.submit(held.engine.checkpoint, arena, step=1)
    assert is_blocked(calling)
    held.release()
    calling.result().result()


def test_lazy_on_a_wrapped_arena_does_not_wait(held: Held) -> None:
    tensors = {"a": torch.zeros(100_000)}
    save = held.engine.checkpoint(engine.Arena.wrap(tensors), step=1, snapshot="lazy")
    assert not save.wait_staged(timeout=0.01)
    held.release()
    assert save.wait_staged()
    tensors["a"].fill_(1)
    save.result()
    assert stored(held.directory, 1)["a"].eq(0).all()


def test_memory_that_training_frees_is_kept_until_it_is_staged(held: Held) -> None:
    tensors = {"a": torch.zeros(100_000)}
    arena = engine.Arena.wrap(tensors)
    save = held.engine.checkpoint(arena, step=1, snapshot="lazy")
    tensors["a"].data = torch.ones(100_000)  # frees the zeros, if no save holds them
    trash = [torch.full((100_000,), 7.0) for _ in range(8)]
    held.release()
    save.result()
    assert stored(held.directory, 1)["a"].eq(0).all() and len(trash) == 8


@pytest.mark.parametrize("disturb", [True, False])
def test_checked_mixes_nothing_with_a_writer(held: Held, disturb: bool) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1, snapshot="checked")
    deadline = monotonic() + 60
    while staged_blocks(save) < 2:
        assert monotonic() < deadline, "nothing was staged"
        sleep(0.001)
    if disturb:
        with torch.no_grad():
            model.get_parameter("0.weight")[0, 0] += 1  # in the first block, which has been staged
    held.release()
    try:
        save.result()
    except engine.TornSnapshot as error:  # under cow, where the writer waits for slots that nobody frees
        assert disturb and "0.weight" in str(error) and held.engine.steps() == []
    else:
        assert_stored(held.directory, 1, want)


def staged_blocks(save: engine.Save) -> int:
    """Blocks past pending, as the native thread has written them."""
    assert save._write is not None
    return sum(state > 0 for state in save._write.job.states())


def test_checked_on_a_wrapped_arena_catches_a_racing_thread(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4_000_000)}
    arena = engine.Arena.wrap(tensors)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            tensors["a"].add_(1)

    writer = threading.Thread(target=write)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(arena, step=0, snapshot="checked").result()
        writer.start()
        try:
            with pytest.raises(engine.TornSnapshot):
                for step in range(1, 50):  # one save is all but sure to be caught; fifty misses are a fault
                    eng.checkpoint(arena, step=step, snapshot="checked").result()
        finally:
            stop.set()
            writer.join()


def test_a_failed_save_does_not_block_the_step(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    save = held.engine.checkpoint(arena, step=1)
    assert save._write is not None
    save._write.pipeline.abort(save._write.job, 5)
    held.pool.submit(optimizer.step).result(timeout=60)
    held.release()
    with pytest.raises(engine.StorageError):
        save.result()


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
def test_the_arena_may_grow_while_a_save_is_in_flight(held: Held) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = held.engine.checkpoint(arena, step=1)
    model.add_module("more", nn.Linear(3, 3))
    growing = held.pool.submit(held.engine.checkpoint, arena, step=2)
    assert is_blocked(growing), "the arena was laid out anew while it was being staged"
    held.release()
    save.result()
    growing.result().result()
    assert_stored(held.directory, 1, want)
    assert "more.weight" in stored(held.directory, 2)
