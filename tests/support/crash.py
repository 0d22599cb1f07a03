"""Crash: build a crash state, let the real code recover it, and check every promise.

Theory of operation.  A `Checker` builds the state of a `Case` in a fresh directory and opens an Engine there.  It
checks the promises of docs/durability.md.  Every step that was reported durable and not retired since exists.  Every
directory named `step-N` verifies whole and holds the state saved as that step.  The newest step is at least as new as
the newest one ever reported.  The engine saves one more step, which recycles a spare if there is one and changes
nothing else. Nothing beside the engine's directory changes.

Two cases with the same disk and the same promises are one state, which is checked once.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from cases import PLAIN, Case, Promise, Recorder, fresh
from recorder import RUN, SENTINEL, SENTINEL_CONTENT, SMALL, Change, materialise, unchanged
from scenarios import KINDS, RANKS, SCENARIOS, Kind, content, part_content, part_name, training
from simulator import Disk, Fates

import engine
from engine.errors import CorruptError, EngineError, EngineWarning
from engine.io.backend import Attempt, Probe
from engine.io.pipeline import Pipeline

# The probe that Engines report for the one pipeline that all checks share.
_PROBE = Probe("", "io_uring", (Attempt("io_uring"),))

# The payload that a check saves; no scenario uses this number.
_CHECK_PAYLOAD = 1 << 20


class Violation(AssertionError):
    """A crash state in which something does not hold."""


class Checker:
    """Builds crash states and checks the promises in each.

    Attributes:
        tried_count: crash states checked.
        distinct_count: those that differ from all others in their disk or their promises.
    """

    def __init__(self, recorder: Recorder, scratch: Path, pipeline: Pipeline) -> None:
        self._recorder = recorder
        self._scratch = scratch
        self._pipeline = pipeline
        self._seen: set[bytes] = set()
        self.tried_count = 0

    @property
    def distinct_count(self) -> int:
        return len(self._seen)

    def check(self, case: Case) -> None:
        """Build the state and check it.

        Raises:
            Violation: a promise is broken; the message names it, and how to reproduce it.
        """
        recorded = self._recorder.recorded(case)
        stop, fates = (case.stop, case.fates) if case.nesting == PLAIN else (case.second_stop, case.second_fates)
        trace = recorded.trace
        assert stop <= len(trace.operations), "the trace is shorter than the case says"
        disk = trace.cut(stop, Fates(fates, trace.pending(stop)))
        promise = recorded.promise(stop)
        owed = {step: promise.reported[step] for step in _named_steps(trace.live(stop)) if step in promise.reported}
        self.tried_count += 1
        twice_named = disk.twice_named()
        kind = KINDS[case.scenario]
        state = _digest(disk, promise, owed, twice_named, kind)
        if state in self._seen:
            return
        self._seen.add(state)
        try:
            if twice_named:
                raise Violation(f"under two names: {twice_named}")
            with fresh(self._scratch) as directory:
                materialise(disk, directory)
                self._recover(disk, promise, owed, directory, kind)
        except (EngineError, AssertionError) as error:
            raise Violation(
                f"{error}\n  {case}, of scenario {list(SCENARIOS)[case.scenario]}\n"
                f"  see it again with: python tests/support/crash_campaign.py --replay {case.number}"
            ) from error

    def _recover(self, disk: Disk, promise: Promise, owed: Mapping[int, set[int]], directory: Path, kind: Kind) -> None:
        named = _named_steps(disk)
        damaged = {step for step, inode in named.items() if inode in promise.damaged}
        good = sorted(named.keys() - damaged)
        with self._opened(directory) as eng:
            _require(eng.steps() == sorted(named), f"there are {sorted(named)}, and steps() says {eng.steps()}")
            self._verify(eng, promise, owed, good, damaged, kind)
            for step in good:
                _verify_parts(directory / RUN / f"step-{step:08d}")
            newest = max(promise.reported, default=-1)
            _require(max(good, default=-1) >= newest, f"step {newest} was durable, and now there are {good}")
            _restore_newest(eng, good, kind)
            training(kind).fill(_CHECK_PAYLOAD)
            saved = eng.checkpoint(training(kind).arena, snapshot="eager").result().step
        with self._opened(directory) as eng:
            _require(eng.steps() == [*sorted(named), saved], f"after a save, steps() says {eng.steps()}")
            training(kind).fill(0)
            _require(eng.restore(training(kind).arena).step == saved, "the newest is not what was saved last")
            _require(
                training(kind).content() == content(kind, _CHECK_PAYLOAD),
                "what was saved last is not what was restored",
            )
        _require_unchanged(disk, named, directory)

    def _verify(
        self,
        eng: engine.Engine,
        promise: Promise,
        owed: Mapping[int, set[int]],
        good: Sequence[int],
        damaged: set[int],
        kind: Kind,
    ) -> None:
        """Every listed step is whole and holds its saved state, and every promised step is listed."""
        missing = sorted(owed.keys() - set(good))
        _require(not missing, f"steps {missing} were durable, and are not there")
        for step in good:
            tensors = eng.load(step)
            loaded = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
            allowed = owed.get(step, promise.begun.get(step, set()))
            _require(
                loaded in [content(kind, payload) for payload in allowed],
                f"step {step} does not hold what was saved, {allowed}",
            )
        for step in damaged:
            try:
                eng.load(step)
            except CorruptError:
                continue
            raise Violation(f"step {step} was damaged, and is restored")

    @contextmanager
    def _opened(self, directory: Path) -> Iterator[engine.Engine]:
        """An Engine on the one pipeline that all checks share: opening a ring takes longer than all the rest."""
        with (
            warnings.catch_warnings(),
            mock.patch("engine.store.store.open_pipeline", lambda *_: (self._pipeline, _PROBE)),
            engine.Engine(directory / RUN, keep=None, max_async=1, **SMALL) as eng,
        ):
            warnings.simplefilter("ignore", EngineWarning)  # of damaged steps passed over
            yield eng


class KeptPipeline(Pipeline):
    """A pipeline that outlives its engines."""

    def close(self, timeout_ns: int | None = None) -> bool:
        """Not yet."""
        return False

    def end(self) -> None:
        """Now."""
        super().close()


@contextmanager
def checking(change: Change = unchanged) -> Iterator[tuple[Recorder, Checker]]:
    """A Recorder and a Checker, in memory where possible."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    pipeline = KeptPipeline(SMALL["staging_bytes"] // SMALL["block_bytes"], SMALL["block_bytes"])
    try:
        with tempfile.TemporaryDirectory(prefix="engine-crash-", dir=shared) as name:
            recorder = Recorder(Path(name), change)
            yield recorder, Checker(recorder, Path(name), pipeline)
    finally:
        pipeline.end()


