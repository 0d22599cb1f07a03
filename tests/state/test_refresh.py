"""Refresh: notices every way in which a tensor leaves the arena, and brings the tensor back or refuses it."""

from __future__ import annotations

import itertools
import struct
import sys
from collections import defaultdict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from trainings import (
    OPTIMIZERS,
    assert_holds,
    assert_inside,
    bits,
    build,
    count_calls,
    everything,
    mlp,
    read,
    train,
)

import engine.state.arena
import engine.state.arrangement
import engine.state.fence
import engine.state.memory
from engine.errors import ArenaError
from engine.state.arena import Arena
from engine.state.watch import TensorWatch

pytestmark = pytest.mark.usefixtures("one_thread")


def to_double(model: Any, optimizer: Optimizer) -> None:
    model.to(torch.float64)


def new_data(model: Any, optimizer: Optimizer) -> None:
    model[0].weight.data = torch.full((12, 6), 3.0)


def shorter_data(model: Any, optimizer: Optimizer) -> None:
    model[0].weight.data = model[0].weight.data[:2]


def other_dtype_in_place(model: Any, optimizer: Optimizer) -> None:
    model.register_buffer("b", torch.arange(4.0))
    model.b.data = model.b.data.view(torch.int32)


def transposed_data(model: Any, optimizer: Optimizer) -> None:
    weight = model[2].weight
    weight.data = weight.data.t().contiguous().t()


def swapped_data(model: Any, optimizer: Optimizer) -> None:
    one = optimizer.state[model[0].weight]
    one["exp_avg"].data, one["exp_avg_sq"].data = one["exp_avg_sq"].data, one["exp_avg"].data


def assign(model: Any, optimizer: Optimizer) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)


def load_optimizer(model: Any, optimizer: Optimizer) -> None:
    net = mlp()
    other = OPTIMIZERS["adam"](net.parameters())
    train(net, other, "mlp", 3)
    optimizer.load_state_dict(other.state_dict())


def reset_state(model: Any, optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def add_parameter(model: Any, optimizer: Optimizer) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))


def remove_parameter(model: Any, optimizer: Optimizer) -> None:
    model[2].register_parameter("bias", None)


def rename_parameter(model: Any, optimizer: Optimizer) -> None:
    layer = model[2]
    weight = layer.weight
    del layer.weight
    layer.register_parameter("kernel", weight)


def replace_module(model: Any, optimizer: Optimizer) -> None:
    model[2] = nn.Linear(12, 3)


def replace_buffer(model: Any, optimizer: Optimizer) -> None:
    model[0].register_buffer("counter", torch.ones(2))


def add_group(model: Any, optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})


def untie(model: Any, optimizer: Optimizer) -> None:
    model[2].bias = nn.Parameter(model[2].bias.detach())


def replace_groups(model: Any, optimizer: Optimizer) -> None:
    """As Lightning does, which builds its own groups."""
    one = optimizer.param_groups[0]
    optimizer.param_groups = [one, {**one, "params": [nn.Parameter(torch.ones(4))]}]


def replace_params(model: Any, optimizer: Optimizer) -> None:
    group = optimizer.param_groups[0]
    group["params"] = [*group["params"], nn.Parameter(torch.ones(4))]


def extend_params(model: Any, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(4)))


SAME_LAYOUT = [new_data, swapped_data, load_optimizer, reset_state]
NEW_LAYOUT = [
    to_double,
    shorter_data,
    other_dtype_in_place,
    transposed_data,
    assign,
    add_parameter,
    remove_parameter,
    rename_parameter,
    replace_module,
    replace_buffer,
    add_group,
    untie,
    replace_groups,
    replace_params,
    extend_params,
]


