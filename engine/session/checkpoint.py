"""Checkpoint: from an arena to a save in flight.

Theory of operation.  `Checkpointer.begin` does in the caller's time only what must be done there: bring the arena up to
date, encode `extra`, start the native job, and wait for what must be staged before the caller goes on.  A save is one
value, a `Content`, gathered here and handed down.  A commit thread does the rest.

Ctrl-C can strike at any call.  A save that the commit threads were not given is abandoned; one that they were given and
still reads the arena is made to fail; one that is staged goes on.  Either way nothing reads the arena after the raise.
A second Ctrl-C may cut this short.  So the first thing after a failure is one call into C that has a commit thread do
the same, where no Ctrl-C strikes.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from engine.errors import (
    ArenaError,
    BusyError,
    ClosedError,
    EngineError,
    MonitorLostError,
    StepError,
    TornSnapshot,
    UsageError,
    warn,
)
from engine.format.layout import Layout
from engine.format.manifest import STEP_MAX, listed
from engine.format.plan import chunk_size
from engine.format.values import Json
from engine.io.guard import NotArmed
from engine.io.job import Milestone
from engine.io.packing import Packed
from engine.monitor.client import MonitoredStore
from engine.options import Options
from engine.session.failures import Failures
from engine.session.in_flight import InFlight, Permit
from engine.session.layerwise import LayerwiseSave, refuse_in_block
from engine.session.request import Request
from engine.session.save import Save
from engine.session.snapshot import Snapshot, SnapshotPlan, Snapshots
from engine.session.workers import Workers
from engine.state.arena import Arena, check_arena
from engine.state.tensors import encode, encode_options
from engine.state.versions import Handed
from engine.store.store import Store
from engine.store.writer import Content, PackedPlan, Write, Writer, pack_all_sources, pack_plan

_log = logging.getLogger("engine")


@dataclass(slots=True)
class _Packs:
    """Kept for an arena between saves: its plans by chunk size, and its packed sources."""

    layout: Layout
    plans: dict[tuple[int, bool], PackedPlan] = field(default_factory=dict)
    locations: object = None
    sources: Packed | None = None


class Checkpointer:
    """Begins the saves of one engine."""

    def __init__(
        self,
        store: Store | MonitoredStore,
        options: Options,
        in_flight: InFlight,
        workers: Workers,
        snapshots: Snapshots,
        failures: Failures,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._options = options
        self._in_flight = in_flight
        self._workers = workers
        self._failures = failures
        self._warned_of: weakref.WeakKeyDictionary[Arena, set[str]] = weakref.WeakKeyDictionary()
        self._packs: weakref.WeakKeyDictionary[Arena, _Packs] = weakref.WeakKeyDictionary()

    def begin(self, arena: Arena, request: Request) -> Save:
        """Begin a save of the arena.  Blocks and raises as `Engine.checkpoint`."""
        return self._admitted(arena, request, None)

    def begin_layerwise(self, arena: Arena, request: Request, opened: list[LayerwiseSave]) -> LayerwiseSave:
        """Begin a save whose layers are handed over one by one.  Blocks and raises as `begin`.

        Args:
            opened: gets the save as soon as it is made, so that the caller can discard it wherever Ctrl-C strikes.
        """
        save = self._admitted(arena, request, opened)
        assert isinstance(save, LayerwiseSave)
        return save

    def leave(self, arena: Arena, save: LayerwiseSave) -> None:
        """The block of a layerwise save has been left in order: let it be committed.  Blocks as `begin`.

        A save that is not whole fails.
        """
        began_ns = time.monotonic_ns()
        if save.write is None or not save.is_open or save.done() or save.write.pipeline.is_forked:
            save.leave()
            return
        try:
            self._complete(arena, save, save.write)
        except BaseException as error:
            save.discard(error if isinstance(error, EngineError) else UsageError(f"interrupted: {error!r}"))
            save.interrupt()
            if not isinstance(error, EngineError):
                raise
        self._warn_of_foreign_steps(arena)
        save.add_held(began_ns)

    def _complete(self, arena: Arena, save: LayerwiseSave, write: Write) -> None:
        """Check that a layerwise save has everything, take the content of its manifest, and let it be committed."""
        missing = save.remaining()
        if missing:
            raise UsageError(
                f"step {save.step} lacks {listed(missing, 'layers')}: call layer_ready() for each layer before the "
                "block ends; layer_ready('') is all that is left"
            )
        if not arena.is_current():
            raise ArenaError(
                f"tensors of the arena were replaced in the block of step {save.step}, by an optimizer that does not "
                "write in place or by a change of the model; save with checkpoint() after the step"
            )
        plan = save.snapshot
        write.amend(optimizers=_options(arena), modules=arena.extra_states())
        arena.hold(save.wait_staged, plan.holds_writers)
        save.leave()
        if not plan.is_lazy:
            save.wait_staged()
        elif plan.urgent_names:
            save.await_urgent(plan.urgent_names)

    def _admitted(self, arena: Arena, request: Request, opened: list[LayerwiseSave] | None) -> Save:
        if self._interrupts_itself():
            raise UsageError(
                "checkpoint() was called by a signal handler that interrupts checkpoint(), and would wait for it; set "
                "a flag in the handler, and save after the step"
            )
        try:
            return self._begin(arena, request, opened)
        except NotArmed as refusal:
            if not self._snapshots.note_refused(arena, refusal):
                raise
        except MonitorLostError:  # before anything was begun; there is another one by now
            pass
        return self._begin(arena, request, opened)

    def _interrupts_itself(self) -> bool:
        """Whether this thread is in `begin` already.  The stack says so: a mark of ours could be left by Ctrl-C."""
        frame = sys._getframe(2)  # of `begin`
        while (back := frame.f_back) is not None:
            frame = back
            if frame.f_code is Checkpointer._admitted.__code__ and frame.f_locals["self"] is self:
                return True
        return False

    def _begin(self, arena: Arena, request: Request, opened: list[LayerwiseSave] | None) -> Save:
        began_ns = time.monotonic_ns()
        _check_savable(arena)
        permit = Permit()
        begun: list[Write] = []
        writer, layerwise = self._store.writer, opened is not None
        give_up = partial(_give_up, self._in_flight, permit, writer, begun)
        try:
            if not self._in_flight.admit(permit, wait=request.on_busy == "wait"):
                return self._refuse(request, LayerwiseSave if layerwise else Save)
            if self._options.split_untrained:
                arena.split_untrained()
            arena.refresh()
            plan = self._snapshots.plan(arena, request.snapshot, layerwise)
            if plan.guard is not None or layerwise:
                arena.fence()  # it watches for one save at a time; the steps of open blocks wait for none
            handed = Handed() if layerwise else None
            write, changed = self._prepare(arena, request, permit, writer, plan, handed)
            begun.append(write)
            if opened is None:
                save = Save(write.step, write, self._workers.is_current, changed)
                arena.hold(save.wait_staged, plan.holds_writers)
            else:
                save = block = LayerwiseSave(write.step, write, self._workers.is_current, handed, arena, writer, plan)
                opened.append(block)
                permit.block = block
                arena.hold(block.await_fence, holds_writers=False)
            permit.save = save
            writer.start(write)
            permit.handed_over = True
            note_failed = self._noting(arena, request)
            self._workers.submit(
                partial(_finish, self._in_flight, permit, self._store, writer, write, save, note_failed)
            )
            self._check_open()
            _hold_caller(save, plan, write.packed)
        except BaseException:
            self._workers.submit(give_up)  # first, and into C at once
            self._take_back(permit, writer, begun)
            raise
        arena.warn_of_untrained()
        self._warn_of_foreign_steps(arena)
        save.mark_held(began_ns)
        return save

    def _check_open(self) -> None:
        if self._workers.is_closed:
            raise ClosedError("a signal handler that interrupted checkpoint() closed the Engine; open a new one")

    def _noting(self, arena: Arena, request: Request) -> Callable[[Save, BaseException], None]:
        note_torn = partial(self._note_torn, weakref.ref(arena), request.snapshot)
        return partial(_note_failed, self._failures, note_torn)

    def _prepare(
        self,
        arena: Arena,
        request: Request,
        permit: Permit,
        writer: Writer,
        plan: SnapshotPlan,
        handed: Handed | None,
    ) -> tuple[Write, Callable[[], object]]:
        """The save, with its step, and what notes that it is staged; nothing is begun."""
        content = self._gather(arena, request, plan, handed)
        step = self._take_step(permit, request.step)
        write = writer.prepare(step, content, plan.is_checked, withheld=handed is not None)
        return write, content.changed

    def _note_torn(self, arena: weakref.ref[Arena], snapshot: Snapshot) -> None:
        torn = arena()
        if torn is not None and snapshot == "auto":
            self._snapshots.note_torn(torn)

    def _warn_of_foreign_steps(self, arena: Arena) -> None:
        """Warn once of each parameter that an optimizer steps whose state the arena does not hold."""
        names = [name for name in arena.take_foreign() if arena.fenced]
        new = [name for name in names if name not in self._warned_of.setdefault(arena, set())]
        if new:
            self._warned_of[arena].update(new)
            warn(
                f"another optimizer than the arena's has stepped {listed(new)}; its state is in no checkpoint: adopt "
                "the model with all optimizers that step them, Arena.adopt(model, [first, second])"
            )

    def _gather(self, arena: Arena, request: Request, plan: SnapshotPlan, handed: Handed | None) -> Content:
        packed, sources = self._pack(arena, request.chunk_count, request.chunk_bytes, plan.urgent_names)
        return Content(
            packed,
            sources,
            owners=(arena, arena.memory),  # the arena's hooks hold writers back as long as it lives
            guard=plan.guard,
            changed=tuple if plan.guard is not None else (handed or arena.versions()).settle,
            aliases=dict(arena.aliases),
            optimizers=_options(arena),
            modules=arena.extra_states(),
            wrappers=arena.wrappers,
            extra=encode(request.extra),
            metrics={name: value if math.isfinite(value) else None for name, value in request.plain_metrics.items()},
            tag=request.tag,
            user_files=request.contents,
        )

    def _pack(
        self, arena: Arena, chunk_count: int | None, chunk_bytes: int | None, urgent_names: Collection[str]
    ) -> tuple[PackedPlan, Packed]:
        """The arena's plan and sources, packed: once per layout and chunk size, and once per move of its tensors."""
        packs = self._packs.get(arena)
        if packs is None or packs.layout is not arena.layout:
            packs = self._packs[arena] = _Packs(arena.layout)
        if packs.sources is None or packs.locations is not arena.sources:
            packs.locations, packs.sources = arena.sources, pack_all_sources(arena.layout, arena.sources)
        if chunk_count is None and chunk_bytes is None:
            chunk_bytes = self._options.chunk_bytes
        size = chunk_size(arena.layout, chunk_count, chunk_bytes)
        key = (size, bool(urgent_names))
        if key not in packs.plans:
            packs.plans[key] = pack_plan(
                arena.layout, arena.runs, arena.rows, urgent_names, self._options.block_bytes, size
            )
        return packs.plans[key], packs.sources

    def _refuse(self, request: Request, kind: type[Save]) -> Save:
        saving = self._in_flight.steps()
        busy = BusyError(f"steps {saving} are in flight; wait for one, or raise max_async")
        if request.on_busy == "raise":
            raise busy
        step = self._in_flight.next_step(self._store.steps()) if request.step is None else request.step
        return kind.refused(step, busy)

    def _take_step(self, permit: Permit, step: int | None) -> int:
        """Reserve a step, and set aside damaged checkpoints of that step and later ones."""
        committed, damaged = self._store.steps, self._store.reader.damaged
        if step is None:
            taken = self._in_flight.reserve(permit, None, committed)
            if taken > STEP_MAX:
                raise StepError(f"step {taken - 1} is the last that there can be; roll back to an earlier one")
        else:
            taken = self._in_flight.reserve(permit, step, lambda: [s for s in committed() if s not in damaged])
        # Only damaged ones: a save in flight may commit a later step at this moment.
        for passed in [s for s in committed() if s >= taken and s in damaged]:
            aside = self._store.catalog.set_aside(passed)
            damaged.discard(passed)
            if aside is not None:
                warn(f"step {passed} is damaged and was renamed to {aside}")
        damaged.discard(taken)  # from here on the number is the new save's
        return taken

    def _take_back(self, permit: Permit, writer: Writer, begun: list[Write]) -> None:
        """After Ctrl-C or a failure in `begin`: make every part of the save stop reading the arena.  Blocks."""
        if permit.block is not None:
            permit.block.discard_closed()
        for write in begun:
            if permit.handed_over:
                writer.interrupt(write)
            else:
                writer.abandon(write)
        if not permit.handed_over:
            self._in_flight.withdraw(permit)
            begun.clear()  # `_give_up` may come late, and must not keep the arena's memory until then


