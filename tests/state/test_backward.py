"""Optimizers that step in backward: the same weights as with steps after it, and layers that are handed over in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import engine

WIDTH, LAYERS = 32, 4


def training(unused: bool = False) -> tuple[nn.Sequential, dict[str, torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    if unused:
        model[1].spare = nn.Parameter(torch.ones(3))
    return model, {f"layer-{index}": torch.optim.AdamW(layer.parameters()) for index, layer in enumerate(model)}


def backward(model: nn.Module, number: int) -> None:
    data = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
    model(data).square().mean().backward()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("kind", ["one", "several", "dict"])
def test_the_weights_are_those_of_steps_after_backward(kind: str, unused: bool, one_thread: None) -> None:
    (plain, _), (model, optimizers) = training(unused), training(unused)
    after: list[torch.optim.Optimizer] = [torch.optim.AdamW(plain.parameters())]
    given: Any = torch.optim.AdamW(model.parameters())
    if kind != "one":
        after = [torch.optim.AdamW(layer.parameters()) for layer in plain]
        given = optimizers if kind == "dict" else list(optimizers.values())
    hooks = engine.step_in_backward(given)
    for number in range(4):
        backward(plain, number)
        for each in after:
            each.step()
            each.zero_grad()
        backward(model, number)
        assert all(param.grad is None for param in model.parameters())
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert same(one.detach(), other.detach())
    hooks.remove()
    hooks.remove()
    backward(model, 9)
    assert all(same(a.detach(), b.detach()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_layer_steps_before_the_gradients_of_earlier_layers_exist() -> None:
    model, optimizers = training()
    engine.step_in_backward(optimizers)
    seen: list[int] = []
    for index, optimizer in enumerate(optimizers.values()):
        optimizer.register_step_post_hook(lambda *_, index=index: seen.append(index))
    model.get_parameter("0.weight").register_hook(lambda _: seen.append(-1))
    backward(model, 0)
    assert seen.index(3) < seen.index(2) < seen.index(1) < seen.index(-1)


def test_a_pass_that_raises_does_not_disturb_the_next_one(one_thread: None) -> None:
    (plain, _), (model, _) = training(), training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.step_in_backward(optimizer)
    after = torch.optim.SGD(plain.parameters(), lr=0.1)

    def fail(_: Tensor) -> None:
        raise OSError("mine")

    handle = model.get_parameter("1.weight").register_hook(fail)
    with pytest.raises(OSError, match="mine"):
        backward(model, 0)
    handle.remove()
    optimizer.zero_grad()
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for number in (1, 2):
        backward(model, number)
        backward(plain, number)
        after.step()
        after.zero_grad()
    assert len(steps) == 2
    assert all(same(a.detach(), b.detach()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_layers_are_handed_over_in_backward(tmp_path: Path) -> None:
    model, optimizers = training()
    arena = engine.Arena.adopt(model, optimizers)
    engine.step_in_backward(optimizers)
    remaining: list[list[str]] = []
    with engine.Engine(tmp_path) as eng:
        for number in range(2):
            with eng.layerwise(arena, number) as save, save.in_backward():
                handle = model.get_parameter("0.weight").register_hook(lambda grad: remaining.append(save.remaining()))
                backward(model, number)
                handle.remove()
            step = save.result().step
            loaded = eng.load(step)
            assert all(same(loaded[name], tensor) for name, tensor in arena.state_dict().items())
    assert remaining == [["0"]] * 2, "the other layers were handed over inside backward"


def checkpointed(model: nn.Module, use_reentrant: bool) -> Tensor:
    """The loss of two segments that share their parameters, with activation checkpointing."""
    hidden = torch.ones(2, WIDTH, requires_grad=True)  # a reentrant segment needs an input with a gradient
    for _ in range(2):
        hidden = checkpoint(model, hidden, use_reentrant=use_reentrant)
    return hidden.square().mean()


def test_activation_checkpointing_changes_no_weight(one_thread: None) -> None:
    (plain, _), (model, _) = training(), training()
    after = torch.optim.SGD(plain.parameters(), lr=0.1)
    checkpointed(plain, use_reentrant=False).backward()
    after.step()
    engine.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
    checkpointed(model, use_reentrant=False).backward()
    assert all(same(a.detach(), b.detach()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_backward_pass_inside_the_pass_steps_nothing() -> None:
    (plain, _), (model, _) = training(), training()
    engine.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(engine.UsageError, match="use_reentrant=False"):
        checkpointed(model, use_reentrant=True).backward()
    assert all(same(a.detach(), b.detach()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("given", [nn.Linear(1, 1), [3], {"a": None}])
def test_what_is_no_optimizer_is_refused(given: Any) -> None:
    with pytest.raises((engine.ArgumentError, TypeError)):
        engine.step_in_backward(given)
