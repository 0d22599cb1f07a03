"""The arena: training in it is bit-identical, nothing leaves it unnoticed, nothing unfit gets in."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import math
import pickle
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer

import engine.arena
from engine.arena import Arena
from engine.errors import ArenaError, ArgumentError, MismatchError, UsageError
from engine.gather import SOURCE_DIMS_MAX, merge_dims
from engine.layout import ARENA_ALIGNMENT, DTYPES
from engine.watch import TensorWatch

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False, fused=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
# The optimizers named in the promise; the others share their ways of making state.
PROMISED = [name for name in OPTIMIZERS if name.startswith(("sgd", "adam-", "adamw", "adagrad", "rmsprop"))] + ["adam"]


class Transformer(nn.Module):
    """Two small encoder layers over tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(tokens)))
        return out


def mlp() -> Any:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def convnet() -> Any:
    block = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    return nn.Sequential(*block, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def convnet_last() -> Any:
    return convnet().to(memory_format=torch.channels_last)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(4, 6)),
    "transformer": (Transformer, lambda: torch.randint(0, 11, (2, 5))),
    "convnet": (convnet, lambda: torch.randn(3, 2, 6, 6)),
    "channels_last": (convnet_last, lambda: torch.randn(3, 2, 6, 6).contiguous(memory_format=torch.channels_last)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them; and there are few cores to share."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def build(model_name: str, optimizer_name: str) -> tuple[Any, Optimizer]:
    torch.manual_seed(1)
    model = MODELS[model_name][0]()
    return model, OPTIMIZERS[optimizer_name](model.parameters())


def train(model: nn.Module, optimizer: Optimizer, model_name: str, step_count: int, seed: int = 2) -> None:
    torch.manual_seed(seed)
    for _ in range(step_count):
        optimizer.zero_grad()
        model(MODELS[model_name][1]()).square().mean().backward()
        optimizer.step()


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order, so that -0.0 is not 0.0 and nan equals itself."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def everything(model: Any, optimizer: Optimizer) -> dict[str, Any]:
    """All state by name, tensors as bytes, without the help of the arena."""
    out: dict[str, Any] = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        out |= {f"{index}.{k}": bits(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    return out


def read(arena: Arena, name: str) -> bytes:
    """A segment's bytes as the engine reads them: from the address that its source and place give."""
    index = [segment.name for segment in arena.segments].index(name)
    segment = arena.segments[index]
    source_index, offset = arena.places[index]
    source = arena.sources[source_index]
    if source.shape == ():
        return ctypes.string_at(source.address + offset, segment.nbytes)
    assert offset == 0
    places = [0]
    for extent, stride in zip(source.shape, source.stride, strict=True):
        places = [place + step * stride for place in places for step in range(extent)]
    return b"".join(ctypes.string_at(source.address + place * source.itemsize, source.itemsize) for place in places)


def assert_holds(arena: Arena) -> None:
    """Every live tensor's bytes are what the engine would store under its name."""
    live = arena.state_dict()
    for segment in arena.segments:
        assert read(arena, segment.name) == bits(live[segment.name]), segment.name


def assert_inside(arena: Arena, tensor: Tensor) -> None:
    base = arena.sources[0].address
    assert base <= tensor.data_ptr() < base + arena.layout.arena_bytes


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
    assert arena.layout is layout, "the state was all there, or its place reserved, from the start"
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


class OwnStep(torch.optim.Adam):
    """An optimizer whose step expects no state before it."""

    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if not self.state[param]:
                self.state[param]["velocity"] = torch.zeros_like(param)
            with torch.no_grad():
                param -= self.state[param]["velocity"].add_(param.grad)


def test_unknown_optimizers_state_is_taken_when_it_appears() -> None:
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
    def loss() -> Tensor:
        optimizer.zero_grad()
        out: Tensor = model(torch.ones(4, 6)).square().sum()
        out.backward()
        return out

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
    state = arena.options()["state"]["0.weight"]
    assert state["n_iter"] == optimizers[0].state[plain[0].weight]["n_iter"] > 3
    assert all(isinstance(tensor, Tensor) for tensor in state["old_dirs"])


# What others see of the tensors


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


def test_what_share_memory_moved_out_comes_back() -> None:
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
    assert saved[1]["param_groups"][0]["params"] == names and "param_names" not in saved[1]["param_groups"][0]
    optimizer.param_groups[0]["param_names"] = [f"mine.{name}" for name in names]
    restore(arena, saved)
    assert optimizer.param_groups[0]["param_names"] == [f"mine.{name}" for name in names], "it is the live one's"
    assert all(isinstance(param, nn.Parameter) for param in optimizer.param_groups[0]["params"])


# Names, roles, places


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


def test_two_parameters_over_one_memory_stay_tied() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), None])
    model[1] = nn.Parameter(model[0].data)
    arena = Arena.adopt(model)
    with torch.no_grad():
        model[0][2] = 7
    assert arena.aliases == {"1": "0"} and model[1][2] == 7
    assert model[0] is not model[1]


