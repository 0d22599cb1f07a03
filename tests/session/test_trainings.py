"""Trainings of models of many kinds: one that is saved, restored into a fresh model and resumed is bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import engine

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[], tuple[nn.Module, Optimizer]]


def step(model: nn.Module, optimizer: Optimizer, shape: tuple[int, ...], number: int) -> None:
    torch.manual_seed(number)
    optimizer.zero_grad()
    out = model(torch.randn(shape))
    out.abs().square().mean().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Every tensor of a training, in order."""
    states = optimizer.state_dict()["state"]
    values = [*model.state_dict().values(), *(value for state in states.values() for value in state.values())]
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == theirs


def assert_resumes(
    make: Make,
    path: Path,
    shape: tuple[int, ...],
    make_again: Make | None = None,
    same_base: bool = False,
    **adopt: Any,
) -> dict[str, Tensor]:
    """A training, saved after three steps, and one that goes on from there in a fresh model end in the same bits.

    Args:
        make_again: makes the fresh model, if not in the same way.
        same_base: the fresh model has the first one's initial tensors, of which a part is not saved.

    Returns:
        The tensors of the checkpoint.
    """
    torch.manual_seed(1)
    model, optimizer = make()
    arena = engine.Arena.adopt(model, optimizer, **adopt)
    with engine.Engine(path) as eng:
        for number in range(6):
            step(model, optimizer, shape, number)
            if number == 2:
                eng.checkpoint(arena, number)
    torch.manual_seed(1 if same_base else 2)
    fresh, fresh_optimizer = (make_again or make)()
    run = engine.open(path)
    arena = engine.Arena.adopt(fresh, fresh_optimizer, **adopt)
    run.restore(arena)
    loaded = run.load()
    live = arena.state_dict()
    assert_same(list(loaded.values()), [live[name] for name in loaded])
    for number in range(3, 6):
        step(fresh, fresh_optimizer, shape, number)
    assert_same(state_of(fresh, fresh_optimizer), state_of(model, optimizer))
    return loaded


def linear() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    return model, torch.optim.AdamW(model.parameters())


def test_a_compiled_training_resumes_in_a_raw_model(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model, optimizer = linear()
        compiled: Any = torch.compile(model, backend="eager")
        return compiled, optimizer

    loaded = assert_resumes(make, tmp_path, (7, 6), linear)
    assert set(loaded) >= {"0.weight", "1.running_mean", "optimizer.2.bias.exp_avg"}


def test_a_renamed_training_resumes(tmp_path: Path) -> None:
    loaded = assert_resumes(linear, tmp_path, (7, 6), rename=lambda name: f"net.{name}")
    assert set(loaded) >= {"net.0.weight", "net.1.running_mean", "optimizer.net.2.bias.exp_avg"}
