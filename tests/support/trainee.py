"""The trainee: a training process to be killed, and the server that forks one for each of its lives.

    python tests/support/trainee.py        reads requests and writes answers, each a line of JSON

Theory of operation.  A life opens an Engine, verifies every step, restores the newest, and trains on with a lazy save
of every step until it is killed or reaches its end.  It logs events, one append each, which a kill cannot take back.
It logs a report of `result()` only after that has returned.  `kills` reads the log.

A `Life` says where a life ends.  "open" and "save" count the operations on the `Filesystem` during the open, or on the
thread that commits one save.  Number 2n ends the life before operation n and 2n + 1 after it; "before" a new file
means with half of it written.  "write" ends the life when a given part of a save's bytes is written.  In all these the
process kills itself.  At "time" the server kills it, a number of seconds after the fork.

So that the operations are the same each time, a life waits for its first saves one by one.  They leave spares that
were whole checkpoints, and the next save takes one.  With company, the save of the next step is in flight then: the
counted save commits once that one has come to C1 as well, where it waits until the counted save has ended.

Importing torch takes longer than a life, so the server imports everything that a training needs.  It has no threads and
no Engine when it forks, so the fork is as good as a fresh process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deadly import HANG_S, DeadlyFilesystem, Life, Log
from torch import nn

import engine

MAX_ASYNC = 2

# Some hundred blocks in a save, and as few slots as can be, so that writing them takes a while.
ENGINE_OPTIONS: Mapping[str, Any] = {"max_async": MAX_ASYNC, "block_bytes": 8 << 10, "staging_bytes": 16 << 10}

# 1.6 MB with AdamW's two moments, and 64 kB that no optimizer trains.
_INPUTS, _HIDDEN, _BATCH = 128, 512, 8

# After so many steps the frozen layer changes.
_FROZEN_STEPS = 5


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of all tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


class Training:
    """A model whose every step depends on all earlier ones, dropout's random numbers and running means included.

    Its first layer is frozen, and changes every few steps by other hands than the optimizer's.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._frozen = nn.Linear(_INPUTS, _INPUTS).requires_grad_(False)
        self._model = nn.Sequential(
            self._frozen,
            nn.Linear(_INPUTS, _HIDDEN),
            nn.BatchNorm1d(_HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(_HIDDEN, _INPUTS),
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self.arena = engine.Arena.adopt(self._model, self._optimizer)

    def step(self, number: int) -> None:
        """One step of training on the data of this number."""
        if number % _FROZEN_STEPS == 0:
            self._frozen.weight[number % _INPUTS].add_(0.01)
        data = torch.randn(_BATCH, _INPUTS, generator=torch.Generator().manual_seed(number))
        self._optimizer.zero_grad()
        loss: torch.Tensor = (self._model(data) - data).square().mean()
        loss.backward()
        self._optimizer.step()

    def digest(self) -> str:
        """The required content of a checkpoint of this moment."""
        return digest(self.arena.state_dict())


class _Trainee:
    """One life."""

    def __init__(self, life: Life, log: Log) -> None:
        self._life = life
        self._log = log
        self._filesystem = DeadlyFilesystem(life, log)
        self._training = Training()
        self._saves: deque[tuple[engine.Save, str]] = deque()

    def live(self) -> None:
        """From the opening to the end, unless it is killed."""
        life = self._life
        with engine.Engine(
            life.directory,
            keep=life.keep,
            backend=life.backend,  # type: ignore[arg-type]
            filesystem=self._filesystem,
            split_untrained=life.split,
            **ENGINE_OPTIONS,
        ) as eng:
            spares = os.listdir(Path(life.directory, ".engine/spare"))
            self._log("opened", steps=eng.steps(), spare_count=len(spares), names=os.listdir(life.directory))
            for step in eng.steps():
                self._log("loaded", step=step, digest=digest(eng.load(step)))
            first = self._resume(eng)
            unsettled = first + life.settled_count
            self._filesystem.aim(unsettled, unsettled + 1 if life.company else None)
            for step in range(first, first + life.step_count):
                self._step(eng, step, wait=step < unsettled)
                if step == unsettled:
                    self._target = self._saves[-1][0]
                if step == unsettled + life.company:
                    self._attend(self._target)
                while self._saves and self._saves[0][0].done():
                    self._report()
            while self._saves:
                self._report()
        self._log("closed")

    def _resume(self, eng: engine.Engine) -> int:
        """Restore the newest step, if there is one; returns the next step."""
        if not eng.steps():
            return 1
        restored = eng.restore(self._training.arena)
        torch.set_rng_state(restored.extra["rng"])
        passed_over = [found.reason for found in restored.passed_over]
        self._log("restored", step=restored.step, digest=self._training.digest(), passed_over=passed_over)
        return restored.step + 1

    def _step(self, eng: engine.Engine, step: int, wait: bool) -> None:
        self._training.step(step)
        state = self._training.digest()
        self._log("began", step=step)
        save = eng.checkpoint(self._training.arena, step, extra={"rng": torch.get_rng_state()})
        self._saves.append((save, state))
        if wait:
            save.result(HANG_S)

    def _attend(self, target: engine.Save) -> None:
        """See the counted save to where its life ends, if it ends there, and let its company go on."""
        if self._life.where == "write":
            self._die_writing(target)
        if self._life.where == "save":
            target.result(HANG_S)
        self._filesystem.release()

    def _report(self) -> None:
        """Say that the oldest save is durable, once it is."""
        save, state = self._saves.popleft()
        self._log("reported", step=save.result(HANG_S).step, digest=state)

    def _die_writing(self, save: engine.Save) -> None:
        nbytes = sum(file.nbytes for file in save.plan.files)
        while (written := _done_bytes(save)) < self._life.at * nbytes:
            os.sched_yield()  # the commit thread needs the interpreter's lock
        self._filesystem.die(line="W", step=save.step, written=written, nbytes=nbytes)


def _done_bytes(save: engine.Save) -> int:
    """How much of a save is written, or need not be."""
    stats = save.stats()
    return stats["io_bytes"] + stats["skipped_bytes"]


def live(life: Life) -> None:
    """Live one life, in its own process."""
    torch.set_num_threads(1)  # so that sums are formed in one order
    log = Log(life.log)
    log("started")
    if life.directory:
        _Trainee(life, log).live()
        return
    training = Training()
    for step in range(1, life.step_count + 1):
        training.step(step)
        log("reported", step=step, digest=training.digest())


def _fork(life: Life) -> int:
    """A process that lives this life; its pid."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        live(life)
        status = 0
    except BaseException:
        Log(life.log)("failed", what=traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    """Fork a life for each request, wait for its end, and report its status (-9 for a kill) and its seconds.

    A life that hangs is killed as well, and reported as such.
    """
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"Retention\(.*keeps fewer")  # lives of one directory differ in `keep`
    warnings.filterwarnings("ignore", "the kernel did not register")  # an ordinary user's memlock limit
    logging.getLogger("engine").addHandler(logging.StreamHandler())  # pytest shows the engine's log
    Training()  # torch imports a thousand modules late
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    for request in sys.stdin:
        life = Life(**json.loads(request))
        began = time.monotonic()
        child = _fork(life)
        ended = os.pidfd_open(child)
        in_time = bool(select.select([ended], [], [], life.at if life.where == "time" else HANG_S)[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        hung = not in_time and life.where != "time"
        answer = {"status": status, "hung": hung, "seconds": time.monotonic() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