def test_optimizer_may_own_more_than_the_model() -> None:
    model, extra = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    groups = [{"params": model.parameters()}, {"params": [extra], "lr": 0.5}]
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


STORED = [name for name in DTYPES if name != "complex32"]  # torch warns that it is experimental


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
    places = {s.name: place for s, place in zip(arena.segments, arena.places, strict=True)}
    assert places["left"][0] == places["right"][0] == 0, "what was not dense is dense in the arena"
    source = arena.sources[places["dense"][0]]
    assert (source.shape, source.stride, source.itemsize) == ((2, 5, 12), (60, 1, 5), 4)
    assert_holds(arena)


def test_wrapped_tensors_are_read_where_they_lie() -> None:
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


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms(use_true_random=False))
def test_merged_dims_walk_the_same_elements(shape: list[int], random: Any) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    numbers = torch.arange(math.prod(shape)).reshape([shape[axis] for axis in order])
    tensor = numbers.permute([order.index(axis) for axis in range(len(shape))])
    places = [0]
    dims = merge_dims(tensor.shape, tensor.stride())
    for extent, stride in dims:
        places = [place + step * stride for place in places for step in range(extent)]
    assert places == tensor.reshape(-1).tolist()
    assert all(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims)), "could be merged further"


def test_repr_says_what_is_inside() -> None:
    model, optimizer = build("convnet", "adam")
    arena = Arena.adopt(model, optimizer)
    assert repr(arena) == "Arena(27 segments, 0.0 MB, model 6 / buffer 3 / optimizer 18, cpu, adopted)"
    arena.mark_torn()
    assert repr(arena).endswith("cpu, adopted, torn)")
    assert repr(Arena.wrap({"w": torch.zeros(25_000)})) == "Arena(1 segments, 0.1 MB, model 1, cpu, wrapped)"


# Refusals


class Odd(Tensor):
    """A tensor subclass, as DTensor is one."""


def overlapping_rows() -> dict[str, Tensor]:
    base = torch.zeros(6)
    return {"first": base[:4], "culprit": base[2:]}


def overlapping_columns() -> dict[str, Tensor]:
    base = torch.zeros(4, 6)
    return {"fine": torch.zeros(2), "first": base[:, :3], "culprit": base[:, 2:]}


def wrongly_sized() -> dict[str, Tensor]:
    base = torch.zeros(4, 6)
    return {"first": base[:, :2], "culprit": base.view(torch.int16)[:, 6:]}


