"""Measurements of tuning that were never taken: fixed ones, and any that hypothesis makes.

`measurements` are of a state of 1000 MiB with the default options.  `OFFERED` are the candidates beside those.
"""

from __future__ import annotations

from hypothesis import strategies as st

from engine.options import Options
from engine.tuning.decide import Candidate, Flight, Measurements, Timing, Trial, candidates
from engine.tuning.search import below

MIB = 1 << 20
BASE = Options()
STATE = 1000 * MIB
BACKENDS = below("io_uring", BASE)
OFFERED = candidates(BASE, STATE, BACKENDS, 4)


def measurements(
    trials: tuple[Trial, ...] = (), final: Trial | None = None, sample_bytes: int = 100 * MIB
) -> Measurements:
    return Measurements(
        state_bytes=STATE,
        sample_bytes=sample_bytes,
        backend="io_uring",
        trials=trials,
        final=final,
        flights=(Flight(1, (0.1,)), Flight(2, (0.2,))),
        fresh_seconds=0.3,
        recycled=Timing(0.02, 0.1),
        read_seconds=0.1,
        commit_seconds=0.002,
        held_seconds=0.0005,
        lost_seconds=0.02,
    )


def trial(candidate: Candidate, factor: float, wins: int = 5) -> Trial:
    base = Timing(0.02, 0.1)
    timing = Timing(0.02, 0.1 * factor)
    return Trial(candidate.name, candidate.value, base, timing, wins, 5)


TIMES = st.floats(1e-4, 10)
TIMINGS = st.tuples(TIMES, TIMES).map(lambda pair: Timing(min(pair), max(pair)))


@st.composite
def trials_of(draw: st.DrawFn, candidate: Candidate) -> Trial:
    if draw(st.booleans()):
        return Trial(candidate.name, candidate.value, cause="refused")
    wins = draw(st.integers(0, 5))
    return Trial(candidate.name, candidate.value, draw(TIMINGS), draw(TIMINGS), wins, 5)


@st.composite
def any_measurements(draw: st.DrawFn) -> Measurements:
    chosen = draw(st.lists(st.sampled_from(OFFERED), unique=True))
    trials = tuple(draw(trials_of(candidate)) for candidate in chosen)
    return measurements(trials, sample_bytes=draw(st.sampled_from([MIB, 100 * MIB, 500 * MIB, STATE])))
