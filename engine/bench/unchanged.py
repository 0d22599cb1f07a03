"""Saves of trainings that change little: what the bytes that did not change cost.

Theory of operation.  Each training is adopted three times, and each arena is saved by an Engine of its own: with its
defaults, with untrained tensors in files of their own, and rewriting everything.  They take turns in each round, so
that whatever the host does falls on all alike.  A turn changes what a step of that training would change.  The bytes
that a save had to write are those of the blocks whose hash in its manifest differs from the one in the step before.

    all frozen           nothing is trained
    adapters             a frozen base and 1 MB of adapters with AdamW's state, as LoRA
    embedding            a table of which the first 1 % of the rows change: those of the most frequent tokens
    experts              eight experts, of which one is trained
    everything changed   an element in every page

Called by `__main__`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import engine
from engine.bench.goals import ADAPTERS, ALL_FROZEN, CHANGED, EMBEDDING, EXPERTS, OURS
from engine.bench.measure import Rounds, Turn, timed_save
from engine.bench.savers import Ours
from engine.bench.states import PAGE_COUNT, State, make_tensors

# The base and its layers, as the measurement of the issue that set the goals had them.
BASE_SHARE, BASE_COUNT = 0.89, 24
ADAPTER_BYTES = 10**6
ROW_COUNT = 1024  # elements of a row: 4 KiB
EXPERT_COUNT = 8
# Saves after which every later one recycles files that hold what it does not change: two are kept, and one is spare.
WARM_UP = 4


class OursDefault(Ours):
    name = "engine unchanged"


class OursSplit(Ours):
    name = "engine split_untrained"
    options: ClassVar[Mapping[str, Any]] = {"split_untrained": True}


class OursRewriting(Ours):
    name = "engine rewrite_all"
    options: ClassVar[Mapping[str, Any]] = {"rewrite_all": True}


WAYS: Mapping[str, type[Ours]] = {"elided": OursDefault, "split": OursSplit, "rewritten": OursRewriting}


@dataclass(frozen=True, slots=True)
class _ChangingState(State):
    """A state of which a training changes a part."""

    step: Callable[[], object]

    def change(self) -> None:
        """Change what a step changes."""
        with torch.no_grad():
            self.step()


class _Layers(nn.Module):
    """Layers of equal size, of which some are trained."""

    def __init__(self, nbytes: int, count: int, trained: Callable[[int], bool]) -> None:
        super().__init__()
        tensors = make_tensors(nbytes, count)
        self.layers = nn.ParameterList(
            nn.Parameter(tensors.pop(name), requires_grad=trained(index)) for index, name in enumerate(list(tensors))
        )


def _touch(params: list[nn.Parameter]) -> None:
    for param in params:
        param.view(-1)[::PAGE_COUNT].add_(1)


def _adopt(model: nn.Module) -> engine.Arena:
    """The arena of a model and an optimizer without state."""
    return engine.Arena.adopt(model, torch.optim.SGD(model.parameters()))


def _all_frozen(nbytes: int) -> _ChangingState:
    model = _Layers(nbytes, BASE_COUNT, lambda index: False)
    return _ChangingState(nbytes, {}, _adopt(model), lambda: None)


def _adapters(nbytes: int) -> _ChangingState:
    model = _Layers(nbytes, BASE_COUNT, lambda index: False)
    adapters = [nn.Parameter(tensor) for tensor in make_tensors(ADAPTER_BYTES // 3, BASE_COUNT).values()]
    model.adapters = nn.ParameterList(adapters)
    arena = engine.Arena.adopt(model, torch.optim.AdamW(adapters))
    state = [tensor for name, tensor in arena.state_dict().items() if name.startswith("optimizer.")]

    def change() -> None:
        for tensor in [*adapters, *state]:
            tensor.add_(1)

    return _ChangingState(nbytes, {}, arena, change)


def _embedding(nbytes: int) -> _ChangingState:
    model = _Layers(nbytes, 1, lambda index: True)
    count = model.layers[0].numel() // ROW_COUNT // 100 * ROW_COUNT
    return _ChangingState(nbytes, {}, _adopt(model), lambda: model.layers[0].view(-1)[:count].add_(1))


def _experts(nbytes: int) -> _ChangingState:
    model = _Layers(nbytes, EXPERT_COUNT, lambda index: index == 0)
    return _ChangingState(nbytes, {}, _adopt(model), lambda: _touch([model.layers[0]]))


def _changed(nbytes: int) -> _ChangingState:
    model = _Layers(nbytes, BASE_COUNT, lambda index: True)
    return _ChangingState(nbytes, {}, _adopt(model), lambda: _touch(list(model.layers)))


TRAININGS: Mapping[str, Callable[[int], _ChangingState]] = {
    ALL_FROZEN: _all_frozen,
    ADAPTERS: _adapters,
    EMBEDDING: _embedding,
    EXPERTS: _experts,
    CHANGED: _changed,
}


def measure(rounds: Rounds, main_bytes: int, count: int, seconds: float, clear: Callable[[], None]) -> None:
    """Rounds of every training, one training after the other."""
    nbytes = int(main_bytes * BASE_SHARE)
    rounds.introduce(OURS, "save", Ours.how)
    for training, make in TRAININGS.items():
        with ExitStack() as stack:
            turns: dict[tuple[str, str], Turn] = {}
            shape = (nbytes, 0)
            for way, kind in WAYS.items():
                state = make(nbytes)
                shape = (nbytes, state.tensor_count)
                saver = kind(rounds.directory / f"{training} {way}", state)
                stack.callback(saver.close)
                for _ in range(WARM_UP):
                    timed_save(saver)
                turns[OURS, f"{training}, {way}"] = _turn(saver)
            rounds.run("unchanged", turns, shape, range(count), seconds=seconds)
        clear()


def _turn(saver: Ours) -> Turn:
    def turn() -> Mapping[str, float]:
        before = _blocks(saver.path(saver.steps[-1]))
        measured = timed_save(saver)
        after = _blocks(saver.path(saver.steps[-1]))
        changed = sum(
            nbytes for place, (nbytes, checksum) in after.items() if before.get(place, (0, ""))[1] != checksum
        )
        return {**measured, "changed_bytes": float(changed)}

    return turn


def _blocks(step: Path) -> dict[tuple[str, int], tuple[int, str]]:
    """The blocks of a checkpoint: by file and offset, their bytes on disk and hash."""
    body = json.loads((step / "manifest.json").read_bytes())["body"]
    found = {}
    for chunk in body["chunks"]:
        for index, checksum in enumerate(chunk["checksums"]):
            start = index * body["block_bytes"]
            nbytes = -(-min(body["block_bytes"], chunk["nbytes"] - start) // 4096) * 4096
            found[body["files"][chunk["file"]]["name"], chunk["offset"] + start] = nbytes, checksum
    return found
