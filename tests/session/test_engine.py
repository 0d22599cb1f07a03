"""The engine end to end, on the real ring and the real file system: a restore returns the saved state."""

from __future__ import annotations

import asyncio
import concurrent.futures
import fnmatch
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from disk import FAILURES, FailingFilesystem, GatedFilesystem, names, same, stored
from dtypes import TORCH_DTYPES
from hooked import HookedFilesystem
from hypothesis import given
from hypothesis import strategies as st
from jobs import until
from processes import native_threads
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
from engine.format import plan
from engine.format.manifest import SegmentRecord
from engine.state.select import Selection
from engine.store import writer

pytestmark = [pytest.mark.every_backend, pytest.mark.remote_owner]

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


def tensors_of_every_dtype(seed: int = 0) -> dict[str, Tensor]:
    """One tensor of random bytes for each dtype, of a size that is no multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (dtype, stored_as) in enumerate(TORCH_DTYPES.items()):
        count = 1001 + 13 * index
        raw = torch.randint(0, 256, (count * stored_as.itemsize,), dtype=torch.uint8, generator=generator)
        if dtype == "bool":
            raw %= 2
        tensors[f"layer.{index}.{dtype}"] = raw.view(getattr(torch, dtype))
    return tensors


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def wipe(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.detach().reshape(-1).view(torch.uint8).zero_()


class Net(nn.Module):
    """Parameters, module buffers of two dtypes, a tied weight, a channels_last weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.conv(torch.ones(1, 3, 5, 5)).mean()
        out: Tensor = self.head(self.norm(self.embed(tokens))) * image
        return out


def make_training(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randint(0, 50, (16,))).square().mean().backward()
    optimizer.step()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[engine.Engine]:
    with engine.Engine(tmp_path, **SMALL) as eng:
        yield eng


# -- round trips ------------------------------------------------------------------------------------------------


