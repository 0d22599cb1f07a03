"""Runner: train undisturbed, train and kill, resume, and compare.

Theory of operation.  The runner imports the packages of a training, and forks each life from itself, because imports
take longer than tiny trainings.  It has no thread and has used no engine, so a fork is as good as a new process.  Each
life writes its events to a pipe.  The runner kills one with SIGKILL at a random moment after its first checkpoint,
while it trains and saves.  The stock safetensors library then reads the newest checkpoint.

A verdict is one of:

    same        every value of every step is that of the undisturbed training
    different   it is not, and no error was raised: the worst outcome
    refused     an EngineError was raised; the message is kept
    failed      anything else: another exception, a hang
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch._dynamo  # an optimizer's first step imports it, which takes a second
from catalog import Training
from life import MODEL, Plan, Run, tensor_digest
from safetensors.torch import load as load_safetensors

import engine

LAST = 8
# The killed life trains no further, so that there is always something left to do.
LAST_BEFORE_KILL = LAST - 3
# A step of the trainings takes milliseconds.  The kill comes up to this much later than the first checkpoint.
KILL_SECONDS = 0.03
# No training takes this long, on a machine that is busy with other work.
HANG_SECONDS = 240

Outcome = Literal["same", "different", "refused", "failed"]


class Verdict(NamedTuple):
    """How a training went.  `warnings` are those of the engine; `steps` are the resumed step and the last one."""

    name: str
    outcome: Outcome
    detail: str
    warnings: tuple[str, ...]
    seconds: float
    resumed_step: int


class Bad(Exception):
    """A life did not do what it should."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome: Outcome = outcome


def is_available(training: Training) -> bool:
    """Whether the packages of a training are installed."""
    return all(importlib.util.find_spec(package) is not None for package in training.needs)


def judge(training: Training, seed: int) -> Verdict:
    """Run all lives of a training."""
    import_packages(training.needs)
    chance = random.Random(f"{seed} {training.name}")
    start = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="engine-zoo-"))
    warned: list[str] = []
    resumed_step = 0
    outcome: Outcome = "same"
    detail = ""
    try:
        resumed_step = _lives(training, directory, chance, warned)
    except Bad as bad:
        outcome, detail = bad.outcome, str(bad)
    finally:
        shutil.rmtree(directory)
    unique = tuple(dict.fromkeys(warned))
    return Verdict(training.name, outcome, detail, unique, time.monotonic() - start, resumed_step)


def import_packages(packages: Sequence[str]) -> None:
    """Import what lives will need, before they are forked."""
    if packages:
        _let_torchvision_load()  # most of them import it
    for package in packages:
        importlib.import_module(package)


