"""The subjects that restore: the engine and its peers, each used as its documentation says.

Theory of operation.  A `Loader` writes a checkpoint once, and then reads it repeatedly from a cold page cache.  `load`
ends when the state is in memory that a training can use: the existing tensors, or new ones if the peer makes them.  A
peer that maps a file has read nothing yet when it returns, so a copy into the existing tensors follows, as
``load_state_dict`` does it.  `load_part` reads one layer.

The engine verifies the checksum of everything it reads; the peers here verify nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.bench.savers import Dcp, Ours, Safetensors, Saver, TorchCheckpointing, TorchSave
from engine.bench.states import State


class Loader:
    """One way to restore."""

    name: ClassVar[str]
    how: ClassVar[str]
    written_by: ClassVar[type[Saver]]
    packages: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[bool] = False  # whether it can read one layer without the rest

    def __init__(self, directory: Path, state: State) -> None:
        self.state = state
        self.modules = [importlib.import_module(package) for package in self.packages]
        self.saver = self.written_by(directory, state)
        self.path = self.saver.path(1)
        self.saver.save(1).wait_durable()

    def files(self) -> list[Path]:
        """The files of the checkpoint."""
        return [path for path in self.path.rglob("*") if path.is_file()] if self.path.is_dir() else [self.path]

    def load(self) -> object:
        """Read everything; the result is kept until the time is taken."""
        raise NotImplementedError

    def load_part(self, layer: str) -> object:
        """Read one layer."""
        raise NotImplementedError

    def close(self) -> None:
        self.saver.close()

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy into the tensors that are there."""
        for name, tensor in tensors.items():
            self.state.tensors[name].copy_(tensor)


class OursLoader(Loader):
    name = "engine"
    how = "Engine(directory).restore(arena), every block verified"
    written_by = Ours
    parts = True

    def data_files(self) -> list[Path]:
        """The one with the data, beside the small ones."""
        assert isinstance(self.saver, Ours)
        return self.saver.data_files()

    def load(self) -> object:
        assert isinstance(self.saver, Ours) and self.state.arena is not None
        return self.saver.engine.restore(self.state.arena)

    def load_part(self, layer: str) -> object:
        assert isinstance(self.saver, Ours) and self.state.arena is not None
        return self.saver.engine.restore(self.state.arena, select=layer)


class OursNew(OursLoader):
    name = "engine load"
    how = "Engine(directory).load(), into new tensors, every block verified"

    def load(self) -> object:
        assert isinstance(self.saver, Ours)
        return self.saver.engine.load()

    def load_part(self, layer: str) -> object:
        assert isinstance(self.saver, Ours)
        return self.saver.engine.load(select=layer)


class TorchLoad(Loader):
    name = "torch.load"
    how = "torch.load(path), into new tensors"
    written_by = TorchSave

    def load(self) -> object:
        return torch.load(self.path)


class TorchMapped(Loader):
    name = "torch.load mmap"
    how = "torch.load(path, mmap=True), copied into the tensors that are there"
    written_by = TorchSave
    parts = True

    def load(self) -> object:
        self.fill(torch.load(self.path, mmap=True))
        return None

    def load_part(self, layer: str) -> object:
        mapped = torch.load(self.path, mmap=True)
        self.fill({name: tensor for name, tensor in mapped.items() if name.startswith(f"{layer}.")})
        return None


class SafetensorsLoader(Loader):
    name = "safetensors"
    how = "load_file(path), which maps it, copied into the tensors that are there; a part through safe_open"
    written_by = Safetensors
    packages = ("safetensors", "safetensors.torch")
    parts = True

    def load(self) -> object:
        self.fill(self.modules[1].load_file(self.path))
        return None

    def load_part(self, layer: str) -> object:
        with self.modules[0].safe_open(self.path, framework="pt") as file:
            self.fill({name: file.get_tensor(name) for name in self.state.tensors if name.startswith(f"{layer}.")})
        return None


class DcpLoader(Loader):
    name = "DCP load"
    how = "torch.distributed.checkpoint.load(tensors, checkpoint_id=directory), in place"
    written_by = Dcp
    packages = ("torch.distributed.checkpoint",)
    parts = True

    def load(self) -> object:
        self.modules[0].load(dict(self.state.tensors), checkpoint_id=self.path, no_dist=True)
        return None

    def load_part(self, layer: str) -> object:
        part = {name: tensor for name, tensor in self.state.tensors.items() if name.startswith(f"{layer}.")}
        self.modules[0].load(part, checkpoint_id=self.path, no_dist=True)
        return None


class TorchCheckpointingLoader(Loader):
    name = "torch-checkpointing"
    how = "CheckpointManager().load(path, into=tensors), in place"
    written_by = TorchCheckpointing

    def load(self) -> object:
        assert isinstance(self.saver, TorchCheckpointing)
        return self.saver.manager.load(str(self.path), into={"model": dict(self.state.tensors)})


class FastSafetensors(Loader):
    name = "fastsafetensors"
    how = "fastsafe_open(path, nogds=True) for the CPU, all tensors taken"
    written_by = Safetensors
    packages = ("fastsafetensors",)

    def load(self) -> object:
        with self.modules[0].fastsafe_open(str(self.path), device="cpu", nogds=True) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


class RunaiStreamer(Loader):
    name = "runai-model-streamer"
    how = "SafetensorsStreamer().stream_file(path), all tensors taken"
    written_by = Safetensors
    packages = ("runai_model_streamer",)
    parts = True

    def load(self) -> object:
        return self._stream(None)

    def load_part(self, layer: str) -> object:
        return self._stream([name for name in self.state.tensors if name.startswith(f"{layer}.")])

    def _stream(self, names: list[str] | None) -> dict[str, Any]:
        with self.modules[0].SafetensorsStreamer() as streamer:
            streamer.stream_file(str(self.path), tensor_names=names)
            return dict(streamer.get_tensors())


LOADERS: tuple[type[Loader], ...] = (
    *(OursLoader, OursNew, TorchLoad, TorchMapped, SafetensorsLoader, DcpLoader, TorchCheckpointingLoader),
    *(FastSafetensors, RunaiStreamer),
)
LOADING_PEERS = tuple(loader.name for loader in LOADERS if not issubclass(loader, OursLoader))
