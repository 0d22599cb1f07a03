"""A training with a monitor that kills itself at one moment of a save; `tests/monitor/test_deaths` runs it.

Usage: monitored_trainee.py DIRECTORY MOMENT GUARD

It commits step 1, begins step 2, and dies by SIGKILL at the moment, or ends by itself in another way.  Before that it
writes the checkpoint of step 2 as plain bytes beside the run, `want.bin`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine
from engine.io.job import Job, Milestone
from engine.io.pipeline import Pipeline
from engine.monitor.client import MonitoredStore
from engine.monitor.protocol import Channel
from engine.monitor.shared_memory import Board


def _replace(owner: type, name: str, method: Callable[..., Any]) -> None:
    setattr(owner, name, method)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_at_message(kind: str, when: str) -> None:
    """Before or after a message of this kind is sent."""
    real = Channel.send

    def send(channel: Channel, message: Any, descriptors: Any = ()) -> None:
        if type(message).__name__ == kind and when == "before":
            die()
        real(channel, message, descriptors)
        if type(message).__name__ == kind and when == "after":
            die()

    _replace(Channel, "send", send)


def die_after_answer(kind: str) -> None:
    """When an answer of this kind has come."""
    real = Channel.expect

    def expect(channel: Channel, wanted: Any) -> Any:
        message = real(channel, wanted)
        if type(message).__name__ == kind:
            die()
        return message

    _replace(Channel, "expect", expect)


def die_around(owner: type, name: str, when: str) -> None:
    """Before or after a method."""
    real: Callable[..., Any] = getattr(owner, name)

    def method(*arguments: Any) -> Any:
        if when == "before":
            die()
        result = real(*arguments)
        if when == "after":
            die()
        return result

    _replace(owner, name, method)


def die_while_written(share: float) -> None:
    """When this share of the blocks is written, or when all are staged."""
    real = Pipeline.attach

    def attach(pipeline: Pipeline, job: Job, *arguments: Any) -> None:
        def watch() -> None:
            while sum(state == 2 for state in job.states()) < share * job.block_count:
                pass
            die()

        threading.Thread(target=watch, daemon=True).start()
        real(pipeline, job, *arguments)

    _replace(Pipeline, "attach", attach)


def arm(moment: str) -> None:
    """Have this process die at a moment of the next save."""
    kind, _, argument = moment.partition(":")
    if kind in ("before", "after"):
        names = {"attach": (Pipeline, "attach"), "mark_staged": (Board, "mark_staged")}
        if argument in names:
            die_around(*names[argument], kind)
        else:
            die_at_message(argument, kind)
    elif kind == "answered":
        die_after_answer(argument)
    elif kind == "written":
        die_while_written(float(argument))
    elif kind == "random":
        threading.Timer(float(argument), die).start()


def main(directory: str, moment: str, guard: str) -> None:
    torch.manual_seed(1)
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    arena = engine.Arena.adopt(model, optimizer)
    options: dict[str, Any] = {"block_bytes": 64 << 10, "guard": guard, "isolation": "process"}
    eng = engine.Engine(directory, staging_bytes=1 << 20, **options)
    eng.checkpoint(arena, step=1, extra={"step": 1}).result()
    assert isinstance(eng._store, MonitoredStore)
    with torch.no_grad():
        model.weight.mul_(2)
    Path(directory + ".want").write_bytes(model.weight.detach().numpy().tobytes())
    Path(directory + ".pid").write_text(str(eng._store._monitors.last.pid))
    arm(moment)
    save = eng.checkpoint(arena, step=2, extra={"step": 2}, metrics={"loss": 0.5}, tag="last")
    if moment == "exec":
        save.wait_milestone(Milestone.STAGED)
        while not eng._store.writer or not save.chunks() or save.chunks()[0].status == "pending":
            pass
        os.execv("/bin/true", ["true"])
    elif moment == "exit":
        sys.exit(0)
    elif moment == "fork_and_die":
        if os.fork() == 0:
            time.sleep(20)  # outlives its parent
            os._exit(0)
        die()
    save.result()
    time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
