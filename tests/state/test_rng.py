"""The states of random generators go through a checkpoint, and the same numbers follow."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine


def draw() -> tuple[float, float, float, float]:
    return random.gauss(0, 1), numpy.random.standard_normal(), float(torch.rand(())), random.random()


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_the_same_numbers_follow(seed: int, drawn: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(drawn):  # an odd number leaves half of a pair of normal numbers behind
        draw()
    state = engine.rng_state()
    expected = [draw() for _ in range(3)]
    engine.set_rng_state(state)
    assert [draw() for _ in range(3)] == expected


def test_a_checkpoint_holds_them(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, staging_bytes=1 << 20, block_bytes=64 << 10) as eng:
        draw()
        eng.checkpoint(engine.Arena.wrap({"w": torch.zeros(1)}), extra={"rng": engine.rng_state()}).result()
        expected = [draw() for _ in range(3)]
        engine.set_rng_state(eng.extra()["rng"])
        assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize(
    "wrong", [{}, {"python": 1, "torch": 2}, {"python": random.getstate(), "torch": torch.zeros(3)}]
)
def test_what_is_no_state_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(engine.ArgumentError, match=r"engine\.rng_state\(\)"):
        engine.set_rng_state(wrong)
