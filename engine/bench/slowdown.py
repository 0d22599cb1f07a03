"""How much longer training takes with checkpoints, by how often there is one: the plot of CheckFreq and PCcheck.

Theory of operation.  A small transformer is trained on the CPU, with every core.  A segment is so many steps, with a
checkpoint after the first step of each interval; it ends when the last checkpoint is durable, because the next one
would have to wait for that.  Within a round the segments of one interval follow one another, in shuffled order, with
one without checkpoints before and after them.  A segment's slowdown is its time beside the mean of those two.  Peers
train a model of ordinary tensors, and the engine one that an arena has adopted, so what adopting costs is in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import engine
from engine.bench.goals import NONE
from engine.bench.measure import Rounds, settle
from engine.bench.record import Sample
from engine.bench.savers import SAVERS, Pending, Saver
from engine.bench.states import State

INTERVALS = (1, 5, 10, 25, 100)
CHECKPOINTS = {1: 5, 5: 3, 10: 3, 25: 1, 100: 1}  # in a segment: what three rounds in five minutes have time for

# 9 million parameters, 109 MB with AdamW's two moments: on two cores a step takes about a tenth of a second, so that
# one checkpoint a step is more than any drive here takes, and one in a hundred is nothing.
VOCABULARY, WIDTH, LAYERS, HEADS = 256, 384, 5, 6
BATCH, CONTEXT = 2, 64


class Training:
    """A model, its optimizer, and its state for those who save it."""

    def __init__(self, *, adopted: bool) -> None:
        torch.manual_seed(1)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True),
            LAYERS,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.model = nn.ModuleList([self.tokens, self.layers, self.head])
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.batch = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
        self.step()  # the optimizer's state is there
        arena = engine.Arena.adopt(self.model, self.optimizer) if adopted else None
        tensors = {} if adopted else self._tensors()
        self.state = State(sum(tensor.nbytes for tensor in self._tensors().values()), tensors, arena)

    def step(self, saver: Saver | None = None) -> None:
        """One step."""
        self.optimizer.zero_grad()
        logits = self.head(self.layers(self.tokens(self.batch[:, :-1])))
        loss = functional.cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        if saver is None:
            self.optimizer.step()
            return
        with saver.guard():
            self.optimizer.step()

    def _tensors(self) -> dict[str, Tensor]:
        moments = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {**{name: tensor.detach() for name, tensor in self.model.state_dict().items()}, **moments}


def measure(
    rounds: Rounds, names: tuple[str, ...], intervals: tuple[int, ...], round_count: int, *, seconds: float
) -> None:
    """Samples of everybody's segments, at every interval: one round, and more until `seconds` are over."""
    out = {subject.name for subject in rounds.record.subjects if subject.kind == "save" and subject.unavailable}
    kinds = [kind for kind in SAVERS if kind.name in names and rounds.wanted(kind.name) and kind.name not in out]
    trainings = {adopts: Training(adopted=adopts) for adopts in {kind.adopts for kind in kinds} | {False}}
    savers = _open(rounds, kinds, trainings)
    end = time.monotonic() + seconds
    for number in range(round_count):
        for interval in intervals:
            # The longest takes as long as all others together, and its noise is the smallest: once is enough.
            if not number or (interval != INTERVALS[-1] and time.monotonic() < end):
                _one_interval(rounds, trainings, savers, interval, number)
    for saver in savers.values():
        saver.close()


def _one_interval(
    rounds: Rounds, trainings: Mapping[bool, Training], savers: dict[str, Saver], interval: int, number: int
) -> None:
    """Everybody's segment at one interval, between two without checkpoints; whoever raises is out."""
    for name in (NONE, *rounds.shuffled(savers), NONE):
        saver = savers.get(name)
        training = trainings[saver is not None and saver.adopts]
        settle(rounds.directory)
        try:
            taken_s = _segment(training, saver, interval)
        except Exception as error:  # whatever a peer raises
            rounds.refuse(name, "save", error)
            del savers[name]
            continue
        shape = (training.state.nbytes, training.state.tensor_count)
        values = {"seconds_s": taken_s, "step_count": float(interval * CHECKPOINTS[interval])}
        rounds.record.samples.append(Sample("slowdown", name, *shape, f"every {interval}", number, values))


def _open(rounds: Rounds, kinds: list[type[Saver]], trainings: Mapping[bool, Training]) -> dict[str, Saver]:
    opened: dict[str, Saver] = {}
    for kind in kinds:
        directory = rounds.directory / "training" / str(len(opened))
        opened |= _open_one(rounds, kind, directory, trainings[kind.adopts])
    for training in trainings.values():
        training.step()
    return opened


def _open_one(rounds: Rounds, kind: type[Saver], directory: Path, training: Training) -> dict[str, Saver]:
    rounds.introduce(kind.name, "save", kind.how)
    try:
        saver = kind(directory, training.state)
        for _ in range(3):  # both that are kept, and one more, so that the next recycles
            _segment(training, saver, 1, checkpoints=1)
    except Exception as error:  # whatever a peer raises
        rounds.refuse(kind.name, "save", error)
        return {}
    return {kind.name: saver}


def _segment(training: Training, saver: Saver | None, interval: int, checkpoints: int | None = None) -> float:
    """Seconds for one segment."""
    pending = Pending()
    began = time.perf_counter()
    for _ in range(checkpoints or CHECKPOINTS[interval]):
        training.step(saver)
        if saver is not None:
            pending.wait_durable()
            step = saver.steps[-1] + 1 if saver.steps else 1
            saver.path(step)
            pending = saver.save(step)
        for _ in range(interval - 1):
            training.step(saver)
    pending.wait_durable()
    taken = time.perf_counter() - began
    if saver is not None:
        saver.tidy()
    return taken
