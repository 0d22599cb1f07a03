"""The arena: training in it is bit-identical, and its segments have the names, bytes and strides of the tensors."""

from __future__ import annotations

import copy
import ctypes
import inspect
import io
import pickle
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dtypes import TORCH_DTYPES
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from trainings import (
    MODELS,
    OPTIMIZERS,
    PROMISED,
    OwnStep,
    assert_holds,
    assert_inside,
    bits,
    build,
    convnet,
    everything,
    mlp,
    read,
    restore,
    save,
    train,
)

from engine.errors import ArenaError, UsageError
from engine.format.layout import ARENA_ALIGNMENT, DTYPES
from engine.state.arena import Arena

pytestmark = pytest.mark.usefixtures("one_thread")


# Training in the arena


@pytest.mark.parametrize("optimizer_name", PROMISED)
@pytest.mark.parametrize("model_name", MODELS)
def test_training_is_bit_identical(model_name: str, optimizer_name: str) -> None:
    plain = build(model_name, optimizer_name)
    train(*plain, model_name, 50)
    adopted = build(model_name, optimizer_name)
    arena = Arena.adopt(*adopted)
    layout = arena.layout
    train(*adopted, model_name, 50)
    assert everything(*adopted) == everything(*plain)
    arena.refresh()
    assert arena.layout is layout, "adoption made or reserved all of the state"
    assert_holds(arena)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_adoption_in_mid_training(optimizer_name: str) -> None:
    plain, adopted = build("convnet", optimizer_name), build("convnet", optimizer_name)
    for model, optimizer in (plain, adopted):
        train(model, optimizer, "convnet", 3)
    arena = Arena.adopt(*adopted)
    for model, optimizer in (plain, adopted):
        train(model, optimizer, "convnet", 5, seed=3)
    assert everything(*adopted) == everything(*plain)
    assert_holds(arena)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_created_state_is_that_of_the_first_step(optimizer_name: str) -> None:
    plain, adopted = build("mlp", optimizer_name), build("mlp", optimizer_name)
    grads = [torch.ones_like(param) for param in adopted[0].parameters()]
    for param, grad in zip(adopted[0].parameters(), grads, strict=True):
        param.grad = grad
    Arena.adopt(*adopted)
    assert all(param.grad is grad for param, grad in zip(adopted[0].parameters(), grads, strict=True))
    for model, optimizer in (plain, adopted):
        train(model, optimizer, "mlp", 6)
    assert everything(*adopted) == everything(*plain)


def old_init_group(
    self: torch.optim.AdamW,
    group: Any,
    params: Any,
    grads: Any,
    amsgrad: Any,
    avgs: Any,
    sqs: Any,
    max_sqs: Any,
    steps: Any,
) -> None:
    torch.optim.AdamW._init_group(self, {**group, "amsgrad": amsgrad}, params, grads, avgs, sqs, max_sqs, steps)


old_init_group.__module__ = "torch.optim.adamw"


class OldAdamW(torch.optim.AdamW):
    """As AdamW was up to torch 2.6: one argument of `_init_group` is a hyperparameter."""

    if "amsgrad" not in inspect.signature(torch.optim.AdamW._init_group).parameters:
        _init_group: Any = old_init_group


@pytest.mark.parametrize("amsgrad", [True, False])
def test_state_is_created_by_an_init_group_that_takes_hyperparameters(amsgrad: bool) -> None:
    model = mlp()
    optimizer = OldAdamW(model.parameters(), amsgrad=amsgrad)
    Arena.adopt(model, optimizer)
    assert ("max_exp_avg_sq" in optimizer.state[model[0].weight]) is amsgrad


def test_backward_does_not_see_other_tensors_written() -> None:
    model = nn.Linear(3, 3)
    Arena.adopt(model)
    out = model(torch.ones(2, 3, requires_grad=True))
    with torch.no_grad():
        model.bias.add_(1)  # shares the buffer, not the version counter, with the weight that backward needs
    out.sum().backward()
    assert model.weight.grad is not None


def test_adoption_in_inference_mode_leaves_training_possible() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    with torch.inference_mode():
        arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 2)
    with torch.inference_mode():
        model[0].weight.data = torch.ones(12, 6)
        arena.refresh()
    train(model, optimizer, "mlp", 2)
    assert_holds(arena)


def test_adoption_between_forward_and_backward() -> None:
    model, optimizer = build("mlp", "adam")
    expected = build("mlp", "adam")[0]
    loss, other = model(torch.ones(4, 6)).sum(), expected(torch.ones(4, 6)).sum()
    Arena.adopt(model, optimizer)
    loss.backward()
    other.backward()
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and bits(one.grad) == bits(two.grad)


