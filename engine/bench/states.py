"""The states that are saved: a number of bytes in a number of float32 tensors, adopted or separate.

Theory of operation.  Peers get tensors with memory of their own, as in a model that was not adopted.  The engine gets
an arena that adopted a model and its optimizer, its intended use.  Both hold the same numbers, which no drive can
compress or deduplicate: consecutive pieces of one random pattern, because drawing 8 GB takes longer than saving them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import engine

PATTERN_COUNT = 1 << 24  # 64 MiB of float32: more than any cache that a drive or a host would find it again in


# Elements of float32 in a page.
PAGE_COUNT = 1024


@dataclass(frozen=True, slots=True)
class State:
    """The state of a subject: the arena for the engine, the tensors for the others.  Either may be missing."""

    nbytes: int
    tensors: Mapping[str, Tensor]
    arena: engine.Arena | None

    def change(self) -> None:
        """Add 1 to an element of every page, so that every block changes, as in a step of training.

        Without it the engine would find most blocks in the files that it recycles, and not write them.
        """
        held = [*self.tensors.values(), *(self.arena.state_dict().values() if self.arena is not None else ())]
        with torch.no_grad():
            for tensor in held:
                tensor.view(-1)[::PAGE_COUNT].add_(1)

    @property
    def tensor_count(self) -> int:
        return len(self.arena.segments) if self.arena is not None else len(self.tensors)


def make_tensors(nbytes: int, tensor_count: int) -> dict[str, Tensor]:
    """So many float32 tensors of equal size, the last one with the remainder: ``layers.0.weight`` and so on."""
    pattern = torch.rand(PATTERN_COUNT, generator=torch.Generator().manual_seed(1))
    total = nbytes // pattern.element_size()
    bounds = [total * index // tensor_count for index in range(tensor_count + 1)]
    return {
        f"layers.{index}.weight": _piece(pattern, bounds[index], bounds[index + 1]) for index in range(tensor_count)
    }


def make_arena(tensors: dict[str, Tensor]) -> engine.Arena:
    """The arena of a model with these as parameters, which an optimizer without state trains.

    The tensors are taken out of the dictionary: at 8 GB there is no room for those, too.
    """
    model = nn.Module()
    model.layers = nn.ModuleList(_Layer(tensors.pop(name)) for name in list(tensors))
    return engine.Arena.adopt(model, torch.optim.SGD(model.parameters(), lr=0.1))


def make_state(nbytes: int, tensor_count: int, *, plain: bool = True, adopted: bool = True) -> State:
    """A state for the subjects that want its tensors, its arena, or both."""
    arena = make_arena(make_tensors(nbytes, tensor_count)) if adopted else None
    return State(nbytes, make_tensors(nbytes, tensor_count) if plain else {}, arena)


class _Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _piece(pattern: Tensor, start: int, end: int) -> Tensor:
    """Elements of the endlessly repeated pattern, in new memory."""
    piece = torch.empty(end - start)
    at = 0
    while at < len(piece):
        offset = (start + at) % len(pattern)
        count = min(len(piece) - at, len(pattern) - offset)
        piece[at : at + count] = pattern[offset : offset + count]
        at += count
    return piece
