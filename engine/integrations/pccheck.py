"""PCcheck: the names, arguments and meaning of PCcheck's adapter, on this engine.

    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    monitor = Chk_monitor(None, total_size, 1, 2, True, gpu_ar=gpu_ar, bsize=total_size // 4)
    start = monitor.restore()
    ...
    monitor.save(step)

Theory of operation.  `flat_state` has the training in one arena, and that arena's memory as the flat tensor `gpu_ar`.
`Chk_monitor` and `PCCheckAdapter` each have one Engine, and save that arena, or any other tensor under the name
`gpu_ar`.  `LayerwiseCheckpointTrainer` makes the optimizer and the tensor, and runs the steps.  Each save stores its
`checkpoint_id`, the training step, the random generators and the names of absent gradients in `extra`, under the key
`pccheck`.

PCcheck's `save()` has no step.  Such a save is of the step that the optimizer has reached: its hooks count.

Rules: only the public API of the engine is used.  Messages go to the logger `engine.pccheck`.  Arguments that tune
PCcheck's own mechanism (threads, batches, buffers, the C library) are taken and not used:
docs/migrating-from-pccheck.md lists them.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import engine
from engine.integrations.flat_state import FlatState, get_total_size, initialize, set_storage, state_of

__all__ = [
    "Chk_monitor",
    "LayerwiseCheckpointTrainer",
    "PCCheckAdapter",
    "chunk_ranges",
    "find",
    "get_total_size",
    "initialize",
    "set_storage",
]

# PCcheck's file has a fixed name in the working directory (`Chk_monitor.__init__`).
DIRECTORY = "pccheck_checkpoints"

# PCcheck's loops poll without a pause.  Each poll waits so long, or they would take the core that copies.
_POLL_S = 0.001

_KEY = "pccheck"

_log = logging.getLogger("engine.pccheck")


def chunk_ranges(total: int, chunk_count: int) -> list[tuple[int, int]]:
    """How so many elements are cut: chunks of ceil(total / count) elements, the last one with the rest.

    A count below 1 is taken as 1.  Where the chunks before hold everything, later ones are left out.
    """
    size = -(-total // max(1, chunk_count))
    return [(start, min(start + size, total)) for start in range(0, total, size)] if total else []


def find(directory: str | os.PathLike[str], checkpoint_id: str) -> engine.CheckpointInfo | None:
    """The newest committed checkpoint that was saved under an id, or None.  Works beside the training.

    Raises:
        NotFoundError: there is no such directory.
    """
    with engine.open(directory) as run:
        for step in reversed(run.steps()):
            try:
                if _facts(run.extra(step)).get("checkpoint_id") == checkpoint_id:
                    return run.info(step)
            except (engine.CorruptError, engine.NotFoundError, engine.StorageError) as error:
                _log.warning("step %d is passed over in the search for %r: %s", step, checkpoint_id, error)
    return None


def _facts(extra: Any) -> dict[str, Any]:
    """What this module has stored in `extra`; nothing if the save was another's."""
    facts = extra.get(_KEY) if isinstance(extra, dict) else None
    return facts if isinstance(facts, dict) else {}


