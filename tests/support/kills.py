"""Kills: a training is killed again and again in one directory, and the promises are checked after every kill.

Theory of operation.  `Server` runs `trainee.py`, which forks a process for each life.  An `Ordeal` is the history of
one directory on one file system: life after life, each killed at another point, and a last one that is not killed.

After each life the test reads the disk itself, with the stock safetensors library and no Engine.  Every directory named
`step-N` holds, bit for bit, the state of an undisturbed training after N steps.  The newest is at least as new as the
newest one ever reported.  Leftovers stay within bounds.  Nothing beside the directory has changed.

The next life reports on the engine: it opened at once, although the last owner of the lock was killed; each step
verified; it restored the newest and passed over none.  The reference is computed apart, without an Engine, so no life
is trusted about its own bytes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from deadly import Life
from trainee import MAX_ASYNC, digest

from engine.errors import CorruptError
from engine.format.manifest import decode
from engine.io.backend import LADDER

# Each life draws one, so that a checkpoint of one backend is restored and recycled by another.
BACKENDS = ("auto", *LADDER)

# The file systems and their sizes: room for some dozens of the trainee's checkpoints, or the minimum of mkfs.
VOLUMES = {"ext4": 128 << 20, "xfs": 320 << 20, "btrfs": 256 << 20, "tmpfs": 128 << 20}

# Every line of docs/durability.md that changes anything.
LINES = {
    *("O1", "O3", "O4", "O5", "O6", "O7", "O9"),
    *("B1", "B2", "B3", "W", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"),
    *("R1", "R2", "R3"),
}

# In how many parts of its bytes a save is killed while they are being written, and how often that is tried: on a noisy
# machine one in three is killed before all are written.
_PARTS, _TRIES_MAX = 8, 8

# Here all writes usually end before another thread runs, so a kill between them is not required.
IN_MEMORY = ("tmpfs",)

# The steps of a life that is killed at a random moment, and of one that measures the time: most of it saves.
_ENDLESS_COUNT, _MEASURED_COUNT = 200, 20

# With three kept, and then one, more is retired at once than may stay as spares: three, of which one is deleted.
_KEEP_MAX = 3

# This many saves leave max_async spares that are whole checkpoints, for any directory before.
_SETTLED_COUNT = MAX_ASYNC

# The number of no operation.
_NEVER = -1

# Bounds on the leftovers right after a kill, after any number of kills.  An opening leaves max_async spares and no
# partial.  Each save in flight may then leave a partial, or a step that was not retired.  A retirement moves all but
# one of the steps to spare, as an opening does with the partials, before anything there is deleted.
_PARTIAL_MAX = MAX_ASYNC
_STEP_MAX = _KEEP_MAX + MAX_ASYNC
_SPARE_MAX = MAX_ASYNC + _STEP_MAX + _PARTIAL_MAX

# The files of a step, and those of one with untrained tensors in files of their own.
_FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors"]
_SPLIT_FILES = [
    "manifest.json",
    *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    *("model.safetensors.index.json", "optimizer.safetensors"),
]

_SENTINEL = b"not the engine's\n"


class Lost(AssertionError):
    """A promise was broken after a kill."""


class Server:
    """A running `trainee.py`."""

    def __init__(self, scratch: Path, program: str = "trainee.py") -> None:
        """Logs go to `scratch`; the program is beside this file."""
        self._log = scratch / "log"
        # One thread each: a fork takes no others along.
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **alone},
        )
        self._reference: list[str] = []

    def live(self, directory: Path | str, **life: Any) -> Outcome:
        """Run one life; returns its end and its log."""
        self._log.unlink(missing_ok=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(Life(str(directory), str(self._log), **life))) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise Lost("the server that forks trainees has ended; what it said is above")
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return Outcome(**json.loads(answer), events=[json.loads(line) for line in lines])

    def reference(self, step: int) -> str:
        """The digest of an undisturbed training after so many steps."""
        if step > len(self._reference):
            outcome = self.live("", step_count=max(2 * step, 500))
            require(outcome.status == 0, f"the reference failed: {outcome.events}")
            self._reference = [event["digest"] for event in outcome.of("reported")]
        return self._reference[step - 1]

    def close(self) -> None:
        """End it."""
        with self._process as process:
            process.kill()


@contextmanager
def serving(scratch: Path, program: str = "trainee.py") -> Iterator[Server]:
    """A Server until the end of the `with` block."""
    server = Server(scratch, program)
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True)
class Outcome:
    """The end of a life: its exit status from the server's waitpid, its duration, and its log.

    A life that hung was killed too, but not by request.  Orphans: the statuses of the processes that it has left
    (`monitored_lives`).
    """

    status: int
    hung: bool
    seconds: float
    events: Sequence[dict[str, Any]]
    orphans: Sequence[int] = ()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def was_killed(self) -> bool:
        """Whether waitpid reported SIGKILL."""
        return self.status == -signal.SIGKILL

    def numbers(self, line: str) -> list[int]:
        """Where to kill at each operation of this line: before and after it."""
        asked = [event["number"] for event in self.of("asked") if event["line"] == line]
        return [number + edge for number in asked for edge in (0, 1)]

    @property
    def in_flight(self) -> int:
        """How many saves had begun and were not reported."""
        return len(self.of("began")) - len(self.of("reported"))

    @property
    def phase(self) -> str:
        """The point where it ended: a line of the sequence, or an activity outside of it."""
        if dying := self.of("dying"):
            return str(dying[0]["line"]).split()[0]
        operations = [event for event in self.events if event["event"] in ("asked", "did")]
        if self.in_flight and self.of("began"):
            last = operations[-1]
            if last["step"] is None:
                return "staging"
            return "W" if last["event"] == "did" and last["operation"] == "allocate" else str(last["line"])
        if self.of("opened"):
            return "training" if self.of("began") else "restore"
        return str(operations[-1]["line"]).split()[0] if operations else "start"


@dataclass
class Figures:
    """Counters of the kills, to check that there were enough.

    Attributes:
        phases: kills by file system and phase.
        backends: kills by backend.
        life_count: all lives, those that were not killed too.
        random_count, random_in_flight_count: kills at a random moment, and those of them that hit a save in flight.
        torn_count: kills when some of a save's bytes were written, and some not.
        recycled_count: saves that took a spare.
        linked_count: files that were linked from the step before.
    """

    phases: Counter[tuple[str, str]] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    life_count: int = 0
    random_count: int = 0
    random_in_flight_count: int = 0
    torn_count: int = 0
    recycled_count: int = 0
    linked_count: int = 0

    @property
    def kill_count(self) -> int:
        """All kills, each reported by waitpid."""
        return self.phases.total()

    def note(self, kind: str, backend: str, where: str, outcome: Outcome) -> None:
        """Count a life."""
        self.life_count += 1
        # C5 is there only where B2 has taken a spare.
        self.recycled_count += sum(event["line"] == "C5" for event in outcome.of("did"))
        self.linked_count += sum(
            event["line"] == "L1" and event["operation"] == "rename" for event in outcome.of("did")
        )
        if not outcome.was_killed:
            return
        self.phases[kind, outcome.phase] += 1
        self.backends[backend] += 1
        self.torn_count += any(0 < e["written"] < e["nbytes"] for e in outcome.of("dying") if "written" in e)
        if where == "time":
            self.random_count += 1
            self.random_in_flight_count += outcome.in_flight > 0


class Ordeal:
    """One directory's history.

    Args:
        server: forks the lives.
        volume: the file system; the engine's directory is made in it, beside a sentinel.
        kind: its name in the figures.
        chance: the source of random backends and points.
        figures: the counters of the lives.
        split: whether untrained tensors have files of their own.
    """

    def __init__(
        self,
        server: Server,
        volume: Path,
        kind: str,
        chance: random.Random,
        figures: Figures,
        split: bool = False,
    ) -> None:
        self._split = split
        self._server = server
        self._directory = volume / "run"
        self._sentinel = volume / "sentinel"
        self._kind = kind
        self._chance = chance
        self._figures = figures
        self._reported = 0  # the newest step that any life has reported
        self._open_number = 0
        shutil.rmtree(self._directory, ignore_errors=True)  # an earlier ordeal's
        self._sentinel.write_bytes(_SENTINEL)
        self._beside = self._look_beside()

    # -- the lives ------------------------------------------------------------------------------------------------

    def suffer(self, companies: Sequence[bool], random_count: int) -> None:
        """Each operation of an opening and of a save, with or without company; the middle of its writes; any moment."""
        self.first_openings()
        for company in companies:
            self.saves(company)
        self.trimming()
        self.writes()
        self.moments(random_count)
        self.end()

    def first_openings(self) -> None:
        """Killed at each operation of an opening that finds nothing, not even the directory."""
        for number in count():
            shutil.rmtree(self._directory, ignore_errors=True)
            if not self._live("open", number, step_count=0).was_killed:
                return
            if number % 2:  # before an operation is what was after the one before it
                self._live(step_count=0)

    def saves(self, company: bool) -> None:
        """Killed at each operation of a save, and after every other one of these kills in the next opening."""
        for number in count():
            life = {"company": company, "step_count": _SETTLED_COUNT + 2, "settled_count": _SETTLED_COUNT}
            if not self._live("save", number, **life).was_killed:
                return
            if number % 2:
                opening = self._live("open", self._open_number, step_count=0)
                self._open_number = self._open_number + 1 if opening.was_killed else 0

    def trimming(self) -> None:
        """Killed at each deletion of surplus spares by a save, and each time again in the opening that continues it,
        after its first deletion."""
        numbers = self._trim(_NEVER).numbers("R3")
        require(bool(numbers), "a save has deleted none of the surplus spares")
        self._trim(numbers[0])
        following = self._live("open", _NEVER).numbers("O7")
        require(bool(following), "an opening has deleted none of the spares that are too many")
        for number in numbers:
            self._trim(number)
            self._live("open", following[1])

    def _trim(self, number: int) -> Outcome:
        """A life that retires more than may stay, after one that kept it."""
        # Serially, so that one spare is there besides the three steps, and the next save takes it.
        self._live(keep=_KEEP_MAX, settled_count=_KEEP_MAX + 1, step_count=_KEEP_MAX + 1)
        return self._live("save", number, keep=1, step_count=1)

    def writes(self) -> None:
        """Killed while the blocks of a save are being written; at least once, except on tmpfs."""
        before = self._figures.torn_count
        for number in range(_PARTS * _TRIES_MAX):
            if number >= _PARTS and (self._figures.torn_count > before or self._kind in IN_MEMORY):
                return
            at = (number % _PARTS + self._chance.random()) / _PARTS
            self._live("write", at, company=bool(number % 2))

    def moments(self, random_count: int) -> None:
        """Killed at a moment in the time that a few steps take."""
        seconds = self._live(step_count=_MEASURED_COUNT).seconds
        for _ in range(random_count):
            keep = self._chance.randint(1, _KEEP_MAX)
            self._live("time", self._chance.uniform(0, seconds), step_count=_ENDLESS_COUNT, keep=keep)

    def end(self) -> None:
        """A life to its end: the training ends like an undisturbed one."""
        last = self._live()
        require(not last.was_killed, "the last life was killed")
        steps = self.look()
        require(steps == [last.of("reported")[-1]["step"]], f"keep=1 has left {steps}")

    def _live(self, where: str = "", at: float = 0, step_count: int = 4, keep: int = 1, **life: Any) -> Outcome:
        """One life, and checks of its log and its files."""
        backend = self._chance.choice(BACKENDS)
        life |= {
            "where": where,
            "at": at,
            "step_count": step_count,
            "backend": backend,
            "keep": keep,
            "split": self._split,
        }
        outcome = self._server.live(self._directory, **life)
        self._figures.note(self._kind, backend, where, outcome)
        try:
            self._look_at_log(outcome, is_mortal=bool(where))
            self.look()
        except Lost as lost:
            raise Lost(
                f"{lost}\n  on {self._kind}, in {outcome.phase}, life {self._figures.life_count}: {life}"
            ) from lost
        return outcome

    # -- what has to hold -----------------------------------------------------------------------------------------

    def _look_at_log(self, outcome: Outcome, is_mortal: bool) -> None:
        failed = [event["what"] for event in outcome.of("failed")]
        require(not failed, "".join(failed))
        require(not outcome.hung, f"it hung; the last that it said was {outcome.events[-1:]}")
        require(outcome.status == 0 or (outcome.was_killed and is_mortal), f"it ended with status {outcome.status}")
        for opened in outcome.of("opened"):
            newest = max(opened["steps"], default=0)
            require(newest >= self._reported, f"step {self._reported} was reported, and {opened['steps']} are there")
            require(opened["spare_count"] <= MAX_ASYNC, f"an open has left {opened['spare_count']} spares")
            partials = [name for name in opened["names"] if name.endswith(".partial")]
            require(not partials, f"an open has left {partials}")
            for restored in outcome.of("restored"):
                require(restored["step"] == newest, f"step {restored['step']} was restored, and {newest} is there")
                require(not restored["passed_over"], f"passed over: {restored['passed_over']}")
        for event in outcome.events:
            if event["event"] in ("loaded", "restored", "reported"):
                right = event["digest"] == self._server.reference(event["step"])
                require(right, f"step {event['step']} was {event['event']}, and is not what it should be")
        self._reported = max([self._reported, *(event["step"] for event in outcome.of("reported"))])

    def look(self) -> list[int]:
        """The steps on the disk, after checking that each is right and all leftovers are within bounds."""
        require(self._look_beside() == self._beside, f"beside {self._directory} something has changed")
        names = os.listdir(self._directory) if self._directory.exists() else []
        partials = [name for name in names if name.endswith(".partial")]
        named = [re.fullmatch(r"step-(\d{8,})", name) for name in names if name not in (".engine", *partials)]
        require(all(named), f"nobody knows what to make of one of {sorted(names)}")
        steps = sorted(int(match.group(1)) for match in named if match)
        for step in steps:
            self._look_at_step(step)
        require(max(steps, default=0) >= self._reported, f"step {self._reported} was reported, and {steps} are there")
        require(len(steps) <= _STEP_MAX and len(partials) <= _PARTIAL_MAX, f"left over: {sorted(names)}")
        spares = self._directory / ".engine/spare"
        left = os.listdir(spares) if spares.exists() else []
        require(len(left) <= _SPARE_MAX, f"spares: {sorted(left)}")
        return steps

    def _look_at_step(self, step: int) -> None:
        path = self._directory / f"step-{step:08d}"
        require(sorted(os.listdir(path)) == (_SPLIT_FILES if self._split else _FILES), str(path))
        try:
            manifest = decode((path / "manifest.json").read_bytes())
        except CorruptError as error:
            raise Lost(f"{path}: {error}") from error
        require(manifest.step == step, f"{path} has the manifest of step {manifest.step}")
        tensors: dict[str, torch.Tensor] = {}
        for file in manifest.files:
            try:
                # Read, not mapped: an engine does not reuse a mapped file.
                tensors |= safetensors.torch.load((path / file.name).read_bytes())
            except safetensors.SafetensorError as error:
                raise Lost(f"{path / file.name}: {error}") from error
        require(digest(tensors) == self._server.reference(step), f"{path} does not hold step {step}")

    def _look_beside(self) -> Any:
        """Everything that an intruder would change."""
        volume = self._sentinel.parent
        status = self._sentinel.stat()
        names = sorted(set(os.listdir(volume)) - {self._directory.name})
        return names, self._sentinel.read_bytes(), status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def require(truth: bool, what: str) -> None:
    if not truth:
        raise Lost(what)
