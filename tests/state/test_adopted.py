"""Optimizers as an arena is given them: wrapped, of odd classes, with steps of their own; adopted or refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from trainings import assert_inside, bits, build, everything, mlp, train
from wrappers import Accelerated, Counting, Hiding, Lightning, Lookahead, Sam, Stateless, Unhooked

from engine.errors import ArenaError, ArgumentError, MismatchError
from engine.state.arena import Arena
from engine.state.memory import HostMemory
from engine.state.steps import WrappedStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("wrap", [Accelerated, Lightning, Lookahead, lambda o: Lightning(Lookahead(Accelerated(o)))])
def test_the_state_of_a_wrapped_optimizer_is_adopted(wrap: Callable[[Optimizer], Any]) -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, wrap(optimizer))
    assert_inside(arena, optimizer.state[model[0].weight]["exp_avg"])
    assert arena.options()[""]["class"] == "Adam"


class FastLookahead(Lookahead):
    """A wrapper with state of its own from the start."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.state[self.param_groups[0]["params"][0]] = {"slow": torch.zeros(1)}


class Pair(Optimizer):
    """Muon and AdamW in one object."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.parameters(), {})
        self.inner = [AdamW([model[0].weight]), SGD([model[2].weight])]


def partners(model: Any) -> Optimizer:
    optimizer: Any = AdamW([model[0].weight, model[0].bias])
    optimizer.partner = SGD([model[2].weight])
    return optimizer  # type: ignore[no-any-return]


def sharded(model: Any) -> Optimizer:
    """As ZeroRedundancyOptimizer: all parameters, and an optimizer of those that this rank steps."""
    optimizer: Any = AdamW(model.parameters())
    optimizer.optim = AdamW([model[0].weight])
    return optimizer  # type: ignore[no-any-return]


class Secret(AdamW):
    """An optimizer whose state_dict() has a hyperparameter that no group has."""

    def state_dict(self) -> Any:
        content = super().state_dict()
        content["param_groups"][0]["secret"] = 1
        return content


class Gathering(AdamW):
    """ZeroRedundancyOptimizer, before `consolidate_state_dict()`."""

    def state_dict(self) -> Any:
        raise RuntimeError("not consolidated")


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no groups": (lambda model: Stateless(), ArenaError, r"\(Stateless\) has no param_groups.*super\(\)\.__init__"),
    "own state": (
        lambda model: FastLookahead(AdamW(model.parameters())),
        ArenaError,
        r"\(AdamW\) is wrapped in a .*FastLookahead, which keeps state of its own; adopt both",
    ),
    "two inside": (Pair, ArgumentError, r"is a .*Pair, which holds 2 optimizers; adopt them instead"),
    "other parameters": (partners, ArgumentError, r"AdamW, which holds an optimizer of other parameters; adopt both"),
    "shards": (sharded, ArgumentError, r"AdamW, which holds an optimizer of some of its .* without sharding"),
    "hidden group": (lambda model: Secret(model.parameters()), ArenaError, r"has 'secret' in parameter group 0"),
    "raises": (lambda model: Gathering(model.parameters()), ArenaError, r"\(Gathering\) raises RuntimeError: not cons"),
    "twice": (
        lambda model: [optimizer := AdamW(model.parameters()), Accelerated(optimizer)],
        ArgumentError,
        "the optimizers '0' and '1' are one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_optimizer_is_refused_by_name_with_nothing_changed(kind: str) -> None:
    make, error, words = REFUSED[kind]
    model = mlp()
    given = make(model)
    addresses = [param.data_ptr() for param in model.parameters()]
    states = [dict(each.state) for each in given] if isinstance(given, list) else []
    with pytest.raises(error, match=words):
        Arena.adopt(model, given)
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert not model._load_state_dict_pre_hooks
    assert states == ([dict(each.state) for each in given] if isinstance(given, list) else [])


def test_a_failed_adoption_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("mlp", "adam")
    odd = Unhooked(model.parameters())
    addresses = [param.data_ptr() for param in model.parameters()]

    def refuse(self: HostMemory, nbytes: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "__init__", refuse)
        with pytest.raises(MemoryError):
            Arena.adopt(model, [optimizer, odd])
    with monkeypatch.context() as patch:
        patch.setattr(WrappedStep, "__init__", refuse)
        with pytest.raises(TypeError) as caught:
            Arena.adopt(model, [optimizer, odd])
    assert caught.traceback, "it holds the arena, and no hook remains all the same"
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert not optimizer.state and not odd.state and "step" not in vars(odd)
    assert not optimizer._optimizer_step_pre_hooks and not model._load_state_dict_pre_hooks


def test_state_that_a_step_hides_is_refused_at_the_save() -> None:
    model = mlp()
    optimizer = Hiding(model.parameters())
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 1)
    with pytest.raises(ArenaError, match=r"\(Hiding\) has the state 'hidden' of parameter 0, .* hides its state"):
        arena.options()
    with pytest.raises(ArenaError, match="hides its state"):
        Arena.adopt(model, optimizer)


def test_state_that_a_wrapper_makes_is_refused_at_the_save_or_adopted_with_it() -> None:
    model = mlp()
    sam = Sam(model.parameters())
    arena = Arena.adopt(model, sam)
    assert_inside(arena, sam.base_optimizer.state[model[0].weight]["exp_avg"])
    train(model, sam, "mlp", 1)
    with pytest.raises(ArenaError, match=r"\(AdamW\) is wrapped in a wrappers\.Sam, .* adopt both"):
        arena.refresh()
    arena = Arena.adopt(model, {"sam": sam, "inner": sam.base_optimizer})
    names = {segment.name for segment in arena.segments}
    assert {"optimizer.sam.0.weight.old", "optimizer.inner.0.weight.exp_avg"} <= names


def test_keys_that_a_hook_adds_are_options() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    assert "added" not in arena.options()[""]
    optimizer.register_state_dict_post_hook(lambda _, content: {**content, "note": 5})
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, content: seen.append(content["note"]))
    options = arena.options()
    assert options[""]["added"] == {"note": 5}
    before = everything(model, optimizer)
    arena.restored(options, {})
    assert seen == [5] and everything(model, optimizer) == before


def test_added_keys_that_are_not_taken_leave_the_arena_torn() -> None:
    model = mlp()
    optimizer = Counting(model.parameters())
    arena = Arena.adopt(model, optimizer)
    options = arena.options()
    del options[""]["added"]["count"]
    optimizer.state_dict = lambda: AdamW.state_dict(optimizer)  # type: ignore[method-assign]
    arena.mark_torn()
    with pytest.raises(MismatchError, match=r"\(Counting\) refuses what its state_dict\(\) gave: KeyError: 'count'"):
        arena.restored(options, {})
    assert arena.torn


# Steps


def waits(arena: Arena, step: Callable[[], object], param: torch.Tensor) -> list[bool]:
    """Whether each wait of a step came before its first write."""
    before = bits(param)
    waited: list[bool] = []

    def staged(timeout: float | None) -> bool:
        if timeout is None:
            waited.append(bits(param) == before)
        return timeout is None

    arena.hold(staged, holds_writers=True)
    step()
    assert bits(param) != before
    return waited


def replaced_by_a_method(optimizer: Any) -> None:
    original = optimizer.step

    def step(self: Any) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        original()

    optimizer.step = MethodType(step, optimizer)


def replaced_by_a_function(optimizer: Any) -> None:
    original, param = optimizer.step, optimizer.param_groups[0]["params"][0]

    def step() -> None:
        with torch.no_grad():
            param.add_(1)
        original()

    optimizer.step = step


def scheduled(optimizer: Any) -> None:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)


def scheduled_twice(optimizer: Any) -> None:
    scheduled(optimizer)
    scheduled(optimizer)


def replaced_and_scheduled(optimizer: Any) -> None:
    replaced_by_a_method(optimizer)
    scheduled(optimizer)


CHANGES = [replaced_by_a_method, replaced_by_a_function, scheduled, scheduled_twice, replaced_and_scheduled]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), Unhooked], ids=["hooked", "unhooked"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_step_waits(change: Callable[[Any], None], make: Callable[[Any], Any], late: bool) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    param = model[0].weight
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    if not late:
        change(optimizer)
    arena = Arena.adopt(model, optimizer)
    if late:
        change(optimizer)
        arena.refresh()
    step = vars(optimizer).get("step")
    assert waits(arena, optimizer.step, param) == [True]
    arena.refresh()
    arena.refresh()
    assert vars(optimizer).get("step") is step, "wrapped once"
    if "scheduled" in change.__name__:
        assert hasattr(optimizer.step, "_wrapped_by_lr_sched") and optimizer._opt_called


def test_a_replaced_step_that_is_put_back_waits() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    replaced_by_a_method(optimizer)
    arena = Arena.adopt(model, optimizer)
    for _ in range(2):
        del optimizer.step
        arena.refresh()
        assert waits(arena, optimizer.step, model[0].weight) == [True]
        replaced_by_a_method(optimizer)
        arena.refresh()
        assert waits(arena, optimizer.step, model[0].weight) == [True]


def test_a_wrapped_step_is_put_back_with_its_arena() -> None:
    model = mlp()
    optimizer = Unhooked(model.parameters())
    arena = Arena.adopt(model, optimizer)
    assert "step" in vars(optimizer)
    del arena
    assert "step" not in vars(optimizer)
    replaced_by_a_function(optimizer)
    step = vars(optimizer)["step"]
    arena, other = Arena.adopt(model, optimizer), Arena.adopt(model, optimizer)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    assert waits(arena, optimizer.step, model[0].weight) == waits(other, optimizer.step, model[0].weight) == [True]
    gone = weakref.ref(arena)
    del arena
    gc.collect()
    assert gone() is None
    optimizer.step()
    assert vars(optimizer)["step"] is not step


def test_hooks_of_an_unhooked_step_are_as_without_an_arena() -> None:
    """torch hooks the class of timm's Lookahead in its first zero_grad()."""
    model = nn.Linear(2, 2)
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1))
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    arena = Arena.adopt(model, optimizer)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert calls == [1]
    del arena
    optimizer.step()
    assert calls == [1, 1]


def test_wrappers_are_lazy_only_where_their_writes_are_known() -> None:
    model, optimizer = build("mlp", "adam")
    assert Arena.adopt(model, optimizer).steps_by_torch
    assert not Arena.adopt(model, Lookahead(optimizer)).steps_by_torch
    assert not Arena.adopt(model, [SGD(model.parameters()), Unhooked(model.parameters())]).steps_by_torch
    assert not Arena.adopt(model).steps_by_torch
