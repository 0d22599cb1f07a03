"""The subjects that save: the engine with each of its backends, and its peers, each used as its documentation says.

Theory of operation.  A `Saver` is made with a directory and a state.  `save(step)` returns when the training loop may
continue, with a `Pending` that waits for two events: the state may change, and the save is durable.  Durable means the
same for all: a power failure would not lose it.  If a peer does not sync, the benchmark calls fsync of the files and
directories within the measured time; for asynchronous peers on a thread, as a callback would.  Each keeps two
checkpoints, and `tidy` deletes the oldest outside that time.  The engine recycles its own.

A peer that is not installed, or does not work here, raises at the first try, and becomes a row that says so.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

import engine
from engine.bench.states import State

KEEP = 2  # checkpoints of every subject: the default of Engine
STAGING_BYTES = 256 << 20  # the engine's default, which `memory` is compared with

# What DeepSpeed's configuration says where nothing is said: runtime/model_checkpointing and runtime/swap_tensor,
# constants.py of 0.19.8.
DEEPSPEED_BUFFER_BYTES = 64 << 20
DEEPSPEED_AIO = {
    "block_size": 1 << 20,
    "queue_depth": 8,
    "single_submit": False,
    "overlap_events": True,
    "intra_op_parallelism": 1,
}


def _nothing() -> None:
    """Nothing to wait for: the call has done everything."""


def _done() -> Future[Any]:
    """A future that is done, with the result of the call."""
    future: Future[Any] = Future()
    future.set_result(None)
    return future


@dataclass(frozen=True, slots=True)
class Pending:
    """The rest of a save after its call has returned."""

    wait_staged: Callable[[], object] = _nothing
    durable: Future[Any] = field(default_factory=_done)
    stats: Callable[[], Mapping[str, int]] = dict

    def wait_durable(self) -> None:
        self.durable.result()


class Saver:
    """One way to save."""

    name: ClassVar[str]
    how: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    adopts: ClassVar[bool] = False  # whether it saves the state's arena, rather than its tensors

    def __init__(self, directory: Path, state: State) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.state = state
        self.steps: list[int] = []
        self.modules = [importlib.import_module(package) for package in self.packages]

    def save(self, step: int) -> Pending:
        """Save; returns when the loop may continue."""
        raise NotImplementedError

    def guard(self) -> AbstractContextManager[object]:
        """A context for the training's optimizer step."""
        return nullcontext()

    def path(self, step: int) -> Path:
        """Where a step goes."""
        if step not in self.steps:
            self.steps.append(step)
        return self.directory / f"step-{step:08d}"

    def tidy(self) -> None:
        """Delete all but the newest two, and wait for it, so that it costs no other subject time."""
        for step in self.steps[:-KEEP]:
            path = self.path(step)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            self.steps.remove(step)

    def close(self) -> None:
        """Release all resources."""


def sync(path: Path) -> None:
    """fsync a file or a tree, and the directory that names it."""
    for directory, _, names in os.walk(path):
        for file_name in names:
            _sync_one(Path(directory, file_name))
        _sync_one(Path(directory))
    if path.is_file():
        _sync_one(path)
    _sync_one(path.parent)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- ours ------------------------------------------------------------------------------------------------------------


class Ours(Saver):
    """The engine with its defaults."""

    name = "engine"
    how = "Engine(directory).checkpoint(arena), arena adopted, everything at its default"
    adopts = True
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, directory: Path, state: State) -> None:
        super().__init__(directory, state)
        self.engine = engine.Engine(directory, **self.engine_options(state))

    def engine_options(self, state: State) -> Mapping[str, Any]:
        return self.options

    def save(self, step: int) -> Pending:
        assert self.state.arena is not None
        save = self.engine.checkpoint(self.state.arena, step=step)
        return Pending(save.wait_staged, save, save.stats)

    def tidy(self) -> None:
        """Retiring is a part of every save, and nothing is deleted."""

    def data_files(self) -> list[Path]:
        """The data file of each checkpoint, and of the one that will be recycled.

        Recycling renames them, so these are their present paths, always in the same order.
        """
        status = {path: path.stat() for path in self.directory.rglob("*") if path.is_file()}
        return sorted((p for p in status if status[p].st_size >= self.state.nbytes), key=lambda p: status[p].st_ino)

    def close(self) -> None:
        self.engine.close()


class OursRing(Ours):
    name = "engine io_uring"
    how = 'backend="io_uring": the same as the default where that is what it finds, so how far they differ is noise'
    options: ClassVar[Mapping[str, Any]] = {"backend": "io_uring"}


