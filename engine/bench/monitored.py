"""Saves through a monitor, beside saves of the same process: what `isolation="process"` costs.

Theory of operation.  Two Engines save one state, in turns, into recycled files.  The CPU time of a save is that of this
process and of its children, so that of the monitor counts.  `optimizer.step()` is not a part of it: what holds a step
back is the guard, in the trainer, the same in both.

Called by `__main__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

from engine.bench.goals import IN_PROCESS, MONITORED, OURS
from engine.bench.measure import Rounds, Turn, timed_save
from engine.bench.savers import Ours
from engine.bench.states import make_state


class OursMonitored(Ours):
    name = "engine process"
    options: ClassVar[Mapping[str, Any]] = {"isolation": "process"}


WAYS: Mapping[str, type[Ours]] = {IN_PROCESS: Ours, MONITORED: OursMonitored}


def measure(rounds: Rounds, nbytes: int, tensor_count: int, count: int, warm_up: int, seconds: float) -> None:
    """Rounds of one save each."""
    rounds.introduce(OURS, "save", Ours.how)
    state = make_state(nbytes, tensor_count)
    with ExitStack() as stack:
        turns: dict[tuple[str, str], Turn] = {}
        for way, kind in WAYS.items():
            saver = kind(rounds.directory / way, state)
            stack.callback(saver.close)
            for _ in range(warm_up):
                timed_save(saver)
            turns[OURS, way] = partial(timed_save, saver)
        rounds.run("monitor", turns, (state.nbytes, state.tensor_count), range(count), seconds=seconds)
