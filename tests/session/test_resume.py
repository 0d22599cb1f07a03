"""`engine.resume`, as the first line of a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine

TINY: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


def test_a_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    seen = []
    for last in (3, 3, 7):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        with engine.Engine(tmp_path, **TINY) as eng:
            arena = engine.Arena.adopt(model)
            for step in range(engine.resume(arena, eng) + 1, last + 1):
                with torch.no_grad():
                    model.weight.fill_(step)
                eng.checkpoint(arena, step).result()
                seen.append(step)
            assert model.weight.eq(last).all()
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_a_damaged_run_is_no_new_run(tmp_path: Path) -> None:
    arena = engine.Arena.adopt(nn.Linear(2, 2))
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(arena, 5).result()
        (tmp_path / "step-00000005/manifest.json").write_bytes(b"{}")
        with pytest.warns(engine.EngineWarning), pytest.raises(engine.CorruptError):
            engine.resume(arena, eng)