class OursPlain(Ours):
    name = "engine io_uring_plain"
    how = 'backend="io_uring_plain": one ring, nothing registered'
    options: ClassVar[Mapping[str, Any]] = {"backend": "io_uring_plain"}


class OursThreads(Ours):
    name = "engine threads"
    how = 'backend="threads": pwrite of four threads, O_DIRECT; what the ring is worth'
    options: ClassVar[Mapping[str, Any]] = {"backend": "threads"}


class OursBuffered(Ours):
    name = "engine buffered"
    how = 'backend="buffered": pwrite of four threads through the page cache'
    options: ClassVar[Mapping[str, Any]] = {"backend": "buffered"}


class OursKeeping(Ours):
    """A running engine that retires nothing, so that each save makes new files."""

    options: ClassVar[Mapping[str, Any]] = {"keep": None}


class OursWhole(Ours):
    name = "engine staged whole"
    how = "staging_bytes for the whole arena, so that staging waits for no write"

    def engine_options(self, state: State) -> Mapping[str, Any]:
        # Each file may end in a block that is not full, and its header comes on top.
        return {"staging_bytes": max(STAGING_BYTES, state.nbytes + (64 << 20))}


# -- in torch and safetensors ----------------------------------------------------------------------------------------


class TorchSave(Saver):
    name = "torch.save"
    how = "torch.save(tensors, path), fsync of file and directory"

    def save(self, step: int) -> Pending:
        path = self.path(step)
        torch.save(dict(self.state.tensors), path)
        sync(path)
        return Pending()


class Safetensors(Saver):
    name = "safetensors"
    how = "safetensors.torch.save_file(tensors, path), fsync of file and directory"
    packages = ("safetensors.torch",)

    def save(self, step: int) -> Pending:
        path = self.path(step)
        self.modules[0].save_file(dict(self.state.tensors), path)
        sync(path)
        return Pending()


class Dcp(Saver):
    name = "DCP save"
    how = "torch.distributed.checkpoint.save(tensors, checkpoint_id=directory), fsync of the directories"
    packages = ("torch.distributed.checkpoint",)

    def save(self, step: int) -> Pending:
        path = self.path(step)
        self.modules[0].save(dict(self.state.tensors), checkpoint_id=path, no_dist=True)
        sync(path)
        return Pending()


class _Asynchronous(Saver):
    """A peer that returns its own future and leaves the syncing to a callback."""

    def __init__(self, directory: Path, state: State) -> None:
        super().__init__(directory, state)
        self.syncer = ThreadPoolExecutor(1)

    def settled(self, future: Future[Any], path: Path) -> Future[None]:
        """A future of the checkpoint written and synced."""

        def settle() -> None:
            future.result()
            sync(path)

        return self.syncer.submit(settle)

    def close(self) -> None:
        self.syncer.shutdown()


class DcpAsync(_Asynchronous):
    name = "DCP async_save"
    how = "torch.distributed.checkpoint.async_save(tensors, checkpoint_id=directory), everything at its default"
    packages = ("torch.distributed.checkpoint",)

    def save(self, step: int) -> Pending:
        path = self.path(step)
        future = self.modules[0].async_save(dict(self.state.tensors), checkpoint_id=path, no_dist=True)
        return Pending(durable=self.settled(future, path))


class DcpCached(_Asynchronous):
    name = "DCP async_save cached"
    how = "the same with one DefaultStager kept: shared memory reused, staging on a thread; nothing pinned without CUDA"
    packages = ("torch.distributed.checkpoint", "torch.distributed.checkpoint.staging")

    def __init__(self, directory: Path, state: State) -> None:
        super().__init__(directory, state)
        staging = self.modules[1]
        self.staged: Future[Any] = Future()
        self.staged.set_result(None)
        self.stager = staging.DefaultStager(
            staging.StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
        )

    def save(self, step: int) -> Pending:
        path = self.path(step)
        response = self.modules[0].async_save(
            dict(self.state.tensors), checkpoint_id=path, async_stager=self.stager, no_dist=True
        )
        self.staged = response.staging_completion
        return Pending(self.staged.result, self.settled(response.upload_completion, path))

    def guard(self) -> AbstractContextManager[object]:
        self.staged.result()
        return nullcontext()

    def close(self) -> None:
        super().close()
        self.stager.close()


# -- elsewhere -------------------------------------------------------------------------------------------------------


