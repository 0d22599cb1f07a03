"""What every test shares: how hypothesis looks for counterexamples, and over which backends a test runs.

Two cores shared with others make any deadline a coin toss, so there is none.  In CI the examples are the same
each time, so that a change is judged by what it changes; at a desk they differ, and find more.

A test marked `every_backend` runs once for each rung of the ladder (engine/backend.py): its Engines find no other.
What compares trainings bit by bit asks for `one_thread`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from engine import backend

settings.register_profile("engine", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("engine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked so over every rung."""
    if metafunc.definition.get_closest_marker("every_backend"):
        metafunc.parametrize("rung", backend.LADDER, indirect=True)


@pytest.fixture(autouse=True)
def rung(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one backend that ``"auto"`` finds; without the mark it finds what the host has."""
    only: str = getattr(request, "param", backend.LADDER[0])
    if only != backend.LADDER[0]:
        monkeypatch.setattr(backend, "LADDER", (only,))
    return only


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them; and there are few cores to share."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
