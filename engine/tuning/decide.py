"""Decide: from measurements to options.  Pure.

Theory of operation.  A `Candidate` changes one option of the given ones, the base.  A `Trial` is its result: both saved
the same sample in turns, so that other load on the host affects both.  A candidate wins if it is faster by more than
`GAIN` in the median and faster in every round.  The winners of all options are joined, and the joined options are tried
against the base once more.  They are taken if they win again.  So noise changes no option: what tuning does not change
is within `GAIN` of the best that it found.

A configuration is judged by `score`: the time until a save is durable, and the time that a training would wait for its
staging beyond one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec

from engine.options import MAX_ASYNC_MAX, SLOT_COUNT_MAX, Backend, Options

# Below it a difference is not worth an option: the default is within this of the best.
GAIN = 0.05

BLOCK_BYTES = (1 << 20, 2 << 20, 8 << 20, 16 << 20)
STAGING_FACTORS = (0.25, 0.5, 2, 4)
STAGING_THREADS = (1, 2, 4)
IN_FLIGHT = (1, 2, 3, 4)

Name = Literal["block_bytes", "staging_bytes", "staging_threads", "backend", "all"]

# What is read from a cache is hostile: a duration of more than a day is none of ours.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Medians of saves of the sample: until all is staged, until all is durable, and of copying and hashing alone."""

    staged_seconds: Seconds
    durable_seconds: Seconds
    copying_seconds: Seconds = 0.0


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate beside the base.

    Attributes:
        name, value: the option and its value; "all" is the joined options.
        base, timing: of the base and of the candidate, in the same rounds; None if the candidate was not measured.
        wins, rounds: the rounds in which the candidate's save was durable earlier, of how many.
        cause: why it was not measured.
    """

    name: Name
    value: int | Text
    base: Timing | None = None
    timing: Timing | None = None
    wins: int = 0
    rounds: int = 0
    cause: Text = ""


class Flight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many saves begun at once, and for each round the time until the last was durable."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_ASYNC_MAX)]
    rounds: Annotated[tuple[Seconds, ...], msgspec.Meta(min_length=1, max_length=1000)]

    @property
    def durable_seconds(self) -> float:
        """The median."""
        return median(self.rounds)

    def beats(self, other: Flight) -> bool:
        """Whether a save of these takes less time than one of the others: by more than `GAIN`, and in every round.

        Not if there are fewer rounds of these.
        """
        each, others = self.durable_seconds / self.count, other.durable_seconds / other.count
        pairs = list(zip(self.rounds, other.rounds, strict=False))
        wins = all(mine / self.count < its / other.count for mine, its in pairs)
        return each < others * (1 - GAIN) and wins and len(pairs) == len(other.rounds)


class Measurements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, for the sample; `scale` makes times of the whole state of it.

    Attributes:
        state_bytes, sample_bytes: all of the arena, and the part that was saved.
        backend: the one that the base found.
        trials: one for each candidate.
        final: the joined winners beside the base.
        flights: by the number of saves in flight.
        fresh_seconds: a save into files whose blocks were just reserved.
        recycled: a save over files that were written before.
        read_seconds: reading and verifying.
        commit_seconds: syncing the small files and directories of a commit; does not grow with the state.
        held_seconds: the look at every tensor that `checkpoint()` takes; does not grow with the bytes.
        lost_seconds: what one save takes from a program that keeps every core busy; at least its copying, for
            which it takes a core.
    """

    state_bytes: Bytes
    sample_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    backend: Backend
    trials: tuple[Trial, ...]
    final: Trial | None
    flights: Annotated[tuple[Flight, ...], msgspec.Meta(min_length=1, max_length=100)]
    fresh_seconds: Seconds
    recycled: Timing
    read_seconds: Seconds
    commit_seconds: Seconds
    held_seconds: Seconds
    lost_seconds: Seconds

    @property
    def scale(self) -> float:
        """The state in samples."""
        return self.state_bytes / self.sample_bytes


class Candidate(NamedTuple):
    """One option with another value than the base's."""

    name: Name
    value: int | str
    options: Options


def candidates(base: Options, state_bytes: int, backends: Sequence[Backend], cores: int) -> list[Candidate]:
    """What is tried beside the base.

    Args:
        base: the given options.
        state_bytes: slots for more than the state are useless.
        cores: of this process; no more threads are of use.
        backends: those that the ladder has below the base's.
    """
    found = [
        Candidate("block_bytes", nbytes, replace(base, block_bytes=nbytes))
        for nbytes in BLOCK_BYTES
        if nbytes != base.block_bytes and 2 * nbytes <= base.staging_bytes
    ]
    for factor in STAGING_FACTORS:
        nbytes = int(base.staging_bytes * factor) // base.block_bytes * base.block_bytes
        is_useful = factor < 1 or nbytes // 2 < state_bytes
        if is_useful and 2 * base.block_bytes <= nbytes <= SLOT_COUNT_MAX * base.block_bytes:
            found.append(Candidate("staging_bytes", nbytes, replace(base, staging_bytes=nbytes)))
    for count in STAGING_THREADS:
        if count != base.staging_threads and count <= cores:
            found.append(Candidate("staging_threads", count, replace(base, staging_threads=count)))
    return found + [Candidate("backend", name, replace(base, backend=name)) for name in backends]


