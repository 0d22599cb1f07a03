"""Retention: the rule that says which committed steps are kept.  Pure.

Theory of operation.  A step is kept if any part of the rule applies to it: it is among the `last`, its number is a
multiple of `every`, its metric is among the `best`, or it has a tag.  The newest step and a step that is being read are
always kept.  All others are to be retired.

The tag and metrics in a step's manifest are read through a callback, only if the rule depends on them.  A step whose
facts cannot be read at the moment is kept.

A rule is stored with the run as JSON, and is hostile when it is read.  Called by `catalog`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.errors import ArgumentError, CorruptError
from engine.options import whole_number

# A rule has a few numbers and the name of a metric; a longer file is not a rule.
RETENTION_BYTES_MAX = 4096

# The largest number in a rule, so that one read from disk stays a machine word: the largest step (format.manifest).
_COUNT_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Retention:
    """A rule that says which checkpoints are kept.

    Attributes:
        last: the number of newest checkpoints to keep; None keeps every one.
        every: keep also each checkpoint whose step is a multiple of this.
        best: keep also the best by a metric: its name, ``"min"`` or ``"max"``, and their number.

    Raises:
        ArgumentError: a value is out of range.
    """

    last: int | None = 2
    every: int | None = None
    best: tuple[str, Literal["min", "max"], int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("every", self.every)):
            if value is not None:
                count = _count(value)
                if count is None:
                    raise ArgumentError(f"{name} is {value!r}; it must be a whole number from 1, or None")
                object.__setattr__(self, name, count)
        if self.best is not None:
            object.__setattr__(self, "best", _plain_best(self.best))


KEEP_ALL = Retention(last=None)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """The facts of a step that a rule depends on: its tag, or None, and its metrics by name."""

    step: int
    tag: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def to_retire(
    rule: Retention, steps: Sequence[int], facts: Callable[[int], StepFacts | None], being_read: Collection[int] = ()
) -> list[int]:
    """The steps that a rule does not keep, oldest first.

    Args:
        rule: the rule.
        steps: all committed steps.
        facts: returns the facts of a step, or None if they cannot be read now.
        being_read: steps that readers have pinned.
    """
    if rule.last is None:
        return []
    ordered = sorted(steps)
    kept = {*ordered[-rule.last :], *being_read}
    if rule.every is not None:
        kept.update(step for step in ordered if step % rule.every == 0)
    left = [step for step in ordered if step not in kept]
    if not left:
        return []
    if rule.best is not None:
        kept.update(_best(*rule.best, ordered, facts))
    return [step for step in left if step not in kept and _is_untagged(facts(step))]


def _best(
    metric: str,
    which: Literal["min", "max"],
    count: int,
    steps: Sequence[int],
    facts: Callable[[int], StepFacts | None],
) -> list[int]:
    """The steps with the best values; of equal ones the newer.  NaN does not count as a value."""
    found = ((step, facts(step)) for step in steps)
    values = [(known.metrics[metric], step) for step, known in found if known is not None and metric in known.metrics]
    numbers = [(value, step) for value, step in values if not math.isnan(value)]
    sign = 1 if which == "min" else -1
    return [step for _, step in sorted(numbers, key=lambda pair: (sign * pair[0], -pair[1]))[:count]]


def _is_untagged(facts: StepFacts | None) -> bool:
    return facts is not None and facts.tag is None


def encode_rule(rule: Retention) -> bytes:
    """A rule as it is stored."""
    return json.dumps(asdict(rule)).encode() + b"\n"


def decode_rule(raw: bytes) -> Retention:
    """A stored rule.

    Raises:
        CorruptError: it is no rule.
    """
    try:
        fields: Any = json.loads(raw)
        if not isinstance(fields, dict) or fields.keys() != {"last", "every", "best"}:
            raise CorruptError("the stored retention rule has not the fields of one")
        best = fields["best"]
        return Retention(fields["last"], fields["every"], tuple(best) if isinstance(best, list) else best)
    except (ArgumentError, ValueError, RecursionError) as error:
        raise CorruptError(f"the stored retention rule is no rule: {error}") from None


def _count(value: object) -> int | None:
    """A count as an int, or None if it is none."""
    count = whole_number(value)
    return count if count is not None and 1 <= count <= _COUNT_MAX else None


def _plain_best(best: object) -> tuple[str, str, int]:
    if isinstance(best, tuple) and len(best) == 3:
        metric, which, count = best[0], best[1], _count(best[2])
        if isinstance(metric, str) and which in ("min", "max") and count is not None:
            return metric, which, count
    raise ArgumentError(f"best is {best!r}; it must be (metric, 'min' or 'max', how many)")
