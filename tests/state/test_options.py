"""Options, reserved momentum and late state: saved, restored, and refused if they do not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from trainings import (
    OPTIMIZERS,
    OwnStep,
    assert_holds,
    assert_inside,
    build,
    count_calls,
    everything,
    mlp,
    read,
    restore,
    save,
    train,
)

import engine
from engine.errors import ArenaError, MismatchError
from engine.state.arena import Arena

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("step_count", [0, 4])
@pytest.mark.parametrize("into", [0, 2])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_restored_training_goes_on_bit_identically(optimizer_name: str, into: int, step_count: int) -> None:
    model, optimizer = build("convnet", optimizer_name)
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "convnet", step_count)
    optimizer.param_groups[0]["lr"] *= 0.5
    saved = save(arena)
    train(model, optimizer, "convnet", 4, seed=5)

    other, other_optimizer = build("convnet", optimizer_name)
    other_arena = Arena.adopt(other, other_optimizer)
    train(other, other_optimizer, "convnet", into, seed=9)
    layout = other_arena.layout
    restore(other_arena, saved)
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(other, other_optimizer, "convnet", 4, seed=5)
    assert everything(other, other_optimizer) == everything(model, optimizer)
    other_arena.refresh()
    assert other_arena.layout is layout
    assert_holds(other_arena)


LATER: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], str]] = {
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
    "centered": (torch.optim.RMSprop, {"centered": True}, "grad_avg"),
    "momentum": (torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
}


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("option", LATER)
def test_an_option_set_after_adopt_steps_as_without_an_arena(option: str, refreshed: bool) -> None:
    """Torch makes the state of the option in the first step; an arena has made state before that."""
    make, later, key = LATER[option]
    models, optimizers = [], []
    for is_adopted in (True, False):
        torch.manual_seed(1)
        model = mlp()
        optimizer = make(model.parameters())
        arena = Arena.adopt(model, optimizer) if is_adopted else None
        optimizer.param_groups[0].update(later)
        if arena is not None and refreshed:
            arena.refresh()
            assert f"optimizer.0.weight.{key}" in {segment.name for segment in arena.segments}
        train(model, optimizer, "mlp", 3)
        if arena is not None:
            arena.refresh()
            assert_holds(arena)
            assert f"optimizer.0.weight.{key}" in {segment.name for segment in arena.segments}
        models.append(model)
        optimizers.append(optimizer)
    assert everything(models[0], optimizers[0]) == everything(models[1], optimizers[1])


def test_momentum_is_absent_until_made() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    absent = [f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()]
    assert arena.options()[""]["absent"] == absent
    assert len(optimizer.state) == 0
    assert all(not arena.state_dict()[name].any() for name in absent), "reserved segments read as zeros"
    layout = arena.layout
    train(model, optimizer, "mlp", 1)
    assert arena.options()[""]["absent"] == []
    assert all(any(read(arena, name)) for name in absent)
    optimizer.state.clear()
    arena.refresh()
    assert arena.options()[""]["absent"] == absent
    assert all(not any(read(arena, name)) for name in absent), "a deleted tensor leaves zeros"
    assert arena.layout is layout


def test_momentum_of_an_unfrozen_parameter_is_taken_in() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    model[2].requires_grad_(False)
    arena = Arena.adopt(model, optimizer)
    model[2].requires_grad_(True)
    train(model, optimizer, "mlp", 1)
    arena.refresh()
    assert_inside(arena, optimizer.state[model[2].weight]["momentum_buffer"])
    assert_holds(arena)


def test_freezing_and_unfreezing_are_noticed() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    name = "optimizer.2.bias.momentum_buffer"
    model[2].bias.requires_grad_(False)
    arena.refresh()
    assert name not in arena.options()[""]["absent"] and name not in arena.state_dict()
    model[2].bias.requires_grad_(True)
    arena.refresh()
    assert name in arena.options()[""]["absent"] and name in arena.state_dict()


def test_momentum_switched_on_is_noticed_and_its_schedule_causes_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("mlp", "sgd")
    arena = Arena.adopt(model, optimizer)
    assert arena.options()[""]["absent"] == []
    optimizer.param_groups[0]["momentum"] = 0.9
    arena.refresh()
    assert len(arena.options()[""]["absent"]) == 4
    gathers = count_calls(monkeypatch, "gather")
    optimizer.param_groups[0]["momentum"] = 0.8
    arena.refresh()
    assert gathers == []
    train(model, optimizer, "mlp", 1)
    assert_inside(arena, optimizer.state[model[2].bias]["momentum_buffer"])


def test_restoring_a_part_creates_and_deletes_momentum() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    first, last = model[0].weight, model[2].weight
    names = {"optimizer.0.weight.momentum_buffer", "optimizer.2.bias.momentum_buffer"}
    with torch.inference_mode():
        arena.restored_part(names, absent=[])
    assert set(optimizer.state) == {first, model[2].bias}
    assert_inside(arena, optimizer.state[first]["momentum_buffer"])
    optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, "mlp", 1)
    everywhere = [f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()]
    arena.restored_part(names, absent=everywhere)
    assert [p for p in model.parameters() if "momentum_buffer" in optimizer.state[p]] == [model[0].bias, last]
    assert set(arena.options()[""]["absent"]) == names and optimizer.param_groups[0]["lr"] == 0.5
    assert_holds(arena)


def test_reserved_state_is_not_made_on_the_default_device() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in [(2,), (0, 2)]])
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    torch.set_default_device("meta")
    try:
        arena = Arena.adopt(model, optimizer)
        arena.restored_part([f"optimizer.{name}.momentum_buffer" for name in "01"], absent=[])
    finally:
        torch.set_default_device(None)
    assert [state["momentum_buffer"].device.type for state in optimizer.state.values()] == ["cpu", "cpu"]


def test_momentum_has_the_strides_of_its_parameter() -> None:
    param = nn.Parameter(torch.arange(12.0).reshape(4, 3).t())
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    arena = Arena.adopt(nn.ParameterList([param]), optimizer)
    layout = arena.layout
    param.grad = torch.arange(12.0).reshape(3, 4)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    assert arena.layout is layout and momentum.stride() == param.stride()
    assert torch.equal(momentum, param.grad)
    assert_holds(arena)


def test_restored_momentum_has_its_own_version() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 1)
    saved = save(arena)
    optimizer.state.clear()
    restore(arena, saved)
    one, other = (optimizer.state[param]["momentum_buffer"] for param in model[0].parameters())
    version = one._version
    other.zero_()
    assert one._version == version, "not one counter for all views of the buffer"


def test_momentum_of_an_unused_parameter_stays_absent() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    arena = Arena.adopt(model, optimizer)
    layout = arena.layout
    train(model, optimizer, "mlp", 2)
    saved = save(arena)
    assert saved[1][""]["absent"] == ["optimizer.params.1.0.momentum_buffer"] and arena.layout is layout
    assert_inside(arena, optimizer.state[model[0].weight]["momentum_buffer"])
    unused.grad = torch.ones(3)
    optimizer.step()
    assert arena.options()[""]["absent"] == []
    restore(arena, saved)
    assert arena.options()[""]["absent"] == saved[1][""]["absent"]
    assert "momentum_buffer" not in optimizer.state[unused]


def test_step_does_not_raise_for_momentum_that_cannot_be_stored() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arena = Arena.adopt(model, optimizer)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ArenaError, match=r"'optimizer\.weight\.momentum_buffer' is sparse"):
        arena.refresh()


def test_tensor_hyperparameters_are_restored_in_place() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    arena = Arena.adopt(model, optimizer)
    saved = save(arena)
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.125
    restore(arena, saved)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0


def grouped(rates: list[float], turned: bool = False) -> tuple[Any, Optimizer]:
    model = nn.Linear(3, 3)
    groups = [{"params": [model.weight], "lr": rates[0]}, {"params": [model.bias], "lr": rates[1]}]
    return model, torch.optim.Adam(groups[::-1] if turned else groups)


def test_each_group_gets_its_own_hyperparameters_back() -> None:
    arena = Arena.adopt(*grouped([0.1, 0.2]))
    model, optimizer = grouped([9.0, 9.0])
    restore(Arena.adopt(model, optimizer), save(arena))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert optimizer.param_groups[1]["params"] == [model.bias]


def test_other_groups_are_refused() -> None:
    options = save(Arena.adopt(*grouped([0.1, 0.2])))[1]
    model, optimizer = grouped([9.0, 9.0], turned=True)
    arena = Arena.adopt(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(MismatchError, match=r"group 0 of the checkpoint's.*\['weight'\].*arena's has \['bias'\]"):
        arena.restored(options, {})
    assert everything(model, optimizer) == before
    assert [group["lr"] for group in optimizer.param_groups] == [9.0, 9.0]


def test_plain_state_is_restored() -> None:
    model = mlp()
    optimizer = OwnStep(model.parameters())
    param: Any = model[0].bias
    optimizer.state[param] = {"count": 3, "note": "x"}
    arena = Arena.adopt(model, optimizer)
    saved = save(arena)
    assert saved[1][""]["state"] == {"0.bias": {"count": 3, "note": "x"}}
    optimizer.state[param] = {"count": 4, "later": True}
    restore(arena, saved)
    assert optimizer.state[param] == {"count": 3, "note": "x"}
    optimizer.state.clear()
    restore(arena, saved)
    assert optimizer.state[param] == {"count": 3, "note": "x"}


def test_options_of_another_optimizer_are_refused() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    bare = Arena.adopt(mlp())
    options = arena.options()

    def changed(**other: Any) -> dict[str, Any]:
        return {"": options[""] | other}

    assert bare.options() == {} and Arena.wrap({}).options() == {}
    bare.restored({}, {})
    for holder, given_options, words in [
        (bare, options, "the arena has none"),
        (arena, {}, "the checkpoint has none"),
        (arena, changed(param_groups=[]), "0 parameter groups and the arena's has 1"),
        (arena, changed(absent=["optimizer.0.weight.exp_avg"]), r"cannot take: optimizer\.0\.weight\.exp_avg"),
        (arena, changed(state={"gone": {"n": 1}}), "cannot take: gone"),
    ]:
        with pytest.raises(MismatchError, match=words):
            holder.check_options(given_options)
    assert set(options[""]["param_groups"][0]) >= {"lr", "betas"}
    assert options[""]["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]


class Drawing(torch.optim.SGD):
    """An optimizer that draws from generators of its own, as timm's Adahessian does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.generator = torch.Generator().manual_seed(1)
        self.rngs: list[Any] = [random.Random(2), numpy.random.default_rng(3)]
        self.by_name = {"old": numpy.random.RandomState(4)}
        self.shared = torch.default_generator

    def draw(self) -> list[float]:
        drawn = [float(torch.rand(1, generator=self.generator)), self.rngs[0].random(), float(self.rngs[1].random())]
        return [*drawn, self.by_name["old"].standard_normal()]