def test_frozen_parameters_get_no_state() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    arena = Arena.adopt(model, torch.optim.Adam(model.parameters()))
    names = {segment.name for segment in arena.segments}
    assert "0.weight" in names and "optimizer.0.weight.exp_avg" not in names
    assert "optimizer.0.bias.exp_avg" in names


def test_state_of_an_unknown_optimizer_is_taken_in_after_its_step() -> None:
    model = mlp()
    optimizer = OwnStep(model.parameters())
    arena = Arena.adopt(model, optimizer)
    before = arena.layout
    assert len(arena.segments) == 4
    train(model, optimizer, "mlp", 1)
    arena.refresh()
    assert arena.layout is not before and len(arena.segments) == 8
    assert "optimizer.2.bias.velocity" in arena.state_dict()
    assert_holds(arena)


def lbfgs_steps(model: nn.Module, optimizer: Optimizer, after: Callable[[], None]) -> None:
    def loss() -> float:
        optimizer.zero_grad()
        out: Tensor = model(torch.ones(4, 6)).square().sum()
        out.backward()
        return out.item()

    for _ in range(3):
        optimizer.step(loss)
        after()


def test_lbfgs_keeps_its_lists_in_options() -> None:
    torch.manual_seed(1)
    plain = mlp()
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.LBFGS(net.parameters(), max_iter=3) for net in (plain, model)]
    lbfgs_steps(plain, optimizers[0], lambda: None)
    arena = Arena.adopt(model, optimizers[1])
    lbfgs_steps(model, optimizers[1], arena.refresh)
    assert {n: bits(p) for n, p in model.named_parameters()} == {n: bits(p) for n, p in plain.named_parameters()}
    assert_holds(arena)
    state = arena.options()[""]["state"]["0.weight"]
    assert state["n_iter"] == optimizers[0].state[plain[0].weight]["n_iter"] > 3
    assert all(isinstance(tensor, Tensor) for tensor in state["old_dirs"])


# How adopted tensors copy, pickle and share


def saved_bytes(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def test_tensors_copy_and_pickle_as_before(tmp_path: Path) -> None:
    model, optimizer = build("convnet", "adam")
    train(model, optimizer, "convnet", 1)

    def sizes() -> list[int]:
        twin, moment = copy.deepcopy(model), copy.deepcopy(optimizer.state[model[0].bias]["exp_avg"])
        copies = [*twin.state_dict().values(), moment, copy.deepcopy(model[0].bias)]
        whole = [model.state_dict(), model[1].state_dict(), optimizer.state_dict(), model[0].bias]
        pickled = [len(pickle.dumps(tensor)) for tensor in (model[0].bias, model[1].running_mean)]
        return [t.untyped_storage().nbytes() for t in copies] + [saved_bytes(value) for value in whole] + pickled

    before = sizes()
    arena = Arena.adopt(model, optimizer)
    assert sizes() == before, "an adopted tensor brings more along than itself"
    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = convnet()
    load_model(fresh, tmp_path / "model.safetensors")
    assert {n: bits(t) for n, t in fresh.state_dict().items()} == {n: bits(t) for n, t in model.state_dict().items()}
    assert_holds(arena)


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
def test_each_tensor_has_its_own_storage_and_version() -> None:
    model, optimizer = build("channels_last", "adam")
    model.empty = nn.Parameter(torch.zeros(3, 0))
    Arena.adopt(model, optimizer)
    tensors = [*model.state_dict().values(), *(t for state in optimizer.state.values() for t in state.values())]
    addresses = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(addresses)) == len(addresses)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    versions = [t._version for t in tensors[1:]]
    tensors[0].zero_()
    assert [t._version for t in tensors[1:]] == versions


def test_tied_objects_share_one_storage() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    model.append(nn.Parameter(model[0].data))
    Arena.adopt(model)
    assert model[0].untyped_storage()._cdata == model[1].untyped_storage()._cdata


def test_an_arena_is_not_copied() -> None:
    model, optimizer = build("mlp", "adam")
    model.arena = Arena.adopt(model, optimizer)
    for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UsageError, match=r"cannot be copied or pickled.*adopt the copies"):
            duplicate(model.arena)
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model)


