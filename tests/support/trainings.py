"""Small models and optimizers of every kind, trained for a few steps, and their contents as bytes.

The tests of the arena use them.  They train on one thread (`one_thread` of conftest), so that sums are reproducible.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import engine.state.arena
from engine.state.arena import Arena

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


class OwnStep(torch.optim.Adam):
    """An optimizer whose first step expects no state."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            if not self.state[param]:
                self.state[param]["velocity"] = torch.zeros_like(param)
            with torch.no_grad():
                param -= self.state[param]["velocity"].add_(param.grad)


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
    """A segment's bytes as the engine reads them: from the address of its source and location."""
    index = [segment.name for segment in arena.segments].index(name)
    segment = arena.segments[index]
    source_index, offset = arena.locations[index]
    source = arena.sources[source_index]
    if source.shape == ():
        return ctypes.string_at(source.address + offset, segment.nbytes)
    assert offset == 0
    offsets = [0]
    for extent, stride in zip(source.shape, source.stride, strict=True):
        offsets = [offset + step * stride for offset in offsets for step in range(extent)]
    return b"".join(ctypes.string_at(source.address + offset * source.itemsize, source.itemsize) for offset in offsets)


def assert_holds(arena: Arena) -> None:
    """The bytes of every live tensor equal those that the engine would store under its name."""
    live = arena.state_dict()
    for segment in arena.segments:
        assert read(arena, segment.name) == bits(live[segment.name]), segment.name


def assert_inside(arena: Arena, tensor: Tensor) -> None:
    base = arena.sources[0].address
    assert base <= tensor.data_ptr() < base + arena.layout.arena_bytes


def copied(value: Any) -> Any:
    """As if read from disk: equal, with no object shared."""
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
    arena.restored(copied(saved[1]), {})
    assert not arena.torn


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    original = getattr(engine.state.arena, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(engine.state.arena, name, counted)
    return calls