def _hold_caller(save: Save, plan: SnapshotPlan, packed: PackedPlan) -> None:
    """Wait for what must be staged before the caller goes on."""
    if isinstance(save, LayerwiseSave):
        save.release_ownerless()
    elif not plan.is_lazy:
        save.wait_staged()
    elif packed.urgent_count or plan.is_checked:
        save.wait_milestone(Milestone.URGENT)


def _check_savable(arena: Arena) -> None:
    check_arena(arena)
    if arena.torn:
        raise ArenaError("a restore of this arena failed half-way; restore it whole before saving it")
    refuse_in_block(arena)


def _options(arena: Arena) -> dict[str, Json]:
    return {name: encode_options(options) for name, options in arena.options().items()}


def _give_up(in_flight: InFlight, permit: Permit, writer: Writer, begun: list[Write]) -> None:
    """What a commit thread runs after a failure in `begin`, which Ctrl-C may have kept from doing it.  Never raises.

    It comes after `_finish` in the queue if that was handed over, and then `_finish` ends the save.
    """
    if not in_flight.claim(permit):
        return
    with suppress(Exception):  # a pipeline that was closed meanwhile has nothing left of the save
        for write in begun:
            writer.abandon(write)
    in_flight.withdraw(permit)


def _finish(
    in_flight: InFlight,
    permit: Permit,
    store: Store | MonitoredStore,
    writer: Writer,
    write: Write,
    save: Save,
    note_failed: Callable[[Save, BaseException], None],
) -> None:
    """What a commit thread runs: from staging to the commit or the failure.  Never raises.

    It is not a method: a save in flight must not keep an Engine alive that its owner has dropped, or the Engine would
    be closed on the thread that its closing waits for.
    """
    if not in_flight.claim(permit):
        return
    try:
        await_left = save.await_left if isinstance(save, LayerwiseSave) else None
        info = writer.finish(write, partial(in_flight.await_turn, permit), await_left)
    except BaseException as failure:  # every error goes to the Future, none to this thread
        error = save.reason or failure if isinstance(save, LayerwiseSave) else failure
        with suppress(Exception):  # handlers are the user's, and may raise
            _log.error("the save of step %d failed: %s", save.step, error)
        in_flight.free(permit)  # before the save has ended, so that its waiter finds the permit free
        save.end(None, error)
        note_failed(save, error)
        in_flight.withdraw(permit)
        save.resolve()
        del save, error  # or the failure's traceback would hold a frame that holds the failure
        return
    with suppress(Exception):
        _retire(store)
    in_flight.free(permit)
    save.end(info, None)
    in_flight.withdraw(permit)  # now the next step may become visible
    save.resolve()


def _note_failed(failures: Failures, note_torn: Callable[[], None], save: Save, error: BaseException) -> None:
    if isinstance(error, TornSnapshot):
        note_torn()
    failures.note(save, error)


def _retire(store: Store | MonitoredStore) -> None:
    """Retire after the commit: a failure here costs disk space, not the checkpoint."""
    try:
        store.retire()
    except Exception as error:
        _log.warning("old checkpoints could not be retired, and stay: %s", error)
