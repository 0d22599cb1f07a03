"""Tensor subclasses: their plain components are stored under names of their own, or they are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded import Coded, CodedSgd
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from trainings import OPTIMIZERS, assert_holds, assert_inside, bits, mlp, train

import engine
from engine.errors import ArenaError, CorruptError
from engine.state.arena import Arena
from engine.state.components import leaves
from engine.state.tensors import encode

pytestmark = pytest.mark.usefixtures("one_thread")


def names(arena: Arena) -> set[str]:
    return {segment.name for segment in arena.segments}


def test_state_of_a_subclass_is_taken_apart() -> None:
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    optimizer, other = CodedSgd(model.parameters()), CodedSgd(plain.parameters())
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 2)
    arena.refresh()
    assert names(arena) >= {"optimizer.0.weight.momentum.codes", "optimizer.2.bias.momentum.scale"}
    layout = arena.layout
    train(model, optimizer, "mlp", 3)
    train(plain, other, "mlp", 2)
    train(plain, other, "mlp", 3)
    arena.refresh()
    assert arena.layout is layout
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in plain.state_dict().items()}
    segment = next(s for s in arena.segments if s.name == "optimizer.0.weight.momentum.codes")
    assert (segment.role, segment.layer, segment.dtype) == ("optimizer", "0", "int8")
    assert_inside(arena, optimizer.state[model[0].weight]["momentum"].codes)
    assert_holds(arena)


def test_a_component_that_is_replaced_is_brought_back() -> None:
    model = mlp()
    optimizer = CodedSgd(model.parameters())
    train(model, optimizer, "mlp", 1)
    arena = Arena.adopt(model, optimizer)
    layout, momentum = arena.layout, optimizer.state[model[0].weight]["momentum"]
    momentum.codes = torch.full_like(momentum.codes, 7)
    arena.refresh()
    assert arena.layout is layout
    assert_inside(arena, momentum.codes)
    assert_holds(arena)
    optimizer.state[model[0].weight]["momentum"] = Coded.of(torch.ones(12, 6))
    arena.refresh()
    assert arena.layout is layout
    assert_holds(arena)


class Growing(TwoTensor):
    """Has its second component only from some moment on."""

    has_second = False

    def __tensor_flatten__(self) -> Any:
        return ["a", "b"] if self.has_second else ["a"], None


def test_a_component_that_comes_later_is_taken_in() -> None:
    kind: Any = Growing
    model, codes = nn.Module(), kind(torch.ones(3), torch.zeros(3))
    model.register_buffer("codes", codes)
    arena = Arena.adopt(model)
    assert names(arena) == {"codes.a"}
    codes.has_second = True
    arena.refresh()
    assert names(arena) == {"codes.a", "codes.b"}
    layout = arena.layout
    arena.refresh()
    assert arena.layout is layout
    codes.has_second = False
    arena.refresh()
    assert names(arena) == {"codes.a"}


class TwoWeights(nn.Module):
    """A layer whose parameter has two tensors in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(TwoTensor(torch.ones(6), torch.zeros(6)))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.weight * self.scale


@pytest.mark.parametrize("optimizer_name", ["sgd-momentum", "adam"])
def test_a_parameter_of_a_subclass_is_trained(optimizer_name: str) -> None:
    model = TwoWeights()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    arena = Arena.adopt(model, optimizer)
    before = model.weight.a.clone()  # type: ignore[attr-defined]
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    arena.refresh()
    state = {"sgd-momentum": "momentum_buffer", "adam": "exp_avg"}[optimizer_name]
    assert names(arena) >= {"weight.a", "weight.b", "scale", f"optimizer.weight.{state}.a"}
    assert not arena.unfenced, "the step writes to all of them"
    assert not torch.equal(model.weight.a, before)  # type: ignore[attr-defined]
    assert_holds(arena)


def test_a_frozen_parameter_of_a_subclass_is_untrained() -> None:
    model = TwoWeights()
    model.weight.requires_grad_(False)
    assert Arena.adopt(model, torch.optim.Adam(model.parameters())).unfenced == {"weight.a", "weight.b"}


def test_wrappers_in_wrappers_and_tied_ones() -> None:
    inner = TwoTensor(torch.ones(3), torch.zeros(3))
    model = nn.Module()
    model.one = nn.Parameter(TwoTensor(inner, torch.ones(3)))
    model.other = model.one
    arena = Arena.adopt(model)
    assert names(arena) == {"one.a.a", "one.a.b", "one.b"}
    assert arena.aliases == {"other.a.a": "one.a.a", "other.a.b": "one.a.b", "other.b": "one.b"}


def test_another_optimizer_over_a_subclass_is_named() -> None:
    model = TwoWeights()
    arena = Arena.adopt(model, torch.optim.SGD([model.scale], lr=0.1))
    other = torch.optim.SGD([model.weight], lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    other.step()
    assert arena.take_foreign() == ["weight.a"]


class Odd(Tensor):
    """Says nothing of its components."""


class Opaque(torch.optim.SGD):
    """Makes state that cannot be stored, in its step."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            self.state[param]["odd"] = torch.zeros_like(param).as_subclass(Odd)


def test_state_that_cannot_be_taken_apart_is_refused_in_the_save(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Opaque(model.parameters(), lr=0.1)
    arena = Arena.adopt(model, optimizer)
    optimizer.step()
    with engine.Engine(tmp_path) as eng:
        with pytest.raises(ArenaError, match=r"'optimizer\.weight\.odd' is a Odd, .*store the tensors it is made of"):
            eng.checkpoint(arena)
        assert eng.steps() == []


def test_a_tensor_of_several_ranks_is_refused() -> None:
    kind: Any = type("DTensor", (TwoTensor,), {"__module__": "torch.distributed.tensor"})
    with pytest.raises(ArenaError, match=r"'w' is a DTensor, .* holds the part of one rank"):
        Arena.wrap({"w": kind(torch.ones(2), torch.ones(2))})


@pytest.mark.parametrize(
    "change",
    [{"parts": "ab"}, {"parts": [1]}, {"class": None}, {"shape": ["1"]}, {"stride": 3}],
    ids=lambda change: str(change),
)
def test_a_description_of_another_form_is_damage(change: dict[str, Any]) -> None:
    about = {"class": "coded.Coded", "parts": ["codes", "scale"], "shape": [1], "stride": [1]}
    assert leaves("w", {"w": encode(about)}) == ["w.codes", "w.scale"]
    with pytest.raises(CorruptError, match="'w' is not that of a tensor subclass"):
        leaves("w", {"w": encode(about | change)})


def test_subclasses_in_each_other_without_end_are_damage() -> None:
    about = encode({"class": "coded.Coded", "parts": ["a"], "shape": [1], "stride": [1]})
    with pytest.raises(CorruptError, match="over 16 deep"):
        leaves("w", {"w" + ".a" * depth: about for depth in range(3000)})
