"""Checkpoints that do not fit the arena: the message of a refusal, and ``strict=False``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


@pytest.fixture
def eng(tmp_path: Path) -> Iterator[engine.Engine]:
    with engine.Engine(tmp_path, **SMALL) as opened:
        yield opened


def make_training(classes: int, lr: float) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


class Summing(torch.optim.Optimizer):
    """Makes its state in its step: a tensor and a number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state["sum"], state["count"] = torch.zeros_like(param), 0
            state["sum"].add_(param.grad)
            state["count"] += 1
            param.sub_(state["sum"], alpha=0.1)


def test_no_state_is_made_for_a_new_head(eng: engine.Engine) -> None:
    def make(classes: int) -> tuple[nn.Sequential, Summing]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))
        return model, Summing(model.parameters())

    def step(model: nn.Sequential, optimizer: Summing) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    old, old_optimizer = make(1)
    step(old, old_optimizer)
    eng.checkpoint(engine.Arena.adopt(old, old_optimizer)).result()
    model, optimizer = make(2)
    info = eng.restore(engine.Arena.adopt(model, optimizer), strict=False)
    assert info.mismatched == ("1.weight", "1.bias")
    assert info.unexpected == ("optimizer.1.weight.sum", "optimizer.1.bias.sum")
    assert [optimizer.state.get(param, {}).get("count") for param in model.parameters()] == [1, 1, None, None]
    step(model, optimizer)
    assert [optimizer.state[param]["count"] for param in model.parameters()] == [2, 2, 1, 1]
    eng.restore(engine.Arena.adopt(model, optimizer), strict=False)
    assert [optimizer.state[param]["count"] for param in model.parameters()] == [1, 1, 1, 1], "the head's is its own"
    assert all(optimizer.state[param]["sum"].shape == param.shape for param in model.parameters())


def test_a_mismatch_of_many_tensors_is_grouped_and_capped(eng: engine.Engine) -> None:
    stored = {f"layers.{index}.{name}": torch.ones(2) for index in range(56) for name in ("weight", "bias")}
    eng.checkpoint(engine.Arena.wrap(stored | {"w": torch.ones(3)})).result()
    arena = engine.Arena.wrap({"w": torch.zeros(3)})
    with pytest.raises(engine.MismatchError) as caught:
        eng.restore(arena)
    head, *lines, last = str(caught.value).splitlines()
    assert "does not fit the arena; nothing was changed" in head
    assert lines[0] == "  layers.0.weight, layers.0.bias: not in the arena" and len(lines) == 11
    assert lines[-1] == "  and 92 more"
    assert last.startswith("to restore only the tensors that fit (1): restore(arena, strict=False)")
    assert eng.restore(arena, strict=False).missing == ()


def test_the_state_of_another_kind_of_optimizer_is_one_line_a_kind(eng: engine.Engine) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    eng.checkpoint(engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))).result()
    arena = engine.Arena.adopt(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(engine.MismatchError) as caught:
        eng.restore(arena)
    _, *lines, last = str(caught.value).splitlines()
    assert len(lines) == 3 and all("tensors more" in line for line in lines), lines
    assert last.endswith('restore(arena, select=engine.role("model", "buffer"))')
    eng.restore(arena, select=engine.role("model", "buffer"))


def test_a_new_head_keeps_its_own_tensors_and_the_rest_is_restored(eng: engine.Engine) -> None:
    model, optimizer = make_training(2, lr=0.5)
    eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    other, others = make_training(5, lr=0.1)
    arena = engine.Arena.adopt(other, others)
    head = other.get_parameter("1.weight").clone()
    others.state[other.get_parameter("1.weight")]["step"].fill_(7)
    with pytest.raises(engine.MismatchError, match="strict=False") as caught:
        eng.restore(arena)
    assert "1.weight: float32[2, 4] in the checkpoint, float32[5, 4] in the arena" in str(caught.value)
    info = eng.restore(arena, strict=False)
    heads = ["1.weight", "1.bias"]
    state = [f"optimizer.{name}.{kind}" for name in heads for kind in ("exp_avg", "exp_avg_sq")]
    assert set(info.mismatched) == {*heads, *state} and info.missing == info.unexpected == ()
    assert info.hyperparameters == "" and others.param_groups[0]["lr"] == 0.5
    assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight")) and torch.equal(
        other.get_parameter("1.weight"), head
    )
    assert torch.equal(
        others.state[other.get_parameter("0.bias")]["exp_avg"],
        optimizer.state[model.get_parameter("0.bias")]["exp_avg"],
    )
    assert others.state[other.get_parameter("1.weight")]["step"] == 7, "as its moments are, its own"
    assert not arena.torn and eng.checkpoint(arena).result().step == 1


