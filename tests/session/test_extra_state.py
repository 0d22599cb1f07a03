"""What modules keep besides tensors: stored, given back whole, left alone by a part, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import sealed
from torch import nn
from torch.optim import AdamW

import engine
from engine.errors import ArenaError, MismatchError
from engine.state.arena import Arena

TINY: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


class Counted(nn.Linear):
    """A layer with a value of any kind."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(3, 3)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        if state == "refuse":
            raise ValueError("no such value")
        self.value = state


class Voiceless(nn.Linear):
    """A layer that gives extra state and takes none."""

    def get_extra_state(self) -> Any:
        return 1


class Raising(Counted):
    """A layer that is not ready."""

    def get_extra_state(self) -> Any:
        raise RuntimeError("run a batch first")


def model_of(first: Any, second: Any) -> Any:
    return nn.Sequential(Counted(first), nn.Tanh(), Counted(second))


def adopted(model: Any, **how: Any) -> Arena:
    return Arena.adopt(model, AdamW(model.parameters()), **how)


def changed(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of step 1, digest included."""
    path = directory / "step-00000001/manifest.json"
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(sealed(json.dumps(body).encode()))


def modules_of(directory: Path, step: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"step-{step:08d}/manifest.json").read_bytes())["body"]["modules"]
    return found


@pytest.fixture
def eng(tmp_path: Path) -> Any:
    with engine.Engine(tmp_path, **TINY) as opened:
        yield opened


def test_values_come_back_after_the_tensors(eng: Any, tmp_path: Path) -> None:
    model = model_of({"amax": torch.ones(2), 3: (1, None)}, None)
    arena = adopted(model)
    eng.checkpoint(arena, step=1).result()
    assert set(modules_of(tmp_path)) == {"0._extra_state", "2._extra_state"} <= set(model.state_dict())
    weight = model[0].weight.detach().clone()
    seen: list[bool] = []
    fresh = model_of("other", "other")

    def notice(state: Any) -> None:
        seen.append(torch.equal(fresh[0].weight, weight))
        fresh[0].value = state

    fresh[0].set_extra_state = notice
    target = adopted(fresh)
    info = eng.restore(target)
    assert seen == [True] and not target.torn and info.missing == info.unexpected == ()
    assert torch.equal(fresh[0].value["amax"], torch.ones(2)) and fresh[0].value[3] == (1, None)
    assert fresh[2].value is None


def test_a_value_is_that_of_the_call(eng: Any) -> None:
    model = model_of({"steps": 1}, 0)
    save = eng.checkpoint(adopted(model), step=1)
    model[0].value["steps"] = 2
    save.result()
    fresh = model_of(None, None)
    eng.restore(adopted(fresh))
    assert fresh[0].value == {"steps": 1}


def half() -> Any:
    """As `model_of`, but the first layer is a plain one."""
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Counted(5))


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        (lambda: model_of(1, 2), half, r"0\._extra_state: not in the arena"),
        (half, lambda: model_of(1, 2), r"0\._extra_state: not in the checkpoint"),
    ],
)
def test_other_modules_are_refused_before_anything_changes_or_named(
    eng: Any, saved: Callable[[], Any], here: Callable[[], Any], words: str
) -> None:
    first = saved()
    eng.checkpoint(adopted(first), step=1).result()
    model = here()
    arena = adopted(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(MismatchError, match=words) as caught:
        eng.restore(arena)
    assert "nothing was changed" in str(caught.value) and "strict=False" in str(caught.value)
    assert torch.equal(model[0].weight, before) and not arena.torn
    info = eng.restore(arena, strict=False)
    assert (*info.missing, *info.unexpected) == ("0._extra_state",)
    assert model[2].value == first[2].value and torch.equal(model[0].weight, first[0].weight)


def test_a_checkpoint_without_the_field_has_none(eng: Any, tmp_path: Path) -> None:
    eng.checkpoint(adopted(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))), step=1).result()
    changed(tmp_path, lambda body: body.pop("modules"))
    eng.restore(adopted(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))))
    with pytest.raises(MismatchError, match=r"0\._extra_state, 2\._extra_state: not in the checkpoint"):
        eng.restore(adopted(model_of(1, 2)))


def test_a_damaged_value_is_damage(eng: Any, tmp_path: Path) -> None:
    eng.checkpoint(adopted(model_of(1, 2)), step=1).result()
    changed(tmp_path, lambda body: body["modules"].update({"0._extra_state": {"no such tag": 1}}))
    [found] = eng.verify(1)
    assert "0._extra_state" in found.reason
    with pytest.raises(engine.CorruptError, match=r"0\._extra_state"):
        eng.restore(adopted(model_of(1, 2)), 1)
    with pytest.raises(engine.CorruptError, match=r"0\._extra_state"):
        eng.load(1)


def test_parts_leave_extra_state_alone(eng: Any) -> None:
    eng.checkpoint(adopted(model_of(1, 2)), step=1).result()
    model = model_of(3, 4)
    eng.restore(adopted(model), select="0.*")
    assert (model[0].value, model[2].value) == (3, 4)
    arena = adopted(model, exclude="0")
    assert "0._extra_state" in arena.left_out and "2._extra_state" not in arena.left_out
    eng.restore(arena)
    assert (model[0].value, model[2].value) == (3, 2)


def test_a_wrapped_arena_has_none(eng: Any) -> None:
    model = model_of(1, 2)
    arena = Arena.adopt(model)
    eng.checkpoint(arena, step=1).result()
    eng.restore(Arena.wrap({name: torch.zeros_like(tensor) for name, tensor in arena.state_dict().items()}))
    eng.checkpoint(Arena.wrap(arena.state_dict()), step=2).result()
    with pytest.raises(MismatchError, match="_extra_state"):
        eng.restore(arena, 2)


def test_names_are_renamed_and_a_shared_module_has_one(eng: Any, tmp_path: Path) -> None:
    shared = Counted(7)
    model = nn.ModuleDict({"body": nn.Sequential(shared, shared)})
    eng.checkpoint(Arena.adopt(model, rename=lambda name: name.removeprefix("body.")), step=1).result()
    assert modules_of(tmp_path) == {"0._extra_state": 7}
    plain = nn.Sequential(Counted())
    plain.append(plain[0])
    eng.restore(Arena.adopt(plain))
    assert plain[0].value == 7


def test_the_module_inside_a_wrapper_is_meant(eng: Any, tmp_path: Path) -> None:
    model = model_of(1, 2)
    eng.checkpoint(adopted(torch.compile(model, backend="eager")), step=1).result()
    assert modules_of(tmp_path) == {"0._extra_state": 1, "2._extra_state": 2}


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            lambda: Counted({"f": print}),
            r"of the module '0' \(Counted\) cannot be stored: 0\._extra_state\[\"f\"\] is a",
        ),
        (lambda: Raising(), r"of the module '0' \(Raising\) raises RuntimeError: run a batch first"),
        (lambda: Voiceless(3, 3), r"the module '0' \(Voiceless\) has get_extra_state\(\) and no set_extra_state\(\)"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_adopt(layer: Callable[[], nn.Module], words: str) -> None:
    model: Any = nn.Sequential(layer(), nn.Linear(3, 3))
    optimizer = AdamW(model.parameters())
    address = model[0].weight.data_ptr()
    with pytest.raises(ArenaError, match=words):
        Arena.adopt(model, optimizer)
    assert model[0].weight.data_ptr() == address and not optimizer.state
    assert Arena.adopt(model, optimizer, exclude="0._extra_state").left_out == {"0._extra_state"}


def test_what_cannot_be_stored_is_refused_at_the_save(eng: Any) -> None:
    model = model_of(1, 2)
    arena = adopted(model)
    model[2].value = object()
    with pytest.raises(ArenaError, match=r"the module '2' \(Counted\) cannot be stored: 2\._extra_state is a .*object"):
        eng.checkpoint(arena, step=1)
    model[2].value = 3
    eng.checkpoint(arena, step=1).result()


def test_a_module_that_refuses_its_value_leaves_the_arena_torn(eng: Any) -> None:
    arena = adopted(model_of("refuse", 1))
    eng.checkpoint(arena, step=1).result()
    with pytest.raises(MismatchError, match=r"set_extra_state\(\) of the module '0' \(Counted\) .* no such value"):
        eng.restore(arena)
    assert arena.torn


class Hidden(nn.Linear):
    """A layer that puts a value of its own into `state_dict()`."""

    count = 3

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = torch.tensor(self.count)


def add_key(module: nn.Module, content: Any, prefix: str, metadata: Any) -> None:
    content[prefix + "added"] = torch.ones(1)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_state_dict_post_hook(add_key)
    return model


@pytest.mark.parametrize(
    ("make", "key"), [(lambda: nn.Sequential(Hidden(3, 3)), "0.count"), (hooked, "0.added")], ids=["method", "hook"]
)
def test_what_only_state_dict_has_is_named_in_a_warning(make: Callable[[], nn.Module], key: str) -> None:
    with pytest.warns(engine.EngineWarning, match=rf"has {key}, which no parameter, .* store them in extra="):
        adopted(make())
    adopted(make(), exclude=[key])


@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_parametrized_model_has_nothing_beside_tensors(parametrize: Callable[[nn.Module], nn.Module]) -> None:
    adopted(nn.Sequential(parametrize(nn.Linear(3, 3))))