def test_generators_of_an_optimizer_are_stored_and_put_back(tmp_path: Path) -> None:
    model = mlp()
    optimizer = Drawing(model.parameters())
    arena = Arena.adopt(model, optimizer)
    optimizer.draw()
    with engine.Engine(tmp_path) as run:
        run.checkpoint(arena).result()
        drawn = [optimizer.draw() for _ in range(3)]
        model = mlp()
        other = Drawing(model.parameters())
        torch.manual_seed(5)
        run.restore(Arena.adopt(model, other))
    assert [other.draw() for _ in range(3)] == drawn
    expected = torch.Generator().manual_seed(5)
    assert torch.rand(1) == torch.rand(1, generator=expected), "that of the process is left alone"


def test_a_generator_that_is_not_there_is_refused_by_name() -> None:
    model = mlp()
    saved = Arena.adopt(model, Drawing(model.parameters())).options()
    for change, kind in (({}, "no generator"), ({"generator": random.Random()}, "a python generator")):
        model = mlp()
        optimizer = Drawing(model.parameters())
        del optimizer.generator
        vars(optimizer).update(change)
        with pytest.raises(MismatchError, match=f"'generator', and the arena's has {kind} there"):
            Arena.adopt(model, optimizer).check_options(saved)
    model = mlp()
    other = Drawing(model.parameters())
    other.rngs[1] = numpy.random.Generator(numpy.random.MT19937())
    with pytest.raises(MismatchError, match=r"'rngs\.1' of the optimizer \(Drawing\) refuses the state that it had"):
        Arena.adopt(model, other).restored(saved, {})