REFUSED: dict[str, tuple[Callable[[], Tensor | dict[str, Tensor]], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse_coo(), "sparse.*to_dense"),
    "quantized": (lambda: torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8), "quantized"),
    "meta": (lambda: torch.zeros(2, device="meta"), "meta device.*to_empty"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "not initialized.*one batch"),
    "subclass": (lambda: torch.zeros(2).as_subclass(Odd), "is a Odd"),
    "conjugate": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "resolve_conj"),
    "negative": (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "expanded": (lambda: torch.zeros(1, 3).expand(2, 3), "share memory.*clone"),
    "unfold": (lambda: torch.zeros(9).unfold(0, 3, 1), "share memory.*clone"),
    "nine dims": (lambda: torch.zeros([4] * 9)[tuple([slice(None, None, 2)] * 9)], "more than 8 dimensions"),
    "dtype": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "bits8"),
    "overlap, contiguous": (overlapping_rows, "'first' and 'culprit' overlap"),
    "overlap, strided": (overlapping_columns, "'first' and 'culprit' overlap"),
    "overlap, element sizes": (wrongly_sized, "'first' and 'culprit' overlap"),
}


@pytest.mark.parametrize("adopted", [True, False], ids=["adopted", "wrapped"])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_refused_by_name_with_nothing_changed(kind: str, adopted: bool) -> None:
    make, words = REFUSED[kind]
    made = make()
    tensors = made if isinstance(made, dict) else {"fine": torch.ones(2), "culprit": made}
    model = nn.Module()
    model.trained = nn.Linear(2, 2)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(name, tensor)
        else:
            model.register_buffer(name, tensor)
    optimizer = torch.optim.Adam(model.trained.parameters())
    address = model.trained.weight.data_ptr()
    with pytest.raises(ArenaError, match=f"(?s)'culprit'.*{words}|{words}"):
        if adopted:
            Arena.adopt(model, optimizer)
        else:
            Arena.wrap(tensors)
    assert model.trained.weight.data_ptr() == address
    assert len(optimizer.state) == 0 and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Arena.adopt("model"), r"model is a builtins\.str"),
        (lambda: Arena.adopt(mlp().state_dict()), r"model is a collections\.OrderedDict"),
        (lambda: Arena.adopt(mlp(), [torch.optim.SGD(mlp().parameters())]), r"optimizer is a builtins\.list"),
        (lambda: Arena.adopt(mlp(), mlp()), r"optimizer is a torch\.nn\.modules\.container\.Sequential"),
        (lambda: Arena.wrap([torch.zeros(1)]), r"tensors is a builtins\.list"),
        (lambda: Arena.wrap({7: torch.zeros(1)}), r"7 is mapped to a torch\.Tensor"),
        (lambda: Arena.wrap({"w": [1]}), r"'w' is mapped to a builtins\.list"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(call: Callable[[], Arena], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call()


def test_more_refusals_by_name() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    model.optimizer = nn.ModuleDict({"w": nn.ParameterDict({"exp_avg": torch.zeros(1)})})
    optimizer = torch.optim.Adam([model.w])
    with pytest.raises(ArenaError, match=r"two tensors are called 'optimizer\.w\.exp_avg'"):
        Arena.adopt(model, optimizer)
    assert len(optimizer.state) == 0, "state that was created before the refusal"
    del model.optimizer
    model.register_parameter("a\nb", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ArenaError, match=r"cannot be called 'a\\nb'"):
        Arena.adopt(model, optimizer)
    assert len(optimizer.state) == 0 and not optimizer._optimizer_step_pre_hooks
    assert not model._load_state_dict_pre_hooks


def test_devices_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ArenaError, match=r"'1\.weight' is on the meta device"):
        Arena.adopt(model)


def test_optimizer_state_is_refused_by_name() -> None:
    model = mlp()
    optimizer = OwnStep(model.parameters())
    optimizer.state[model[0].weight] = {"velocity": torch.eye(3).to_sparse_coo()}
    with pytest.raises(ArenaError, match=r"'optimizer\.0\.weight\.velocity' is sparse"):
        Arena.adopt(model, optimizer)
    optimizer.state[model[0].weight] = [1]
    with pytest.raises(ArenaError, match=r"state of 'optimizer\.0\.weight' is a list"):
        Arena.adopt(model, optimizer)


# Ways out of the arena


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
    """As Lightning and others do that build groups of their own."""
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
def test_what_left_is_brought_back(leave: Callable[[nn.Module, Optimizer], None]) -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 2)
    before = arena.layout
    leave(model, optimizer)
    expected = everything(model, optimizer)
    arena.refresh()
    assert (arena.layout is before) == (leave in SAME_LAYOUT)
    assert everything(model, optimizer).items() >= expected.items(), "a new parameter has got its state, at most"
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    live = arena.state_dict()
    assert {name: bits(live[name]) for name in model.state_dict()} == {
        n: bits(t) for n, t in model.state_dict().items()
    }
    for tensor in [*model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]:
        assert_inside(arena, tensor)
    assert_holds(arena)