def whole(timing: Timing, options: Options, measured: Measurements) -> Timing:
    """The timing of the whole state, from that of the sample.

    Durable grows with the bytes.  So does staging as long as the slots hold everything, and what they do not hold is
    staged as fast as the device takes it.
    """
    durable = timing.durable_seconds * measured.scale
    staged_bytes = min(max(options.slot_count * options.block_bytes, measured.sample_bytes), measured.state_bytes)
    staged = timing.staged_seconds * staged_bytes / measured.sample_bytes
    staged += (measured.state_bytes - staged_bytes) * timing.durable_seconds / measured.sample_bytes
    return Timing(min(staged, durable), durable, timing.copying_seconds * measured.scale)


def score(timing: Timing, step_seconds: float) -> float:
    """The seconds of a whole save that count: until durable, and a training's wait for the staging."""
    return timing.durable_seconds + max(0.0, timing.staged_seconds - step_seconds)


def gain(trial: Trial, options: Options, base: Options, measured: Measurements, step_seconds: float) -> float:
    """By what part a candidate is better than the base; negative if it is worse, and 0 if it was not measured."""
    if trial.timing is None or trial.base is None:
        return 0.0
    beside = score(whole(trial.base, base, measured), step_seconds)
    if not beside:
        return 0.0
    return 1 - score(whole(trial.timing, options, measured), step_seconds) / beside


def joined(base: Options, offered: Sequence[Candidate], measured: Measurements, step_seconds: float) -> Options:
    """The base with the best winner of each option: better by more than `GAIN`, and by more than noise."""
    trials = {(trial.name, trial.value): trial for trial in measured.trials}
    best: dict[Name, tuple[float, Candidate]] = {}
    for candidate in offered:
        trial = trials.get((candidate.name, candidate.value))
        if trial is None:
            continue
        better = gain(trial, candidate.options, base, measured, step_seconds)
        ahead = best[candidate.name][0] if candidate.name in best else GAIN
        if better > ahead and _wins(trial, candidate, base, measured, step_seconds):
            best[candidate.name] = better, candidate
    return _join(base, {name: candidate for name, (_, candidate) in best.items()})


def _wins(trial: Trial, candidate: Candidate, base: Options, measured: Measurements, step_seconds: float) -> bool:
    """Whether a candidate won by more than noise: in every round, or by a shorter wait for the staging.

    That wait is computed from the size of the slots, where the sample is too small for a difference.
    """
    if trial.wins == trial.rounds > 0:
        return True
    if candidate.name != "staging_bytes" or trial.base is None or trial.timing is None:
        return False
    alone = whole(trial.base, base, measured)
    same_device = whole(trial.base, candidate.options, measured)
    return score(alone, step_seconds) - score(same_device, step_seconds) > GAIN * score(alone, step_seconds)


def _join(base: Options, winners: Mapping[Name, Candidate]) -> Options:
    changes: dict[str, object] = {
        name: getattr(candidate.options, name) for name, candidate in winners.items() if name != "all"
    }
    if "block_bytes" in changes:  # as many slots as the other winner has, but never fewer than two
        least = 2 * winners["block_bytes"].options.block_bytes
        changes["staging_bytes"] = max(
            winners["staging_bytes"].options.staging_bytes if "staging_bytes" in winners else base.staging_bytes, least
        )
    return replace(base, **changes)  # type: ignore[arg-type]


def describe_options(options: Options, base: Options) -> str:
    """The options that differ from the base; "" if none does."""
    names = [name for name in get_args(Name) if name != "all" and getattr(options, name) != getattr(base, name)]
    return ", ".join(f"{name}={getattr(options, name)}" for name in names)


def confirmed(
    base: Options, offered: Sequence[Candidate], measured: Measurements, step_seconds: float
) -> Options | None:
    """The options to take, or None if the joined winners were not tried against the base.

    With another time of a step than that of the measurements other options may win.
    """
    found = joined(base, offered, measured, step_seconds)
    if found == base:
        return base
    final = measured.final
    if final is None or final.value != describe_options(found, base):
        return None
    return found if gain(final, found, base, measured, step_seconds) > GAIN else base


def in_flight(base: Options, flights: Sequence[Flight], state_bytes: int, free_bytes: int | None) -> int:
    """PCcheck's N*: the number of saves in flight that are durable in the least time each.

    The base's number stays unless another beats it, or if it was not measured.  On disk each save in flight needs two
    checkpoints, beside the one that is kept, so a number without room is none.
    """
    if all(flight.count != base.max_async for flight in flights):
        return base.max_async
    fitting = [
        flight
        for flight in sorted(flights, key=lambda flight: flight.count)
        if flight.count == 1 or free_bytes is None or (1 + 2 * flight.count) * state_bytes <= free_bytes
    ]
    best = next((flight for flight in reversed(fitting) if flight.count <= base.max_async), None)
    if best is None:  # the cache says nothing of one save
        return 1
    for flight in fitting:
        if flight.beats(best):
            best = flight
    return best.count


def write_seconds(count: int, flights: Sequence[Flight]) -> float:
    """The time of `count` saves at once; if they were not measured, in proportion to the next lower number."""
    known = {flight.count: flight.durable_seconds for flight in flights}
    nearest = max((number for number in known if number <= count), default=min(known))
    return known[nearest] * max(1.0, count / nearest)