def _restore_newest(eng: engine.Engine, good: Sequence[int], kind: Kind) -> None:
    if good:
        training(kind).fill(0)
        restored = eng.restore(training(kind).arena).step
        _require(restored == good[-1], f"the newest of {good} is not {restored}")


def _verify_parts(step: Path) -> None:
    """The parts of the manifest that several writers have sealed are all there, and whole."""
    parts = {path.name: path.read_bytes() for path in step.glob("manifest-*.json")}
    _require(parts in ({}, {part_name(rank): part_content(rank) for rank in RANKS}), f"{step} has the parts {parts}")


def _named_steps(disk: Disk) -> dict[int, int]:
    """The directories under a step's final name, by step, and their inodes."""
    run = disk.find(RUN)
    names = {} if run is None else disk.directories[run]
    steps = {name: re.fullmatch(r"step-(\d{8,})", name) for name in names}
    return {int(match.group(1)): names[name] for name, match in steps.items() if match}


def _require(truth: bool, what: str) -> None:
    if not truth:
        raise Violation(what)


def _require_unchanged(disk: Disk, named: Mapping[int, int], directory: Path) -> None:
    """Neither the files beside the engine's directory nor the earlier steps have changed."""
    _require(sorted(os.listdir(directory)) == sorted([RUN, SENTINEL]), f"beside {RUN} lies {os.listdir(directory)}")
    _require((directory / SENTINEL).read_bytes() == SENTINEL_CONTENT, "the sentinel has changed")
    for step, inode in named.items():
        path = directory / RUN / f"step-{step:08d}"
        there = {file.name: file.read_bytes() for file in path.iterdir()}
        was = {name: disk.files[file] for name, file in disk.directories[inode].items()}
        _require(there == was, f"step {step} has changed since")


def _digest(disk: Disk, *promised: Any) -> bytes:
    """Equal for two states in which the same is there and the same is promised."""
    shared = sorted(disk.shared().values())
    digest = hashlib.blake2b(repr((promised, shared)).encode(), digest_size=16)
    for path, inode in disk.walk():
        digest.update(path.encode() + b"\0")
        if inode in disk.files:
            digest.update(len(disk.files[inode]).to_bytes(8, "little") + disk.files[inode])
    return digest.digest()