def test_what_left_and_is_unfit_is_refused_and_left_alone() -> None:
    model = mlp()
    arena = Arena.adopt(model)
    model[0].bias = nn.Parameter(torch.zeros(1).expand(12))
    before, weight = arena.layout, model[0].weight.data_ptr()
    for _ in range(2):  # and again, not once only
        with pytest.raises(ArenaError, match=r"'0\.bias' has elements that share memory"):
            arena.refresh()
    assert arena.layout is before and model[0].weight.data_ptr() == weight
    model[0].bias = nn.Parameter(torch.ones(12))
    arena.refresh()
    assert_holds(arena)


@pytest.mark.parametrize("moved_count", [0, 2])
def test_an_interrupted_refresh_is_gone_on_with(moved_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    assign(model, optimizer)
    expected = everything(model, optimizer)
    point, moved = engine.arena._point, []

    def interrupted(tensor: Tensor, view: Tensor) -> None:
        if len(moved) == moved_count:
            raise KeyboardInterrupt
        moved.append(tensor)
        point(tensor, view)

    monkeypatch.setattr(engine.arena, "_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arena.refresh()
    monkeypatch.undo()
    arena.refresh()
    assert everything(model, optimizer).items() >= expected.items()
    for tensor in model.state_dict().values():
        assert_inside(arena, tensor)
    assert_holds(arena)


def test_state_dict_is_of_what_is_there_now() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    arena = Arena.adopt(model)
    model[0] = nn.Linear(2, 2)
    assert arena.state_dict()["0.weight"].data_ptr() == model[0].weight.data_ptr()
    model[0] = nn.Linear(2, 2, bias=False)
    assert list(arena.state_dict()) == ["0.weight"]


def test_conjugated_in_place_is_noticed() -> None:
    model = nn.Module()
    model.z = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    arena = Arena.adopt(model)
    model.z.data = model.z.data.conj()
    with pytest.raises(ArenaError, match=r"'z' is a lazy conjugate"):
        arena.refresh()


def test_transposed_in_place_is_noticed() -> None:
    model = nn.Linear(2, 2, bias=False)
    arena = Arena.adopt(model)
    model.weight.data = model.weight.data.t()
    arena.refresh()
    assert model.weight.stride() == (1, 2)
    assert_holds(arena)


def test_wrapped_tensor_is_read_where_it_now_lies() -> None:
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


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    original = getattr(engine.arena, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(engine.arena, name, counted)
    return calls


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd-momentum", "sgd"])
def test_fast_path_does_not_gather(optimizer_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert len(looks) == 5, "one look at the tensors for each refresh, and no more"


# Fence and hooks


def test_step_and_load_wait_for_staging() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    assert arena.fenced and not Arena.adopt(mlp()).fenced
    seen: list[tuple[str, bytes]] = []
    saved = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}

    def during(what: str, act: Callable[[], object]) -> None:
        before = read(arena, "2.bias")

        def staged(timeout: float | None) -> bool:
            if timeout is None:
                seen.append((what, read(arena, "2.bias")))
            return timeout is None

        arena.hold(staged)
        arena.hold(staged)
        act()
        assert seen == [(what, before)] * 2, "each wait is called once, before the first byte changes"
        assert read(arena, "2.bias") != before
        del seen[:]

    during("step", lambda: train(model, optimizer, "mlp", 1))
    during("load", lambda: model.load_state_dict(saved))
    saved_bias = {"weight": saved["2.weight"], "bias": saved["2.bias"] + 1}
    during("load part", lambda: model[2].load_state_dict(saved_bias))
    model[2].bias.data = torch.zeros(3)
    during("refresh", arena.refresh)


def test_modules_added_later_wait_too() -> None:
    model = mlp()
    arena = Arena.adopt(model)
    model.add_module("more", nn.Sequential(nn.Linear(2, 2)))
    arena.refresh()
    waited: list[float | None] = []

    def staged(timeout: float | None) -> bool:
        waited.append(timeout)
        return timeout is None

    for module in (model.more, model.more[0]):
        arena.hold(staged)
        module.load_state_dict(module.state_dict())
        assert waited == [None]
        waited.clear()


def test_the_fence_is_before_hooks_that_were_there_first() -> None:
    model, optimizer = build("mlp", "adam")
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("hook"))
    arena = Arena.adopt(model, optimizer)

    def staged(timeout: float | None) -> bool:
        if timeout is None:
            order.append("staged")
        return timeout is None

    arena.hold(staged)
    optimizer.step()
    assert order == ["staged", "hook"]


def test_hooks_go_with_their_arena() -> None:
    model, optimizer = build("mlp", "adam")
    for _ in range(5):
        arena = Arena.adopt(model, optimizer)
        arena.refresh()
    for hooks in (model._load_state_dict_pre_hooks, model[0]._load_state_dict_pre_hooks):
        assert len(hooks) == 1
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    del arena
    assert not model._load_state_dict_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_unfenced_is_what_the_step_does_not_train() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("ours", "theirs", "frozen")})
    model["norm"] = nn.BatchNorm1d(2)
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD([p for name in ("ours", "frozen", "norm") for p in model[name].parameters()])
    arena = Arena.adopt(model, optimizer)
    buffers = {f"norm.{name}" for name, _ in model["norm"].named_buffers()}
    assert arena.unfenced == buffers | {f"{m}.{p}" for m in ("theirs", "frozen") for p in ("weight", "bias")}
    assert Arena.wrap({"w": torch.zeros(1)}).unfenced == frozenset()
    assert Arena.adopt(nn.BatchNorm1d(2)).unfenced == {"running_mean", "running_var", "num_batches_tracked"}

    layout, address = arena.layout, arena.sources[0].address
    model["ours"].requires_grad_(False)
    arena.refresh()
    assert arena.unfenced >= {"ours.weight", "ours.bias"}
    assert arena.layout is not layout, "plans go by it"
    assert arena.sources[0].address == address, "nothing had to move"
    optimizer.add_param_group({"params": model["theirs"].parameters()})
    model.requires_grad_(True)
    arena.refresh()
    assert arena.unfenced == buffers