def test_tensors_moved_by_share_memory_are_brought_back() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    layout, expected = arena.layout, everything(model, optimizer)
    model.share_memory()
    assert model[0].weight.is_shared()
    arena.refresh()
    assert_inside(arena, model[0].weight)
    assert arena.layout is layout and everything(model, optimizer) == expected
    train(model, optimizer, "mlp", 1)
    assert_holds(arena)


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(TORCH < (2, 6), reason="torch 2.6 is the first whose optimizers take named parameters")
@pytest.mark.parametrize("optimizer_name", ["adam", "sgd-momentum"])
def test_an_optimizer_of_named_parameters(optimizer_name: str) -> None:
    plain = build("mlp", optimizer_name)
    train(*plain, "mlp", 3)
    model = build("mlp", optimizer_name)[0]
    optimizer = OPTIMIZERS[optimizer_name](model.named_parameters())
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 1)
    saved = save(arena)
    names = [name for name, _ in model.named_parameters()]
    group = saved[1][""]["param_groups"][0]
    assert group["params"] == names and "param_names" not in group
    optimizer.param_groups[0]["param_names"] = [f"mine.{name}" for name in names]
    restore(arena, saved)
    assert optimizer.param_groups[0]["param_names"] == [f"mine.{name}" for name in names], "it is the live one's"
    assert all(isinstance(param, nn.Parameter) for param in optimizer.param_groups[0]["params"])


# Names, roles, locations


def test_names_are_those_of_state_dict() -> None:
    model, optimizer = build("transformer", "adam")
    arena = Arena.adopt(model, optimizer)
    names = {segment.name: segment for segment in arena.segments}
    assert set(model.state_dict()) == {n for n in names if names[n].role != "optimizer"} | set(arena.aliases)
    assert arena.aliases == {"head.weight": "embed.weight"}
    assert names["body.layers.1.linear1.weight"].layer == "body.layers.1.linear1"
    moment = names["optimizer.body.layers.1.linear1.weight.exp_avg"]
    assert (moment.role, moment.layer) == ("optimizer", "body.layers.1.linear1")
    live = arena.state_dict()
    assert live["head.weight"].data_ptr() == live["embed.weight"].data_ptr() == model.head.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in live.values())
    assert arena.nbytes == sum(segment.nbytes for segment in arena.segments)


def test_buffers_of_all_kinds() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.zeros(5), persistent=False)
    arena = Arena.adopt(model)
    roles = {segment.name: segment.role for segment in arena.segments}
    assert roles == {
        "weight": "model",
        "bias": "model",
        "running_mean": "buffer",
        "running_var": "buffer",
        "num_batches_tracked": "buffer",
    }
    assert {segment.layer for segment in arena.segments} == {""}
    model.register_buffer("running_mean", model.running_mean, persistent=False)
    arena.refresh()
    assert "running_mean" not in arena.state_dict()


def test_shared_module_has_all_its_names() -> None:
    shared = nn.Linear(2, 2)
    arena = Arena.adopt(nn.Sequential(shared, nn.ReLU(), shared))
    assert arena.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}
    assert_inside(arena, shared.weight)


def test_parameters_that_share_memory_stay_tied() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), None])
    model[1] = nn.Parameter(model[0].data)
    arena = Arena.adopt(model)
    with torch.no_grad():
        model[0][2] = 7
    assert arena.aliases == {"1": "0"} and model[1][2] == 7
    assert model[0] is not model[1]


def test_optimizer_may_own_more_than_the_model() -> None:
    model, extra = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": model.parameters()}, {"params": [extra], "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    arena = Arena.adopt(model, optimizer)
    names = {segment.name: segment.role for segment in arena.segments}
    assert names["optimizer.params.1.0"] == names["optimizer.params.1.0.exp_avg"] == "optimizer"
    assert_inside(arena, extra)
    extra.data = torch.full((3,), 2.0)
    arena.refresh()
    assert read(arena, "optimizer.params.1.0") == struct.pack("3f", 2, 2, 2)
    optimizer.param_groups[1]["params"][0] = nn.Parameter(torch.zeros(3))
    with pytest.raises(ArenaError, match="none of its parameter groups"):
        arena.refresh()  # the state is still that of the parameter that was taken away


STORED = [name for name in TORCH_DTYPES if name != "complex32"]  # torch warns that it is experimental


