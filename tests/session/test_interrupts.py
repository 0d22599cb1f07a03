"""Ctrl-C at any moment of `checkpoint()` and `restore()`: nothing is torn, no place is lost, the engine goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.io.backend import LADDER

# A timer interrupts at random moments of calls that take about as long.  In a process of its own: an interrupt may
# as well strike in pytest, or in a callback of the collector, which then writes "Exception ignored" to stderr.
SCRIPT = """
import logging, random, signal, sys
import torch, engine

directory, count, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
random.seed(count)
logging.getLogger("engine").setLevel(logging.CRITICAL)
small = {"max_async": 2, "staging_bytes": 256 << 10, "block_bytes": 64 << 10, "backend": backend}
tensors = {"a": torch.zeros(200_000)}

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
eng, interrupted = engine.Engine(directory, **small), 0
for step in range(count):
    arena = engine.Arena.wrap(tensors)
    tensors["a"].fill_(step)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-3))
        if step % 3:
            eng.checkpoint(arena, step=3 * step)
        elif eng.steps():
            eng.restore(arena)
    except KeyboardInterrupt:
        interrupted += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    tensors["a"].fill_(-1)  # what an interrupted save must not see
    if step % 50 == 49:
        tensors["a"].fill_(step)
        arena = engine.Arena.wrap(tensors)
        saves = [eng.checkpoint(arena, step=3 * step + more) for more in (1, 2)]  # every place is free again
        for save in saves:
            save.result(timeout=60)
        for committed in eng.steps():
            values = eng.load(committed)["a"].unique()
            assert len(values) == 1 and values[0] != -1, (committed, values)
        if step % 100 == 99:
            eng.close()
            eng = engine.Engine(directory, **small)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
eng.close()
print(interrupted)
"""


@pytest.mark.parametrize("backend", LADDER)
def test_interrupts_at_random_moments(tmp_path: Path, backend: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "600", backend], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100, "hardly anything was interrupted"