@pytest.mark.parametrize("leave", SAME_LAYOUT + NEW_LAYOUT, ids=lambda leave: leave.__name__)
def test_a_tensor_that_left_is_brought_back(leave: Callable[[nn.Module, Optimizer], None]) -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 2)
    before = arena.layout
    leave(model, optimizer)
    expected = everything(model, optimizer)
    arena.refresh()
    assert (arena.layout is before) == (leave in SAME_LAYOUT)
    assert everything(model, optimizer).items() >= expected.items(), "only the state of a new parameter may be added"
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    live = arena.state_dict()
    assert {name: bits(live[name]) for name in model.state_dict()} == {
        n: bits(t) for n, t in model.state_dict().items()
    }
    for tensor in [*model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]:
        assert_inside(arena, tensor)
    assert_holds(arena)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_tensors_that_have_changed_places_keep_their_contents(order: tuple[int, ...]) -> None:
    """The arena's first segment, its last and one in between: no copy overwrites bytes that another one still needs."""
    model = nn.ModuleList([nn.Linear(5, 4, bias=False) for _ in range(3)])
    params = list(model.parameters())
    arena = Arena.adopt(model)
    assert arena.segments[0].name == "0.weight" and arena.segments[-1].name == "2.weight"
    contents = [params[index].data for index in order]
    expected = [bits(content) for content in contents]
    for param, content in zip(params, contents, strict=True):
        param.data = content
    del content, contents
    arena.refresh()
    assert [bits(param) for param in params] == expected
    assert_holds(arena)


def test_a_new_tensor_that_cannot_be_stored_is_refused_and_nothing_changes() -> None:
    model = mlp()
    arena = Arena.adopt(model)
    model[0].bias = nn.Parameter(torch.zeros(1).expand(12))
    before, weight = arena.layout, model[0].weight.data_ptr()
    for _ in range(2):  # every time, not only once
        with pytest.raises(ArenaError, match=r"'0\.bias' has elements that share memory"):
            arena.refresh()
    assert arena.layout is before and model[0].weight.data_ptr() == weight
    model[0].bias = nn.Parameter(torch.ones(12))
    arena.refresh()
    assert_holds(arena)


