"""Scenarios: short lives of an engine, with a simulated crash at every instant.

Theory of operation.  Each is a function that drives an engine in a `World` and records the engine's reports:

* ``began`` a save of a step with a payload; ``reported`` when its `result()` has returned,
* ``listed`` when an open lists a step, which promises as much as a report,
* ``rolling back`` to a step before the call and ``rolled back`` after it.

A payload is a number that determines the contents of all tensors.  In most scenarios every tensor changes with it;
`KINDS` names those with frozen parameters, whose contents change with every hundred of payloads.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from disk import FAILURES
from jobs import until
from recorder import World
from simulator import Sync
from torch import nn

import engine
from engine.errors import CorruptError, StorageError
from engine.format.manifest import DigestedFile
from engine.session.save import Save
from engine.store.commit import publish, seal
from engine.store.owner import Owner

# The payload that `recover` saves; no scenario uses this number.
_RECOVERY_PAYLOAD = 1 << 10

_HANG_S = 60  # ends a test whose threads wait for each other; nothing here takes a second


# Of a scenario's training: all is trained, or a layer is frozen and in the file of the others, or in one of its own.
Kind = Literal["trained", "frozen", "split"]

# Payloads with the same frozen parameters.
_BASE_PAYLOADS = 100


class Training:
    """A model and an optimizer whose state fills two files of three blocks each: header, a whole block, a short one.

    With a frozen layer the blocks after the header are that layer's, and what is trained is small.
    """

    def __init__(self, kind: Kind) -> None:
        model = nn.Linear(30, 40) if kind == "trained" else nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 2))
        if isinstance(model, nn.Sequential):
            model[0].requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        model(torch.zeros(30)).sum().backward()
        optimizer.step()
        self._owners = model, optimizer
        self.arena = engine.Arena.adopt(model, optimizer, split_untrained=kind == "split")
        self._tensors = dict(sorted(self.arena.state_dict().items()))
        self._frozen = {name for name, param in model.named_parameters() if not param.requires_grad}

    def fill(self, payload: int) -> None:
        """Make the tensors hold a payload."""
        trained = torch.Generator().manual_seed(payload)
        frozen = torch.Generator().manual_seed(-1 - payload // _BASE_PAYLOADS)
        for name, tensor in self._tensors.items():
            tensor.copy_(torch.rand(tensor.shape, generator=frozen if name in self._frozen else trained))

    def content(self) -> bytes:
        """The contents of the tensors, in order of name."""
        return b"".join(tensor.numpy().tobytes() for tensor in self._tensors.values())


@functools.cache
def training(kind: Kind) -> Training:
    """The one that all saves of a scenario are of."""
    return Training(kind)


@functools.cache
def content(kind: Kind, payload: int) -> bytes:
    """The contents of the tensors with this payload."""
    training(kind).fill(payload)
    return training(kind).content()


class Session:
    """An open engine, and the notes of its reports.

    Attributes:
        base: decides what the frozen parameters hold.
    """

    def __init__(self, world: World, eng: engine.Engine, payloads: Iterator[int], kind: Kind) -> None:
        self.world = world
        self.engine = eng
        self.base = 0
        self.training = training(kind)
        self._payloads = payloads

    def begin(self, step: int) -> tuple[Save, int]:
        """Start a save of new contents."""
        payload = next(self._payloads) + self.base * _BASE_PAYLOADS
        self.training.fill(payload)
        self.world.note("began", step, payload)
        with self.world.staging():
            return self.engine.checkpoint(self.training.arena, step, snapshot="eager"), payload

    def end(self, begun: tuple[Save, int]) -> None:
        """Wait until a save is durable."""
        save, payload = begun
        self.world.note("reported", save.result(_HANG_S).step, payload)

    def save(self, *steps: int) -> None:
        """Saves, one after the other."""
        for step in steps:
            self.end(self.begin(step))

    def attempt(self, step: int) -> None:
        """A save of which one operation is refused.  Its own report is the promise."""
        begun = self.begin(step)
        if begun[0].exception(_HANG_S) is None:
            self.end(begun)


@contextmanager
def session(world: World, payload: int = 1, kind: Kind = "trained", **options: Any) -> Iterator[Session]:
    """An engine in a World."""
    with world.running(**options) as eng:
        yield Session(world, eng, itertools.count(payload), kind)


def first_save(world: World) -> None:
    with session(world, keep=2, max_async=1) as it:
        it.save(1)


def recycled_save(world: World) -> None:
    with session(world, keep=1, max_async=1) as it:
        it.save(1, 2, 3)


def retirement(world: World) -> None:
    """Of several at once, more than may stay as spares."""
    with session(world, keep=None, max_async=1) as it:
        it.save(1, 2, 3)
    with session(world, payload=11, keep=1, max_async=1) as it:
        it.save(4, 5)


def rollback(world: World) -> None:
    """Training continues from an earlier step, and passes the later ones again."""
    with session(world, keep=None, max_async=1) as it:
        it.save(1, 2, 3)
        world.note("rolling back", 1)
        it.engine.rollback(1)
        world.note("rolled back", 1)
        it.save(2, 3)


def set_aside(world: World) -> None:
    """The newest is damaged; a restore passes over it, and training reaches it again."""
    with session(world, keep=2, max_async=1) as it:
        it.save(1, 2)
        world.damage(2)
        assert it.engine.restore(it.training.arena).step == 1
        it.save(2, 3)


def leftovers(world: World) -> None:
    """A save that failed and could not be deleted; the next open makes it a spare, and a save takes that."""
    with session(world, keep=1, max_async=1) as it:
        it.save(1, 2)
        with refusing(world, "write_new_file"), refusing(world, "unlink", place=1):  # the first is B2
            it.attempt(3)
    with session(world, payload=11, keep=1, max_async=1) as it:
        it.save(3)


def elided_save(world: World) -> None:
    """Blocks that the recycled file holds are not written."""
    with session(world, keep=1, max_async=1, kind="frozen") as it:
        it.save(1, 2, 3)
        it.base = 1
        it.save(4)


def linked_save(world: World) -> None:
    """The file of the frozen parameters is linked from the step before."""
    with session(world, keep=1, max_async=1, kind="split") as it:
        it.save(1, 2, 3)


def linked_change(world: World) -> None:
    """The linked file is written anew, and later recycled."""
    with session(world, keep=1, max_async=1, kind="split") as it:
        it.save(1, 2)
        it.base = 1
        it.save(3)
        it.base = 2
        it.save(4, 5)


def linked_rollback(world: World) -> None:
    """A retired step shares its file with the committed one."""
    with session(world, keep=None, max_async=1, kind="split") as it:
        it.save(1, 2)
        world.note("rolling back", 1)
        it.engine.rollback(1)
        world.note("rolled back", 1)
        it.base = 1
        it.save(2, 3)


def linked_leftovers(world: World) -> None:
    """A save that failed and could not be deleted: the next open makes a spare of it, which shares a committed file."""
    with session(world, keep=1, max_async=1, kind="split") as it:
        it.save(1, 2)
        first = "step-00000003.partial/model-00001-of-00002.safetensors"
        with refusing(world, "write_new_file"), refusing(world, "unlink", first):
            it.attempt(3)
    with session(world, payload=11, keep=1, max_async=1, kind="split") as it:
        it.base = 1
        it.save(3)


def linked_failure(operation: str, suffix: str, world: World) -> None:
    """A save of which one operation on a link is refused, and a save after it."""
    with session(world, keep=1, max_async=1, kind="split") as it:
        it.save(1, 2)
        it.base = operation == "write_range"
        with refusing(world, operation, suffix):
            it.attempt(3)
        it.save(4, 5)


# Writers of one checkpoint; the third has no file.
RANKS = range(3)


def part_name(rank: int) -> str:
    """The file of a writer's part of the manifest."""
    return f"manifest-{rank:05d}.json"


