"""The formulas of the interval: what they promise for any times, and the worked figures of docs/tuning.md."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tuning.interval import (
    Costs,
    advise,
    cost_steps,
    daly_seconds,
    loss_seconds,
    pccheck_steps,
    shortest_steps,
    slowdown,
    young_seconds,
)

SECONDS = st.floats(1e-3, 1e4)
OVERHEADS = st.floats(1e-3, 1.0)
COUNTS = st.integers(1, 32)


@given(write=SECONDS, cost=SECONDS, count=COUNTS, overhead=OVERHEADS, step=SECONDS)
def test_the_shortest_interval_keeps_the_bound_and_no_shorter_one_does(
    write: float, cost: float, count: int, overhead: float, step: float
) -> None:
    steps = shortest_steps(write, cost, count, overhead, step)
    assert slowdown(steps, write, cost, count, step) <= overhead + 1e-9
    if steps > 1:
        assert slowdown(steps - 1, write, cost, count, step) > overhead - 1e-9


@given(write=SECONDS, cost=SECONDS, count=COUNTS, overhead=OVERHEADS, step=SECONDS)
def test_the_shortest_interval_is_the_greater_of_its_two_parts(
    write: float, cost: float, count: int, overhead: float, step: float
) -> None:
    parts = pccheck_steps(write, count, overhead, step), cost_steps(cost, overhead, step)
    assert shortest_steps(write, cost, count, overhead, step) == max(parts) >= 1


@given(cost=SECONDS, mtbf=SECONDS, other=st.floats(0.01, 100))
def test_no_interval_loses_less_than_youngs_to_first_order(cost: float, mtbf: float, other: float) -> None:
    def lost(interval: float) -> float:
        return cost / interval + interval / (2 * mtbf)

    best = young_seconds(cost, mtbf)
    assert lost(best) <= lost(best * other) * (1 + 1e-9)


@given(share=st.floats(1e-9, 0.25, exclude_max=True), mtbf=SECONDS, other=st.floats(0.5, 2))
def test_no_interval_takes_less_time_than_dalys_with_failures_at_random(
    share: float, mtbf: float, other: float
) -> None:
    """Daly's model: the expected time of a training is proportional to (exp((interval + cost) / M) - 1) / interval."""
    cost = share * mtbf  # below a quarter his series is close; beyond, it is an approximation

    def expected(interval: float) -> float:
        return math.expm1((interval + cost) / mtbf) / interval

    best = daly_seconds(cost, mtbf)
    assert expected(best) <= expected(best * other) * 1.001


@given(cost=SECONDS, mtbf=SECONDS)
def test_dalys_interval_is_the_time_between_failures_where_a_save_takes_twice_that(cost: float, mtbf: float) -> None:
    if cost >= 2 * mtbf:
        assert daly_seconds(cost, mtbf) == mtbf
    else:
        assert 0 < daly_seconds(cost, mtbf) <= young_seconds(cost, mtbf) * 13 / 9


@given(interval=SECONDS, durable=SECONDS, restore=SECONDS, moments=st.integers(200, 400))
def test_a_failure_costs_what_random_failures_cost_on_average(
    interval: float, durable: float, restore: float, moments: int
) -> None:
    """A checkpoint is begun every interval and durable later; failures come at evenly spread moments."""
    lost = []
    for number in range(moments):
        moment = 10 * durable + 10 * interval + interval * (number + 0.5) / moments
        newest = math.floor((moment - durable) / interval) * interval
        lost.append(moment - newest + restore)
    assert sum(lost) / moments == pytest.approx(loss_seconds(interval, durable, restore), rel=0.02)


@given(
    write=SECONDS, durable=SECONDS, cost=SECONDS, count=COUNTS, overhead=OVERHEADS, step=SECONDS,
    mtbf=st.none() | SECONDS,
)  # fmt: skip
def test_the_optimum_is_never_shorter_than_the_bound_allows(
    write: float, durable: float, cost: float, count: int, overhead: float, step: float, mtbf: float | None
) -> None:
    costs = Costs(in_flight=count, write_seconds=write, durable_seconds=durable, cost_seconds=cost, restore_seconds=1.0)
    interval = advise(costs, overhead, step, mtbf)
    assert (interval.best_steps is None) == (mtbf is None)
    if interval.best_steps is not None and interval.best_loss_seconds is not None:
        assert interval.best_steps >= interval.steps
        assert interval.best_loss_seconds >= interval.loss_seconds


def test_the_worked_figures() -> None:
    """Those of docs/tuning.md: 4 saves of 60 s together, a step of 0.5 s, a bound of 5 %, 0.5 s from the training."""
    assert pccheck_steps(60, 4, 0.05, 0.5) == 29
    assert cost_steps(0.5, 0.05, 0.5) == 20
    assert shortest_steps(60, 0.5, 4, 0.05, 0.5) == 29
    assert young_seconds(0.5, 6 * 3600) == pytest.approx(146.97, abs=0.01)
    assert daly_seconds(0.5, 6 * 3600) == pytest.approx(146.64, abs=0.01)
