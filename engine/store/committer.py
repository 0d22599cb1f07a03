"""Committer: a save from its begin to its commit, without its bytes.

Theory of operation.  A save is recorded once, in a `SaveRecord`: everything that its manifest needs but the hashes of
its blocks.  `Committer.begin` has the directory's owner make the files, and says which blocks they hold already.  When
all blocks are written, `commit` takes their hashes, settles the linked files, seals, waits for its turn and publishes.
So the process that commits needs neither the tensors nor the pipeline: it is the trainer's own process, or its monitor
(`engine.monitor`), and both commit by this code.

Rules: no torch.  Methods may be called from any thread, those of one step from one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from engine.errors import EngineError, TornSnapshot
from engine.format.manifest import (
    FORMAT,
    READER,
    VERSION,
    FileRecord,
    Manifest,
    Rows,
    chunk_records,
    digest_of,
    encode,
    known_hashes,
)
from engine.format.plan import Plan
from engine.format.values import Json
from engine.io.job import JobMemory
from engine.store.access import BegunSave, NewFile, WriteAccess
from engine.store.commit import commit
from engine.store.info import CheckpointInfo, info_of
from engine.store.unchanged import Candidates, Committed, candidates, changed_files, only


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """All of a checkpoint but the bytes of its blocks and their hashes.

    Attributes:
        step, checkpoint_id: which checkpoint.
        plan: its files, chunks and blocks; extents are not looked at.
        untrained: the names of the files of untrained tensors.
        layers: returns for each chunk the layers that it holds a part of.
        rows: the encoded segments.
        aliases, optimizers, modules, wrappers, extra, metrics, tag: of the manifest.
        user_files: content of the user's small files, by name; the manifest records them.
        small_files: content of the other small files.
    """

    step: int
    checkpoint_id: str
    plan: Plan
    untrained: Collection[str]
    layers: Callable[[], Sequence[tuple[str, ...]]]
    rows: Rows
    aliases: Mapping[str, str]
    optimizers: Mapping[str, Json]
    modules: Mapping[str, Json]
    wrappers: Mapping[str, Json]
    extra: Json
    metrics: Mapping[str, float | None]
    tag: str | None
    user_files: Mapping[str, bytes]
    small_files: Mapping[str, bytes]


class Attachment(NamedTuple):
    """What a job gets when its files are open.

    Attributes:
        path: the partial directory.
        descriptors: of the files, in the plan's order, as the pipeline's mover understands them.
        known: for each block the hash with which it is not written, or None; None if there is no such block.
    """

    path: str
    descriptors: Sequence[int]
    known: Sequence[bytes | None] | None


class Commits(Protocol):
    """What commits the saves of a `Writer`: a `Committer`, in this process or another."""

    def memory(self, block_count: int) -> JobMemory | None:
        """Where a job's states and checksums are; None for memory of its own."""

    def begin(self, record: SaveRecord, direct: bool, memory: JobMemory | None) -> Attachment:
        """Make a save's files.  Blocks."""

    def amend(self, record: SaveRecord) -> None:
        """Replace the record of a begun save by one of the same plan.  Blocks."""

    def commit(self, step: int, checksums: Sequence[bytes], await_turn: Callable[[], None]) -> CheckpointInfo:
        """Make a begun save durable and visible, whose blocks are all written.  Blocks.

        `await_turn` is called after sealing, before the checkpoint becomes visible; may block.
        """

    def discard(self, step: int, error: BaseException) -> None:
        """Delete what is left of a save that has failed with this error.  None of its blocks is in flight."""

    def lost(self) -> EngineError | None:
        """The error of every save since the process that commits has ended, or None."""


class _Begun(NamedTuple):
    """A save under way: its record, its linked files, and the hashes that its recycled files hold."""

    record: SaveRecord
    held: Candidates
    recycled: Sequence[bytes | None]