def part_content(rank: int) -> bytes:
    """The content of a writer's part: more than a sector, so that it can tear."""
    return f"the part of rank {rank}\n".encode() * 30


class _Turns:
    """Has threads do one operation each in turn, so that the same work leaves the same trace."""

    def __init__(self, world: World, count: int) -> None:
        self.before = world.hook
        self._alive = list(range(count))
        self._turn = 0  # the index among those alive
        self._changed = threading.Condition()
        self._ranks: dict[int, int] = {}

    def run(self, rank: int, act: Callable[[], None]) -> None:
        """One thread's work."""
        self._ranks[threading.get_ident()] = rank
        try:
            self._wait(rank)
            act()
        finally:
            with self._changed:
                self._alive.remove(rank)
                self._turn %= max(1, len(self._alive))
                self._changed.notify_all()

    def hook(self, operation: str, path: str) -> None:
        """Before an operation: it ends this thread's turn, and waits for the next."""
        self.before(operation, path)
        rank = self._ranks.get(threading.get_ident())
        if rank is not None:
            with self._changed:
                self._turn = (self._turn + 1) % len(self._alive)
                self._changed.notify_all()
            self._wait(rank)

    def _wait(self, rank: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._alive[self._turn] == rank, _HANG_S), "a turn was never taken"


