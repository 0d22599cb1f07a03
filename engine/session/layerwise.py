"""Layerwise: a save whose layers are handed over one by one, each as soon as it is final.

Theory of operation.  The native job of such a save withholds every block.  `LayerwiseSave.layer_ready` releases the
blocks whose segments are all handed over, so staging and writing overlap with what still computes the other layers.
A commit thread has the files made meanwhile.  It waits at a gate until the block of the ``with`` statement is left, and
only then takes the content of the manifest, which optimizers change in their steps.

What a checkpoint holds of a layer is what it was when it was handed over.  A released block is guarded, or counted and
compared, as in any save.  The part of a layer in a block that is not complete yet is early: it is hashed when the
layer is handed over, and again when its block is released.  If they differ, the save is torn.

The save is **open** from the call until the block is left.  Whatever would wait for an open save could wait for ever:
a restore of the arena, `close()`.  These discard the save and go on.  Another save of the arena is refused.

Rules: `discard` may be called from any thread, and by the collector; `layer_ready` by one thread at a time.
"""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from engine.errors import ArgumentError, ClosedError, EngineError, TornSnapshot, UsageError
from engine.format.handover import Early, Handover, Layers
from engine.format.manifest import listed
from engine.format.plan import Source
from engine.io.binding import memory_checksum
from engine.io.job import BlockState, Milestone
from engine.session.gate import Gate
from engine.session.save import Save
from engine.session.snapshot import SnapshotPlan
from engine.state.arena import Arena
from engine.state.select import near
from engine.state.versions import Handed
from engine.store.info import CheckpointInfo
from engine.store.writer import Write, Writer

# Between looks at the states of blocks: a block takes about as long.
_LOOK_NS = 1_000_000