@pytest.mark.parametrize("adopted", [True, False], ids=["adopted", "wrapped"])
def test_every_dtype_and_shape(adopted: bool) -> None:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for dtype in STORED:
        for shape in [(), (0,), (1,), (3, 1, 5), (65,), (2, 0, 3)]:
            raw = torch.randint(0, 2, (*shape, DTYPES[dtype].itemsize), dtype=torch.uint8)
            tensors[f"{dtype}_{'x'.join(map(str, shape))}"] = raw.view(getattr(torch, dtype)).reshape(shape)
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    arena = Arena.adopt(model) if adopted else Arena.wrap(tensors)
    assert {name: bits(tensor) for name, tensor in arena.state_dict().items()} == before
    assert {segment.name: segment.shape for segment in arena.segments} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert_holds(arena)


def test_segments_are_aligned_and_padding_is_zero() -> None:
    model, optimizer = build("convnet", "adam")
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "convnet", 2)
    whole = ctypes.string_at(arena.sources[0].address, arena.layout.arena_bytes)
    ends = [segment.arena_offset for segment in arena.segments[1:]] + [arena.layout.arena_bytes]
    for segment, end in zip(arena.segments, ends, strict=True):
        assert segment.arena_offset % ARENA_ALIGNMENT == 0
        assert not any(whole[segment.arena_offset + segment.nbytes : end]), segment.name


def test_base_is_aligned() -> None:
    # Torch aligns to 64 bytes (c10::gAlignment), so that of many buffers few are aligned to more by chance.
    arenas = [Arena.adopt(nn.Linear(width, 7)) for width in range(1, 33)]
    assert {arena.sources[0].address % ARENA_ALIGNMENT for arena in arenas} == {0}


def test_strided_parameters_keep_their_strides_and_have_a_source() -> None:
    model = nn.Module()
    base = torch.arange(24.0).reshape(4, 6)
    model.dense = nn.Parameter(torch.arange(120.0).reshape(2, 3, 4, 5).permute(0, 3, 1, 2))
    model.left, model.right = nn.Parameter(base[:, :2]), nn.Parameter(base[:, 2:])  # interleaved, not overlapping
    stride, before = model.dense.stride(), {n: bits(p) for n, p in model.named_parameters()}
    arena = Arena.adopt(model)
    assert model.dense.stride() == stride
    assert {n: bits(p) for n, p in model.named_parameters()} == before
    locations = {s.name: location for s, location in zip(arena.segments, arena.locations, strict=True)}
    assert locations["left"][0] == locations["right"][0] == 0, "an arena makes its tensors dense"
    source = arena.sources[locations["dense"][0]]
    assert (source.shape, source.stride, source.itemsize) == ((2, 5, 12), (60, 1, 5), 4)
    assert_holds(arena)


def test_wrapped_tensors_are_read_at_their_own_location() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    arena = Arena.wrap({"a.left": base[:, :2], "a.right": base[:, 2:], "whole": torch.ones(3)})
    assert {s.name: (s.role, s.layer) for s in arena.segments} == {
        "a.left": ("model", "a"),
        "a.right": ("model", "a"),
        "whole": ("model", ""),
    }
    assert sorted(source.address for source in arena.sources)[:1] != [0] and not arena.fenced
    base.add_(1)
    assert arena.state_dict()["a.left"].data_ptr() == base.data_ptr()
    assert_holds(arena)


class Pages(bytearray):
    """Memory that can be referred to weakly."""


def test_memory_keeps_the_old_storage_of_a_wrapped_tensor() -> None:
    pages = Pages(16)
    tensor, alive = torch.frombuffer(pages, dtype=torch.uint8), weakref.ref(pages)
    del pages
    arena = Arena.wrap({"w": tensor})
    memory = arena.memory
    tensor.data = torch.ones(16, dtype=torch.uint8)
    arena.refresh()
    assert alive() is not None, "a save may still read it"
    del memory
    assert alive() is None


def test_repr_counts_segments_by_role() -> None:
    model, optimizer = build("convnet", "adam")
    arena = Arena.adopt(model, optimizer)
    assert repr(arena) == "Arena(27 segments, 0.0 MB, model 6 / buffer 3 / optimizer 18, cpu, adopted)"
    arena.mark_torn()
    assert repr(arena).endswith("cpu, adopted, torn)")
    assert repr(Arena.wrap({"w": torch.zeros(25_000)})) == "Arena(1 segments, 0.1 MB, model 1, cpu, wrapped)"


def test_completion_offers_the_names_for_callers() -> None:
    arena = Arena.wrap({"w": torch.zeros(1)})
    assert dir(Arena) == dir(arena)
    assert {"adopt", "wrap", "segments"} <= set(dir(Arena)) and "hold" not in dir(Arena)
    assert all(hasattr(Arena, name) for name in dir(Arena))
