"""Writers: the ways in which a training writes to its tensors, for the tear detector.

Theory of operation.  A writer is a function of a `Training`.  Its `Sight` says which guards see it, and with that which
ends of a save are permitted (`tears.permitted`).  Every writer changes each byte-for-byte comparison: it never writes
the values that are there already.
"""

from __future__ import annotations

import ctypes
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH = 500
_CHANNELS = 64


class Sight(Enum):
    """What sees a writer, beside the kernel's guards."""

    FENCED = "held back by the fence"
    COUNTED = "seen by torch's version counters"
    UNSEEN = "seen by nothing else"
    HOLDS_GIL = "seen by nothing else, and may hold the GIL while it writes"


class Training(NamedTuple):
    """What writers write to."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    chance: random.Random

    def some(self) -> Sequence[Tensor]:
        """Parameters in a random order, and now and then not all of them."""
        params = [parameter for parameter in self.model.parameters() if parameter.numel()]
        self.chance.shuffle(params)
        return params[: self.chance.choice([1, 3, len(params), len(params)])]


class Model(nn.Module):
    """4 MB: several units of 2 MiB with its optimizer's state; frozen, strided, large and small ones."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.conv = nn.Conv2d(_CHANNELS, _CHANNELS, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = nn.Embedding(width, width)
        self.frozen.weight.requires_grad_(False)
        self.low = nn.Parameter(torch.randn(1000, dtype=torch.bfloat16))
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.rand_like(parameter) + 0.5


class Sam(torch.optim.SGD):
    """An optimizer with a method beside `step()` that writes to the parameters, as SAM's first step does."""

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=0.05)


class Averaging(torch.optim.SGD):
    """An optimizer that swaps weights for evaluation, as averaging ones do."""

    @torch.no_grad()
    def swap(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.neg() + 1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sam": lambda p: Sam(p, lr=0.1, momentum=0.9),
    "averaging": lambda p: Averaging(p, lr=0.1, momentum=0.9),
}


# -- held back by the fence --------------------------------------------------------------------------------------------


def step(training: Training) -> None:
    training.optimizer.step()


def step_in_a_thread(training: Training) -> None:
    _in_a_thread(training.optimizer.step)


def step_of_another(training: Training) -> None:
    trained = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained[: training.chance.randint(1, len(trained))], lr=1.0).step()


def forward(training: Training) -> None:
    training.model.get_submodule("norm").train()(torch.randn(8, training.model.get_parameter("norm.weight").numel()))


def load(training: Training) -> None:
    training.model.load_state_dict({name: tensor + 1 for name, tensor in training.model.state_dict().items()})


def fork_workers(training: Training) -> None:
    """Workers that write to what they inherit, beside a step of the parent."""
    _iterate(_Inherited(training.model), "fork", training)


def spawn_workers(training: Training) -> None:
    _iterate(_Plain(), "spawn", training)


# -- seen by torch's version counters ----------------------------------------------------------------------------------


@torch.no_grad()
def copy(training: Training) -> None:
    for parameter in training.some():
        parameter.copy_(parameter.detach() + 1)


@torch.no_grad()
def clip(training: Training) -> None:
    for parameter in training.some():
        parameter.clamp_(-0.01, 0.01).add_(0.001)


def first_step(training: Training) -> None:
    """SAM's, of an optimizer that was adopted or of another."""
    own = training.optimizer
    optimizer = own if isinstance(own, Sam) else Sam(_trained(training.model), lr=1.0)
    optimizer.first_step()


# -- seen by the kernel's guards only ----------------------------------------------------------------------------------


def swap(training: Training) -> None:
    own = training.optimizer
    optimizer = own if isinstance(own, Averaging) else Averaging(_trained(training.model), lr=1.0)
    optimizer.swap()


def data(training: Training) -> None:
    for parameter in training.some():
        parameter.data.mul_(0.5).add_(1)


def memset(training: Training) -> None:
    byte = training.chance.randrange(256)
    for parameter in training.some():
        ctypes.memset(parameter.data_ptr(), byte, parameter.nbytes)


def memmove(training: Training) -> None:
    for parameter in training.some():
        source = torch.rand(parameter.nbytes // 4 + 1)
        ctypes.memmove(parameter.data_ptr(), source.data_ptr(), parameter.nbytes)


def thread(training: Training) -> None:
    _in_a_thread(lambda: data(training))


def threads(training: Training) -> None:
    """Several at once, each over all parameters in its own order."""
    orders = [training.some() for _ in range(3)]
    each = [threading.Thread(target=lambda order=order: [p.data.add_(1) for p in order]) for order in orders]
    for one in each:
        one.start()
    for one in each:
        one.join()


def read_file(training: Training) -> None:
    """read(2): the kernel writes to the parameter."""
    with open("/dev/urandom", "rb", buffering=0) as source:
        for parameter in training.some():
            source.readinto(_bytes_of(parameter).numpy().data)


def read_vector(training: Training) -> None:
    """readv(2) from a file, into all of them in one call."""
    views = [_bytes_of(parameter).numpy().data for parameter in training.some()]
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(1 << 16) * (sum(map(len, views)) // (1 << 16) + 1))
        file.seek(0)
        assert os.readv(file.fileno(), views) == sum(map(len, views))


# -- that may hold the GIL meanwhile -----------------------------------------------------------------------------------


def numpy_view(training: Training) -> None:
    """numpy holds the GIL for short arrays, and for some operations on long ones."""
    for parameter in training.some():
        _bytes_of(parameter).numpy()[...] += 1


def memory_view(training: Training) -> None:
    for parameter in training.some():
        _bytes_of(parameter).numpy().data[:] = training.chance.randbytes(parameter.nbytes)


WRITERS: dict[Callable[[Training], None], Sight] = {
    **dict.fromkeys(
        (step, step_in_a_thread, step_of_another, forward, load, fork_workers, spawn_workers), Sight.FENCED
    ),
    **dict.fromkeys((copy, clip, first_step), Sight.COUNTED),
    **dict.fromkeys((swap, data, memset, memmove, thread, threads, read_file, read_vector), Sight.UNSEEN),
    **dict.fromkeys((numpy_view, memory_view), Sight.HOLDS_GIL),
}


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes_of(parameter: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of its memory."""
    flat = parameter.detach().as_strided((parameter.numel(),), (1,))
    return flat.view(torch.uint8)


def _in_a_thread(function: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    one = threading.Thread(target=call)
    one.start()
    one.join()
    if failures:
        raise failures[0]


class _Inherited(Dataset[int]):
    """Writes to the parameters that a forked worker has inherited."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getitem__(self, index: int) -> int:
        for parameter in self._model.parameters():
            parameter.data.fill_(index)
        return int(all(parameter.eq(index).all() for parameter in self._model.parameters()))

    def __len__(self) -> int:
        return 4


class _Plain(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return 1

    def __len__(self) -> int:
        return 2


def _iterate(dataset: Dataset[int], context: str, training: Training) -> None:
    workers = DataLoader(dataset, num_workers=2, multiprocessing_context=context)
    with _quiet_fork():
        items = iter(workers)
        training.optimizer.step()
        assert all(bool(item) for item in items), "a worker does not see its own writes"


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """One thread of torch: a forked worker hangs in OpenMP's pool that it lacks."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
