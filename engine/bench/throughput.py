"""Throughput of a training against the interval of its checkpoints, with 1 to 4 of them in flight.

Theory of operation.  This is the plot by which PCcheck (ASPLOS'25, its figures 8 and 12) shows concurrent checkpoints:
training throughput over the steps between checkpoints.  The training is that of `slowdown`, on every core.  A turn is
`STEP_COUNT` steps with a checkpoint after the first step of each period, until the last one is durable.  Its throughput
is compared with steps of the same adopted training without checkpoints, in the same round.

PCcheck was measured where one checkpoint takes as long as many steps: 1 to 108 GB to a cloud disk.  A local drive has a
checkpoint of this training durable within a step or two, and then there is never a second one in flight.  So the turns
are taken twice: with the drive as it is, and with its writes limited by the kernel (`device_limit`) to
`LIMIT_BYTES_PER_S`, at which a checkpoint takes about as long as three steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

import engine
from engine.bench.device_limit import limited
from engine.bench.goals import ADOPTED, OURS
from engine.bench.measure import Rounds, settle
from engine.bench.record import Sample
from engine.bench.slowdown import Training

INTERVALS = (1, 2, 5, 10)
STEP_COUNT = 20  # of a turn: the longest interval has two periods
WARM_UP = 8  # checkpoints: two are kept, and with four in flight each finds files to recycle after six
AS_IT_IS = "drive as it is"
# 66 MB in about 160 ms: three steps of a tenth to a twentieth of a second.
LIMIT_BYTES_PER_S = 400_000_000
LIMITED = "writes limited to 0.4 GB/s"


def measure(
    rounds: Rounds, flights: tuple[int, ...], intervals: tuple[int, ...], round_count: int, *, seconds: float
) -> None:
    """Samples of every number in flight at every interval: one round, and more until `seconds` are over."""
    training = Training(adopted=True)
    arena = training.state.arena
    assert arena is not None
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        engines = {
            count: stack.enter_context(engine.Engine(rounds.directory / f"flight-{count}", max_async=count))
            for count in flights
        }
        for eng in engines.values():  # until every save of a turn finds files to recycle
            for _ in range(WARM_UP):
                eng.checkpoint(arena)
            eng.wait()
        turns = [(interval, count) for interval in intervals for count in flights]
        for number in range(round_count):
            for drive in (AS_IT_IS, LIMITED):
                if number and time.monotonic() > end:
                    return
                try:
                    with ExitStack() as limit:
                        if drive == LIMITED:
                            limit.enter_context(limited(rounds.directory, LIMIT_BYTES_PER_S))
                        _round(rounds, training, engines, turns, (drive, number))
                except OSError as error:
                    _note(rounds, f"{LIMITED}: not measured, {error.strerror or error}")


def _round(
    rounds: Rounds,
    training: Training,
    engines: Mapping[int, engine.Engine],
    turns: list[tuple[int, int]],
    where: tuple[str, int],
) -> None:
    drive, number = where
    shape = (training.state.nbytes, training.state.tensor_count)

    def add(subject: str, setting: str, measured: Mapping[str, float]) -> None:
        rounds.record.samples.append(Sample("throughput", subject, *shape, setting, number, measured))

    for turn in rounds.shuffled([None, *turns, None]):
        settle(rounds.directory)
        if turn is None:
            add(ADOPTED, drive, _turn(training, None, 1))
        else:
            interval, count = turn
            add(OURS, f"{drive}, {count} in flight, every {interval}", _turn(training, engines[count], interval))


def _turn(training: Training, eng: engine.Engine | None, interval: int) -> Mapping[str, float]:
    """`STEP_COUNT` steps, and the rest of the last checkpoint."""
    arena = training.state.arena
    assert arena is not None
    training.step()  # the first after a pause takes longer
    saves: list[engine.Save] = []
    held_s, most = 0.0, 0
    began = time.perf_counter()
    for step in range(STEP_COUNT):
        training.step()
        if eng is not None and step % interval == 0:
            called = time.perf_counter()
            saves.append(eng.checkpoint(arena))
            held_s += time.perf_counter() - called
            most = max(most, sum(not save.done() for save in saves))
    for save in saves:
        save.result()
    taken_s = time.perf_counter() - began
    durable_s = max((save.stats()["durable_ns"] / 1e9 for save in saves), default=0.0)
    return {"step_s": taken_s / STEP_COUNT, "held_s": held_s, "durable_s": durable_s, "most_count": float(most)}


def _note(rounds: Rounds, note: str) -> None:
    if note not in rounds.record.notes:
        rounds.record.notes.append(note)