def test_a_parameter_trained_under_another_name_is_fenced() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    model.append(nn.Parameter(model[0].data))
    arena = Arena.adopt(model, torch.optim.SGD([model[1]]))
    assert arena.aliases == {"1": "0"} and arena.unfenced == frozenset()


def test_saves_that_are_staged_are_let_go_of_without_a_step() -> None:
    arena = Arena.adopt(mlp())
    asked: list[int] = []

    def staged(index: int) -> Callable[[float | None], bool]:
        def wait_staged(timeout: float | None) -> bool:
            asked.append(index)
            return index != 3

        return wait_staged

    for index in range(6):
        arena.hold(staged(index))
    assert asked == [0, 1, 2, 3, 3], "each staged one is asked once, and none behind one that is not"


def test_an_interrupted_wait_is_waited_for_again() -> None:
    arena = Arena.adopt(mlp())
    outcomes: list[Exception | None] = [None, KeyError(), None]

    def wait_staged(timeout: float | None) -> bool:
        outcome = outcomes.pop()
        if outcome is not None:
            raise outcome
        return True

    arena.hold(wait_staged)
    arena.fence()
    arena.hold(wait_staged)
    with pytest.raises(KeyError):
        arena.fence()
    arena.fence()
    assert outcomes == []


def test_reading_does_not_wait() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    arena.hold(lambda timeout: pytest.fail("nothing was written"))
    arena.refresh()
    model(torch.ones(1, 6)).sum().backward()
    arena.state_dict()
    arena.options()