def test_every_dtype_round_trips_and_opens_in_stock_safetensors(opened: engine.Engine, tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    want = clones(tensors)
    arena = engine.Arena.wrap(tensors)
    opened.checkpoint(arena, step=1).result()
    wipe(tensors)
    opened.restore(arena)
    on_disk = stored(tmp_path, 1)
    for name, tensor in want.items():
        assert same(tensors[name], tensor), name
        here = on_disk[name]
        if name.endswith(("complex128", "complex32")):
            here = torch.view_as_complex(here)
        assert same(here, tensor), name
    loaded = opened.load()
    assert loaded.keys() == want.keys() and all(same(loaded[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 0, 2), (2, 3, 4)])
def test_every_shape_round_trips(opened: engine.Engine, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.randn(shape), "b": torch.randn(7)}
    want = clones(tensors)
    arena = engine.Arena.wrap(tensors)
    opened.checkpoint(arena).result()
    wipe(tensors)
    opened.restore(arena)
    assert same(tensors["a"], want["a"]) and same(tensors["b"], want["b"])


def test_an_empty_arena_round_trips(opened: engine.Engine, tmp_path: Path) -> None:
    arena = engine.Arena.wrap({})
    opened.checkpoint(arena, step=3).result()
    assert opened.restore(arena).step == 3
    assert opened.load() == {} and stored(tmp_path, 3) == {}


def test_a_training_comes_back_whole(opened: engine.Engine, tmp_path: Path) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    for seed in range(3):
        train(model, optimizer, seed)
    want = clones(arena.state_dict())
    opened.checkpoint(arena, step=3, extra={"epoch": 7}).result()
    train(model, optimizer, 3)
    expected = clones(arena.state_dict())

    other_model, other_optimizer = make_training(seed=99)
    other_optimizer.param_groups[0]["lr"] = 123.0
    other = engine.Arena.adopt(other_model, other_optimizer)
    info = opened.restore(other)
    assert (info.step, info.extra) == (3, {"epoch": 7})
    assert all(same(tensor, want[name]) for name, tensor in other.state_dict().items())
    assert other_optimizer.param_groups[0]["lr"] == 1e-2
    train(other_model, other_optimizer, 3)
    assert all(same(tensor, expected[name]) for name, tensor in other.state_dict().items())
    assert "head.weight" in want and "head.weight" not in stored(tmp_path, 3)


def test_stock_safetensors_loads_a_model_with_tied_weights(opened: engine.Engine, tmp_path: Path) -> None:
    from safetensors.torch import load_model

    model, optimizer = make_training()
    opened.checkpoint(engine.Arena.adopt(model, optimizer), step=1).result()
    fresh = make_training(seed=5)[0]
    load_model(fresh, tmp_path / "step-00000001" / "model.safetensors")
    assert all(same(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


@pytest.mark.parametrize("cut", [{"chunk_count": 1}, {"chunk_count": 5}, {"chunk_bytes": 1}, {"chunk_bytes": 100_000}])
@pytest.mark.parametrize("block_bytes", [4096, 256 << 10, 4 << 20])
def test_a_restore_does_not_depend_on_the_chunks(tmp_path: Path, cut: dict[str, Any], block_bytes: int) -> None:
    """Also where the stored blocks are larger than the restoring engine's slots."""
    tensors = {"a": torch.randn(300_001), "b": torch.arange(70_001)}
    want = clones(tensors)
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path, block_bytes=block_bytes, staging_bytes=8 << 20) as eng:
        eng.checkpoint(arena, step=1, **cut).result()
    wipe(tensors)
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.restore(arena)
        assert all(same(tensors[name], want[name]) for name in want)
        eng.checkpoint(arena, step=2, chunk_count=2).result()
        assert all(same(tensor, want[name]) for name, tensor in eng.load(step=2).items())


def test_wrapped_views_are_gathered_and_scattered(opened: engine.Engine) -> None:
    base = torch.randn(60, 50)
    halves = {"left": base[:, :20], "right": base[:, 20:], "turned": torch.randn(5, 6, 7).permute(2, 0, 1)}
    want = clones(halves)
    arena = engine.Arena.wrap(halves)
    opened.checkpoint(arena).result()
    base.zero_()
    halves["turned"].zero_()
    opened.restore(arena)
    assert all(same(halves[name], want[name]) for name in want)


@pytest.mark.filterwarnings("ignore:no optimizer of the arena trains")
def test_a_plan_is_computed_once(opened: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def counting(*arguments: Any) -> Any:
        planned.append(arguments)
        return plan.make_plan(*arguments)

    monkeypatch.setattr(writer, "make_plan", counting)
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    for _ in range(4):
        opened.checkpoint(arena).result()
        train(model, optimizer, 0)
    assert len(planned) == 1, "reused by every later save"
    opened.checkpoint(arena, chunk_count=2).result()
    opened.checkpoint(arena).result()
    assert len(planned) == 2, "another cutting is another plan, and the first is still there"
    model.add_module("more", nn.Linear(2, 2))
    opened.checkpoint(arena).result()
    assert len(planned) == 3, "a plan of the arena's old layout was used"


# -- partial restore --------------------------------------------------------------------------------------------


def layered_tensors(count: int = 40, elements: int = 50_000) -> dict[str, Tensor]:
    return {f"layers.{index}.weight": torch.randn(elements) for index in range(count)}


@pytest.mark.parametrize("select", ["layers.7.*", ["layers.7.weight", "layers.31.*"]])
def test_a_partial_restore_changes_and_reads_only_its_part(opened: engine.Engine, select: str | list[str]) -> None:
    tensors = layered_tensors()
    want = clones(tensors)
    arena = engine.Arena.wrap(tensors)
    opened.checkpoint(arena).result()
    wipe(tensors)
    info = opened.restore(arena, select=select)
    chosen = {name for name in tensors if name.split(".")[1] in (("7",) if isinstance(select, str) else ("7", "31"))}
    for name in tensors:
        assert same(tensors[name], want[name]) == (name in chosen), name
    manifest_bytes = (Path(info.path) / "manifest.json").stat().st_size
    layer_bytes = sum(want[name].nbytes for name in chosen)
    assert layer_bytes <= info.nbytes_read - manifest_bytes <= layer_bytes + len(chosen) * 2 * SMALL["block_bytes"]
    assert set(opened.load(select=select)) == chosen


def test_select_takes_a_layer_with_its_optimizer_state(opened: engine.Engine) -> None:
    model, optimizer = make_training()
    arena = engine.Arena.adopt(model, optimizer)
    opened.checkpoint(arena).result()
    chosen = opened.load(select="norm.*")
    assert {"norm.weight", "norm.running_mean", "optimizer.norm.weight.exp_avg"} <= set(chosen)
    assert not any("embed" in name or "conv" in name for name in chosen)


def test_select_takes_the_name_of_a_layer(opened: engine.Engine) -> None:
    layers = [nn.Sequential(nn.Linear(2, 2)) for _ in range(32)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    layers[3].scale = nn.Parameter(torch.ones(2))
    opened.checkpoint(engine.Arena.adopt(model, torch.optim.Adam(model.parameters()))).result()
    assert set(opened.load(select="layers.3.0")) == {
        f"{prefix}layers.3.0.{name}{suffix}"
        for name in ("weight", "bias")
        for prefix, suffix in [("", ""), *(("optimizer.", f".{key}") for key in ("step", "exp_avg", "exp_avg_sq"))]
    }
    chosen = {name for name in opened.load(select="layers.3") if not name.startswith("optimizer.")}
    assert chosen == {"layers.3.scale"}, "neither its children nor layers.31"


@given(
    st.lists(st.text("ab.*?[!]-", max_size=6), min_size=1, max_size=3),
    st.tuples(st.text("ab.*[]", max_size=5), st.text("ab.*[]", max_size=5)),
)
def test_select_matches_like_fnmatch(patterns: list[str], named: tuple[str, str]) -> None:
    name, layer = named
    record = SegmentRecord(
        name=name, dtype="float32", shape=(1,), role="model", layer=layer, file=0, offset=4096, nbytes=4
    )
    expected = any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (name, layer, f"{layer}."))
    assert Selection(patterns).has(record) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "complex128"])
def test_a_large_tensor_is_loaded_into_its_own_mapping(opened: engine.Engine, dtype: str) -> None:
    """Such memory comes from the kernel, and works as any other: shaped, writable, and freed with the tensor."""
    shape = (3, 700_001) if dtype != "complex128" else (3, 50_001)
    stored = (torch.arange(shape[0] * shape[1]).view(shape) % 2).to(getattr(torch, dtype))
    opened.checkpoint(engine.Arena.wrap({"a": stored, "b": stored.clone()})).result()
    loaded = opened.load()
    assert same(loaded["a"], stored) and same(loaded["b"], stored)
    loaded["a"].zero_()
    assert same(loaded["b"], stored)


def make_momentum(rate: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, step_count: int) -> None:
    for _ in range(step_count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def test_a_partial_restore_brings_optional_state_and_no_hyperparameters(opened: engine.Engine) -> None:
    model, optimizer = make_momentum()
    arena = engine.Arena.adopt(model, optimizer)
    opened.checkpoint(arena, step=0).result()
    descend(model, optimizer, 3)
    opened.checkpoint(arena, step=3).result()
    descend(model, optimizer, 1)

    other_model, other_optimizer = make_momentum(rate=0.5)
    other = engine.Arena.adopt(other_model, other_optimizer)
    opened.restore(other, select="*")
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    other_optimizer.param_groups[0]["lr"] = 0.1
    descend(other_model, other_optimizer, 1)
    assert all(same(tensor, arena.state_dict()[name]) for name, tensor in other.state_dict().items())

    opened.restore(other, step=0, select="1.*")
    having = [name for name, p in other_model.named_parameters() if "momentum_buffer" in other_optimizer.state[p]]
    assert having == ["0.weight", "0.bias"], "at step 0 no parameter had momentum, and 1.* was asked for"


class Lion(torch.optim.Optimizer):
    """An optimizer that is not torch's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(exp_avg=torch.zeros_like(param), count=0)
            state["count"] += 1
            param.sub_(state["exp_avg"].lerp_(param.grad, 0.1).sign(), alpha=0.01 / state["count"])


LATE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2),
    "sparse adam": lambda model: torch.optim.SparseAdam(model.parameters()),
    "own": lambda model: Lion(model.parameters()),
}


@pytest.mark.parametrize("kind", LATE)
def test_state_that_is_made_late_is_restored_without_a_step(opened: engine.Engine, kind: str) -> None:
    def make() -> tuple[nn.Embedding, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Embedding(4, 3, sparse=kind == "sparse adam")
        return model, LATE[kind](model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def loss() -> float:
            optimizer.zero_grad()
            out: Tensor = model(torch.tensor([1, 2])).square().sum()
            out.backward()
            return out.item()

        optimizer.step(loss) if kind == "lbfgs" else (loss(), optimizer.step())

    model, optimizer = make()
    arena = engine.Arena.adopt(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    opened.checkpoint(arena).result()
    step(model, optimizer)

    other_model, other_optimizer = make()
    other = engine.Arena.adopt(other_model, other_optimizer)
    with pytest.raises(engine.MismatchError, match=r"not in the arena\n.*a restore without select= makes it"):
        opened.restore(other, select="*")
    assert not other_optimizer.state and not other.torn
    opened.restore(other)
    step(other_model, other_optimizer)
    assert same(other_model.weight, model.weight)


def test_the_groups_of_an_optimizer_come_back_or_are_refused(opened: engine.Engine) -> None:
    def make(rates: list[float], turned: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3)
        groups = [{"params": [model.weight], "lr": rates[0]}, {"params": [model.bias], "lr": rates[1]}]
        return model, torch.optim.Adam(groups[::-1] if turned else groups)

    opened.checkpoint(engine.Arena.adopt(*make([0.1, 0.2]))).result()
    model, optimizer = make([8.0, 9.0])
    opened.restore(engine.Arena.adopt(model, optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    model, optimizer = make([8.0, 9.0], turned=True)
    arena = engine.Arena.adopt(model, optimizer)
    want = clones(arena.state_dict())
    with pytest.raises(engine.MismatchError, match=r"\['weight'\].*\['bias'\]"):
        opened.restore(arena)
    assert all(same(tensor, want[name]) for name, tensor in arena.state_dict().items()) and not arena.torn


def test_numbers_that_a_scheduler_computes_with_numpy_are_saved(opened: engine.Engine) -> None:
    model, optimizer = make_momentum()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: numpy.float64(0.5))
    arena = engine.Arena.adopt(model, optimizer)
    descend(model, optimizer, 1)
    scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is numpy.float64
    opened.checkpoint(arena).result()
    optimizer.param_groups[0]["lr"] = 1.0
    opened.restore(arena)
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.param_groups[0]["foo"] = len
    with pytest.raises(engine.ExtraError, match=r"""the optimizer's param_groups\[0\]\["foo"\]"""):
        opened.checkpoint(arena)


def test_the_default_device_does_not_matter(opened: engine.Engine) -> None:
    model, optimizer = make_momentum()
    arena = engine.Arena.adopt(model, optimizer)
    descend(model, optimizer, 1)
    want = clones(arena.state_dict())
    fresh = engine.Arena.adopt(*make_momentum())
    torch.set_default_device("meta")
    try:
        engine.Arena.adopt(model, optimizer)
        opened.checkpoint(arena, extra={"rng": torch.arange(3, device="cpu")}).result()
        loaded = opened.load()
        info = opened.restore(fresh)
    finally:
        torch.set_default_device(None)
    assert info.extra["rng"].tolist() == [0, 1, 2]
    assert all(same(loaded[name], tensor) for name, tensor in want.items())
    assert all(same(fresh.state_dict()[name], tensor) for name, tensor in want.items())


def test_a_selection_that_matches_nothing_is_an_error(opened: engine.Engine) -> None:
    arena = engine.Arena.wrap({"a": torch.ones(3)})
    opened.checkpoint(arena).result()
    with pytest.raises(engine.MismatchError, match="matches no tensor"):
        opened.restore(arena, select="b")
    with pytest.raises(engine.ArgumentError, match="matches no tensor"):
        opened.load(select="b")
    with pytest.raises(engine.ArgumentError, match="select is"):
        opened.load(select=[])


def test_mismatches_are_listed_together_and_change_nothing(opened: engine.Engine) -> None:
    opened.checkpoint(engine.Arena.wrap({"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)})).result()
    here = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.float64), "d": torch.zeros(3)}
    arena = engine.Arena.wrap(here)
    with pytest.raises(engine.MismatchError) as caught:
        opened.restore(arena)
    message = str(caught.value)
    assert "a: float32[3] in the checkpoint, float32[4] in the arena" in message
    assert "b: float32[3] in the checkpoint, float64[3] in the arena" in message
    assert "c: not in the arena" in message and "d: not in the checkpoint" in message
    assert all(not tensor.any() for tensor in here.values()) and not arena.torn


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("saved_with", [True, False])
def test_an_optimizer_on_one_side_is_refused_with_the_call_that_works(
    opened: engine.Engine, saved_with: bool, momentum: float
) -> None:
    def make(with_optimizer: bool) -> tuple[nn.Module, engine.Arena]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        return model, engine.Arena.adopt(model, optimizer if with_optimizer else None)

    saved, saved_arena = make(saved_with)
    opened.checkpoint(saved_arena).result()
    model, arena = make(not saved_with)
    with pytest.raises(engine.MismatchError, match=r"has an optimizer and .* has none") as caught:
        opened.restore(arena)
    assert ("Arena.adopt(model, optimizer)" in str(caught.value)) == saved_with and not arena.torn
    remedy = str(caught.value).rpartition(": ")[2]
    eval(f"eng.{remedy}", {"eng": opened, "arena": arena, "engine": engine})
    assert same(model.get_parameter("weight"), saved.get_parameter("weight")) and not arena.torn


# -- damage -----------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def save_steps(eng: engine.Engine, count: int) -> tuple[engine.Arena, dict[str, Tensor], list[dict[str, Tensor]]]:
    tensors = layered_tensors(4)
    arena = engine.Arena.wrap(tensors)
    history = []
    for step in range(count):
        for tensor in tensors.values():
            tensor.normal_()
        history.append(clones(tensors))
        eng.checkpoint(arena, step=step).result()
    return arena, tensors, history


@pytest.mark.parametrize("where", ["data", "header", "manifest", "truncated", "longer", "missing", "no manifest"])
def test_restore_passes_over_what_is_damaged(opened: engine.Engine, tmp_path: Path, where: str) -> None:
    arena, tensors, history = save_steps(opened, 2)
    file = tmp_path / "step-00000001" / "model.safetensors"
    manifest = tmp_path / "step-00000001" / "manifest.json"
    if where in ("data", "header"):
        flip(file, 500_000 if where == "data" else 3000)
    elif where == "manifest":
        flip(manifest, 200)
    elif where in ("truncated", "longer"):
        os.truncate(file, file.stat().st_size + (4096 if where == "longer" else -1))
    else:
        (file if where == "missing" else manifest).unlink()
    with pytest.raises((engine.CorruptError, engine.StorageError)):
        opened.restore(arena, step=1)
    wipe(tensors)
    with pytest.warns(engine.EngineWarning, match="step 1 is passed over"):
        info = opened.restore(arena)
    assert info.step == 0 and [bad.step for bad in info.passed_over] == [1]
    assert all(same(tensors[name], history[0][name]) for name in tensors)


def test_a_damaged_block_is_named(opened: engine.Engine, tmp_path: Path) -> None:
    arena, _, _ = save_steps(opened, 1)
    flip(tmp_path / "step-00000000" / "model.safetensors", 500_000)
    with pytest.raises(engine.CorruptError) as caught:
        opened.restore(arena, step=0)
    message = str(caught.value)
    assert "model.safetensors" in message and "byte 458752 (chunk 0" in message and "layers.2.weight" in message


def test_a_half_restored_arena_is_not_saved(opened: engine.Engine, tmp_path: Path) -> None:
    arena, _, _ = save_steps(opened, 1)
    flip(tmp_path / "step-00000000" / "model.safetensors", 500_000)
    with pytest.warns(engine.EngineWarning), pytest.raises(engine.CorruptError, match="none of the checkpoints"):
        opened.restore(arena)
    assert arena.torn
    with pytest.raises(engine.ArenaError, match="half-way"):
        opened.checkpoint(arena, step=1)
    flip(tmp_path / "step-00000000" / "model.safetensors", 500_000)
    opened.restore(arena)
    opened.checkpoint(arena, step=1).result()


def test_a_restore_finds_the_newest_while_saves_retire_listed_steps(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
        eng.checkpoint(arena, step=0).result()
        listed = eng.steps()
        eng.checkpoint(arena, step=1).result()
        with mock.patch.object(eng._store.catalog, "steps", side_effect=[listed, eng.steps()]):
            assert eng.restore(arena).step == 1
        with mock.patch.object(eng._store.catalog, "steps", side_effect=[listed, eng.steps()]) as steps:
            assert eng.verify() == () and steps.call_count == 2


def test_missing_descriptors_do_not_pass_over_the_newest(tmp_path: Path) -> None:
    class OutOfDescriptors(HookedFilesystem):
        is_out = False

        def before(self, operation: str, path: str, target: str = "") -> None:
            if self.is_out and operation == "open_to_read":
                raise engine.StorageError(24, "open", path)

    filesystem = OutOfDescriptors()
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, filesystem=filesystem, **SMALL) as eng:
        for step in range(2):
            eng.checkpoint(arena, step=step).result()
        filesystem.is_out = True
        with pytest.raises(engine.StorageError, match="Too many open files"):
            eng.restore(arena)
        filesystem.is_out = False
        assert eng.restore(arena).step == 1


def test_training_past_a_damaged_step_sets_it_aside(opened: engine.Engine, tmp_path: Path) -> None:
    arena, _, _ = save_steps(opened, 2)
    flip(tmp_path / "step-00000001" / "model.safetensors", 500_000)
    with pytest.warns(engine.EngineWarning, match="passed over"):
        opened.restore(arena)
    with pytest.warns(engine.EngineWarning, match="renamed to"):
        opened.checkpoint(arena, step=1).result()
    assert names(tmp_path) == ["step-00000000", "step-00000001", "step-00000001.damaged"]
    assert opened.restore(arena).step == 1


# -- steps and retention ----------------------------------------------------------------------------------------


def test_keep_retires_the_oldest_and_recycles_their_files(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    arena = engine.Arena.wrap(tensors)
    inodes = []
    with engine.Engine(tmp_path, keep=2, **SMALL) as eng:
        for step in range(6):
            tensors["a"].fill_(step)
            info = eng.checkpoint(arena, step=step).result()
            inodes.append((Path(info.path) / "model.safetensors").stat().st_ino)
            newest = eng.steps()[-1]
            assert newest == step and stored(tmp_path, step)["a"].eq(step).all()
            if step:
                assert stored(tmp_path, step - 1)["a"].eq(step - 1).all(), "the one before was overwritten"
        assert eng.steps() == [4, 5] and names(tmp_path) == ["step-00000004", "step-00000005"]
    assert inodes[3] == inodes[0] and inodes[4] == inodes[1], "retired files were not reused"


@pytest.mark.parametrize("reader", ["mapped", "open", "linked"])
def test_files_that_a_reader_has_open_are_not_recycled(tmp_path: Path, reader: str) -> None:
    tensors = {"a": torch.zeros(100_000)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path / "runs", keep=1, **SMALL) as eng:
        path = Path(eng.checkpoint(arena, step=0).result().path) / "model.safetensors"
        if reader == "mapped":
            seen = load_file(path)["a"]  # maps the file
        elif reader == "open":
            file = path.open("rb")
        else:
            os.link(path, tmp_path / "copy.safetensors")
        for step in range(1, 5):
            tensors["a"].fill_(step)
            eng.checkpoint(arena, step=step).result()
        if reader == "open":
            (tmp_path / "copy.safetensors").write_bytes(file.read())
            file.close()
        if reader != "mapped":
            seen = load_file(tmp_path / "copy.safetensors")["a"]
        assert seen.eq(0).all(), "a later save overwrote a file that a reader had mapped"


def test_foreign_files_in_spare_are_left_alone(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    with engine.Engine(tmp_path / "runs", keep=1, **SMALL) as eng:
        spare = tmp_path / "runs" / ".engine" / "spare"
        (spare / "00000000").symlink_to(victim)
        (spare / ".DS_Store").write_text("")
        (spare / "00000001").write_text("a file")
        for step in range(5):
            eng.checkpoint(arena, step=step).result()
    assert (victim / "thesis.txt").read_text() == "years of work" and (spare / ".DS_Store").exists()


def test_a_step_deleted_by_hand_does_not_stop_retirement(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    with engine.Engine(tmp_path, keep=2, **SMALL) as eng:
        for step in range(2):
            eng.checkpoint(arena, step=step).result()
        shutil.rmtree(tmp_path / "step-00000000")
        for step in range(2, 6):
            eng.checkpoint(arena, step=step).result()
        assert eng.steps() == [4, 5] and names(tmp_path) == ["step-00000004", "step-00000005"]


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in range(5):
            eng.checkpoint(arena, step=step).result()
        assert eng.steps() == [0, 1, 2, 3, 4]


def test_steps_go_forward_and_rollback_goes_back(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in (10, 20, 30):
            eng.checkpoint(arena, step=step).result()
        for step in (30, 25, 10):
            with pytest.raises(engine.StepError, match="rollback"):
                eng.checkpoint(arena, step=step)
        with pytest.raises(engine.NotFoundError, match="committed steps: 10, 20, 30"):
            eng.rollback(15)
        assert eng.rollback(10) == [30, 20]
        eng.checkpoint(arena, step=11).result()
        assert eng.steps() == [10, 11]
        assert eng.checkpoint(arena).result().step == 12, "without a step it is the next"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": 1.5}, "step is 1.5"),
        ({"chunk_count": 0}, "chunk_count is 0"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"chunk_bytes": "64M"}, "chunk_bytes is '64M'; it must be an integer"),
        ({"chunk_count": 2.5}, "chunk_count is 2.5; it must be an integer"),
        ({"chunk_count": True}, "chunk_count is True; it must be an integer"),
        ({"chunk_count": 1, "chunk_bytes": 1}, "twice"),
        ({"snapshot": "later"}, "snapshot is 'later'"),
        ({"on_busy": "panic"}, "on_busy is 'panic'"),
        ({"extra": {"a": [object()]}}, r'extra\["a"\]\[0\]'),
    ],
)
def test_bad_arguments_of_checkpoint(opened: engine.Engine, call: dict[str, Any], message: str) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with pytest.raises(engine.UsageError, match=message):
        opened.checkpoint(arena, **call)
    opened.checkpoint(arena, step=0).result()  # and its permit is free


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"keep": 0}, "keep is 0"),
        ({"max_async": 0}, "max_async is 0"),
        ({"max_async": 33}, "max_async is 33"),
        ({"block_bytes": 5000}, "multiple of 4096"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"staging_bytes": 4096}, "staging_bytes is 4096"),
        ({"staging_threads": 0}, "staging_threads is 0"),
        ({"staging_threads": 17}, "staging_threads is 17; it must be at least 1 and at most 16"),
        ({"backend": "magic"}, "backend is 'magic'"),
        ({"keep": "2"}, "keep is '2'"),
    ],
)
def test_bad_arguments_of_engine(tmp_path: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(engine.ArgumentError, match=message):
        engine.Engine(tmp_path / "new", **call)
    assert not (tmp_path / "new").exists(), "a refused Engine touched the disk"


def test_engines_and_runs_have_the_staging_threads_of_their_options(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.arange(100_000)})
    before = len(native_threads())
    sizes: dict[str, Any] = {"staging_bytes": 64 << 10, "block_bytes": 16 << 10}
    with engine.Engine(tmp_path, staging_threads=3, **sizes) as eng:
        until(lambda: len(native_threads()) == before + 3)
        eng.checkpoint(arena, step=1).result()
        engine.probe(tmp_path, staging_threads=2, **sizes)
        with engine.open(tmp_path, staging_threads=2, **sizes) as run:
            assert torch.equal(run.load(1)["a"], torch.arange(100_000))
            until(lambda: len(native_threads()) == before + 3 + 2)
    until(lambda: len(native_threads()) == before)


