"""`select=`: tied names, roles, and the weights of a training without its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def eng(tmp_path: Path) -> Iterator[engine.Engine]:
    with engine.Engine(tmp_path, **SMALL) as opened:
        yield opened


def save_training(eng: engine.Engine) -> Tied:
    model = Tied()
    eng.checkpoint(engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))).result()
    return model


@pytest.mark.parametrize("select", ["head.*", "head", "head.weight", ["head.we*"]])
def test_a_tied_name_is_read_under_the_name_asked_for(eng: engine.Engine, select: Any) -> None:
    model = save_training(eng)
    loaded = eng.load(select=select)
    assert set(loaded) == {"head.weight"} and torch.equal(loaded["head.weight"], model.embed.weight)
    assert set(engine.open(eng.info().path.rpartition("/")[0]).load(select=select)) == {"head.weight"}
    other = Tied()
    eng.restore(engine.Arena.adopt(other), select=select)
    assert torch.equal(other.embed.weight, model.embed.weight) and other.head.weight is other.embed.weight


def test_a_role_picks_its_tensors_and_their_tied_names(eng: engine.Engine) -> None:
    model = save_training(eng)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    assert set(eng.load(select=engine.role("model"))) == set(parameters)
    assert set(eng.load(select=engine.role("model", "buffer"))) == set(parameters) | set(buffers)
    assert set(eng.load(select=[engine.role("buffer"), "head"])) == {*buffers, "head.weight"}
    assert all(name.startswith("optimizer.") for name in eng.load(select=engine.role("optimizer")))


def test_the_weights_of_a_training_fill_a_model_without_an_optimizer(eng: engine.Engine) -> None:
    model = save_training(eng)
    arena = engine.Arena.adopt(other := Tied())
    with pytest.raises(engine.MismatchError) as refused:
        eng.restore(arena)
    call = 'restore(arena, select=engine.role("model", "buffer"))'
    assert str(refused.value).count("\n") == 0 and str(refused.value).endswith(call)
    info = eval(f"eng.{call}")
    assert info.step == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    eng.restore(engine.Arena.adopt(other := Tied()), select="norm*")
    assert torch.equal(other.norm.weight, model.norm.weight) and not torch.equal(other.embed.weight, model.embed.weight)


def test_the_weights_of_a_model_fill_a_training(eng: engine.Engine) -> None:
    model = Tied()
    eng.checkpoint(engine.Arena.adopt(model)).result()
    optimizer = torch.optim.AdamW((other := Tied()).parameters())
    arena = engine.Arena.adopt(other, optimizer)
    with pytest.raises(engine.MismatchError, match=r"select=engine\.role"):
        eng.restore(arena)
    eng.restore(arena, select=engine.role("model", "buffer"))
    assert torch.equal(other.embed.weight, model.embed.weight)


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(engine.ArgumentError, match=r"role has 'weights'; the roles are 'model', 'buffer', 'optimizer'"):
        engine.role("weights")
    with pytest.raises(engine.ArgumentError, match="role needs a name"):
        engine.role()
