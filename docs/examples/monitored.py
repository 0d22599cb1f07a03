"""A training whose process is killed while its checkpoint is written, and whose monitor commits it.

    python docs/examples/monitored.py DIRECTORY

It saves two steps.  When all of the second one is staged, it kills itself (SIGKILL).
"""

from __future__ import annotations

import os
import signal
import sys

import torch

import engine


def main(directory: str) -> None:
    model = torch.nn.Linear(4096, 4096)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    eng = engine.Engine(directory, isolation="process")
    for step in (1, 2):
        model(torch.randn(1, 4096)).square().sum().backward()
        optimizer.step()
        save = eng.checkpoint(arena, step=step)
        if step == 1:
            save.result()
    run = engine.open(directory)
    while not any(status.is_safe for status in run.in_flight()):
        if save.done():
            sys.exit("step 2 was committed too soon for this example")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