class _Saver:
    """One Engine, and the saves of a state in it."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        max_async: int,
        use_monitor: bool,
        keep: int | None,
        is_distributed: bool,
    ) -> None:
        if is_distributed:
            raise engine.UsageError(
                "is_distributed is True; this adapter stores the training of one rank: let rank 0 alone save, with "
                "is_distributed=False"
            )
        self.directory = directory
        self._options: dict[str, Any] = {"max_async": max_async, "keep": keep}
        if use_monitor:
            self._options["isolation"] = "process"
        self._eng: engine.Engine | None = None
        self._saves: list[engine.Save] = []

    def open(self) -> engine.Engine:
        """The Engine, which is opened by the first call: a trainer that skips its saves makes no directory."""
        if self._eng is None:
            self._eng = engine.Engine(self.directory, **self._options)
        return self._eng

    def close(self) -> None:
        """Wait until every save is durable, and close the directory, if it was opened.  May be called again."""
        if self._eng is not None:
            self._eng.close()

    def save(
        self,
        state: FlatState,
        step: int | None,
        checkpoint_id: str | None,
        extra: Any,
        *,
        chunk_count: int | None = None,
        chunk_bytes: int | None = None,
    ) -> engine.Save:
        """Begin a save, which waits only if `max_async` others are in flight.

        Args:
            step: the training step; None for the number of steps that the optimizer has taken.
        """
        training_step = state.training_step if step is None else step
        if step is None and training_step is not None:
            checkpoint_id = f"step_{training_step}"
            step = training_step if training_step > self._last() else None  # saved twice without a step in between
        facts = {
            "checkpoint_id": checkpoint_id,
            "training_step": training_step,
            "absent_gradients": state.gather(),
            "rng": engine.rng_state(),
        }
        content = {_KEY: facts, "extra": extra}
        save = self.open().checkpoint(
            state.arena, step, extra=content, chunk_count=chunk_count, chunk_bytes=chunk_bytes
        )
        self._saves = [*(each for each in self._saves if not each.done()), save]
        return save

    def _last(self) -> int:
        """The last number that a save has."""
        return max([*self.open().steps(), *(save.step for save in self._saves)], default=-1)

    def restore(self, state: FlatState, checkpoint_id: str | None) -> int:
        """Restore the newest sound checkpoint, or that of an id; returns its training step, or 0 if there is none."""
        step = None
        if checkpoint_id is not None:
            found = find(self.directory, checkpoint_id)
            if found is None:
                raise engine.NotFoundError(f"no checkpoint in {self.directory} has the id {checkpoint_id!r}")
            step = found.step
        elif not self.open().steps():
            return 0
        restored = self.open().restore(state.arena, step)
        facts = _facts(restored.extra)
        state.scatter(facts.get("absent_gradients", ()))
        if "rng" in facts:
            engine.set_rng_state(facts["rng"])
        training_step = facts.get("training_step", restored.step)
        if training_step is None:
            training_step = restored.step
            warnings.warn(
                f"checkpoint {restored.step} was saved without a training step and without an optimizer that counts "
                f"it, so {restored.step} counts saves: pass the step, save(training_step)",
                engine.EngineWarning,
                stacklevel=3,
            )
        state.resume(training_step)
        return int(training_step)

    def is_any(self, in_progress: Callable[[engine.Save], bool]) -> bool:
        """Whether this holds for any save in flight."""
        return any([in_progress(save) for save in self._saves if not save.done()])


class Chk_monitor:  # noqa: N801 (PCcheck's name)
    """Saves a training in the background.

    Args:
        c_lib_path, num_threads, gpu_copy, ratio, memory_saving, rank, world_size: not used.
        total_size: elements of `gpu_ar`.
        max_async: how many saves may be in flight.
        gpu_ar: what is saved: the tensor that `initialize` returned, or any other.
        is_sync: only one save is in flight at a time.
        bsize: elements of a chunk; None for one chunk.
        is_distributed: refused, because one rank is stored.
        use_monitor: saves belong to a process that outlives this one.
        checkpoint_dir: the directory of the checkpoints.
        keep: the number of checkpoints to keep; None for all.
        state: `model=` and `optimizer=`, whose tensors are in `gpu_ar` already; not used.

    Raises:
        ArgumentError: there is no `gpu_ar`.
        UsageError: `is_distributed` is set.
    """

    def __init__(
        self,
        c_lib_path: str | None,
        total_size: int,
        num_threads: int,
        max_async: int,
        gpu_copy: bool,
        gpu_ar: Tensor,
        ratio: float = 2.0,
        is_sync: bool = False,
        bsize: float | None = None,
        memory_saving: bool = False,
        is_distributed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        use_monitor: bool = False,
        checkpoint_dir: str | os.PathLike[str] = DIRECTORY,
        keep: int | None = 2,
        **state: Any,
    ) -> None:
        if not isinstance(gpu_ar, Tensor):
            raise engine.ArgumentError(
                f"gpu_ar is {gpu_ar!r}; pass the tensor that initialize(model, [optimizer]) returns: state_dict() "
                "lacks what an optimizer makes in its first step"
            )
        self._state = state_of(gpu_ar)
        self._chunk_bytes = max(1, int(total_size if bsize is None else bsize)) * gpu_ar.element_size()
        self._saver = _Saver(checkpoint_dir, 1 if is_sync else max_async, use_monitor, keep, is_distributed)
        self._saver.open()

    @property
    def eng(self) -> engine.Engine:
        """The Engine of the checkpoints, for what PCcheck has no name for."""
        return self._saver.open()

    def save(self, training_step: int | None = None, *, extra: Any = None) -> engine.Save:
        """Begin a checkpoint.  Blocks while `max_async` others are in flight.

        Args:
            training_step: its number, which `restore` returns; None for the steps that the (first) optimizer has taken.
                Where there is no optimizer, saves are counted from 0.
            extra: plain values to store with it, such as `scheduler.state_dict()`.
        """
        name = None if training_step is None else f"step_{training_step}"
        return self._saver.save(self._state, training_step, name, extra, chunk_bytes=self._chunk_bytes)

    def restore(self, checkpoint_id: str | None = None) -> int:
        """Restore a checkpoint, gradients and random generators included, and return its training step.

        Args:
            checkpoint_id: `step_<training step>`; None for the newest that is sound.  Without any the result is 0.

        Raises:
            NotFoundError: no checkpoint has this id.
            MismatchError: the checkpoint is of another model or optimizer.
        """
        return self._saver.restore(self._state, checkpoint_id)

    def gpu_copy_in_progress(self) -> bool:
        """Whether a save still reads the tensors.  Waits a moment for it to end."""
        return self._saver.is_any(lambda save: not save.wait_staged(_POLL_S))

    def checkpoint_in_progress(self) -> bool:
        """Whether a save is not durable yet.  Waits a moment if so."""
        if self._saver.is_any(lambda save: True):
            time.sleep(_POLL_S)
        return self._saver.is_any(lambda save: True)

    def kill_checkpoint(self) -> None:
        """Wait until every save is durable, and close the directory.  May be called again."""
        self._saver.close()


class PCCheckAdapter:
    """Saves one flat tensor, or the training in it, in chunks.

    Args:
        c_lib_path, num_threads, batch_size_mb, ratio, metadata_file, rank, world_size, total_size: not used.
        checkpoint_file: the directory of the checkpoints.
        max_async: how many saves may be in flight.
        use_pccheck: False skips every save.
        use_monitor: saves belong to a process that outlives this one.
        is_distributed: refused, because one rank is stored.
        gpu_ar: what is saved; may be assigned later.
        verbose: log each save at the level INFO instead of DEBUG.
        keep: the number of checkpoints to keep; None for all.
    """

    def __init__(
        self,
        c_lib_path: str | None = None,
        checkpoint_file: str | os.PathLike[str] = "layerwise_checkpoint.chk",
        num_threads: int = 4,
        max_async: int = 2,
        batch_size_mb: float = 100.0,
        ratio: float = 2.0,
        use_pccheck: bool = True,
        use_monitor: bool = False,
        metadata_file: str = "checkpoint_metadata.json",
        is_distributed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        gpu_ar: Tensor | None = None,
        total_size: int = 0,
        verbose: bool = False,
        *,
        keep: int | None = 2,
    ) -> None:
        self.gpu_ar = gpu_ar
        self.use_pccheck = use_pccheck
        self._level = logging.INFO if verbose else logging.DEBUG
        self._saver = _Saver(checkpoint_file, max_async, use_monitor, keep, is_distributed)
        if use_pccheck and gpu_ar is not None:
            self._saver.open()  # what it refuses is refused now, and not at the first save

    @property
    def gpu_ar(self) -> Tensor | None:
        """What is saved."""
        return self._gpu_ar

    @gpu_ar.setter
    def gpu_ar(self, gpu_ar: Tensor | None) -> None:
        self._gpu_ar, self._state = gpu_ar, None if gpu_ar is None else state_of(gpu_ar)

    @property
    def eng(self) -> engine.Engine:
        """The Engine of the checkpoints, for what PCcheck has no name for."""
        return self._saver.open()

    def save_entire_checkpoint(
        self, checkpoint_id: str, training_step: int, *, extra: Any = None
    ) -> engine.Save | None:
        """`save_entire_checkpoint_in_chunks` in one chunk."""
        return self.save_entire_checkpoint_in_chunks(checkpoint_id, training_step, 1, extra=extra)

    def save_entire_checkpoint_in_chunks(
        self, checkpoint_id: str, training_step: int, chunk_count: int = 2, *, extra: Any = None
    ) -> engine.Save | None:
        """Begin a checkpoint of everything in `gpu_ar`, and return.  Blocks only while `max_async` are in flight.

        Args:
            checkpoint_id: the name that `find` and `restore` take.
            training_step: its number, after every earlier one.
            chunk_count: how many chunks of equal size; below 1 is taken as 1.
            extra: plain values to store with it, such as `scheduler.state_dict()`.

        Returns:
            The save, or None if it was skipped: there is no `gpu_ar`, it has no elements, or `use_pccheck` is False.
        """
        total = 0 if self._gpu_ar is None else self._gpu_ar.numel()
        if self._state is None or total == 0 or not self.use_pccheck:
            _log.warning(
                "the chunked save of %r is skipped (gpu_ar=%s, elements=%d, use_pccheck=%s)",
                *(checkpoint_id, self._state is not None, total, self.use_pccheck),
            )
            return None
        count = max(1, int(chunk_count))
        ranges = chunk_ranges(total, count)
        _log.log(self._level, "%s: step %d, %d elements in %d chunks", checkpoint_id, training_step, total, len(ranges))
        for number, (start, end) in enumerate(ranges, 1):
            _log.log(
                self._level,
                "%s: chunk %d of %d has the elements %d:%d (%d elements)",
                *(checkpoint_id, number, len(ranges), start, end, end - start),
            )
        return self._saver.save(self._state, training_step, checkpoint_id, extra, chunk_count=count)

    def find(self, checkpoint_id: str) -> engine.CheckpointInfo | None:
        """The newest committed checkpoint that was saved under an id, or None."""
        return find(self._saver.directory, checkpoint_id)

    def restore(self, checkpoint_id: str | None = None) -> int:
        """Restore a checkpoint, gradients and random generators included, and return its training step.

        Args:
            checkpoint_id: of a save; None for the newest that is sound.  Without any the result is 0.

        Raises:
            NotFoundError: no checkpoint has this id.
            UsageError: there is no `gpu_ar` to restore into.
        """
        if self._state is None:
            raise engine.UsageError(
                "gpu_ar is None; assign the tensor that initialize(model, [optimizer]) returns first"
            )
        return self._saver.restore(self._state, checkpoint_id)

    def shutdown(self) -> None:
        """Wait until every save is durable, and close the directory.  May be called again."""
        self._saver.close()


class LayerwiseCheckpointTrainer:
    """Trains step by step, and saves where it is asked to.

    Args:
        model: without one, assign `gpu_ar` before the first save.
        optimizer_class: makes the optimizer from the parameters and `optimizer_kwargs`; or the optimizer itself.
        checkpoint_dir: the directory of the checkpoints.
        checkpoint_chunk_count: how many chunks a save of `train_step` has; below 1 is taken as 1.
        use_pccheck: False skips every save, and leaves the model's memory as it is.
        use_monitor: saves belong to a process that outlives this one.
        max_async: how many saves may be in flight.
        is_distributed: refused, because one rank is stored.
        device: to move the model to; None leaves it.
        verbose: log each save at the level INFO instead of DEBUG.
        keep: the number of checkpoints to keep; None for all.
        buffer_size_mb, num_threads, batch_size_mb, ratio, c_lib_path, rank, world_size: not used.

    Attributes:
        optimizer: the optimizer, or None.
        total_size: the elements of `gpu_ar` that `initialize` returned; 0 without a model.
        pccheck_adapter: saves and restores.
        current_training_step, current_checkpoint_id: of the last `train_step`, or of the checkpoint restored.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer_class: Callable[..., Optimizer] | Optimizer | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        checkpoint_dir: str | os.PathLike[str] = "layerwise_checkpoints",
        buffer_size_mb: float = 50.0,
        checkpoint_chunk_count: int = 3,
        use_pccheck: bool = True,
        use_monitor: bool = False,
        num_threads: int = 8,
        max_async: int = 4,
        batch_size_mb: float = 100.0,
        ratio: float = 2.0,
        c_lib_path: str | None = None,
        is_distributed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: str | None = None,
        verbose: bool = True,
        *,
        keep: int | None = 2,
    ) -> None:
        self.model = model if model is None or device is None else model.to(device)
        self.optimizer: Optimizer | None = None
        if isinstance(optimizer_class, Optimizer):
            self.optimizer = optimizer_class
        elif self.model is not None and optimizer_class is not None:
            self.optimizer = optimizer_class(self.model.parameters(), **(optimizer_kwargs or {}))
        self.checkpoint_chunk_count = max(1, int(checkpoint_chunk_count))
        self.current_training_step = 0
        self.current_checkpoint_id: str | None = None
        gpu_ar, self.total_size = None, 0
        if self.model is not None and use_pccheck:
            optimizers = [] if self.optimizer is None else [self.optimizer]
            gpu_ar, self.total_size = initialize(self.model, optimizers)
            set_storage(self.model, optimizers, gpu_ar)
        self.pccheck_adapter = PCCheckAdapter(
            checkpoint_file=checkpoint_dir,
            max_async=max_async,
            use_pccheck=use_pccheck,
            use_monitor=use_monitor,
            is_distributed=is_distributed,
            gpu_ar=gpu_ar,
            verbose=verbose,
            keep=keep,
        )
        self.save_entire_checkpoint = self.pccheck_adapter.save_entire_checkpoint
        self.save_entire_checkpoint_in_chunks = self.pccheck_adapter.save_entire_checkpoint_in_chunks
        self.find = self.pccheck_adapter.find

    @property
    def gpu_ar(self) -> Tensor | None:
        """What is saved."""
        return self.pccheck_adapter.gpu_ar

    @gpu_ar.setter
    def gpu_ar(self, gpu_ar: Tensor | None) -> None:
        self.pccheck_adapter.gpu_ar = gpu_ar

    @property
    def eng(self) -> engine.Engine:
        """The Engine of the checkpoints, for what PCcheck has no name for."""
        return self.pccheck_adapter.eng

    def train_step(
        self, inputs: Tensor, labels: Tensor, criterion: Callable[..., Tensor], enable_checkpoint: bool = False
    ) -> float:
        """One step of forward, backward and optimizer, and a save if asked for; returns the loss.

        Raises:
            UsageError: the trainer has no model, or no optimizer.
        """
        if self.model is None or self.optimizer is None:
            raise engine.UsageError("train_step() needs a model and an optimizer_class; pass both to the trainer")
        self.current_training_step += 1
        self.current_checkpoint_id = f"step_{self.current_training_step}"
        outputs = self.model(inputs)
        if outputs.dim() == 3:  # of a sequence model: (batch, position, vocabulary)
            outputs, labels = outputs.view(-1, outputs.size(-1)), labels.view(-1)
        loss = criterion(outputs, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if enable_checkpoint:
            self.save_entire_checkpoint_in_chunks(
                self.current_checkpoint_id, self.current_training_step, self.checkpoint_chunk_count
            )
        return loss.item()

    def restore(self, checkpoint_id: str | None = None) -> int:
        """`PCCheckAdapter.restore`; the next `train_step` has the number after the step that is returned."""
        self.current_training_step = self.pccheck_adapter.restore(checkpoint_id)
        self.current_checkpoint_id = checkpoint_id
        return self.current_training_step

    def finalize_checkpoint(self) -> None:
        """Wait until every save in flight is durable or has failed."""
        self.eng.wait()

    def shutdown(self) -> None:
        """Wait until every save is durable, and close the directory.  May be called again."""
        self.pccheck_adapter.shutdown()