def _commit_by_ranks(
    world: World,
    catalog: Owner,
    step: int,
    small_files: Mapping[str, bytes],
    manifest: bytes | bytearray,
    await_turn: Callable[[], None],
) -> str:
    """`commit` with several writers, each with its own thread, file and part."""
    partial, files = catalog.partial_path(step), catalog.files(step)
    parts: dict[int, DigestedFile | None] = {}
    turns = _Turns(world, len(RANKS))

    def act(rank: int) -> None:
        part = part_name(rank), part_content(rank)
        parts[rank] = seal(catalog.filesystem, partial, files[rank : rank + 1], {}, part)

    threads = [threading.Thread(target=turns.run, args=(rank, functools.partial(act, rank))) for rank in RANKS]
    world.hook = turns.hook
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.hook = turns.before
    await_turn()
    path = publish(catalog, step, manifest, [part for rank in RANKS if (part := parts[rank]) is not None])
    catalog._close_files(step)
    return path


def several_writers(world: World) -> None:
    """Three writers seal at once, and one of them publishes."""
    by_ranks = mock.patch("engine.store.committer.commit", functools.partial(_commit_by_ranks, world))
    with by_ranks, session(world, keep=1, max_async=1) as it:
        it.save(1, 2, 3)


class _Hold:
    """Stops one save at one operation, and the one after it before its manifest, so that traces are alike."""

    def __init__(self, step: int, operation: str, other: int) -> None:
        self._step, self._operation = f"step-{step:08d}.partial", operation
        self._other = f"step-{other:08d}.partial"
        self.reached, self.released, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, operation: str, path: str) -> None:
        if operation == "write_new_file" and self._other in path:
            assert self.ended.wait(_HANG_S), "a scenario forgot to release the later save"
        if operation == self._operation and self._step in path:
            self.reached.set()
            assert self.released.wait(_HANG_S), "a scenario forgot to release a save"


def overlapping(first: int, second: int, operation: str, world: World) -> None:
    """Two saves at once: the first goes as far as `operation`, then the second until it seals, then both."""
    with session(world, keep=1, max_async=2) as it:
        it.save(1, 2)
        world.hook = hold = _Hold(first, operation, second)
        held = it.begin(first)
        assert hold.reached.wait(_HANG_S), "the save never came so far"
        count = len(world.operations)
        later = it.begin(second)
        until(
            lambda: sum(isinstance(done, Sync) for done in world.operations[count:]) == 2
        )  # both files: it has sealed
        hold.released.set()
        it.end(held)
        hold.ended.set()
        it.end(later)
        it.save(5)


def failure(operation: str, suffix: str, world: World) -> None:
    """A save of which one operation is refused, and a save after it."""
    with session(world, keep=1, max_async=1) as it:
        it.save(1, 2)
        with refusing(world, operation, suffix):
            it.attempt(3)
        it.save(4)
    with session(world, payload=11, keep=1, max_async=1) as it:
        it.save(5)


