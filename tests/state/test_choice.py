"""Partial arenas: `only=` and `exclude=` say which tensors are moved and stored; the others stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import OPTIMIZERS, OwnStep, assert_holds, assert_inside, build, everything, train

from engine.errors import ArenaError, ArgumentError
from engine.state.arena import Arena

pytestmark = pytest.mark.usefixtures("one_thread")


def names(arena: Arena) -> set[str]:
    return {segment.name for segment in arena.segments}


def frozen_convnet(optimizer_name: str) -> tuple[Any, torch.optim.Optimizer]:
    """Of the two convolutions only the last is trained."""
    model = build("convnet", optimizer_name)[0]
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    return model, OPTIMIZERS[optimizer_name](model.parameters())


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd-momentum"])
def test_only_trained_holds_what_a_training_changes(optimizer_name: str) -> None:
    model, optimizer = frozen_convnet(optimizer_name)
    plain = frozen_convnet(optimizer_name)
    frozen = model[0].weight.data_ptr()
    arena = Arena.adopt(model, optimizer, only="trained")
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert {s.name for s in arena.segments if s.role != "optimizer"} == {"3.weight", "3.bias"} | buffers
    assert {s.layer for s in arena.segments if s.role == "optimizer"} == {"3"}
    assert arena.left_out == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert "4 left out" in repr(arena)
    layout = arena.layout
    train(model, optimizer, "convnet", 3)
    train(*plain, "convnet", 3)
    assert everything(model, optimizer) == everything(*plain)
    arena.refresh()
    assert arena.layout is layout and model[0].weight.data_ptr() == frozen
    assert_holds(arena)


def test_a_parameter_that_is_unfrozen_is_taken_in() -> None:
    model, optimizer = frozen_convnet("adam")
    arena = Arena.adopt(model, optimizer, only="trained")
    model[0].requires_grad_(True)
    arena.refresh()
    assert names(arena) >= {"0.weight", "optimizer.0.weight.exp_avg"}
    assert_inside(arena, model[0].weight)


def test_patterns_pick_names_and_layers() -> None:
    model, optimizer = build("transformer", "adam")
    arena = Arena.adopt(model, optimizer, only=["body.layers.1.*", "embed"], exclude="*.exp_avg_sq")
    assert {s.layer.split(".linear")[0] for s in arena.segments} >= {"embed", "body.layers.1"}
    assert not any("layers.0" in name or name.endswith("exp_avg_sq") for name in names(arena))
    assert "optimizer.embed.weight.exp_avg" in names(arena)
    assert arena.aliases == {"head.weight": "embed.weight"}, "tied weights stay tied"
    train(model, optimizer, "transformer", 2)
    assert_holds(arena)


@pytest.mark.parametrize("left_out", ["embed.*", "head.*"])
def test_a_tied_tensor_is_held_if_one_of_its_names_is(left_out: str) -> None:
    model, _ = build("transformer", "adam")
    arena = Arena.adopt(model, exclude=left_out)
    assert arena.aliases == {"head.weight": "embed.weight"}
    assert_inside(arena, model.head.weight)


def test_parameters_that_share_memory_are_held_together() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))])
    model[1] = nn.Parameter(model[0].data)
    arena = Arena.adopt(model, only="1")
    with torch.no_grad():
        model[0][2] = 7
    assert model[1][2] == 7
    assert_holds(arena)


class Odd(Tensor):
    """Cannot be stored."""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, device="meta"),
        torch.eye(3).to_sparse_coo(),
        torch.zeros(2).as_subclass(Odd),
        nn.LazyLinear(2).weight,
        torch.zeros(1, 3).expand(2, 3),
    ],
    ids=["meta", "sparse", "subclass", "lazy", "expanded"],
)
def test_what_is_left_out_is_not_refused(tensor: Tensor) -> None:
    model = nn.Module()
    model.head, model.base = nn.Linear(2, 2), nn.Module()
    if isinstance(tensor, nn.Parameter):
        model.base.register_parameter("odd", tensor)
    else:
        model.base.register_buffer("odd", tensor)
    with pytest.raises(ArenaError, match=r"'base\.odd'"):
        Arena.adopt(model)
    arena = Arena.adopt(model, exclude="base.*")
    assert names(arena) == {"head.weight", "head.bias"} and arena.left_out == {"base.odd"}
    assert model.base.odd is tensor


def test_state_that_is_made_late_is_left_out_too() -> None:
    model = build("mlp", "adam")[0]
    optimizer = OwnStep(model.parameters())
    arena = Arena.adopt(model, optimizer, exclude="0")
    train(model, optimizer, "mlp", 1)
    arena.refresh()
    assert names(arena) == {"2.weight", "2.bias", "optimizer.2.weight.velocity", "optimizer.2.bias.velocity"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"only": 7}, "only is 7"),
        ({"exclude": []}, r"exclude is \[\]"),
        ({"only": "trained"}, r"only='trained' needs the optimizer"),
    ],
)
def test_arguments_that_choose_nothing_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Arena.adopt(nn.Linear(2, 2), **arguments)


def test_patterns_that_leave_nothing_are_refused() -> None:
    model = nn.Linear(2, 2)
    address = model.weight.data_ptr()
    with pytest.raises(ArenaError, match="leave nothing"):
        Arena.adopt(model, only="decoder.*")
    assert model.weight.data_ptr() == address