class LayerwiseSave(Save):
    """A save whose layers are handed over by `layer_ready`.  Made by `Engine.layerwise`."""

    def __init__(
        self,
        step: int,
        write: Write | None,
        is_commit_thread: Callable[[], bool] = lambda: False,
        handed: Handed | None = None,
        arena: Arena | None = None,
        writer: Writer | None = None,
        snapshot: SnapshotPlan | None = None,
    ) -> None:
        """Not for callers: `Engine.layerwise` makes them.

        Args:
            handed: the counts of writes to what is handed over.
            arena, writer, snapshot: of the save; it is refused without them.
        """
        self._handed = Handed() if handed is None else handed
        super().__init__(step, write, is_commit_thread, self._handed.settle)
        self._arena, self._writer = arena, writer
        self._snapshot = snapshot
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._left = Gate()
        self._has_exited = False
        self.reason: EngineError | None = None
        self._early: dict[int, list[tuple[Early, bytes]]] = {}
        if write is not None and arena is not None:
            _last_saves[arena] = weakref.ref(self)
            packed = write.packed
            self._layers = Layers(packed.layout.segments)
            self._handover = Handover(packed.plan, packed.layout, packed.spans)
            self._sources: tuple[Sequence[Source], Sequence[tuple[int, int]]] = (arena.sources, arena.locations)

    # -- for callers ----------------------------------------------------------------------------------------------

    def layer_ready(self, layer: str) -> None:
        """Hand over a layer: the module at this path and every module in it, with the state of their optimizers.

        A parameter or buffer may be handed over by its own name.  "" is everything that is left.  A tied tensor belongs
        to the layer that stores it, so a layer that has only tied tensors of others has nothing to hand over.

        From here on nothing may write to it until it is staged; under the guard ``"cow"`` a writer waits.

        Raises:
            ArgumentError: the arena has no such layer.
            UsageError: all of it is handed over already, or the block of `Engine.layerwise` has been left.
        """
        if not isinstance(layer, str):
            raise ArgumentError(f"layer is {layer!r}; it must be the path of a module (str), such as 'layers.3'")
        if self._write is None:  # refused
            return
        self._write.pipeline.check_owner()
        if self._has_exited:
            raise UsageError(
                f"layer_ready({layer!r}) after the block of step {self.step} was left; call it inside `with "
                "eng.layerwise(...) as save:`"
            )
        found = self._find(layer)
        left = self._handover.left(found)
        if found and not left:
            raise UsageError(f"layer {layer!r} of step {self.step} is handed over already; hand each over once")
        self.hand_over(left)

    def remaining(self) -> list[str]:
        """The layers that are not handed over, in order."""
        return [] if self._write is None or self._arena is None else self._handover.missing()

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Hand over each layer when the arena's optimizers have stepped all of its parameters, inside the block.

        For trainings whose optimizers step in backward, in hooks of `Tensor.register_post_accumulate_grad_hook`.  What
        no step has written is handed over at the end: frozen layers, and parameters that got no gradient.

        Raises:
            UsageError: no optimizer stepped in the block, so the checkpoint would be of the moment before the step.
        """
        arena = self._arena
        if arena is None or self._write is None:
            yield
            return
        stepped = SteppedLayers(self, arena, self._layers)
        arena.watch_steps(stepped.after_step)
        try:
            yield
        finally:
            arena.watch_steps(None)
        if stepped.is_idle:
            raise UsageError(
                f"no optimizer stepped in the block of step {self.step}, which would store the state from before the "
                "step: step the optimizers in backward, or call layer_ready() after optimizer.step()"
            )
        self.hand_over(self._handover.left(self._layers.within("")))

    def wait_staged(self, timeout: float | None = None) -> bool:
        """As of every save; refused in the block, which would wait for itself."""
        self._refuse_inside("wait_staged()", timeout)
        return super().wait_staged(timeout)

    def _await_end(self, timeout: float | None) -> None:
        self._refuse_inside("result() and exception()", timeout)
        super()._await_end(timeout)

    def _refuse_inside(self, call: str, timeout: float | None) -> None:
        if timeout is None and self.is_open and not self.done() and threading.get_ident() == self._thread:
            raise UsageError(f"{call} of step {self.step} would wait for its own block; call it after the block")

    def _find(self, layer: str) -> list[int]:
        """The segments of a layer or of a tensor."""
        assert self._arena is not None and self._write is not None
        arena, layers = self._arena, self._layers
        found = layers.within(layer)
        name = arena.aliases.get(layer, layer)
        if (index := layers.named(name)) is not None:
            state = [layers.named(each) for each in arena.state_of([name])]
            found = sorted({*found, index, *(each for each in state if each is not None)})
        tied = [alias for alias in arena.aliases if alias.startswith(f"{layer}.")]
        if not found and not tied:
            known = [*layers.names, *(segment.name for segment in arena.segments if segment.role != "optimizer")]
            raise ArgumentError(f"layer {layer!r} is not in the arena; {near([layer], known)}")
        return found

    # -- for the engine -------------------------------------------------------------------------------------------

    @property
    def write(self) -> Write | None:
        """The store's save; None if it was refused."""
        return self._write

    @property
    def snapshot(self) -> SnapshotPlan:
        """How the arena is guarded."""
        assert self._snapshot is not None
        return self._snapshot

    def mark_exited(self) -> None:
        """The ``with`` statement ends.  A save that was discarded before takes layers until then, and does nothing."""
        self._has_exited = True
        self._let_go()

    def end(self, info: CheckpointInfo | None, failure: BaseException | None) -> None:
        """As of every save."""
        super().end(info, failure)
        self._let_go()

    def _let_go(self) -> None:
        """Forget the arena, once no layer can be handed over: a save may be kept long after its end."""
        if self._has_exited and self._ended.is_open:
            self._arena, self._sources = None, ((), ())

    def mark_told(self) -> None:
        """The caller knows that the save has failed: an exception has ended its block."""
        self._asked = True

    def add_held(self, began_ns: int) -> None:
        """The caller was held from then, on the clock of time.monotonic_ns(), until now."""
        self._held_ns += time.monotonic_ns() - began_ns

    @property
    def is_open(self) -> bool:
        """Whether the block has not been left, and the save not been discarded."""
        return self._write is not None and not self._left.is_open

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one whose save it is."""
        return self._write is not None and self._write.pipeline.is_forked

    def not_handed(self, indices: Sequence[int]) -> list[int]:
        """Those of these segments that are not handed over."""
        return self._handover.left(indices)

    def hand_over(self, indices: Sequence[int]) -> None:
        """Segments are final; none of them was handed over before.  After a failure here the save is discarded."""
        began_ns = time.monotonic_ns()
        with self._lock:
            try:
                self._hand_over(indices)
            except BaseException as error:  # Ctrl-C too: what was done of it is not known
                self.discard(error if isinstance(error, EngineError) else self._broken(error))
                if not isinstance(error, EngineError):
                    raise
        self.add_held(began_ns)

    def _broken(self, error: BaseException) -> EngineError:
        return UsageError(f"layer_ready() of step {self.step} was cut short by {type(error).__name__}")

    def _hand_over(self, indices: Sequence[int]) -> None:
        arena, write, writer = self._arena, self._write, self._writer
        assert arena is not None and write is not None and writer is not None
        taken = self._handover.take(indices)
        if not self.is_open or self.done() or write.job.reached(Milestone.DONE):  # it has failed: training goes on
            return
        segments = write.packed.layout.segments
        arena.hand_over([segments[index].name for index in indices], self._handed)
        for part in taken.early:
            self._early.setdefault(part.block, []).append((part, self._checksum(part)))
        self._release(taken.blocks)
        if not self.snapshot.is_lazy:
            self._await_blocks(taken.blocks)

    def release_ownerless(self) -> None:
        """Stage the blocks of files that have only a header."""
        self._release(self._handover.ownerless())

    def _release(self, blocks: Sequence[int]) -> None:
        """Have complete blocks staged."""
        assert self._write is not None and self._writer is not None
        if not blocks:
            return
        self._writer.release(self._write, blocks)
        early = [each for block in blocks for each in self._early.pop(block, ())]
        changed = [part.segment for part, checksum in early if self._checksum(part) != checksum]
        if changed:
            names = listed([self._write.packed.layout.segments[index].name for index in dict.fromkeys(changed)])
            raise TornSnapshot(
                f"a writer changed {names} after layer_ready() of step {self.step}, before the layers that share a "
                "block with it were handed over; hand a layer over after the last write to it"
            )

    def _checksum(self, part: Early) -> bytes:
        """The hash of a part of a segment in memory; of a strided one, of all of its elements."""
        sources, locations = self._sources
        source, offset = locations[part.segment]
        memory = sources[source]
        if memory.shape:
            assert self._arena is not None
            return b"" if self._arena.buffer is None else memory_checksum(memory.address, memory.nbytes)
        return memory_checksum(memory.address + offset + part.start, part.end - part.start)

    def await_urgent(self, names: Collection[str]) -> None:
        """Block until these segments are staged: from here on they may change."""
        assert self._write is not None
        packed = self._write.packed
        spans = packed.spans
        indices = [index for index, segment in enumerate(packed.layout.segments) if segment.name in names]
        self._await_blocks({block for each in indices for block in range(spans.firsts[each], spans.lasts[each])})
        self._handed.settle_first()

    def _await_blocks(self, blocks: Collection[int]) -> None:
        """Block until these blocks are staged, or the save has failed."""
        write = self._write
        assert write is not None
        waiting = set(blocks)
        while waiting and not write.wait(Milestone.STAGED, _LOOK_NS):
            states = write.job.states()
            waiting = {block for block in waiting if states[block] == BlockState.PENDING}

    def discard_closed(self) -> None:
        """Give an open save up because the Engine is closed."""
        self.discard(
            ClosedError(f"the block of step {self.step} was open when the Engine was closed, or was never begun")
        )

    def discard(self, reason: EngineError) -> None:
        """Give an open save up.  Blocks until nothing reads the arena.  Does nothing if the block has been left."""
        with self._lock:
            if self._left.is_open:
                return
            write = self._write
            if write is None or not write.job.reached(Milestone.DONE) or write.job.failure is None:
                # Or it has failed by itself.  The frames of a traceback hold the arena.
                self.reason = self.reason or reason.with_traceback(None)
            if write is not None and self._writer is not None and not write.pipeline.is_forked:
                try:
                    self._writer.interrupt(write)
                finally:  # first into C, before Ctrl-C can strike again: the commit thread waits for the job
                    write.pipeline.aborting(write.job, errno.ECANCELED)()
            self._left.open()

    def interrupt(self) -> None:
        """Make the save fail if it is still staging.  Blocks until nothing reads the arena.

        By its own writer: the Engine may have another monitor by now, whose pipeline does not know the job.
        """
        if self._write is not None and self._writer is not None:
            self._writer.interrupt(self._write)

    def leave(self) -> None:
        """The block has been left in order, and the content is whole: the save may be committed."""
        self._left.open()

    def await_left(self) -> None:
        """Block until the block has been left.  Called by the commit thread.

        Raises:
            EngineError: the save was discarded.
        """
        self._left.wait()
        if self.reason is not None:
            raise self.reason

    def await_fence(self, timeout: float | None) -> bool:
        """As `wait_staged`, for the arena's fence; but an open save is discarded, or the wait would never end."""
        if self.is_open and timeout is None and not self.done():
            self.discard(
                UsageError(
                    f"the block of step {self.step} was still open when its arena was restored or given other "
                    "tensors; leave the block first (an optimizer that makes its state in its first step: take one "
                    "before)"
                )
            )
        return self._write is None or self._write.wait(
            Milestone.STAGED, None if timeout is None else int(timeout * 1e9)
        )


