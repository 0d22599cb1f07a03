"""Reading: the methods that read checkpoints, which `Engine` and `Run` share.

Theory of operation.  Both own a `Reader` and a `Verifier` of the store.  Each checks in `_lend` that it is open
before it lends them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from engine.errors import ArgumentError
from engine.session.restore import RestoreInfo, Tensors, load, restore, restore_module, restore_tensors
from engine.session.save import ChunkStatus, chunks_of
from engine.state.arena import Arena
from engine.state.select import Select
from engine.state.tensors import decode
from engine.store.info import CheckpointInfo
from engine.store.reader import Reader
from engine.store.verify import Damage, Verifier


class Lent(NamedTuple):
    """What reads a directory of checkpoints."""

    reader: Reader
    verifier: Verifier


class Reading(ABC):
    """Reads the checkpoints of one directory."""

    @abstractmethod
    def _lend(self) -> Lent:
        """What reads the directory, or raise ClosedError or ForkedError."""

    def steps(self) -> list[int]:
        """Committed steps, oldest first.  Does not wait for a save in flight."""
        return self._lend().reader.steps()

    def info(self, step: int | None = None) -> CheckpointInfo:
        """The facts of a checkpoint without its tensors.

        Args:
            step: which; None for the newest.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError: its manifest is damaged.
        """
        return self._lend().reader.info(step)

    def extra(self, step: int | None = None) -> Any:
        """The `extra` that a checkpoint was saved with.

        Raises as `info`.
        """
        return decode(self._lend().reader.manifest(step).extra)

    def metrics(self, step: int | None = None) -> Mapping[str, float | None]:
        """The metrics that a checkpoint was saved with; a value that was not finite is None.  Raises as `info`."""
        return self.info(step).metrics

    def chunks(self, step: int | None = None, layer: str | None = None) -> list[ChunkStatus]:
        """Every chunk of a checkpoint: its file, offset, size and layers.  Raises as `info`.

        Args:
            step: which; None for the newest.
            layer: only the chunks that hold a part of this layer, or of one in it; or of the layers that a pattern
                matches, such as ``"layers.*.attn"``.

        Raises:
            ArgumentError: the checkpoint has no such layer.
        """
        if isinstance(step, str):
            raise ArgumentError(f"step is {step!r}; it must be a number, and a layer is given as layer={step!r}")
        manifest = self._lend().reader.manifest(step)
        rows = [
            ChunkStatus(manifest.files[row.file].name, row.index, row.offset, row.nbytes, row.layers, "durable")
            for row in manifest.chunks
        ]
        return chunks_of(rows, layer)

    def restore(
        self,
        arena: Arena | nn.Module | Mapping[str, Tensor],
        step: int | None = None,
        *,
        select: Select = None,
        strict: bool = True,
    ) -> RestoreInfo:
        """Fill an arena, a module or a dict of tensors from a checkpoint.  Blocks until all bytes are verified.

        Args:
            arena: with the same names, shapes and dtypes as were saved; any chunking.  Its optimizers have the names
                and groups that they had.  An optimizer that makes its state in its own step, and has taken none, gets
                it here.  Or a module: its parameters and buffers are filled where they are, without an optimizer.  Or a
                dict of tensors by the names in the checkpoint: they are filled where they are, and what else the
                checkpoint holds is not read.
            step: which; None for the newest that verifies, passing over damaged ones with a warning.
            select: patterns of layers or names, or `engine.role("model", "buffer")` for the weights alone; only those
                tensors are read and changed.  Hyperparameters, and everything else that optimizers and modules keep
                besides tensors, stay as they are.
            strict: False restores what fits by name, dtype and shape, and leaves the rest as it is: a new head, or
                another optimizer.  The result names what was left out.

        Raises:
            MismatchError: the arena does not fit the checkpoint; nothing was changed.
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: the checkpoint asked for, or every one, is damaged or unreadable.  The
                arena may hold a part of it, and will not be saved until a whole restore succeeds.
        """
        if isinstance(arena, nn.Module):
            return restore_module(self._lend().reader, arena, step, select, strict)
        if isinstance(arena, Mapping):
            return restore_tensors(self._lend().reader, arena, step, select, strict)
        return restore(self._lend().reader, arena, step, select, strict)

    def load(self, step: int | None = None, *, select: Select = None) -> Tensors:
        """Read a checkpoint's tensors into new memory, by name.  Blocks.

        A tied tensor is there under each of its names that `select` picks.  Raises as `restore`; ArgumentError if
        `select` matches nothing.
        """
        return load(self._lend().reader, step, select)

    def verify(self, step: int | None = None) -> tuple[Damage, ...]:
        """Read every block of a checkpoint, into no tensor, and return all damage: nothing if it is sound.  Blocks.

        Args:
            step: which; None for the newest.

        Raises:
            NotFoundError: there is no such checkpoint.
            StorageError: it could not be read, for a reason that says nothing of it, such as too many open files.
        """
        return self._lend().verifier.verify(step)