def test_a_new_head_under_lbfgs_leaves_all_of_its_state_out(eng: engine.Engine) -> None:
    """LBFGS has one state of all parameters together, so that of another head fits nothing."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)

    def made(classes: int, lr: float) -> tuple[nn.Module, torch.optim.LBFGS]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))
        return model, torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=3)

    model, optimizer = made(2, lr=0.5)
    step(model, optimizer)
    saved = eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    for step_count in (0, 1):
        other, others = made(5, lr=0.1)
        for _ in range(step_count):
            step(other, others)
        arena = engine.Arena.adopt(other, others)
        before = dict(others.state[other.get_parameter("0.weight")])
        info = eng.restore(arena, saved.step, strict=False)
        assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))
        assert others.param_groups[0]["lr"] == 0.5
        assert dict(others.state[other.get_parameter("0.weight")]) == before
        assert "all state of the optimizer (LBFGS) stays as it is" in info.hyperparameters
        assert "another shape or dtype of 1.bias, 1.weight" in info.hyperparameters
        assert any(name.endswith(".d") for name in (*info.unexpected, *info.mismatched))
        step(other, others)
        assert eng.checkpoint(arena).result().step > saved.step


def test_changed_groups_are_reported_and_keep_their_hyperparameters(eng: engine.Engine) -> None:
    model, optimizer = make_training(2, lr=0.5)
    eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    others = torch.optim.AdamW([{"params": other[0].parameters()}, {"params": other[1].parameters()}], lr=0.1)
    arena = engine.Arena.adopt(other, others)
    info = eng.restore(arena, strict=False)
    assert "1 parameter groups and the arena's has 2" in info.hyperparameters
    assert [group["lr"] for group in others.param_groups] == [0.1, 0.1]
    assert (
        torch.equal(other.get_parameter("1.weight"), model.get_parameter("1.weight"))
        and info.mismatched == info.missing == info.unexpected == ()
    )


def test_missing_and_unexpected_tensors_are_named(eng: engine.Engine) -> None:
    eng.checkpoint(engine.Arena.wrap({"a": torch.ones(2), "b": torch.ones(2)})).result()
    here = {"a": torch.zeros(2), "c": torch.zeros(2)}
    info = eng.restore(engine.Arena.wrap(here), strict=False)
    assert (info.missing, info.unexpected, info.mismatched) == (("c",), ("b",), ())
    assert here["a"].all() and not here["c"].any()


def test_weights_alone_come_from_a_training_without_strict(eng: engine.Engine) -> None:
    model, optimizer = make_training(2, lr=0.5)
    eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    info = eng.restore(engine.Arena.adopt(other), strict=False)
    assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert all(name.startswith("optimizer.") for name in info.unexpected) and info.unexpected
    assert "the checkpoint has an optimizer and the arena has none" in info.hyperparameters


def test_momentum_that_the_checkpoint_lacks_stays(eng: engine.Engine) -> None:
    model = nn.Linear(2, 2, bias=False)
    eng.checkpoint(engine.Arena.adopt(model)).result()
    other = nn.Linear(2, 2, bias=False)
    others = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    arena = engine.Arena.adopt(other, others)
    other(torch.ones(1, 2)).sum().backward()
    others.step()
    before = others.state[other.weight]["momentum_buffer"].clone()
    info = eng.restore(arena, strict=False)
    assert info.missing == ("optimizer.weight.momentum_buffer",)
    assert torch.equal(others.state[other.weight]["momentum_buffer"], before)


def test_nothing_that_fits_is_an_error(eng: engine.Engine) -> None:
    eng.checkpoint(engine.Arena.wrap({"a": torch.ones(2)})).result()
    with pytest.raises(engine.MismatchError, match="a: not in the arena"):
        eng.restore(engine.Arena.wrap({"b": torch.zeros(2)}), strict=False)


def test_a_torn_arena_stays_torn_unless_every_segment_is_filled(eng: engine.Engine) -> None:
    eng.checkpoint(engine.Arena.wrap({"a": torch.ones(2), "b": torch.ones(2)})).result()
    arena = engine.Arena.wrap({"a": torch.zeros(2), "c": torch.zeros(2)})
    arena.mark_torn()
    eng.restore(arena, strict=False)
    assert arena.torn


@pytest.mark.parametrize("is_split", [False, True])
def test_other_groups_are_refused_with_the_calls_that_work(eng: engine.Engine, is_split: bool) -> None:
    """Layers that are frozen before the optimizer is made, or a group that is added later."""
    model, optimizer = make_training(2, lr=0.5)
    eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    other, _ = make_training(2, lr=0.5)
    groups: Any = list(other.get_submodule("1").parameters())
    if is_split:
        groups = [{"params": other.get_submodule("0").parameters()}, {"params": groups}]
    else:
        other.get_submodule("0").requires_grad_(False)
    arena = engine.Arena.adopt(other, torch.optim.AdamW(groups))
    with pytest.raises(engine.MismatchError, match="groups") as caught:
        eng.restore(arena)
    assert 'strict=False); the model alone: restore(arena, select=engine.role("model", "buffer"))' in str(caught.value)
    assert ("add_param_group()" in str(caught.value)) is is_split
    eng.restore(arena, strict=False)
    eng.restore(arena, select=engine.role("model", "buffer"))
    assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_a_restore_prints_in_a_few_lines(eng: engine.Engine) -> None:
    arena = engine.Arena.wrap({"a": torch.ones(3)})
    eng.checkpoint(arena, extra={"rng": engine.rng_state(), "epoch": 3}).result()
    info = eng.restore(arena)
    text = repr(info)
    assert text.startswith("RestoreInfo(step=0, ") and "'epoch': 3" in text and f"path={info.path!r}" in text
    assert len(text) < 1000 and info.extra["epoch"] == 3


@pytest.mark.parametrize("momentum", [None, 0.9], ids=["AdamW", "SGD"])
def test_a_layer_unfrozen_before_the_restore_keeps_its_fresh_state(eng: engine.Engine, momentum: float | None) -> None:
    """The refusal names the call, and training goes on bit-identically after it."""

    def make(is_frozen: bool) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[0].requires_grad_(not is_frozen)
        params = model.parameters()
        return model, torch.optim.SGD(params, 0.1, momentum) if momentum else torch.optim.AdamW(params)

    def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    model, optimizer = make(is_frozen=True)
    train(model, optimizer, 2)
    eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    other, others = make(is_frozen=False)
    arena = engine.Arena.adopt(other, others)
    with pytest.raises(engine.MismatchError, match=r"were frozen when it was saved: restore\(arena, strict=False\)"):
        eng.restore(arena)
    eng.restore(arena, strict=False)
    train(other, others, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.get_parameter(name), tensor), name
