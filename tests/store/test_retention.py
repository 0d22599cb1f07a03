"""Retention: the steps that a rule keeps, for any history, and the rule that is stored with a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ArgumentError, CorruptError
from engine.store.retention import KEEP_ALL, Retention, StepFacts, decode_rule, encode_rule, to_retire

COUNTS = st.none() | st.integers(1, 6)
RULES = st.builds(
    Retention,
    COUNTS,
    COUNTS,
    st.none() | st.tuples(st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"]), st.integers(1, 4)),
)
METRICS = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats(-3, 3) | st.just(math.nan))
HISTORIES = st.dictionaries(
    st.integers(0, 40), st.none() | st.builds(StepFacts, st.just(0), st.none() | st.just("tag"), METRICS), max_size=12
)
History = dict[int, StepFacts | None]


def facts_of(history: History) -> Callable[[int], StepFacts | None]:
    return history.__getitem__


@given(RULES, HISTORIES, st.sets(st.integers(0, 40), max_size=3))
def test_the_newest_tagged_and_read_steps_are_kept(rule: Retention, history: History, being_read: set[int]) -> None:
    retired = to_retire(rule, list(history), facts_of(history), being_read)
    assert retired == sorted(set(retired)) and set(retired) <= history.keys()
    assert not being_read & set(retired)
    assert not history or max(history) not in retired
    for step in retired:
        facts = history[step]
        assert facts is not None and facts.tag is None


@given(RULES, HISTORIES)
def test_the_rule_keeps_exactly_the_steps_that_it_names(rule: Retention, history: History) -> None:
    kept = history.keys() - set(to_retire(rule, list(history), facts_of(history)))
    if rule.last is None:
        assert kept == history.keys()
        return
    known = {s: h for s, h in history.items() if h is not None}
    wanted = set(sorted(history)[-rule.last :]) | {s for s in history if rule.every and s % rule.every == 0}
    if rule.best is not None:
        metric, which, count = rule.best
        ranked = [s for s, h in known.items() if metric in h.metrics and not math.isnan(h.metrics[metric])]
        for step in ranked:
            value = known[step].metrics[metric]
            better = sum(
                (other < value if which == "min" else other > value) or (other == value and s > step)
                for s, other in ((s, known[s].metrics[metric]) for s in ranked)
            )
            wanted |= {step} if better < count else set()
    wanted |= {s for s, h in history.items() if h is None or h.tag is not None}
    assert kept == wanted


@given(RULES, HISTORIES)
def test_applying_a_rule_twice_retires_nothing_more(rule: Retention, history: History) -> None:
    retired = set(to_retire(rule, list(history), facts_of(history)))
    left = [step for step in history if step not in retired]
    assert to_retire(rule, left, facts_of(history)) == []


def test_manifests_are_read_only_where_the_rule_depends_on_them() -> None:
    asked: list[int] = []

    def facts(step: int) -> StepFacts:
        asked.append(step)
        return StepFacts(step)

    assert to_retire(Retention(last=2, every=3), [1, 2, 3, 4, 5], facts) == [1, 2]
    assert asked == [1, 2]
    assert to_retire(KEEP_ALL, [1, 2, 3], facts) == to_retire(Retention(last=3), [1, 2, 3], facts) == []
    assert asked == [1, 2]


@given(RULES)
def test_a_stored_rule_round_trips(rule: Retention) -> None:
    assert decode_rule(encode_rule(rule)) == rule


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_an_invalid_stored_rule_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        decode_rule(raw)


LAST: list[Any] = [0, -1, True, 1.5, "2", 2**63]
EVERY: list[Any] = [0, False, []]
BEST: list[Any] = [(), ("loss", "least", 1), ("loss", "min", 0), (1, "min", 1), "loss", {}]
BAD = [{name: value} for name, values in (("last", LAST), ("every", EVERY), ("best", BEST)) for value in values]


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_a_rule_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(fields))} is "):
        Retention(**fields)  # type: ignore[arg-type]
    with pytest.raises(CorruptError):
        decode_rule(json.dumps({"last": 2, "every": None, "best": None, **fields}).encode())
