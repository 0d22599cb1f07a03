"""Interval: how often to save.  Pure formulas over measured times.

Theory of operation.  A training whose step takes t seconds saves every f steps.  Up to N saves are in flight at once.
N of them take `write` seconds together until the last is durable, and each takes `cost` seconds from the training.

Between two saves the training computes for f t seconds and loses `cost`.  If it comes back before one of N permits is
free, it waits.  N saves take `write` seconds, so it cannot save more often than every write / N seconds:

    period(f) = max(f t + cost, write / N)          slowdown(f) = period(f) / (f t) - 1

`shortest_steps` is the smallest f whose slowdown is at most `overhead`.  Its second part is PCcheck's formula, f* =
Tw / (N q t) with q = 1 + overhead (Strati, Friedman, Klimovic, ASPLOS 2025, "PCcheck", on its configuration), which
takes a save to cost nothing but waiting.  Its first part is that cost, as in CheckFreq (FAST 2021).

A failure loses what was computed since the newest durable checkpoint.  Young (CACM 17(9), 1974) and Daly (Future
Generation Computer Systems 22(3), 2006) give the interval that loses least to saves and failures together.  Their cost
of a dump is the time that the application loses, so here it is `cost`, not `write`: saves run beside the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How often to save, and what that costs.

    Attributes:
        steps: the shortest interval whose slowdown is at most `overhead`: the greater of the next two.
        pccheck_steps: PCcheck's shortest interval, at which no save waits for a permit beyond the bound.
        cost_steps: the shortest interval at which the cost of a save is within the bound.
        slowdown: the part by which the training is slower with a save every `steps`.
        overhead, step_seconds: as given.
        in_flight: saves in flight at once.
        write_seconds: until so many saves, begun at once, are durable.
        durable_seconds: until one save is durable.
        cost_seconds: what one save takes from the training.
        restore_seconds: reading and verifying a checkpoint.
        loss_seconds: what one failure costs on average with a save every `steps`, the restore included.
        mtbf_seconds: the mean time between failures, as given; with None there are no optima.
        young_seconds, daly_seconds: the intervals that lose least by Young's and by Daly's formula.
        best_steps: Daly's interval in steps, but no shorter than `steps`.
        best_loss_seconds: what one failure costs on average with a save every `best_steps`.
    """

    steps: int
    pccheck_steps: int
    cost_steps: int
    slowdown: float
    overhead: float
    step_seconds: float
    in_flight: int
    write_seconds: float
    durable_seconds: float
    cost_seconds: float
    restore_seconds: float
    loss_seconds: float
    mtbf_seconds: float | None = None
    young_seconds: float | None = None
    daly_seconds: float | None = None
    best_steps: int | None = None
    best_loss_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The times of saves and restores that intervals are computed from; see `Interval`."""

    in_flight: int
    write_seconds: float
    durable_seconds: float
    cost_seconds: float
    restore_seconds: float


def advise(costs: Costs, overhead: float, step_seconds: float, mtbf_seconds: float | None) -> Interval:
    """The shortest interval within the bound, and the one that loses least."""
    write, cost, count = costs.write_seconds, costs.cost_seconds, costs.in_flight
    steps = shortest_steps(write, cost, count, overhead, step_seconds)

    def loss(interval_steps: int) -> float:
        return loss_seconds(interval_steps * step_seconds, costs.durable_seconds, costs.restore_seconds)

    daly = None if mtbf_seconds is None else daly_seconds(cost, mtbf_seconds)
    best = None if daly is None else max(steps, round(daly / step_seconds))
    return Interval(
        steps=steps,
        pccheck_steps=pccheck_steps(write, count, overhead, step_seconds),
        cost_steps=cost_steps(cost, overhead, step_seconds),
        slowdown=slowdown(steps, write, cost, count, step_seconds),
        overhead=overhead,
        step_seconds=step_seconds,
        in_flight=count,
        write_seconds=write,
        durable_seconds=costs.durable_seconds,
        cost_seconds=cost,
        restore_seconds=costs.restore_seconds,
        loss_seconds=loss(steps),
        mtbf_seconds=mtbf_seconds,
        young_seconds=None if mtbf_seconds is None else young_seconds(cost, mtbf_seconds),
        daly_seconds=daly,
        best_steps=best,
        best_loss_seconds=None if best is None else loss(best),
    )


def pccheck_steps(write_seconds: float, in_flight: int, overhead: float, step_seconds: float) -> int:
    """PCcheck's shortest interval: no permit is waited for beyond the bound."""
    return _steps(write_seconds / (in_flight * (1 + overhead) * step_seconds))


def cost_steps(cost_seconds: float, overhead: float, step_seconds: float) -> int:
    """The shortest interval at which the cost of a save is at most `overhead` of the steps between two."""
    return _steps(cost_seconds / (overhead * step_seconds))


def shortest_steps(
    write_seconds: float, cost_seconds: float, in_flight: int, overhead: float, step_seconds: float
) -> int:
    """The shortest interval whose slowdown is at most `overhead`."""
    return max(
        pccheck_steps(write_seconds, in_flight, overhead, step_seconds),
        cost_steps(cost_seconds, overhead, step_seconds),
    )


def slowdown(steps: int, write_seconds: float, cost_seconds: float, in_flight: int, step_seconds: float) -> float:
    """The part by which a training with a save every `steps` is slower than one without."""
    computing = steps * step_seconds
    return max(computing + cost_seconds, write_seconds / in_flight) / computing - 1


def young_seconds(cost_seconds: float, mtbf_seconds: float) -> float:
    """Young's first order: sqrt(2 C M)."""
    return math.sqrt(2 * cost_seconds * mtbf_seconds)


def daly_seconds(cost_seconds: float, mtbf_seconds: float) -> float:
    """Daly's higher order (his equation 37); the mean time between failures itself where a save costs twice that."""
    if cost_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = cost_seconds / (2 * mtbf_seconds)
    return young_seconds(cost_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


def loss_seconds(interval_seconds: float, durable_seconds: float, restore_seconds: float) -> float:
    """What a failure costs on average.

    A checkpoint is durable `durable_seconds` after it was taken, so at a random moment the newest durable one is
    between that and an interval more old.
    """
    return interval_seconds / 2 + durable_seconds + restore_seconds


def _steps(quotient: float) -> int:
    return max(1, math.ceil(quotient))