def test_nothing_to_restore(opened: engine.Engine) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with pytest.raises(engine.NotFoundError, match="no committed checkpoint"):
        opened.restore(arena)
    with pytest.raises(engine.NotFoundError, match="no step 5"):
        opened.restore(arena, step=5)


# -- failure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", FAILURES)
def test_a_failed_save_leaves_nothing_and_the_engine_goes_on(
    tmp_path: Path, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem = FailingFilesystem()
    tensors = {"a": torch.zeros(100_000)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path, filesystem=filesystem, **SMALL) as eng:
        eng.checkpoint(arena, step=0).result()
        filesystem.fail_next(operation, 5)
        tensors["a"].fill_(1)
        save = eng.checkpoint(arena, step=1)
        with pytest.raises(engine.StorageError) as caught:
            save.result()
        assert caught.value.errno == 5 and caught.value.operation == operation and filesystem.operation is None
        assert {chunk.status for chunk in save.chunks()} == {"failed"}
        assert [record.levelname for record in caplog.records] == ["ERROR"], "a failed save is logged once"
        assert names(tmp_path) == ["step-00000000"] and eng.steps() == [0]
        assert stored(tmp_path, 0)["a"].eq(0).all()
        eng.checkpoint(arena, step=1).result()
        assert stored(tmp_path, 1)["a"].eq(1).all()


# -- a Save is a Future -----------------------------------------------------------------------------------------


def test_a_save_is_a_future(opened: engine.Engine) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    save = opened.checkpoint(arena, step=1)
    assert isinstance(save, concurrent.futures.Future) and not save.cancel()
    assert concurrent.futures.wait([save], timeout=60).done == {save}

    async def through_asyncio() -> engine.CheckpointInfo:
        return await asyncio.wrap_future(opened.checkpoint(arena, step=2))

    assert asyncio.run(through_asyncio()).step == 2


def test_status_goes_from_pending_to_durable(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    model, optimizer = make_training()
    model.wide = nn.Linear(1000, 1000)
    optimizer.add_param_group({"params": model.wide.parameters()})
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, filesystem=gated, staging_bytes=128 << 10, block_bytes=64 << 10) as eng:
        save = eng.checkpoint(arena, chunk_bytes=64 << 10)
        before = [chunk.status for chunk in save.chunks()]
        assert set(before) <= {"pending", "staged"} and before.count("pending") >= len(before) - 2
        assert not save.wait_staged(timeout=0.01) and not save.done()
        gated.gate.set()
        assert save.wait_staged()
        assert {chunk.status for chunk in save.chunks()} <= {"staged", "written", "durable"}
        save.result()
    chunks = save.chunks()
    assert {chunk.status for chunk in chunks} == {"durable"}
    assert any("wide" in chunk.layers for chunk in chunks) and {c.file for c in chunks} == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    stats = save.stats()
    assert stats["held_ns"] > 0 and stats["copying_ns"] > 0
    assert 0 < stats["staged_ns"] <= stats["written_ns"] <= stats["durable_ns"]
    assert stats["io_bytes"] >= sum(chunk.nbytes for chunk in chunks)


def test_steps_become_visible_in_order(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    gated.gates["step-00000002"] = held = GatedFilesystem().gate
    gated.gate.set()
    tensors = {"a": torch.zeros(1000)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path, filesystem=gated, keep=2, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        first = eng.checkpoint(arena, step=2)
        tensors["a"].fill_(3)
        second = eng.checkpoint(arena, step=3)
        while not all(chunk.status == "written" for chunk in second.chunks()):
            time.sleep(0.001)
        assert not second.done() and not first.done() and eng.steps() == [1]
        held.set()
        assert second.result().step == 3
        assert first.done() and first.result().step == 2
        assert eng.steps() == [2, 3]
        tensors["a"].fill_(9)
        assert eng.restore(arena).step == 3 and tensors["a"].eq(3).all()


def test_a_later_step_commits_after_an_earlier_one_fails(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    gated.gates["step-00000002"] = held = GatedFilesystem().gate
    gated.gate.set()
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    with engine.Engine(tmp_path, filesystem=gated, **SMALL) as eng:
        first = eng.checkpoint(arena, step=2)
        second = eng.checkpoint(arena, step=3)
        assert first._write is not None
        first._write.pipeline.abort(first._write.job, 5)
        held.set()
        assert second.result().step == 3
        assert isinstance(first.exception(0), engine.StorageError)


def test_rollback_after_the_newest_result_finds_nothing_in_flight(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    for attempt in range(60):
        with engine.Engine(tmp_path / str(attempt), **SMALL) as eng:
            eng.checkpoint(arena, step=1)
            eng.checkpoint(arena, step=2).result()
            assert eng.rollback(1) == [2] and eng.steps() == [1]


def test_a_step_before_one_in_flight_is_refused(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    with engine.Engine(tmp_path, filesystem=gated, **SMALL) as eng:
        save = eng.checkpoint(arena, step=3)
        with pytest.raises(engine.StepError, match="in flight; save steps in order"):
            eng.checkpoint(arena, step=2)
        gated.gate.set()
        save.result()


@pytest.mark.parametrize("max_async", [1, 2])
def test_at_most_max_async_saves_are_in_flight(tmp_path: Path, max_async: int) -> None:
    gated = GatedFilesystem()
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, filesystem=gated, max_async=max_async, **SMALL) as eng:
        saves = [eng.checkpoint(arena) for _ in range(max_async)]
        with pytest.raises(engine.BusyError, match="in flight"):
            eng.checkpoint(arena, on_busy="raise")
        skipped = eng.checkpoint(arena, on_busy="skip")
        assert isinstance(skipped.exception(), engine.BusyError) and skipped.step == max_async
        assert skipped.wait_staged() and skipped.chunks() == [] and skipped.stats() == {}
        assert eng.checkpoint(arena, step=77, on_busy="skip").step == 77
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(eng.checkpoint, arena)
            assert not concurrent.futures.wait([waiting], timeout=0.1).done, "did not wait for a place"
            gated.gate.set()
            assert waiting.result().result().step == max_async
        assert [save.result().step for save in saves] == list(range(max_async))


def test_a_step_in_flight_is_refused(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, filesystem=gated, **SMALL) as eng:
        save = eng.checkpoint(arena, step=4)
        with pytest.raises(engine.StepError, match=r"step 4 is being saved already: wait for .*wait\(\)"):
            eng.checkpoint(arena, step=4)
        with pytest.raises(engine.StepError, match="in flight"):
            eng.rollback(4)
        assert eng.checkpoint(arena).step == 5, "the next step is after those in flight"
        gated.gate.set()
        save.result()


def test_no_save_begins_during_a_rollback(tmp_path: Path) -> None:
    """Its step would be checked against steps that are about to go."""
    gate, retiring = threading.Event(), threading.Event()

    class SlowRetirement(HookedFilesystem):
        def before(self, operation: str, path: str, target: str = "") -> None:
            if operation == "rename" and Path(target).parent.name == "spare":
                retiring.set()
                assert gate.wait(60)

    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, filesystem=SlowRetirement(), keep=None, **SMALL) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            rolling = pool.submit(eng.rollback, 1)
            assert retiring.wait(60)
            saving = pool.submit(eng.checkpoint, arena, 2)
            begun = concurrent.futures.wait([saving], timeout=0.1).done
            gate.set()
            assert rolling.result() == [2] and not begun
            assert saving.result().result().step == 2
        assert eng.steps() == [1, 2]


def test_random_histories_of_concurrent_saves(tmp_path: Path) -> None:
    """Many saves in flight from one arena: each holds the value of its step."""
    rng = random.Random(0)
    tensors = {"a": torch.zeros(200_000), "b": torch.zeros(3)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path, max_async=4, keep=None, **SMALL) as eng:
        saves = []
        for step in range(25):
            tensors["a"].fill_(step)
            tensors["b"].fill_(-step)
            saves.append(eng.checkpoint(arena, step=step, chunk_count=rng.randint(1, 5)))
        for save in saves:
            save.result()
        for step in range(25):
            tensors_there = stored(tmp_path, step)
            assert tensors_there["a"].eq(step).all() and tensors_there["b"].eq(-step).all()
