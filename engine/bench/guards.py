"""Guards: how long each holds the caller, a step beside a save, and a training.

Theory of operation.  Every guard has an arena, a model and an optimizer of its own, and they take turns in each round,
so that whatever the host does falls on all alike.  A guard that the host refuses has a row with the reason.

    call             `checkpoint()`, in everything as the section `main`
    step alone       `optimizer.step()` of AdamW, and no save
    step beside      the same step, begun as `checkpoint()` returns: it writes to all that the save has yet to stage
    every N          a training with a checkpoint every N steps, measured as in `slowdown`

Steps are taken with every core and with one thread, which leaves a core to the save.  A save with default
`staging_bytes` stages no faster than the drive writes, and a step waits for that under every guard.  So steps are also
taken beside a save that stages the whole arena at once.

Called by `__main__`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

import engine
from engine.bench.goals import BESIDE_STEP, CALL, EVERY_CORE, GUARDS, ONE_THREAD, STEP_ALONE, WHOLE
from engine.bench.measure import Rounds, Turn, settle, timed_save
from engine.bench.record import Sample
from engine.bench.savers import STAGING_BYTES, Ours
from engine.bench.slowdown import CHECKPOINTS, Training, segment
from engine.bench.states import State, make_tensors

SECTION, KIND = "guards", "guard"
TENSORS_EACH = 4  # of a parameter of AdamW: itself, two moments, and a count of steps
INTERVALS = (1, 5, 10, 25)
WARM_UP = 4  # two are kept and one is spare: the fourth recycles
NOBODY = "no checkpoints"


class OursGuarded(Ours):
    """The engine under one guard."""

    kind: ClassVar[str]

    def engine_options(self, state: State) -> Mapping[str, Any]:
        return {"guard": self.kind}


class OursGuardedWhole(OursGuarded):
    """The same with slots for the whole arena."""

    def engine_options(self, state: State) -> Mapping[str, Any]:
        # Each file may end in a block that is not full, and its header comes on top.
        return {"guard": self.kind, "staging_bytes": max(STAGING_BYTES, state.nbytes + (64 << 20))}


def _of(kind: type[OursGuarded], guard: str) -> type[OursGuarded]:
    """The saver of one guard."""
    return type(kind.__name__, (kind,), {"name": _name(guard), "kind": guard})


def _name(guard: str) -> str:
    return f"engine {guard}"


class _Stepper:
    """An arena of so many bytes and tensors, all of which a step of AdamW changes."""

    def __init__(self, nbytes: int, tensor_count: int) -> None:
        model = nn.Module()
        values = make_tensors(nbytes // (TENSORS_EACH - 1), max(1, tensor_count // TENSORS_EACH))
        params = [nn.Parameter(tensor) for tensor in values.values()]
        model.params = nn.ParameterList(params)
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer = torch.optim.AdamW(params)
        self.state = State(nbytes, {}, engine.Arena.adopt(model, self.optimizer))
        self.step()

    def step(self) -> None:
        self.optimizer.step()


def measure(
    rounds: Rounds, nbytes: int, tensor_count: int, count: int, *, seconds: float, intervals: tuple[int, ...]
) -> None:
    """Rounds of calls and steps, and then rounds of segments of training; each one round, and more for `seconds`."""
    with ExitStack() as stack:
        turns: dict[tuple[str, str], Turn] = {}
        shape = (nbytes, tensor_count)
        for guard in GUARDS:
            stepper = _Stepper(nbytes, tensor_count)
            savers = _open(rounds, guard, stepper.state, stack)
            if savers:
                shape = (nbytes, stepper.state.tensor_count)
                turns |= {(_name(guard), setting): turn for setting, turn in _turns(stepper, *savers)}
        rounds.run(SECTION, turns, shape, range(count), seconds=seconds)
    _measure_trainings(rounds, count, seconds, intervals)


def _open(rounds: Rounds, guard: str, state: State, stack: ExitStack) -> list[OursGuarded]:
    """The savers of one guard, warmed up; none if the host refuses it."""
    rounds.introduce(_name(guard), KIND, f'guard="{guard}"')
    savers = []
    try:
        for kind in (OursGuarded, OursGuardedWhole):
            saver = _of(kind, guard)(rounds.directory / f"{guard} {kind.__name__}", state)
            stack.callback(saver.close)
            for _ in range(WARM_UP):
                timed_save(saver)
            savers.append(saver)
    except engine.EngineError as error:
        rounds.refuse(_name(guard), KIND, error)
        return []
    return savers


def _turns(stepper: _Stepper, saver: OursGuarded, whole: OursGuarded) -> Iterator[tuple[str, Turn]]:
    """The turns of one guard, by setting."""
    yield CALL, lambda: timed_save(saver)
    yield f"{CALL}, {WHOLE}", lambda: timed_save(whole)
    for threads, count in ((EVERY_CORE, torch.get_num_threads()), (ONE_THREAD, 1)):
        yield f"{STEP_ALONE}, {threads}", _alone(stepper, count)
        yield f"{BESIDE_STEP}, {threads}", _beside(stepper, saver, count)
        yield f"{BESIDE_STEP}, {threads}, {WHOLE}", _beside(stepper, whole, count)


def _alone(stepper: _Stepper, thread_count: int) -> Turn:
    def turn() -> Mapping[str, float]:
        with _threads(thread_count):
            stepper.step()  # the first after a pause takes longer
            return {"step_s": _timed(stepper.step)}

    return turn


def _beside(stepper: _Stepper, saver: OursGuarded, thread_count: int) -> Turn:
    def turn() -> Mapping[str, float]:
        with _threads(thread_count):
            stepper.step()
            step = saver.steps[-1] + 1
            saver.path(step)
            began = time.perf_counter()
            pending = saver.save(step)
            held_s = time.perf_counter() - began
            step_s = _timed(stepper.step)
        pending.wait_durable()
        return {"step_s": step_s, "held_s": held_s}

    return turn


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_trainings(rounds: Rounds, count: int, seconds: float, intervals: tuple[int, ...]) -> None:
    """Segments of training, of every guard and of a training that saves nothing, at each interval."""
    with ExitStack() as stack:
        trainings = {NOBODY: Training(adopted=True)}
        available = {sample.subject for sample in rounds.record.select(SECTION)}
        savers: dict[str, OursGuarded] = {}
        for guard in (guard for guard in GUARDS if _name(guard) in available):
            training = Training(adopted=True)
            saver = _of(OursGuarded, guard)(rounds.directory / f"{guard} training", training.state)
            stack.callback(saver.close)
            segment(training, saver, 1, WARM_UP)
            trainings[_name(guard)] = training
            savers[_name(guard)] = saver
        end = time.monotonic() + seconds
        for number in range(count):
            turned = number % len(intervals)  # otherwise the interval without time left would always be the same
            for interval in (*intervals[turned:], *intervals[:turned]):
                for name in rounds.shuffled(trainings) if not number or time.monotonic() < end else ():
                    settle(rounds.directory)
                    training = trainings[name]
                    shape = (training.state.nbytes, training.state.tensor_count)
                    found = segment(training, savers.get(name), interval, CHECKPOINTS[interval])
                    rounds.record.samples += [
                        Sample(SECTION, name, *shape, f"every {interval}", number, values) for values in found
                    ]


def _timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
