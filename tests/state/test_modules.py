"""Wrapped and renamed models: the names are those of the raw module, or those that the caller gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from trainings import assert_holds, assert_inside, build, everything, train

from engine.errors import ArenaError, ArgumentError
from engine.state.arena import Arena

pytestmark = pytest.mark.usefixtures("one_thread")

COMPILER = "aot_eager"  # needs no C++ compiler


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    store = torch._C._distributed_c10d.HashStore()  # of this process alone
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend=COMPILER)


def compiled_inside(model: Any) -> Any:
    model[0] = compiled(model[0])
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend=COMPILER)
    return model


def distributed(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def checkpointed_inside(model: Any) -> Any:
    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPPERS: list[Callable[[Any], Any]] = [
    compiled,
    compiled_inside,
    compiled_in_place,
    distributed,
    nn.DataParallel,
    checkpointed_inside,
    lambda model: compiled(distributed(compiled_inside(model))),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_has_the_names_of_the_raw_one(wrap: Callable[[Any], Any]) -> None:
    raw, optimizer = build("convnet", "adam")
    plain, plain_optimizer = build("convnet", "adam")
    names = set(raw.state_dict())
    wrapped, expected = wrap(raw), wrap(plain)
    arena = Arena.adopt(wrapped, optimizer)
    assert {segment.name for segment in arena.segments if segment.role != "optimizer"} == names
    assert "optimizer.0.weight.exp_avg" in {segment.name for segment in arena.segments}
    train(wrapped, optimizer, "convnet", 3)
    train(expected, plain_optimizer, "convnet", 3)
    assert list(everything(wrapped, optimizer).values()) == list(everything(expected, plain_optimizer).values())
    assert_holds(arena)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_change_inside_a_wrapper_is_noticed(wrap: Callable[[Any], Any]) -> None:
    raw, _ = build("convnet", "adam")
    arena = Arena.adopt(wrap(raw))
    raw[1] = nn.BatchNorm2d(4, dtype=torch.float64)
    raw[3].bias = nn.Parameter(torch.ones(3))
    arena.refresh()
    assert {s.name: s.dtype for s in arena.segments}["1.weight"] == "float64"
    assert_inside(arena, raw[3].bias)
    assert_holds(arena)


def test_a_model_wrapped_after_adoption_keeps_its_layout() -> None:
    model, _ = build("convnet", "adam")
    arena = Arena.adopt(model)
    layout = arena.layout
    compiled_inside(model)
    arena.refresh()
    assert arena.layout is layout


def test_a_key_that_no_wrapper_adds_is_kept() -> None:
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    arena = Arena.adopt(average)
    assert {segment.name for segment in arena.segments} == {"n_averaged", "module.weight", "module.bias"}


# Renamed


def test_renamed_tensors_give_their_names_to_state_and_layer() -> None:
    model, optimizer = build("transformer", "adam")
    plain = build("transformer", "adam")
    arena = Arena.adopt(model, optimizer, rename=lambda name: "backbone." + name.replace("body.layers", "blocks"))
    segments = {segment.name: segment for segment in arena.segments}
    assert arena.aliases == {"backbone.head.weight": "backbone.embed.weight"}
    moment = segments["optimizer.backbone.blocks.1.linear1.weight.exp_avg"]
    assert moment.layer == segments["backbone.blocks.1.linear1.weight"].layer == "backbone.blocks.1.linear1"
    assert "backbone.embed.weight" in arena.options()[""]["param_groups"][0]["params"]
    train(model, optimizer, "transformer", 2)
    train(*plain, "transformer", 2)
    assert everything(model, optimizer) == everything(*plain)
    model.body.layers[0].linear1.bias = nn.Parameter(torch.zeros(16))
    arena.refresh()
    assert_inside(arena, model.body.layers[0].linear1.bias)
    assert_holds(arena)


def fails(name: str) -> str:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: "same", r"'0\.weight' and '0\.bias' both to 'same'"),
        (lambda name: None, r"rename\('0\.weight'\) is None"),
        (lambda name: "", r"rename\('0\.weight'\) is ''"),
        (fails, r"rename\('0\.weight'\) raises KeyError\('0\.weight'\)"),
    ],
)
def test_a_rename_that_gives_no_names_is_refused(rename: Any, words: str) -> None:
    model, optimizer = build("mlp", "adam")
    address = model[0].weight.data_ptr()
    with pytest.raises(ArenaError, match=words):
        Arena.adopt(model, optimizer, rename=rename)
    assert model[0].weight.data_ptr() == address and not optimizer.state


def test_a_rename_that_is_no_function_is_refused() -> None:
    adopt: Any = Arena.adopt
    with pytest.raises(ArgumentError, match=r"rename is a builtins\.dict; it must be a function"):
        adopt(nn.Linear(2, 2), rename={"a": "b"})


def test_a_copy_of_a_wrapped_model_is_adopted_alone() -> None:
    model = nn.DataParallel(nn.Linear(2, 2))
    arena = Arena.adopt(model)
    twin = copy.deepcopy(model)
    Arena.adopt(twin)
    with torch.no_grad():
        twin.module.weight.add_(1)
    assert_holds(arena)
    assert not torch.equal(twin.module.weight, model.module.weight)