def _let_torchvision_load() -> None:
    """The torchvision of the package index may need CUDA where torch does not.

    Its Python then fails over two operators that its library would have defined, and works if they are declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules or _declared:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


_declared: list[torch.library.Library] = []  # they are undone when they are collected


def _lives(training: Training, directory: Path, chance: random.Random, warned: list[str]) -> int:
    """Run a training undisturbed, killed and resumed; returns the step that was resumed."""
    store = directory / "run"
    reference = _steps(_live(training, Plan(None, LAST), directory, None))
    plan = Plan(store, LAST_BEFORE_KILL, awaits_kill=True)
    killed = _live(training, plan, directory, chance)
    warned += [event["what"] for event in killed if event["event"] == "warned"]
    _compare(reference, _steps(killed), "before the kill")
    _read_as_safetensors(store, reference)
    resumed = _live(training, Plan(store, LAST), directory, None)
    warned += [event["what"] for event in resumed if event["event"] == "warned"]
    steps = _steps(resumed)
    start = next(event["step"] for event in resumed if event["event"] == "resumed")
    if start == 0:
        raise Bad("failed", "the resumed training began anew")
    _compare(reference, steps, f"resumed at step {start}")
    if max(step for _, step in steps) != LAST:
        raise Bad("failed", f"the resumed training ended after {sorted(steps)}")
    return int(start)


Steps = Mapping[tuple[int, int], Mapping[str, str]]


def _steps(events: Sequence[Mapping[str, Any]]) -> Steps:
    """The digests of every step of every rank."""
    return {(e["rank"], e["step"]): e["digests"] for e in events if e["event"] == "step"}


def _compare(reference: Steps, steps: Steps, when: str) -> None:
    for rank, step in sorted(steps, key=lambda key: key[1]):
        right, found = reference[rank, step], steps[rank, step]
        wrong = sorted(name for name in {*right, *found} if right.get(name) != found.get(name))
        if wrong:
            rest = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            what = ", ".join(wrong[:4]) + rest
            raise Bad("different", f"{when}, step {step} differs from the undisturbed training in {what}")


def _read_as_safetensors(store: Path, reference: Steps) -> None:
    """The stock library finds the tensors of the raw module's state_dict(), under its names."""
    newest = max(path for path in store.glob("step-*") if path.name[5:].isdigit())
    found = load_safetensors((newest / "model.safetensors").read_bytes())
    right = reference[0, int(newest.name[5:])]
    for name, tensor in found.items():
        if right.get(f"{MODEL}.{name}") != tensor_digest(tensor):
            raise Bad("different", f"{newest.name}/model.safetensors has another {name!r}, or the model has none")
    # A tied tensor is in the file under one of its names.
    digests = {tensor_digest(tensor) for tensor in found.values()}
    buffers = {name.removeprefix("buffers.") for name in right if name.startswith("buffers.")}
    for path, digest in right.items():
        kind, _, name = path.partition(".")
        if (kind == "parameters" or (kind == MODEL and name in buffers)) and digest not in digests:
            raise Bad("different", f"{newest.name}/model.safetensors lacks {name!r}")


# -- processes -------------------------------------------------------------------------------------------------------


def _live(training: Training, plan: Plan, directory: Path, kill: random.Random | None) -> list[dict[str, Any]]:
    """Fork the ranks of one life, and return their events.  With `kill` it ends by SIGKILL."""
    rendezvous = Path(tempfile.mkdtemp(dir=directory)) / "rendezvous"
    reader, writer = os.pipe()
    pids = []
    for rank in range(training.rank_count):
        own = plan._replace(rank=rank, rank_count=training.rank_count, rendezvous=rendezvous)
        pids.append(_fork(training, own, reader, writer))
    os.close(writer)
    try:
        events = list(_read_events(reader, pids, kill))
    except Bad:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(reader)
    for event in events:
        if event["event"] == "raised":
            raise Bad(event["outcome"], event["what"])
    if any(status not in (0, -signal.SIGKILL if kill else 0) for status in statuses):
        raise Bad("failed", f"the training ended with status {statuses}")
    return events


def _fork(training: Training, plan: Plan, reader: int, writer: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as events:
            status = _train(training, plan, events)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _train(training: Training, plan: Plan, events: Any) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    random.seed(0)
    np.random.seed(0)
    try:
        training.train(Run(plan, events))
        return 0
    except engine.EngineError as error:
        event = {"outcome": "refused", "what": f"{type(error).__name__}: {error}"}
    except Exception as error:
        traceback.print_exc()
        event = {"outcome": "failed", "what": f"{type(error).__name__}: {error}"}
    events.write(json.dumps({"rank": plan.rank, "event": "raised", **event}) + "\n")
    return 0


def _read_events(reader: int, pids: Sequence[int], kill: random.Random | None) -> Iterator[dict[str, Any]]:
    """Events until all writers are gone; kills them a random time after the second save has begun, or sooner."""
    deadline = time.monotonic() + HANG_SECONDS
    buffer = b""
    kill_at = float("inf")
    while True:
        until = min(deadline, kill_at)
        if select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
            data = os.read(reader, 1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                yield event
                # The first save is durable before the step after it begins.
                if kill is not None and (event["event"], event["rank"], event.get("step")) == ("step", 0, 3):
                    kill_at = time.monotonic() + kill.uniform(0, KILL_SECONDS)
        elif time.monotonic() >= deadline:
            raise Bad("failed", f"the training did not end within {HANG_SECONDS} s")
        else:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            kill_at = float("inf")
            kill = None
