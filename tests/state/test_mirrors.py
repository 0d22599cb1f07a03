"""Mirrored buffers: forward may resize them, and every save has them as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import assert_holds, bits, read

from engine.state.arena import Arena
from engine.state.modules import resizes_buffers

pytestmark = pytest.mark.usefixtures("one_thread")


class Grows(nn.Module):
    """Keeps as many sums as its input has columns, as an observer of channels does."""

    sums: Tensor
    calls: Tensor

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        if self.sums.shape != rows.shape[1:]:
            self.sums.resize_(rows.shape[1:])
            self.sums.zero_()
        self.sums += rows.sum(0)
        self.calls += 1
        return rows


class GrowsToo(Grows):
    """Inherits the code that resizes."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows)


def grower(kind: type[Grows] = Grows) -> Any:
    return nn.Sequential(nn.Linear(3, 4), kind(), nn.BatchNorm1d(4))


@pytest.mark.parametrize("kind", [Grows, GrowsToo])
def test_forward_resizes_a_buffer_that_the_next_save_takes_in(kind: type[Grows]) -> None:
    model, plain = grower(kind), grower(kind)
    plain.load_state_dict(model.state_dict())
    arena = Arena.adopt(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for width in (4, 4):
        rows = torch.randn(5, 3)
        model(rows).sum().backward()
        plain(rows).sum().backward()
        arena.refresh()
        assert {s.name: s.shape for s in arena.segments}["1.sums"] == (width,)
        assert_holds(arena)
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in plain.state_dict().items()}
    model[1].sums.resize_(9).fill_(3)
    arena.refresh()
    assert_holds(arena)


def test_a_mirrored_buffer_is_read_at_the_refresh_only() -> None:
    model = Grows(2)
    arena = Arena.adopt(model)
    layout = arena.layout
    model.sums.fill_(1)
    assert read(arena, "sums") == bits(torch.zeros(2))
    arena.refresh()
    assert read(arena, "sums") == bits(torch.ones(2)) and arena.layout is layout
    model.sums = torch.full((2,), 5.0)
    arena.refresh()
    assert read(arena, "sums") == bits(torch.full((2,), 5.0)) and arena.layout is layout


def test_a_buffer_that_cannot_be_resized_gets_memory_that_can() -> None:
    model = Grows()
    model.sums = torch.frombuffer(bytearray(4), dtype=torch.float32)
    arena = Arena.adopt(model)
    model(torch.ones(2, 6))
    Arena.adopt(model)
    model(torch.ones(2, 7))
    arena.refresh()
    assert read(arena, "sums") == bits(torch.full((7,), 2.0))


def test_a_buffer_that_two_modules_share_stays_tied() -> None:
    first, second = nn.Module(), Grows(2)
    first.register_buffer("sums", second.sums.detach())
    arena = Arena.adopt(nn.ModuleList([first, second]))
    assert arena.aliases == {"1.sums": "0.sums"}
    second(torch.ones(3, 2))
    arena.refresh()
    assert arena.aliases == {"1.sums": "0.sums"}
    assert bits(first.get_buffer("sums")) == read(arena, "0.sums") == bits(torch.full((2,), 3.0))


def test_only_code_that_resizes_is_known_to() -> None:
    assert [resizes_buffers(module) for module in (Grows(), GrowsToo(), nn.BatchNorm1d(2), nn.LazyLinear(2))] == [
        True,
        True,
        False,
        False,
    ]
    assert resizes_buffers(torch.ao.quantization.FakeQuantize())
    assert resizes_buffers(torch.ao.quantization.PerChannelMinMaxObserver())
