"""The fence: writers wait until an arena is staged, through hooks that are removed with the arena."""

from __future__ import annotations

import copy
import gc
import io
import struct
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from trainings import build, everything, mlp, read, train

from engine.format.plan import ALIGNMENT
from engine.state.arena import Arena
from engine.store.writer import pack_plan

pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_and_load_wait_for_staging() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    assert arena.fenced and not Arena.adopt(mlp()).fenced
    seen: list[tuple[str, bytes]] = []
    saved = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}

    def during(what: str, act: Callable[[], object]) -> None:
        before = read(arena, "2.bias")

        def staged(timeout: float | None) -> bool:
            if timeout is None:
                seen.append((what, read(arena, "2.bias")))
            return timeout is None

        arena.hold(staged, holds_writers=True)
        arena.hold(staged, holds_writers=True)
        act()
        assert seen == [(what, before)] * 2, "each wait is called once, before the first byte changes"
        assert read(arena, "2.bias") != before
        del seen[:]

    during("step", lambda: train(model, optimizer, "mlp", 1))
    during("load", lambda: model.load_state_dict(saved))
    saved_bias = {"weight": saved["2.weight"], "bias": saved["2.bias"] + 1}
    during("load part", lambda: model[2].load_state_dict(saved_bias))
    model[2].bias.data = torch.zeros(3)
    during("refresh", arena.refresh)


def test_modules_added_later_wait_too() -> None:
    model = mlp()
    arena = Arena.adopt(model)
    model.add_module("more", nn.Sequential(nn.Linear(2, 2)))
    arena.refresh()
    waited: list[float | None] = []

    def staged(timeout: float | None) -> bool:
        waited.append(timeout)
        return timeout is None

    for module in (model.more, model.more[0]):
        arena.hold(staged, holds_writers=True)
        module.load_state_dict(module.state_dict())
        assert waited == [None]
        waited.clear()


def test_the_fence_runs_before_hooks_that_were_registered_earlier() -> None:
    model, optimizer = build("mlp", "adam")
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("hook"))
    arena = Arena.adopt(model, optimizer)

    def staged(timeout: float | None) -> bool:
        if timeout is None:
            order.append("staged")
        return timeout is None

    arena.hold(staged, holds_writers=True)
    optimizer.step()
    assert order == ["staged", "hook"]


def test_hooks_are_removed_with_their_arena() -> None:
    model, optimizer = build("mlp", "adam")
    for _ in range(5):
        arena = Arena.adopt(model, optimizer)
        model[0].bias.data = torch.zeros(12)
        arena.refresh()  # takes an inventory, and hooks nothing twice
    for hooks in (model._load_state_dict_pre_hooks, model[0]._load_state_dict_pre_hooks):
        assert len(hooks) == 1
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    del arena
    assert not model._load_state_dict_pre_hooks and not optimizer._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