def test_hooks_do_not_keep_the_arena() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    expected = everything(model, optimizer)
    gone = weakref.ref(arena)
    gc.disable()
    try:
        del arena
        assert gone() is None, "no cycle holds it either"
    finally:
        gc.enable()
    assert everything(model, optimizer) == expected
    train(model, optimizer, "mlp", 1)
    model.load_state_dict(model.state_dict())


def test_a_copied_model_is_not_in_the_arena() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    arena.hold(lambda timeout: pytest.fail("the copy's step does not write here"))
    before = everything(model, optimizer)
    train(twin, twin_optimizer, "mlp", 1)
    twin.load_state_dict(twin.state_dict())
    torch.save(model, io.BytesIO())  # nor do the hooks stand in the way of writing a model whole
    arena.refresh()
    assert everything(model, optimizer) == before


# Options and restore


def copied(value: Any) -> Any:
    """As if it had been to disk: equal, with no object shared."""
    return copy.deepcopy(value)


def save(arena: Arena) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arena.refresh()
    return {name: tensor.clone() for name, tensor in arena.state_dict().items()}, copied(arena.options())


def restore(arena: Arena, saved: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    arena.refresh()
    arena.check_options(saved[1])
    arena.mark_torn()
    for name, tensor in arena.state_dict().items():
        tensor.copy_(saved[0][name])
    arena.restored(copied(saved[1]))
    assert not arena.torn


@pytest.mark.parametrize("step_count", [0, 4])
@pytest.mark.parametrize("into", [0, 2])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_restored_training_goes_on_bit_identically(optimizer_name: str, into: int, step_count: int) -> None:
    model, optimizer = build("convnet", optimizer_name)
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "convnet", step_count)
    optimizer.param_groups[0]["lr"] *= 0.5
    saved = save(arena)
    train(model, optimizer, "convnet", 4, seed=5)

    other, other_optimizer = build("convnet", optimizer_name)
    other_arena = Arena.adopt(other, other_optimizer)
    train(other, other_optimizer, "convnet", into, seed=9)
    layout = other_arena.layout
    restore(other_arena, saved)
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(other, other_optimizer, "convnet", 4, seed=5)
    assert everything(other, other_optimizer) == everything(model, optimizer)
    other_arena.refresh()
    assert other_arena.layout is layout
    assert_holds(other_arena)


def test_momentum_is_absent_until_made() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    absent = [f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()]
    assert arena.options()["absent"] == absent
    assert len(optimizer.state) == 0
    assert all(not arena.state_dict()[name].any() for name in absent), "reserved places read as zeros"
    layout = arena.layout
    train(model, optimizer, "mlp", 1)
    assert arena.options()["absent"] == []
    assert all(any(read(arena, name)) for name in absent)
    optimizer.state.clear()
    arena.refresh()
    assert arena.options()["absent"] == absent
    assert all(not any(read(arena, name)) for name in absent), "nothing is left of what is gone"
    assert arena.layout is layout


