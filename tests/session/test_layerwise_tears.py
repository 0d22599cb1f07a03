"""Writers beside layerwise saves: none mixes one, where a guard or an eager snapshot promises that.

In each round layers are handed over in a random order, and between two of them a writer writes to all parameters.
Every layer must be as it was when it was handed over, or the save torn.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from guarded import KINDS_HERE
from tears import SlowFilesystem, digest, end_of
from writers import OPTIMIZERS, WRITERS, Model, Sight, Training, fork_workers, memory_view, spawn_workers

import engine
from engine.options import GuardName

GUARDS: tuple[GuardName, ...] = (*KINDS_HERE, "fence")
LAYERS = ["first", "second", "norm", "conv", "frozen", "low"]
ROUNDS = 60

# Those that start processes, or hold the GIL until the guard loses its patience, take seconds.
QUICK = [writer for writer in WRITERS if writer not in (spawn_workers, fork_workers, memory_view)]


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.filterwarnings("ignore::engine.EngineWarning")
def test_no_writer_mixes_a_layerwise_save(tmp_path: Path, guard: GuardName) -> None:
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    ends: Counter[tuple[str, str]] = Counter()
    model = Model()
    optimizer = OPTIMIZERS[chance.choice(list(OPTIMIZERS))]([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    training = Training(model, optimizer, chance)
    arena = engine.Arena.adopt(model, optimizer)
    options: dict[str, Any] = {"block_bytes": 64 << 10, "staging_bytes": 256 << 10, "guard": guard}
    with engine.Engine(tmp_path, filesystem=SlowFilesystem(0.005), **options) as eng:
        for number in range(ROUNDS):
            mode = chance.choice(["lazy", "lazy", "eager", "checked"])
            writer = chance.choice(QUICK)
            want: dict[str, Any] = {}
            writes = chance.random() < 0.7
            with eng.layerwise(arena, number, snapshot=mode) as save:  # type: ignore[arg-type]
                for layer in chance.sample(LAYERS, len(LAYERS)):
                    state = arena.state_dict()
                    names = [arena.segments[index].name for index in save._find(layer)]
                    want |= {name: digest(state[name]) for name in names}
                    save.layer_ready(layer)
                    if writes and chance.random() < 0.3:
                        writer(training)
            assert want.keys() == {segment.name for segment in arena.segments}
            end, mixed = end_of(eng, save, want)
            ends[mode, end] += 1
            may_mix = guard != "cow" and mode == "lazy" and WRITERS[writer] is not Sight.COUNTED
            assert end != "mixed" or may_mix, f"{writer.__name__}, {mode}, seed {seed}, round {number}: {mixed}"
    assert any(end == "exact" for _, end in ends), ends
    assert any(end == "torn" for _, end in ends), ends