def test_untrained_segments_are_unfenced() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("ours", "theirs", "frozen")})
    model["norm"] = nn.BatchNorm1d(2)
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD([p for name in ("ours", "frozen", "norm") for p in model[name].parameters()])
    arena = Arena.adopt(model, optimizer)
    buffers = {f"norm.{name}" for name, _ in model["norm"].named_buffers()}
    assert arena.unfenced == buffers | {f"{m}.{p}" for m in ("theirs", "frozen") for p in ("weight", "bias")}
    assert Arena.wrap({"w": torch.zeros(1)}).unfenced == frozenset()
    assert Arena.adopt(nn.BatchNorm1d(2)).unfenced == {"running_mean", "running_var", "num_batches_tracked"}

    layout, address = arena.layout, arena.sources[0].address
    model["ours"].requires_grad_(False)
    arena.refresh()
    assert arena.unfenced >= {"ours.weight", "ours.bias"}
    assert arena.layout is not layout, "plans go by it"
    assert arena.sources[0].address != address, "frozen tensors share no huge page with trained ones"
    optimizer.add_param_group({"params": model["theirs"].parameters()})
    model.requires_grad_(True)
    arena.refresh()
    assert arena.unfenced == buffers


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
@pytest.mark.parametrize("elements", [1, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("chunk_bytes", [ALIGNMENT, 3 * ALIGNMENT])
def test_only_blocks_with_unfenced_segments_are_staged_first(elements: int, chunk_bytes: int) -> None:
    """float32, so 1024 elements are a block: a segment may end where the next block starts."""
    model = nn.Module()
    # An empty tensor in the middle of a block of trained ones: nothing of it can change.
    for name, count in (("first", 1500), ("nothing", 0), ("second", 548)):
        model.register_parameter(name, nn.Parameter(torch.ones(count)))
    for index in range(4):
        model.register_parameter(f"p{index}", nn.Parameter(torch.ones(1024)))
        model.register_buffer(f"b{index}", torch.ones(elements))
        model.register_buffer(f"empty{index}", torch.ones(0))
    names = ("first", "second", "p0", "p1", "p3")  # p2 is another optimizer's
    trained = [model.get_parameter(name) for name in names]
    arena = Arena.adopt(model, torch.optim.SGD(trained))
    packed = pack_plan(arena.layout, arena.runs, arena.rows, arena.unfenced, ALIGNMENT, chunk_bytes)
    stored = [s for s in arena.segments if s.name in arena.unfenced and s.nbytes]
    expected = {
        index
        for index, block in enumerate(packed.plan.blocks)
        for s in stored
        if s.file_index == block.file_index
        and s.file_offset < block.file_offset + block.nbytes
        and block.file_offset < s.file_offset + s.nbytes
    }
    assert 0 < len(expected) < len(packed.plan.blocks)
    order = struct.unpack(f"={packed.order.row_count}I", packed.order.memory)
    assert packed.urgent_count == len(expected) and set(order[: packed.urgent_count]) == expected
    assert sorted(order) == list(range(len(packed.plan.blocks)))


def test_a_parameter_trained_under_another_name_is_fenced() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    model.append(nn.Parameter(model[0].data))
    arena = Arena.adopt(model, torch.optim.SGD([model[1]]))
    assert arena.aliases == {"1": "0"} and arena.unfenced == frozenset()


def test_hold_drops_saves_that_are_staged() -> None:
    arena = Arena.adopt(mlp())
    asked: list[int] = []

    def staged(index: int) -> Callable[[float | None], bool]:
        def wait_staged(timeout: float | None) -> bool:
            asked.append(index)
            return index != 3

        return wait_staged

    for index in range(6):
        arena.hold(staged(index), holds_writers=True)
    assert asked == [0, 1, 2, 3, 3], "each staged one is asked once, and none behind one that is not"


def test_an_interrupted_wait_is_repeated() -> None:
    arena = Arena.adopt(mlp())
    outcomes: list[Exception | None] = [None, KeyError(), None]

    def wait_staged(timeout: float | None) -> bool:
        outcome = outcomes.pop()
        if outcome is not None:
            raise outcome
        return True

    arena.hold(wait_staged, holds_writers=True)
    arena.fence()
    arena.hold(wait_staged, holds_writers=True)
    with pytest.raises(KeyError):
        arena.fence()
    arena.fence()
    assert outcomes == []


def test_reading_does_not_wait() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    arena.hold(lambda timeout: pytest.fail("nothing was written"), holds_writers=True)
    arena.refresh()
    model(torch.ones(1, 6)).sum().backward()
    arena.state_dict()
    arena.options()


def test_hooks_do_not_keep_the_arena() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    expected = everything(model, optimizer)
    gone = weakref.ref(arena)
    gc.disable()
    try:
        del arena
        assert gone() is None, "no cycle holds it either"
    finally:
        gc.enable()
    assert everything(model, optimizer) == expected
    train(model, optimizer, "mlp", 1)
    model.load_state_dict(model.state_dict())


def test_a_copied_model_is_not_in_the_arena() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    arena.hold(lambda timeout: pytest.fail("the copy's step does not write here"), holds_writers=True)
    before = everything(model, optimizer)
    train(twin, twin_optimizer, "mlp", 1)
    twin.load_state_dict(twin.state_dict())
    torch.save(model, io.BytesIO())  # a hooked model can still be pickled
    arena.refresh()
    assert everything(model, optimizer) == before