def test_momentum_of_a_thawed_parameter_is_taken_in() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    model[2].requires_grad_(False)
    arena = Arena.adopt(model, optimizer)
    model[2].requires_grad_(True)
    train(model, optimizer, "mlp", 1)
    arena.refresh()
    assert_inside(arena, optimizer.state[model[2].weight]["momentum_buffer"])
    assert_holds(arena)


def test_freezing_and_thawing_are_noticed() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    name = "optimizer.2.bias.momentum_buffer"
    model[2].bias.requires_grad_(False)
    arena.refresh()
    assert name not in arena.options()["absent"] and name not in arena.state_dict()
    model[2].bias.requires_grad_(True)
    arena.refresh()
    assert name in arena.options()["absent"] and name in arena.state_dict()


def test_momentum_switched_on_is_noticed_and_a_schedule_of_it_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("mlp", "sgd")
    arena = Arena.adopt(model, optimizer)
    assert arena.options()["absent"] == []
    optimizer.param_groups[0]["momentum"] = 0.9
    arena.refresh()
    assert len(arena.options()["absent"]) == 4
    gathers = count_calls(monkeypatch, "gather")
    optimizer.param_groups[0]["momentum"] = 0.8
    arena.refresh()
    assert gathers == []
    train(model, optimizer, "mlp", 1)
    assert_inside(arena, optimizer.state[model[2].bias]["momentum_buffer"])


def test_a_part_brings_its_momentum_and_takes_it_away() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    first, last = model[0].weight, model[2].weight
    names = {"optimizer.0.weight.momentum_buffer", "optimizer.2.bias.momentum_buffer"}
    with torch.inference_mode():
        arena.restored_part(names, absent=[])
    assert set(optimizer.state) == {first, model[2].bias}
    assert_inside(arena, optimizer.state[first]["momentum_buffer"])
    optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, "mlp", 1)
    everywhere = [f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()]
    arena.restored_part(names, absent=everywhere)
    assert [p for p in model.parameters() if "momentum_buffer" in optimizer.state[p]] == [model[0].bias, last]
    assert set(arena.options()["absent"]) == names and optimizer.param_groups[0]["lr"] == 0.5
    assert_holds(arena)


def test_optional_state_is_not_made_on_the_default_device() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in [(2,), (0, 2)]])
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    torch.set_default_device("meta")
    try:
        arena = Arena.adopt(model, optimizer)
        arena.restored_part([f"optimizer.{name}.momentum_buffer" for name in "01"], absent=[])
    finally:
        torch.set_default_device(None)
    assert [state["momentum_buffer"].device.type for state in optimizer.state.values()] == ["cpu", "cpu"]


def test_momentum_takes_the_strides_of_its_reserved_place() -> None:
    param = nn.Parameter(torch.arange(12.0).reshape(4, 3).t())
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    arena = Arena.adopt(nn.ParameterList([param]), optimizer)
    layout = arena.layout
    param.grad = torch.arange(12.0).reshape(3, 4)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    assert arena.layout is layout and momentum.stride() == param.stride()
    assert torch.equal(momentum, param.grad)
    assert_holds(arena)


def test_restored_momentum_has_its_own_version() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    arena = Arena.adopt(model, optimizer)
    train(model, optimizer, "mlp", 1)
    saved = save(arena)
    optimizer.state.clear()
    restore(arena, saved)
    one, other = (optimizer.state[param]["momentum_buffer"] for param in model[0].parameters())
    version = one._version
    other.zero_()
    assert one._version == version, "not one counter for all views of the buffer"


def test_momentum_of_an_unused_parameter_stays_absent() -> None:
    model, optimizer = build("mlp", "sgd-momentum")
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    arena = Arena.adopt(model, optimizer)
    layout = arena.layout
    train(model, optimizer, "mlp", 2)
    saved = save(arena)
    assert saved[1]["absent"] == ["optimizer.params.1.0.momentum_buffer"] and arena.layout is layout
    assert_inside(arena, optimizer.state[model[0].weight]["momentum_buffer"])
    unused.grad = torch.ones(3)
    optimizer.step()
    assert arena.options()["absent"] == []
    restore(arena, saved)
    assert arena.options()["absent"] == saved[1]["absent"]
    assert "momentum_buffer" not in optimizer.state[unused]


