"""Search: measure a directory, and try options in turns.

Theory of operation.  A pilot save finds the speed of the device, and so the size of the sample: as large as the time
allows for all saves together, within a share of the free space and memory.  Then come the times that the interval
depends on, and then one trial for each candidate: the base and the candidate save in turns, first once without being
counted.  The base's pipeline stays open, and each candidate's is closed after its trial, so no more than two sets of
slots exist at once.  When the time is over, the candidates that are left are not measured, and say so.

The base and all candidates that write past the page cache overwrite the same blocks of the same files, because on many
hosts the location on a drive matters as much as the writer (docs/perf.md).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import msgspec

from engine.errors import PlatformError, StorageError
from engine.io.backend import LADDER
from engine.io.pipeline import Pipeline
from engine.options import Backend, Options
from engine.store.filesystem import Filesystem
from engine.tuning.decide import (
    IN_FLIGHT,
    Candidate,
    Flight,
    Measurements,
    Timing,
    Trial,
    candidates,
    confirmed,
    describe_options,
    in_flight,
    joined,
)
from engine.tuning.device import Device
from engine.tuning.measure import SAMPLE_CHUNK_BYTES, Bench, Sample, State, available_bytes, lost_seconds

ROUNDS = 5
FINAL_ROUNDS = 9
TIME_ROUNDS = 3

# Of free space and of available memory no more than this is used.
SHARE = 0.25

# Saves in all: a warm-up and `ROUNDS` for both sides of a dozen candidates, and some fifty more.
_SAVES = 200

# What is saved first, to see how fast the device is.
_PILOT_BYTES = 32 << 20

# A file system that does not say how much room it has is not asked for more.
_UNKNOWN_ROOM_BYTES = 256 << 20

# A manifest of some hundred tensors.
_RECORD_BYTES = 64 << 10

# Of a cause for the table.
_CAUSE_CHARS_MAX = 500


class Search:
    """The measurements of one directory.

    Args:
        directory: its real path.
        filesystem: the file operations.
        state: what a save writes.
        base: the given options.
        device: below the directory.
        hold: the look at every tensor that each `checkpoint()` takes.
        seconds: the time for all trials.
    """

    def __init__(
        self,
        directory: str,
        filesystem: Filesystem,
        state: State,
        base: Options,
        device: Device,
        hold: Callable[[], object],
        seconds: float,
    ) -> None:
        self.directory = directory
        self.filesystem = filesystem
        self._state = state
        self.base = base
        self._device = device
        self._hold = hold
        self._seconds = seconds

    def run(self, step_seconds: float) -> Measurements:
        """Measure everything.  Blocks.

        Raises:
            PlatformError: the requested backend does not work here.
            StorageError: there is too little room, no file can be made in the directory, or the device fails.
        """
        room = self._room() // (IN_FLIGHT[-1] + 1)  # the last set is for the page cache
        chunk_bytes = max(SAMPLE_CHUNK_BYTES, self.base.block_bytes)
        smallest = min(self._state.nbytes, chunk_bytes)
        if room < smallest:
            needed = int(smallest * (IN_FLIGHT[-1] + 1) / SHARE)
            remedy = f"measuring takes a quarter of the free space: free {needed} bytes, or tune a larger file system"
            raise StorageError(errno.ENOSPC, "tune", self.directory, remedy=remedy)
        pilot = Sample(self._state, chunk_bytes, max(1, min(_PILOT_BYTES, room - chunk_bytes)))
        bench = Bench(self.directory, self.filesystem, pilot)
        with bench.pipeline(self.base) as pipeline:
            wanted = max(smallest, min(self._affordable(bench, pipeline), room - chunk_bytes))
            bench.take(Sample(self._state, chunk_bytes, wanted))
            measured = self._times(bench, pipeline)
            offered = self._offered(pipeline.backend)
            deadline = time.monotonic() + self._seconds
            trials = tuple(self._trial(bench, pipeline, candidate, deadline) for candidate in offered)
            measured = msgspec.structs.replace(measured, trials=trials)
            found = joined(self.base, offered, measured, step_seconds)
            if found != self.base:
                value = describe_options(found, self.base)
                final = duel(bench, pipeline, Candidate("all", value, found), FINAL_ROUNDS)
                measured = msgspec.structs.replace(measured, final=final)
        return measured

    def confirmed(self, measured: Measurements, step_seconds: float) -> Options | None:
        """The options to take; None if winners have not been tried together (see `decide.confirmed`)."""
        return confirmed(self.base, self._offered(measured.backend), measured, step_seconds)

    def _offered(self, backend: Backend) -> list[Candidate]:
        rungs, cores = below(backend, self.base), len(os.sched_getaffinity(0))
        return candidates(self.base, self._state.nbytes, rungs, cores)

    def _affordable(self, bench: Bench, pipeline: Pipeline) -> int:
        """The size of a sample that takes its share of the time."""
        seconds = min(bench.save(pipeline).durable_seconds for _ in range(3))
        return int(bench.sample.nbytes / seconds * self._seconds / _SAVES)

    def _room(self) -> int:
        """The bytes that may be written."""
        free = self.filesystem.free_bytes(self.directory)
        room = _UNKNOWN_ROOM_BYTES if free is None else free
        if self._device.kind == "memory":
            room = min(room, available_bytes())
        return int(room * SHARE)

    def _times(self, bench: Bench, pipeline: Pipeline) -> Measurements:
        """What the interval depends on; no candidate is tried."""
        fresh = bench.fresh_seconds(pipeline, IN_FLIGHT[-1])
        recycled = [bench.save(pipeline) for _ in range(ROUNDS)]
        flights = self._flights(bench, pipeline)
        lost = lost_seconds(lambda: bench.save(pipeline), len(os.sched_getaffinity(0)), ROUNDS)
        usual = _median(recycled)
        return Measurements(
            state_bytes=self._state.nbytes,
            sample_bytes=bench.sample.nbytes,
            backend=pipeline.backend,
            trials=(),
            final=None,
            flights=flights,
            fresh_seconds=fresh,
            recycled=usual,
            read_seconds=bench.read_seconds(pipeline, TIME_ROUNDS),
            commit_seconds=bench.commit_seconds(_RECORD_BYTES, TIME_ROUNDS),
            held_seconds=self._held(),
            lost_seconds=max(lost, usual.copying_seconds),
        )

    def _flights(self, bench: Bench, pipeline: Pipeline) -> tuple[Flight, ...]:
        """Numbers of saves at once, in turns.  A number that beats the base's has to do so in as many rounds again."""
        taken: dict[int, list[float]] = {count: [] for count in IN_FLIGHT}

        def measure(counts: Iterable[int]) -> tuple[Flight, ...]:
            for _ in range(ROUNDS):
                for count in counts:
                    taken[count].append(bench.save(pipeline, count).durable_seconds)
            return tuple(Flight(count, tuple(seconds)) for count, seconds in taken.items())

        bench.save(pipeline, IN_FLIGHT[-1])  # not counted
        flights = measure(IN_FLIGHT)
        best = in_flight(self.base, flights, self._state.nbytes, None)
        return flights if best == self.base.max_async else measure({best, self.base.max_async} & set(IN_FLIGHT))

    def _held(self) -> float:
        taken = []
        for _ in range(TIME_ROUNDS):
            began = time.monotonic()
            self._hold()
            taken.append(time.monotonic() - began)
        return median(taken)

    def _trial(self, bench: Bench, pipeline: Pipeline, candidate: Candidate, deadline: float) -> Trial:
        if time.monotonic() > deadline:
            return Trial(candidate.name, candidate.value, cause=f"{self._seconds:g} seconds were over")
        wanted, share = candidate.options.staging_bytes, int(available_bytes() * SHARE)
        if wanted > share:
            return Trial(candidate.name, candidate.value, cause=f"its slots exceed {share >> 20} MiB of free memory")
        return duel(bench, pipeline, candidate, ROUNDS)