class Committer:
    """Commits the saves of a directory; `Commits` in the process of the pipeline.

    Args:
        access: the owner of the directory.
        rewrite_all: have every block written, even if a recycled file holds it already.
    """

    def __init__(self, access: WriteAccess, rewrite_all: bool) -> None:
        self._access = access
        self._rewrite_all = rewrite_all
        self._begun: dict[int, _Begun] = {}
        self._last: Committed | None = None  # the newest that this process committed; one assignment at a time

    def memory(self, block_count: int) -> JobMemory | None:
        """A job of this process has memory of its own."""
        return None

    def begin(self, record: SaveRecord, direct: bool, memory: JobMemory | None = None) -> Attachment:
        """Make a save's files; see `Commits.begin`."""
        plan = record.plan
        last = None if self._rewrite_all else self._last_of(self._access.steps())
        held = candidates(plan, record.untrained, last)
        link_from = {name: last.step for name in held} if last is not None else {}
        files = [NewFile(file.name, file.nbytes, link_from.get(file.name)) for file in plan.files]
        begun = self._access.begin_save(record.step, files, direct)
        held = only(held, begun.linked)
        recycled = self._recycled(plan, begun)
        self._begun[record.step] = _Begun(record, held, recycled)
        return Attachment(begun.path, begun.descriptors, _known(recycled, held))

    def amend(self, record: SaveRecord) -> None:
        """Replace the record of a begun save; see `Commits.amend`."""
        self._begun[record.step] = self._begun[record.step]._replace(record=record)

    def commit(self, step: int, checksums: Sequence[bytes], await_turn: Callable[[], None]) -> CheckpointInfo:
        """Make a save durable and visible; see `Commits.commit`."""
        record, held, recycled = self._begun[step]
        manifest = _manifest(record, checksums)
        if held:
            self._access.settle_links(step, changed_files(record.plan, held, recycled, checksums))
        small_files = {**record.user_files, **record.small_files}
        in_turn = partial(self._commit_in_turn, step, await_turn)
        path = commit(self._access, step, small_files, encode(manifest, record.rows), in_turn)
        del self._begun[step]
        self._note(Committed(step, record.plan, checksums))
        return info_of(manifest, path)

    def discard(self, step: int, error: BaseException) -> None:
        """Delete what is left of a save; see `Commits.discard`."""
        if not isinstance(error, TornSnapshot):
            self._last = None  # what it held may be the cause, and a file without a link has room reserved
        self._begun.pop(step, None)
        self._access.discard_save(step)

    def lost(self) -> EngineError | None:
        """None: this process has not ended."""
        return None

    def _recycled(self, plan: Plan, begun: BegunSave) -> list[bytes | None]:
        """For each block the hash that its recycled file holds already, or None if it is to be written."""
        if begun.recycled is None or self._rewrite_all:
            return [None] * len(plan.blocks)
        return known_hashes(plan, begun.recycled, begun.reused)

    def _last_of(self, steps: Sequence[int]) -> Committed | None:
        """The newest checkpoint of this process, if it is still committed.

        Args:
            steps: the committed ones.  Listed before this call, because `_commit_in_turn` comes before a new checkpoint
                of the same step is listed.
        """
        last = self._last
        return last if last is not None and last.step in steps else None

    def _commit_in_turn(self, step: int, await_turn: Callable[[], None]) -> None:
        """Wait, and forget a checkpoint that was retired or deleted to save this step again."""
        await_turn()
        if self._last is not None and self._last.step >= step:
            self._last = None

    def _note(self, committed: Committed) -> None:
        """Remember the newest checkpoint: the next save may link from it."""
        last = self._last
        if last is None or last.step < committed.step:
            self._last = committed


def _known(recycled: Sequence[bytes | None], held: Candidates) -> list[bytes | None] | None:
    """For each block the hash with which it is not written; None if there is no such block."""
    known = list(recycled)
    for hashes in held.values():
        for block, hash_ in hashes.items():
            known[block] = hash_
    return known if any(known) else None


def _manifest(record: SaveRecord, checksums: Sequence[bytes]) -> Manifest:
    return Manifest(
        format=FORMAT,
        version=VERSION,
        min_reader=READER,
        step=record.step,
        checkpoint_id=record.checkpoint_id,
        created_ns=max(0, time.time_ns()),  # a clock may be wrong
        block_bytes=record.plan.block_bytes,
        files=tuple(FileRecord(*file) for file in record.plan.files),
        chunks=chunk_records(record.plan, record.layers(), checksums),
        segments=(),  # `encode` gets their rows
        aliases=dict(record.aliases),
        optimizers=dict(record.optimizers),
        extra=record.extra,
        metrics=dict(record.metrics),
        tag=record.tag,
        user_files=tuple(digest_of(name, raw) for name, raw in record.user_files.items()),
        modules=dict(record.modules),
        wrappers=dict(record.wrappers),
    )