def test_unfit_momentum_waits_for_the_next_refresh() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arena = Arena.adopt(model, optimizer)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()  # not the place to hear of it
    with pytest.raises(ArenaError, match=r"'optimizer\.weight\.momentum_buffer' is sparse"):
        arena.refresh()


def test_tensor_hyperparameters_are_restored_in_place() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    arena = Arena.adopt(model, optimizer)
    saved = save(arena)
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.125
    restore(arena, saved)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0


def grouped(rates: list[float], turned: bool = False) -> tuple[Any, Optimizer]:
    model = nn.Linear(3, 3)
    groups = [{"params": [model.weight], "lr": rates[0]}, {"params": [model.bias], "lr": rates[1]}]
    return model, torch.optim.Adam(groups[::-1] if turned else groups)


def test_each_group_gets_its_own_back() -> None:
    arena = Arena.adopt(*grouped([0.1, 0.2]))
    model, optimizer = grouped([9.0, 9.0])
    restore(Arena.adopt(model, optimizer), save(arena))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert optimizer.param_groups[1]["params"] == [model.bias]


def test_other_groups_are_refused() -> None:
    options = save(Arena.adopt(*grouped([0.1, 0.2])))[1]
    model, optimizer = grouped([9.0, 9.0], turned=True)
    arena = Arena.adopt(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(MismatchError, match=r"group 0 of the checkpoint's.*\['weight'\].*arena's has \['bias'\]"):
        arena.restored(options)
    assert everything(model, optimizer) == before
    assert [group["lr"] for group in optimizer.param_groups] == [9.0, 9.0]


def test_plain_state_is_restored() -> None:
    model = mlp()
    optimizer = OwnStep(model.parameters())
    param: Any = model[0].bias
    optimizer.state[param] = {"count": 3, "note": "x"}
    arena = Arena.adopt(model, optimizer)
    saved = save(arena)
    assert saved[1]["state"] == {"0.bias": {"count": 3, "note": "x"}}
    optimizer.state[param] = {"count": 4, "later": True}
    restore(arena, saved)
    assert optimizer.state[param] == {"count": 3, "note": "x"}
    optimizer.state.clear()
    restore(arena, saved)
    assert optimizer.state[param] == {"count": 3, "note": "x"}


def test_options_of_another_optimizer_are_refused() -> None:
    model, optimizer = build("mlp", "adam")
    arena = Arena.adopt(model, optimizer)
    bare = Arena.adopt(mlp())
    options = arena.options()
    assert bare.options() == {} and Arena.wrap({}).options() == {}
    bare.restored({})
    for holder, given_options, words in [
        (bare, options, "the arena has none"),
        (arena, {}, "the checkpoint has none"),
        (arena, options | {"param_groups": []}, "0 parameter groups and the arena's has 1"),
        (arena, options | {"absent": ["optimizer.0.weight.exp_avg"]}, r"cannot take: optimizer\.0\.weight\.exp_avg"),
        (arena, options | {"state": {"gone": {"n": 1}}}, "cannot take: gone"),
    ]:
        with pytest.raises(MismatchError, match=words):
            holder.check_options(given_options)
    assert set(options["param_groups"][0]) >= {"lr", "betas"}
    assert options["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]


def test_dims_limit_is_that_of_the_native_code() -> None:
    assert SOURCE_DIMS_MAX == 8
    tensor = torch.zeros([4] * 8)[tuple([slice(None, None, 2)] * 8)]
    assert len(Arena.wrap({"w": tensor}).sources[0].shape) == 8