# The last layerwise save of each arena, whichever Engine made it.
_last_saves: weakref.WeakKeyDictionary[Arena, weakref.ref[LayerwiseSave]] = weakref.WeakKeyDictionary()


def refuse_in_block(arena: Arena) -> None:
    """Refuse to save an arena in a block of a layerwise save of it.

    Raises:
        UsageError: its block has not been left.
    """
    made = _last_saves.get(arena)
    save = None if made is None else made()
    if save is not None and save.is_open and not save.done() and not save.is_forked:
        raise UsageError(
            f"the arena has an open block of layerwise(), of step {save.step}, and a save of it would have to wait for "
            "that block; leave the block first, and save after it"
        )


class SteppedLayers:
    """Hands a layer over when all of its trained parameters have been stepped."""

    def __init__(self, save: LayerwiseSave, arena: Arena, layers: Layers) -> None:
        self._save, self._layers = save, layers
        trained = arena.trained
        self._left: dict[str, set[str]] = {}
        self._layer_of: dict[str, str] = {}
        self.is_idle = bool(trained)  # until a trained parameter is stepped
        for segment in arena.segments:
            if segment.name in trained:
                self._left.setdefault(segment.layer, set()).add(segment.name)
                self._layer_of[segment.name] = segment.layer

    def after_step(self, names: Collection[str]) -> None:
        """An optimizer has written these parameters."""
        for name in names:
            self.is_idle &= name not in self._layer_of
            layer = self._layer_of.get(name)
            left = None if layer is None else self._left.get(layer)
            if layer is None or left is None:
                continue
            left.discard(name)
            if not left:
                del self._left[layer]
                self._hand_over(layer)

    def _hand_over(self, layer: str) -> None:
        self._save.hand_over(self._save.not_handed(self._layers.of(layer)))


class Layerwise:
    """The context manager of `Engine.layerwise`."""

    def __init__(
        self, begin: Callable[[list[LayerwiseSave]], LayerwiseSave], leave: Callable[[LayerwiseSave], None]
    ) -> None:
        """Not for callers.

        Args:
            begin: begins the save, and puts it into a list as soon as it is made.
            leave: ends the block in order.
        """
        self._begin, self._leave = begin, leave
        self._save: LayerwiseSave | None = None
        self._opened: list[LayerwiseSave] = []
        # Ctrl-C may strike where no `__exit__` is called: then the block is collected.
        weakref.finalize(self, _discard, self._opened).atexit = False

    def __enter__(self) -> LayerwiseSave:
        if self._save is not None:
            raise UsageError("a block of Engine.layerwise is entered once; call layerwise() for each save")
        self._save = self._begin(self._opened)
        return self._save

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        save = self._save
        assert save is not None
        save.mark_exited()
        if error is None:
            self._leave(save)
        else:
            save.mark_told()
            save.discard(UsageError(f"the block of step {save.step} was left by {type(error).__name__}: {error}"))


def _discard(saves: list[LayerwiseSave]) -> None:
    for save in saves:
        save.discard(UsageError(f"the block of step {save.step} was never left"))