def below(backend: Backend, base: Options) -> Sequence[Backend]:
    """The rungs of the ladder to try beside the one that was found; none if the caller insists on it."""
    return LADDER[LADDER.index(backend) + 1 :] if base.backend == "auto" else ()


def duel(bench: Bench, pipeline: Pipeline, candidate: Candidate, rounds: int) -> Trial:
    """Saves of the base and of a candidate, in turns; the first ones are not counted."""
    ours: list[Timing] = []
    theirs: list[Timing] = []
    try:
        with bench.pipeline(candidate.options) as other:
            for _ in range(rounds + 1):
                ours.append(bench.save(pipeline))
                theirs.append(bench.save(other))
    except PlatformError as error:
        return Trial(candidate.name, candidate.value, cause=error.cause[:_CAUSE_CHARS_MAX])
    except StorageError as error:
        if len(theirs) == len(ours):  # the base's own save failed
            raise
        return Trial(candidate.name, candidate.value, cause=str(error)[:_CAUSE_CHARS_MAX])
    wins = sum(mine.durable_seconds > its.durable_seconds for mine, its in zip(ours[1:], theirs[1:], strict=True))
    return Trial(candidate.name, candidate.value, _median(ours[1:]), _median(theirs[1:]), wins, rounds)


def _median(timings: Sequence[Timing]) -> Timing:
    return Timing(
        median(timing.staged_seconds for timing in timings),
        median(timing.durable_seconds for timing in timings),
        median(timing.copying_seconds for timing in timings),
    )
