"""The decision from measurements: noise changes nothing, a gain changes what it is of, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tuned import BACKENDS, BASE, MIB, OFFERED, STATE, TIMES, TIMINGS, any_measurements, measurements, trial

from engine.options import Options
from engine.tuning.decide import (
    GAIN,
    Flight,
    Measurements,
    Name,
    Timing,
    Trial,
    candidates,
    confirmed,
    describe_options,
    gain,
    in_flight,
    joined,
    score,
    whole,
    write_seconds,
)
from engine.tuning.search import below

LONG_STEP = 1e4  # no training waits for staging


@given(any_measurements(), st.floats(1e-3, 10))
def test_every_changed_option_has_a_trial_that_was_better_than_noise(measured: Measurements, step: float) -> None:
    found = joined(BASE, OFFERED, measured, step)
    trials = {(each.name, each.value): each for each in measured.trials}
    for candidate in OFFERED:
        if getattr(found, candidate.name) != getattr(BASE, candidate.name):
            value = getattr(found, candidate.name)
            options = replace(BASE, **{candidate.name: value})
            if (candidate.name, value) in trials:
                assert gain(trials[candidate.name, value], options, BASE, measured, step) > GAIN
            else:  # only staging that must hold two larger blocks
                assert candidate.name == "staging_bytes" and value == 2 * found.block_bytes
    assert (
        replace(
            found,
            **{name: getattr(BASE, name) for name in get_args(Name) if name != "all"},
        )
        == BASE
    )


@given(any_measurements(), st.floats(1e-3, 10))
def test_the_best_winner_of_an_option_is_taken(measured: Measurements, step: float) -> None:
    found = joined(BASE, OFFERED, measured, step)
    trials = {(each.name, each.value): each for each in measured.trials}
    sure = [
        (gain(trials[each.name, each.value], each.options, BASE, measured, step), each)
        for each in OFFERED
        if each.name == "block_bytes" and (each.name, each.value) in trials and trials[each.name, each.value].wins == 5
    ]
    best = max(sure, key=lambda pair: pair[0], default=(0.0, None))
    assert found.block_bytes == (best[1].value if best[1] is not None and best[0] > GAIN else BASE.block_bytes)


@given(any_measurements(), st.floats(1e-3, 10), st.none() | st.floats(0.5, 1.5))
def test_winners_are_taken_only_after_they_have_won_together(
    measured: Measurements, step: float, factor: float | None
) -> None:
    found = joined(BASE, OFFERED, measured, step)
    if factor is not None:
        value = describe_options(found, BASE)
        final = Trial("all", value, Timing(0.01, 0.1), Timing(0.01, 0.1 * factor), 9, 9)
        measured = msgspec.structs.replace(measured, final=final)
    taken = confirmed(BASE, OFFERED, measured, step)
    if found == BASE:
        assert taken == BASE
    elif factor is None:
        assert taken is None
    else:
        assert taken in (found, BASE)
        if taken == found:
            assert measured.final is not None and gain(measured.final, found, BASE, measured, step) > GAIN


def test_a_final_of_other_options_confirms_nothing() -> None:
    faster = next(each for each in OFFERED if each.name == "block_bytes")
    other = Trial("all", "block_bytes=123", Timing(0.0, 0.1), Timing(0.0, 0.01), 9, 9)
    measured = measurements((trial(faster, 0.5),), other)
    assert confirmed(BASE, OFFERED, measured, LONG_STEP) is None


def test_a_gain_of_less_than_the_threshold_or_in_some_rounds_only_changes_nothing() -> None:
    for candidate in OFFERED:
        for found in (trial(candidate, 0.96), trial(candidate, 0.5, wins=4), trial(candidate, 2)):
            assert joined(BASE, OFFERED, measurements((found,)), LONG_STEP) == BASE
        assert joined(BASE, OFFERED, measurements((trial(candidate, 0.9),)), LONG_STEP) == candidate.options


def test_larger_slots_are_taken_where_the_training_would_wait_for_its_staging() -> None:
    """The sample fits all slots, so all trials take the same time; the wait is computed from the slots."""
    larger = [each for each in OFFERED if each.name == "staging_bytes" and int(each.value) > BASE.staging_bytes]
    measured = measurements(tuple(trial(each, 1.0, wins=2) for each in larger))
    assert joined(BASE, OFFERED, measured, LONG_STEP) == BASE
    assert joined(BASE, OFFERED, measured, 0.1).staging_bytes == max(each.options.staging_bytes for each in larger)


@given(TIMINGS, st.integers(MIB, 2 * STATE), st.integers(1, 4096), TIMES)
def test_the_whole_is_the_sample_at_full_size_and_never_staged_after_it_is_durable(
    timing: Timing, sample_bytes: int, staging_mib: int, step: float
) -> None:
    options = Options(staging_bytes=max(8, staging_mib) * MIB)
    measured = measurements(sample_bytes=sample_bytes)
    all_of_it = whole(timing, options, measured)
    assert all_of_it.staged_seconds <= all_of_it.durable_seconds
    assert score(all_of_it, step) >= all_of_it.durable_seconds
    more = whole(timing, replace(options, staging_bytes=options.staging_bytes * 2), measured)
    assert more.staged_seconds <= all_of_it.staged_seconds * (1 + 1e-9)
    if sample_bytes == STATE:
        assert all_of_it == timing


@given(
    st.integers(2, 64).map(lambda blocks: blocks * MIB),
    st.sampled_from([4096, 65536, MIB]),
    st.integers(1, 2**45),
    st.integers(1, 16),
    st.integers(1, 64),
)
def test_every_candidate_is_a_change_of_one_option_that_an_engine_takes(
    staging: int, block: int, state_bytes: int, threads: int, cores: int
) -> None:
    base = Options(staging_bytes=staging, block_bytes=block, staging_threads=threads)
    for candidate in candidates(base, state_bytes, BACKENDS, cores):
        assert candidate.options != base
        assert replace(candidate.options, **{candidate.name: getattr(base, candidate.name)}) == base
        assert candidate.options.slot_count >= 2
        assert candidate.name != "staging_threads" or candidate.options.staging_threads <= cores
        assert candidate.value == getattr(candidate.options, candidate.name)
        if candidate.name == "staging_bytes" and candidate.options.staging_bytes > staging:
            assert candidate.options.staging_bytes // 2 < state_bytes, "half of these slots hold the state"


def test_a_backend_that_the_caller_insists_on_is_kept() -> None:
    assert below("io_uring", BASE) == ("io_uring_plain", "threads", "buffered")
    assert below("buffered", BASE) == ()
    assert below("threads", Options(backend="threads")) == ()


ROUNDS = st.lists(TIMES, min_size=3, max_size=3).map(tuple)


@given(st.lists(ROUNDS, min_size=4, max_size=4), st.integers(1, 32), st.none() | st.integers(0, 100 * STATE))
def test_another_number_of_saves_in_flight_is_better_in_every_round_and_has_room(
    rounds: list[tuple[float, ...]], max_async: int, free_bytes: int | None
) -> None:
    flights = [Flight(count, taken) for count, taken in enumerate(rounds, start=1)]
    base = Options(max_async=max_async)
    count = in_flight(base, flights, STATE, free_bytes)
    if max_async > 4:
        assert count == max_async  # it was not measured
        return
    if count > 1 and free_bytes is not None:
        assert (1 + 2 * count) * STATE <= free_bytes
    has_room = free_bytes is None or max_async == 1 or (1 + 2 * max_async) * STATE <= free_bytes
    if has_room and count != max_async:
        pairs = zip(rounds[count - 1], rounds[max_async - 1], strict=True)
        assert all(mine / count < its / max_async for mine, its in pairs)


def test_a_number_of_saves_in_flight_is_not_taken_until_it_was_measured_as_often_as_the_given_one() -> None:
    slow, fast = (0.2, 0.2, 0.2), (0.1, 0.1)
    assert in_flight(BASE, [Flight(1, (0.2,)), Flight(2, slow), Flight(3, fast)], STATE, None) == 2
    assert in_flight(BASE, [Flight(1, (0.2,)), Flight(2, slow), Flight(3, (*fast, 0.1))], STATE, None) == 3
    assert in_flight(BASE, [Flight(1, (0.2,)), Flight(2, slow), Flight(3, (*fast, 0.4))], STATE, None) == 2
    assert in_flight(BASE, [Flight(1, (0.2,)), Flight(2, slow), Flight(3, (0.29,) * 3)], STATE, None) == 2


@given(st.lists(ROUNDS, min_size=4, max_size=4), st.integers(1, 32))
def test_saves_that_were_not_measured_take_as_long_each_as_the_most_that_were(
    rounds: list[tuple[float, ...]], count: int
) -> None:
    flights = [Flight(number, taken) for number, taken in enumerate(rounds, start=1)]
    seconds = write_seconds(count, flights)
    nearest = min(count, 4)
    assert seconds == flights[nearest - 1].durable_seconds * max(1, count / nearest)