@pytest.mark.parametrize("moved_count", [0, 2])
def test_the_next_refresh_completes_one_interrupted_between_tensors(
    moved_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    assign(model, optimizer)
    expected = everything(model, optimizer)
    point = engine.state.arena._point
    moved: list[Tensor] = []

    def interrupted(tensor: Tensor, view: Tensor) -> None:
        if len(moved) == moved_count:
            raise KeyboardInterrupt
        moved.append(tensor)
        point(tensor, view)

    monkeypatch.setattr(engine.state.arena, "_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arena.refresh()
    monkeypatch.undo()
    arena.refresh()
    assert everything(model, optimizer).items() >= expected.items()
    for tensor in model.state_dict().values():
        assert_inside(arena, tensor)
    assert_holds(arena)


# Where a refresh changes anything.
CHANGING = {
    module.__file__
    for module in (engine.state.arena, engine.state.arrangement, engine.state.fence, engine.state.memory)
}


class InterruptedAtLine:
    """Raises KeyboardInterrupt once so many lines of the modules above have begun."""

    def __init__(self, line_count: int) -> None:
        self.left = line_count

    def __call__(self, frame: FrameType, event: str, argument: object) -> InterruptedAtLine | None:
        if frame.f_code.co_filename not in CHANGING:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("leave", [to_double, new_data, replace_module], ids=lambda leave: leave.__name__)
def test_the_next_refresh_completes_one_interrupted_at_any_line(
    leave: Callable[[nn.Module, Optimizer], None], optimized: bool
) -> None:
    done = False
    for line_count in range(5000):
        model, optimizer = build("mlp", "adam")
        arena = Arena.adopt(model, optimizer if optimized else None)
        leave(model, optimizer)
        expected = everything(model, optimizer)
        before = sys.gettrace()
        sys.settrace(InterruptedAtLine(line_count))
        try:
            arena.refresh()
            done = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        arena.refresh()
        assert everything(model, optimizer).items() >= expected.items(), line_count
        for tensor in model.state_dict().values():
            assert_inside(arena, tensor)
        assert_holds(arena)
        if done:
            break
    assert done and line_count > 50, "not every line was interrupted"


def test_a_swap_with_the_first_segment_keeps_both_contents() -> None:
    model = nn.ParameterList([nn.Parameter(torch.full((3,), float(value))) for value in (1, 2)])
    arena = Arena.adopt(model)
    assert model[0].data_ptr() == arena.sources[0].address
    model[0].data, model[1].data = model[1].data, model[0].data
    arena.refresh()
    assert model[0].tolist() == [2, 2, 2] and model[1].tolist() == [1, 1, 1]
    assert_holds(arena)


def test_state_dict_has_the_present_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    arena = Arena.adopt(model)
    model[0] = nn.Linear(2, 2)
    assert arena.state_dict()["0.weight"].data_ptr() == model.get_parameter("0.weight").data_ptr()
    model[0] = nn.Linear(2, 2, bias=False)
    assert list(arena.state_dict()) == ["0.weight"]


def test_conjugated_in_place_is_noticed() -> None:
    model = nn.Module()
    model.z = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    arena = Arena.adopt(model)
    model.z.data = model.z.data.conj()
    with pytest.raises(ArenaError, match=r"'z' is a lazy conjugate"):
        arena.refresh()


def test_negated_in_place_is_noticed() -> None:
    whole = torch.ones(2, dtype=torch.complex64)
    tensor = whole.imag
    arena = Arena.wrap({"w": tensor})
    tensor.data = whole.conj().imag  # the same address, dtype, shape and stride
    with pytest.raises(ArenaError, match="'w' is a lazy negative"):
        arena.refresh()


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_a_replaced_dictionary_of_modules_is_noticed(kind: Callable[..., Any]) -> None:
    model = kind([nn.Linear(2, 2)]) if kind is nn.ModuleList else kind(nn.Linear(2, 2))
    arena = Arena.adopt(model)
    del model[1:]  # deletes nothing, but puts the modules into another dictionary
    model[0] = nn.Linear(2, 2)
    arena.refresh()
    assert_inside(arena, model.get_parameter("0.weight"))
    assert_holds(arena)


def test_a_swap_of_persistent_and_hidden_buffers_is_noticed() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.ones(2))
    model.register_buffer("b", torch.zeros(2), persistent=False)
    arena = Arena.adopt(model)
    model.register_buffer("a", model.get_buffer("a"), persistent=False)
    model.register_buffer("b", model.get_buffer("b"))
    assert list(arena.state_dict()) == list(model.state_dict()) == ["b"]


def test_transposed_in_place_is_noticed() -> None:
    model = nn.Linear(2, 2, bias=False)
    arena = Arena.adopt(model)
    model.weight.data = model.weight.data.t()
    arena.refresh()
    assert model.weight.stride() == (1, 2)
    assert_holds(arena)


def test_a_wrapped_tensor_is_read_at_its_present_location() -> None:
    tensor = torch.zeros(2, 3)
    arena = Arena.wrap({"w": tensor})
    before = arena.layout
    tensor.data = torch.arange(6.0).reshape(3, 2).t()
    arena.refresh()
    assert arena.layout is before and arena.sources[0].stride == (1, 2)
    assert read(arena, "w") == struct.pack("6f", 0, 2, 4, 1, 3, 5)
    tensor.data = torch.zeros(4)
    arena.refresh()
    assert arena.layout is not before and arena.segments[0].shape == (4,)
    tensor.data = torch.zeros(1).expand(4)
    with pytest.raises(ArenaError, match="'w' has elements that share memory"):
        arena.refresh()


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd-momentum", "sgd"])
def test_refresh_takes_no_inventory_without_a_change(optimizer_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gathers = count_calls(monkeypatch, "gather")
    model, optimizer = build("convnet", optimizer_name)
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "convnet", 1)  # SGD makes its momentum here
    arena.refresh()
    del gathers[:]
    looks: list[TensorWatch] = []
    unchanged = TensorWatch.unchanged

    def counted(watch: TensorWatch) -> bool:
        looks.append(watch)
        return unchanged(watch)

    monkeypatch.setattr(TensorWatch, "unchanged", counted)
    for seed in range(5):
        train(model, optimizer, "convnet", 1, seed)
        arena.refresh()
    assert gathers == []
    assert len(looks) == 5, "one look at the tensors for each refresh"
