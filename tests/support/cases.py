"""Cases: the crash states, their numbers, and the promises that precede each.

Theory of operation.  A crash state is a stop in the trace of a scenario, and a fate for every operation that no fsync
covers (`simulator`).  Two more kinds nest: after a kill or a power cut a second engine opens the directory, lists its
steps and saves one more, and is recorded too.  The state is then one of that second trace.  After a kill the pending
operations are still pending.

A `Case` names a state by one number that reproduces it.  A `Recorder` makes the traces, which are the same each time.
A `Promise` holds the promises before a stop, read from the notes in the trace.
"""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from recorder import Change, World, blank
from scenarios import KINDS, SCENARIOS, recover
from simulator import Disk, Fates, Note, Operation, Rot, Trace

# The stop of the first engine before a second one opens its directory.
PLAIN, KILL, CUT = range(3)

# One second trace is worth more than one state: making it takes as long as looking at two.
_STATES_PER_TRACE = 20


class Case(NamedTuple):
    """A crash state.  After a kill all of the first trace is kept, so `fates` is 0."""

    scenario: int
    stop: int
    fates: int
    nesting: int = PLAIN
    second_stop: int = 0
    second_fates: int = 0

    @property
    def number(self) -> int:
        """The case as one number."""
        number = 0
        for value, bits in zip(self, _BITS, strict=True):
            assert value < 1 << bits
            number = number << bits | value
        return number

    @classmethod
    def of(cls, number: int) -> Case:
        """The case that has this number."""
        values = []
        for bits in reversed(_BITS):
            values.append(number & ((1 << bits) - 1))
            number >>= bits
        return cls(*reversed(values))


# Bits of each field of a Case.
_FATES_BITS = 40
_BITS = (8, 16, _FATES_BITS, 2, 16, _FATES_BITS)


@dataclass
class Promise:
    """The promises about the checkpoints, for every state of the disk.

    Attributes:
        begun: the payloads that a step may hold, if it exists.
        reported: of those, the ones that a step holds that was said to be durable.  A step that was retired since
            stays in here: a newer one must be there.
        damaged: the inodes of directories that were damaged on purpose.
    """

    begun: dict[int, set[int]] = field(default_factory=dict)
    reported: dict[int, set[int]] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)

    def copy(self) -> Promise:
        """One that can be changed alone."""
        begun, reported = ({k: set(v) for k, v in d.items()} for d in (self.begun, self.reported))
        return Promise(begun, reported, set(self.damaged))

    def hear(self, note: Note | Rot) -> None:
        """Add a note of a report, or of damage to a step."""
        if isinstance(note, Rot):
            self.reported.pop(note.step)
            self.damaged.add(note.directory)
        elif note.kind == "began":
            self.begun.setdefault(note.step, set()).add(note.payload)
        elif note.kind == "reported":
            self.reported[note.step] = {note.payload}
        elif note.kind == "listed":
            self.reported.setdefault(note.step, set(self.begun[note.step]))
        elif note.kind == "rolling back":
            self.reported = {step: payloads for step, payloads in self.reported.items() if step <= note.step}
        else:
            assert note.kind == "rolled back", note
            self.begun = {step: payloads for step, payloads in self.begun.items() if step <= note.step}


class Recorded(NamedTuple):
    """A trace, the promises before it, and the first stop of interest."""

    trace: Trace
    before: Promise
    first_stop: int

    def promise(self, stop: int) -> Promise:
        """The promises up to the stop."""
        promise = self.before.copy()
        for operation in self.trace.operations[:stop]:
            if isinstance(operation, Note | Rot):
                promise.hear(operation)
        return promise


class Recorder:
    """Records scenarios and the engines after them, each once while it is cached.

    Args:
        scratch: a directory for Worlds.
        change: a change to the engine.
    """

    def __init__(self, scratch: Path, change: Change) -> None:
        self._scratch = scratch
        self._change = change
        self.scenario = functools.lru_cache(maxsize=None)(self._scenario)
        self.second = functools.lru_cache(maxsize=4)(self._second)

    def recorded(self, case: Case) -> Recorded:
        """The trace that a case is a stop in."""
        if case.nesting == PLAIN:
            return self.scenario(case.scenario)
        return self.second(case.scenario, case.stop, case.fates, case.nesting)

    def _scenario(self, index: int) -> Recorded:
        trace = self._record(list(SCENARIOS.values())[index], blank(), (), 0)
        return Recorded(trace, Promise(), 0)

    def _second(self, index: int, stop: int, fates: int, nesting: int) -> Recorded:
        first = self.scenario(index)
        recovery = functools.partial(recover, KINDS[index])
        assert stop <= len(first.trace.operations), "the trace is shorter than the case says"
        if nesting == KILL:
            prefix = first.trace.operations[:stop]
            return Recorded(self._record(recovery, first.trace.disk, prefix, 1), first.before, stop)
        disk = first.trace.cut(stop, Fates(fates, first.trace.pending(stop)))
        return Recorded(self._record(recovery, disk, (), 1), first.promise(stop), 0)

    def _record(
        self, scenario: Callable[[World], None], disk: Disk, operations: Sequence[Operation], number: int
    ) -> Trace:
        with fresh(self._scratch) as directory, self._change() as filesystem:
            world = World(directory, disk, operations, number, filesystem)
            scenario(world)
            return world.trace()


@contextmanager
def fresh(scratch: Path) -> Iterator[Path]:
    """An empty directory, gone afterwards."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def every_plain(recorder: Recorder, scenarios: Iterable[int]) -> Iterator[Case]:
    """Every stop, with every deterministic choice of fates."""
    for scenario in scenarios:
        trace = recorder.scenario(scenario).trace
        for stop in every_stop(recorder, scenario):
            for fates in range(Fates.simple_count(len(trace.pending(stop)))):
                yield Case(scenario, stop, fates)


def every_second(recorder: Recorder, scenario: int, nesting: int, stops: Iterable[int]) -> Iterator[Case]:
    """Every stop, with every deterministic choice of fates, after a kill or a power cut that drops everything."""
    for stop in stops:
        first = Case(scenario, stop, 1 if nesting == CUT else 0, nesting)
        recorded = recorder.recorded(first)
        for second_stop in range(recorded.first_stop + 1, len(recorded.trace.operations) + 1):
            for fates in range(Fates.simple_count(len(recorded.trace.pending(second_stop)))):
                yield first._replace(second_stop=second_stop, second_fates=fates)


def every_stop(recorder: Recorder, scenario: int) -> range:
    """All stops of a scenario, before its first operation and after its last too."""
    return range(len(recorder.scenario(scenario).trace.operations) + 1)


def random_cases(recorder: Recorder, rng: random.Random) -> Iterator[Case]:
    """Without end: any scenario, any stop, any choice, nested or not."""
    while True:
        scenario = rng.randrange(len(SCENARIOS))
        stop = rng.randrange(len(recorder.scenario(scenario).trace.operations) + 1)
        nesting = rng.choice([PLAIN, PLAIN, KILL, CUT])
        if nesting == PLAIN:
            yield Case(scenario, stop, _random_fates(rng))
            continue
        first = Case(scenario, stop, _random_fates(rng) if nesting == CUT else 0, nesting)
        recorded = recorder.recorded(first)
        for _ in range(_STATES_PER_TRACE):
            second_stop = rng.randrange(recorded.first_stop, len(recorded.trace.operations) + 1)
            yield first._replace(second_stop=second_stop, second_fates=_random_fates(rng))


def _random_fates(rng: random.Random) -> int:
    return rng.randrange(Fates.RANDOM, 1 << _FATES_BITS)
