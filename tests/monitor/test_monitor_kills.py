"""Real kills of a trainer, its monitor, or both, in a life's opening, at operations and messages, and at any moment.

`monitored_kills` has the checks, and ``make monitor-kill-campaign`` is the long form.  The tests at the end show that
the checks detect what is wrong.
"""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly import kill_and_wait
from kills import VOLUMES, Lost, Outcome, Server, serving
from monitored_kills import CALLS, VICTIMS, MonitoredFigures, MonitoredOrdeal
from processes import descriptors
from volumes import volume

import engine
from engine.monitor.client import MonitoredStore

# One in so many operations, and so many kills at a random moment, for each victim: some dozens.
_EVERY, _RANDOM_COUNT, _KILLS_MIN = 20, 2, 24

# So many kinds of system calls, and one in some of each.
_CALLS, _CALLS_EVERY = 1, 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "monitored_lives.py") as running:
        yield running


def test_a_training_with_a_monitor_survives_kills_of_either(server: Server) -> None:
    """One file system here; the campaign has all."""
    figures = MonitoredFigures()
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    with volume("ext4", VOLUMES["ext4"]) as root:
        MonitoredOrdeal(server, root, "ext4", random.Random(seed), figures).suffer_all(VICTIMS, _EVERY, _RANDOM_COUNT)
    assert figures.kill_count >= _KILLS_MIN and figures.victims.keys() == set(VICTIMS), f"seed {seed}"
    assert figures.committed_count and figures.discarded_count, f"no save of a dead trainer has ended so: seed {seed}"
    assert figures.lost_count, f"no save has lost its monitor: seed {seed}"


def test_a_training_with_a_monitor_survives_kills_at_system_calls(server: Server, tmp_path: Path) -> None:
    """A few kinds of them; the campaign has all."""
    figures = MonitoredFigures()
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    calls = ["sendmsg,sendto", *chance.sample(CALLS, _CALLS)]
    MonitoredOrdeal(server, tmp_path, "any", chance, figures).suffer_calls(("trainer", "monitor"), calls, _CALLS_EVERY)
    assert figures.victims.keys() == {"trainer", "monitor"}, f"seed {seed}: {figures.victims}"


# -- what the campaign has found ------------------------------------------------------------------------------------


def kill_monitor(eng: engine.Engine) -> MonitoredStore:
    store = eng._store
    assert isinstance(store, MonitoredStore)
    kill_and_wait(store._monitors.last.pid)
    return store


def test_a_save_that_is_being_begun_while_the_monitor_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun again with the new one, and training does not notice."""
    arena = engine.Arena.wrap({"a": torch.ones(1 << 16)})
    refresh = engine.Arena.refresh

    def replace(arena: engine.Arena) -> None:
        monkeypatch.undo()
        kill_monitor(eng).retire()  # as the end of the save before does, on another thread
        refresh(arena)

    with engine.Engine(tmp_path, isolation="process") as eng:
        eng.checkpoint(arena, step=1).result()
        monkeypatch.setattr(engine.Arena, "refresh", replace)
        assert eng.checkpoint(arena, step=2).result().step == 2


def test_a_request_to_a_dead_monitor_leaves_nothing(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, isolation="process") as eng:
        monitor = kill_monitor(eng)._monitors.last
        gc.collect()  # or what earlier tests have left is closed meanwhile
        before = descriptors()
        with warnings.catch_warnings(record=True) as found, pytest.raises(engine.MonitorLostError):
            warnings.simplefilter("always")
            monitor.open_request()
        assert descriptors() == before and not found


# -- what the checks detect -----------------------------------------------------------------------------------------


@pytest.fixture
def ordeal(server: Server, tmp_path: Path) -> MonitoredOrdeal:
    return MonitoredOrdeal(server, tmp_path, "any", random.Random(0), MonitoredFigures())


def ended(*events: tuple[str, int], status: int = -9, **fields: Any) -> Outcome:
    """A life with these events of steps."""
    return Outcome(status, hung=False, seconds=0.0, events=[{"event": e, "step": s} for e, s in events], **fields)


def test_a_staged_save_that_is_not_committed_is_detected(ordeal: MonitoredOrdeal) -> None:
    life = ended(("began", 3), ("marking", 3), ("marked", 3))
    ordeal._look_at_marks(life, "trainer", [2, 3])
    with pytest.raises(Lost, match="were staged"):
        ordeal._look_at_marks(life, "trainer", [2])


def test_a_save_that_is_committed_before_it_was_staged_is_detected(ordeal: MonitoredOrdeal) -> None:
    ordeal._look_at_marks(ended(("began", 3), ("marking", 3)), "both", [2, 3])
    with pytest.raises(Lost, match="were not staged"):
        ordeal._look_at_marks(ended(("began", 3)), "both", [2, 3])


def test_a_training_that_does_not_go_on_is_detected(ordeal: MonitoredOrdeal) -> None:
    events = [("began", 3), ("lost", 3), ("began", 4)]
    ordeal._look_at_marks(ended(*events, ("reported", 4)), "monitor", [])
    with pytest.raises(Lost, match="was not reported"):
        ordeal._look_at_marks(ended(*events), "monitor", [])


def test_a_monitor_that_fails_and_leftovers_are_detected(ordeal: MonitoredOrdeal) -> None:
    ordeal._look_at_orphans(ended(orphans=[0]), "trainer")
    with pytest.raises(Lost, match="has ended with status"):
        ordeal._look_at_orphans(ended(orphans=[-6]), "both")
    left = Outcome(0, False, 0.0, [{"event": "closed", "left": ["socket:[1]"]}])
    with pytest.raises(Lost, match="has left"):
        ordeal._look_at_orphans(left, "none")


def test_damage_that_a_life_finds_is_detected(ordeal: MonitoredOrdeal, tmp_path: Path) -> None:
    ordeal.end()
    (step,) = (tmp_path / "run").glob("step-*")
    path = step / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Lost, match="CorruptError"):
        ordeal.end()