def retried(suffix: str, world: World) -> None:
    """A save whose sync of a directory is refused, and one of the same step after it, which may delete nothing."""
    with session(world, keep=1, max_async=1) as it:
        it.save(1, 2)
        with refusing(world, "sync_directory", suffix):
            it.attempt(3)
        it.save(3, 4)
    with session(world, payload=11, keep=1, max_async=1) as it:
        it.save(5)


def failed_retirement(suffix: str, place: int, world: World) -> None:
    """A durable save after which retiring the previous one fails, and a save after it."""
    with session(world, keep=1, max_async=1) as it:
        it.save(1)
        with refusing(world, "sync_directory", suffix, place):
            it.save(2)
        it.save(3)
    with session(world, payload=11, keep=1, max_async=1) as it:
        it.save(4)


@contextmanager
def refusing(world: World, operation: str, suffix: str = "", place: int = 0) -> Iterator[None]:
    """Refuse one call of an operation on a path that ends so: the next, or with `place` one of those after it."""
    before, count = world.hook, itertools.count()

    def refuse(called: str, path: str) -> None:
        before(called, path)
        if called == operation and path.endswith(suffix) and next(count) == place:
            raise StorageError(errno.EIO, operation, path)

    log = logging.getLogger("engine")
    level = log.level
    world.hook = refuse
    log.setLevel(logging.CRITICAL)  # failures here are intended
    try:
        yield
    finally:
        log.setLevel(level)
        world.hook = before
    assert next(count) > place, f"{operation} was never refused"


def recover(kind: Kind, world: World) -> None:
    """Open the directory, list its steps, and save one more."""
    with session(world, payload=_RECOVERY_PAYLOAD, keep=1, max_async=1, kind=kind) as it:
        for step in it.engine.steps():
            with suppress(CorruptError):
                it.engine.load(step)
                world.note("listed", step)
        it.save(max(it.engine.steps(), default=0) + 1)


# Where one of two saves can wait for the other; inside publish() it holds the catalog's lock.
_HOLDS = ("open_for_blocks", "allocate", "truncate", "sync_file", "write_new_file", "sync_directory")

# Which of the calls of an operation is meant, as in disk.FailingFilesystem.
_SUFFIXES = {"sync_directory": ".partial", "rename": "/step-00000003"}

# The spare that step 3 takes its files from, where there were two saves before it.
_SPARE = "/00000001"

# Refusals of a save besides disk.FAILURES: a block, the manifest's fsync, and the fsyncs of C5 and C7.
_REFUSALS = [
    *((operation, _SUFFIXES.get(operation, "")) for operation in FAILURES),
    ("write", ""),
    ("sync_file", "manifest.json"),
    ("sync_directory", _SPARE),
    ("sync_directory", "/run"),
]

SCENARIOS: dict[str, Callable[[World], None]] = {
    "first_save": first_save,
    "recycled_save": recycled_save,
    "several_writers": several_writers,
    "retirement": retirement,
    "rollback": rollback,
    "set_aside": set_aside,
    "leftovers": leftovers,
    **{f"overlapping_{a}_{b}_{hold}": partial(overlapping, a, b, hold) for a, b in ((3, 4),) for hold in _HOLDS},
    **{f"failure_{operation}{suffix}": partial(failure, operation, suffix) for operation, suffix in _REFUSALS},
    **{f"retried{suffix}": partial(retried, suffix) for suffix in (_SPARE, "/run")},
    # R2 is the first fsync of spare there, and the second of the root, after C7.
    "failed_retirement_/spare": partial(failed_retirement, "/spare", 0),
    "failed_retirement_/run": partial(failed_retirement, "/run", 1),
    "elided_save": elided_save,
    "linked_save": linked_save,
    "linked_change": linked_change,
    "linked_rollback": linked_rollback,
    "linked_leftovers": linked_leftovers,
    "linked_failure_link": partial(linked_failure, "link", ""),
    "linked_failure_rename": partial(linked_failure, "rename", "/model-00002-of-00002.safetensors"),
    "linked_failure_write_range": partial(linked_failure, "write_range", ""),
}

# The trainings of the scenarios, in their order.
KINDS: tuple[Kind, ...] = tuple(
    "frozen" if name.startswith("elided") else "split" if name.startswith("linked") else "trained" for name in SCENARIOS
)
