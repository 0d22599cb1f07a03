"""The slowdown of a training by checkpoints, by their interval: the plot of CheckFreq and PCcheck.

Theory of operation.  A small transformer is trained on the CPU, with every core.  A segment is a few steps without a
checkpoint, then several periods of as many steps as the interval, with a checkpoint after the first step of each, then
a few steps without again.  The cost of a checkpoint is the extra time of its steps over an undisturbed one, until it
is durable and one step more.  All other steps are undisturbed.  Their median is taken within the segment, so a host
that is slower for a minute is slower for both.  The effect of an adopted arena on a step is no cost of a checkpoint,
and has a row of its own.  The time until the last checkpoint is durable is added, because the next one would wait for
it.  It is not added to computed intervals, in which training would continue meanwhile.

The speed of a host varies by a tenth within seconds, so counting undisturbed steps as a checkpoint's would only add
noise: ten of them without any checkpoint were -1.2 to 2.7 steps longer than ten others.

Checkpoints every 25 or 100 steps are not measured beside peers.  They cost as much as one every ten steps, spread over
more steps, so `goals.slowdowns` computes them, and the time is spent on more samples of the measured intervals.  The
section `guards` measures every 25.

Segments of one interval follow one another, one of each subject in each round, in shuffled order.  Segments without any
checkpoint are counted in the same way.  Their cost is zero, so their samples show the noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

import engine
from engine.bench.goals import ADOPTED, NONE
from engine.bench.measure import Rounds, settle
from engine.bench.record import Sample
from engine.bench.savers import SAVERS, Pending, Saver
from engine.bench.states import State

INTERVALS = (1, 5, 10)
CHECKPOINTS = {
    1: 3,
    5: 1,
    10: 1,
    25: 1,
}  # in a segment: short ones, since a host is slower in one minute than in the next
STEPS_ASIDE = 6  # without a checkpoint, on either side of a segment

# 5.5 million parameters, 66 MB with AdamW's two moments: on two cores a step takes about a tenth of a second, so that
# one checkpoint a step is more than most can take, and one in a hundred is next to nothing.
VOCABULARY, WIDTH, LAYERS, HEADS = 256, 384, 3, 6
BATCH, CONTEXT = 2, 64


class Training:
    """A model, its optimizer, and its state for the savers."""

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
    """Samples of the segments of all subjects, at every interval: one round, and more until `seconds` are over."""
    out = {subject.name for subject in rounds.record.subjects if subject.kind == "save" and subject.unavailable}
    kinds = [kind for kind in SAVERS if kind.name in names and rounds.wanted(kind.name) and kind.name not in out]
    trainings = {adopts: Training(adopted=adopts) for adopts in {kind.adopts for kind in kinds} | {False}}
    savers = _open(rounds, kinds, trainings)
    end = time.monotonic() + seconds
    for number in range(round_count):
        turned = number % len(intervals)  # otherwise the interval without time left would always be the same
        for interval in (*intervals[turned:], *intervals[:turned]):
            if not number or time.monotonic() < end:
                _one_interval(rounds, trainings, savers, interval, number)
    for saver in savers.values():
        saver.close()


def _one_interval(
    rounds: Rounds, trainings: Mapping[bool, Training], savers: dict[str, Saver], interval: int, number: int
) -> None:
    """One segment of every subject at one interval; a subject that raises is out."""
    nobody = {NONE: trainings[False]} | ({ADOPTED: trainings[True]} if True in trainings else {})
    for name in rounds.shuffled([*nobody, *savers]):
        saver = savers.get(name)
        training = nobody[name] if saver is None else trainings[saver.adopts]
        settle(rounds.directory)
        try:
            checkpoints = segment(training, saver, interval, CHECKPOINTS[interval])
        except Exception as error:  # a peer may raise anything
            rounds.refuse(name, "save", error)
            del savers[name]
            continue
        shape = (training.state.nbytes, training.state.tensor_count)
        rounds.record.samples += [
            Sample("slowdown", name, *shape, f"every {interval}", number, values) for values in checkpoints
        ]


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
        segment(training, saver, 1, 3)  # both that are kept, and one more, so that the next recycles
    except Exception as error:  # a peer may raise anything
        rounds.refuse(kind.name, "save", error)
        return {}
    return {kind.name: saver}


def segment(training: Training, saver: Saver | None, interval: int, count: int) -> list[Mapping[str, float]]:
    """Several checkpoints: the median undisturbed step, the extra cost of each, and how long its call held the loop."""
    training.step()  # the first after a pause takes longer: this one does not count
    undisturbed = [_timed(training.step) for _ in range(STEPS_ASIDE)]
    disturbed: list[list[float]] = []
    held: list[Mapping[str, float]] = []
    pending = Pending()

    def first_step() -> None:
        nonlocal pending
        training.step(saver)
        held.append({})
        if saver is not None:
            pending.wait_durable()
            step = saver.steps[-1] + 1 if saver.steps else 1
            saver.path(step)
            began = time.perf_counter()
            pending = saver.save(step)
            held[-1] = {"held_s": time.perf_counter() - began}

    for _ in range(count):
        disturbed.append([_timed(first_step)])
        after = 0  # steps begun since it was durable
        for _ in range(1, interval):
            into = undisturbed if after else disturbed[-1]
            after += pending.durable.done()
            into.append(_timed(lambda: training.step(saver)))
    rest_s = [0.0] * (count - 1) + [_timed(pending.wait_durable)]
    training.step()
    undisturbed += [_timed(training.step) for _ in range(STEPS_ASIDE)]
    if saver is not None:
        saver.tidy()
    step_s = median(undisturbed)
    return [
        {"step_s": step_s, "excess_s": sum(steps) - len(steps) * step_s, "rest_s": rest, **call}
        for steps, rest, call in zip(disturbed, rest_s, held, strict=True)
    ]


def _timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