class TorchCheckpointing(_Asynchronous):
    name = "torch-checkpointing"
    how = "CheckpointManager().save(path, tensors): shared memory, a process that writes; buffered, fsync of the tree"
    packages = (
        *("torch_checkpointing", "torch_checkpointing.storage.filesystem"),
        *("torch_checkpointing.config", "torch_checkpointing.staging"),
    )
    direct: ClassVar[bool] = False

    def __init__(self, directory: Path, state: State) -> None:
        super().__init__(directory, state)
        package, filesystem, config, staging = self.modules
        # Pinning and copies that do not block want CUDA: its docs/troubleshooting.md has this for hosts without.
        stager = staging.CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self.manager = package.CheckpointManager(
            package.CheckpointManager.Config(
                save=config.AsyncCheckpointSaverConfig(staging_config=stager),
                storage_config=filesystem.LocalFileSystemStorageConfig(use_direct_io=self.direct),
            )
        )

    def save(self, step: int) -> Pending:
        path = self.path(step)
        future = self.manager.save(str(path), {"model": dict(self.state.tensors)})
        # Its lock for the optimizer's step is free again when nothing is captured any more.
        return Pending(self._wait_captured, self.settled(future, path))

    def guard(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self.manager.lock()
        return lock

    def close(self) -> None:
        super().close()
        self.manager.close()

    def _wait_captured(self) -> None:
        with self.manager.lock():
            pass


class TorchCheckpointingDirect(TorchCheckpointing):
    name = "torch-checkpointing O_DIRECT"
    how = "the same with its default storage, which asks for O_DIRECT"
    direct = True


class TensorStore(_Asynchronous):
    name = "TensorStore"
    how = "one zarr3 array a tensor in an OCDBT database of files, which it syncs; staged when every write has copied"
    packages = ("tensorstore",)

    def save(self, step: int) -> Pending:
        tensorstore = self.modules[0]
        path = self.path(step)
        context = tensorstore.Context()  # one, so that all arrays share the database
        opened = [
            (tensor, tensorstore.open(self.spec(path, name, tensor), context=context, create=True, open=False))
            for name, tensor in self.state.tensors.items()
        ]
        writes = [array.result().write(tensor.detach().numpy()) for tensor, array in opened]

        def staged() -> None:
            for write in writes:
                write.copy.result()

        def settle() -> None:
            for write in writes:
                write.commit.result()
            sync_directories(path)

        return Pending(staged, self.syncer.submit(settle))

    def store(self, path: Path, name: str) -> dict[str, Any]:
        """Where an array goes."""
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}, "path": f"{name}/"}

    def spec(self, path: Path, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """An array of one chunk: the tensor as it is."""
        return {
            "driver": "zarr3",
            "kvstore": self.store(path, name),
            "metadata": {
                "shape": list(tensor.shape),
                "data_type": str(tensor.dtype).removeprefix("torch."),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(tensor.shape)}},
            },
        }


class TensorStoreFiles(TensorStore):
    name = "TensorStore files"
    how = "the same with a directory of files for each array"

    def store(self, path: Path, name: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{path / name}/"}


def sync_directories(path: Path) -> None:
    """fsync the directories of a tree whose files are synced, and the one that names it."""
    for directory, _, _ in os.walk(path):
        _sync_one(Path(directory))
    _sync_one(path.parent)


class DeepSpeed(Saver):
    name = "DeepSpeed"
    how = "torch.save into deepspeed.io.FastFileWriter: libaio, O_DIRECT, double buffer, fsync at close; its defaults"
    packages = ("deepspeed.io", "deepspeed.ops.op_builder")

    def __init__(self, directory: Path, state: State) -> None:
        if not torch.cuda.is_available():
            raise NotImplementedError(
                "deepspeed 0.19.8 has no extension `utils` for the CPU, which FastFileWriter loads (tried)"
            )
        super().__init__(directory, state)
        self.handle = self.modules[1].AsyncIOBuilder().load(verbose=False).aio_handle(**DEEPSPEED_AIO)
        self.buffer = self.handle.new_cpu_locked_tensor(DEEPSPEED_BUFFER_BYTES, torch.empty(0, dtype=torch.uint8))

    def save(self, step: int) -> Pending:
        path = self.path(step)
        config = self.modules[0].FastFileWriterConfig(dnvme_handle=self.handle, pinned_tensor=self.buffer)
        writer = self.modules[0].FastFileWriter(file_path=str(path), config=config)
        torch.save(dict(self.state.tensors), writer)
        writer.close()
        sync(path)
        return Pending()

    def close(self) -> None:
        self.handle.free_cpu_locked_tensor(self.buffer)


SAVERS: tuple[type[Saver], ...] = (
    *(Ours, OursRing, OursPlain, OursThreads, OursBuffered, OursWhole),
    *(TorchSave, Safetensors, Dcp, DcpAsync, DcpCached),
    *(TorchCheckpointing, TorchCheckpointingDirect, TensorStore, TensorStoreFiles, DeepSpeed),
)
PEERS = tuple(saver.name for saver in SAVERS if not issubclass(saver, Ours))
