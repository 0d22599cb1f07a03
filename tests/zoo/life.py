"""Life: what a training of the zoo asks for its steps, and what that does besides.

Theory of operation.  A training is run by several processes, which differ in their `Plan` only:

    undisturbed   no engine; the digest of every value of every step is the reference
    killed        checkpoints every few steps, and waits at its end for a kill that comes earlier
    resumed       restores the newest checkpoint, and goes on to the last step

Each reports events as lines of JSON.  The digests are of everything that the training's own objects show: parameters,
buffers, `state_dict()` of optimizers and of all else, and random generators.  They are compared by name, so that a
difference says what is wrong.
"""

from __future__ import annotations

import enum
import hashlib
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import torch
from torch import Tensor, nn

import engine

# The tensors of the zoo are small, and several trainings run one after the other.
TINY: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


class Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Plan(NamedTuple):
    """What one process does.

    Attributes:
        directory: of the checkpoints; None for an undisturbed training.
        last: the last step.
        every: how many steps lie between two checkpoints.
        awaits_kill: whether to stay after the last step.
        rank: the number of this process among `rank_count`.
        rendezvous: a file that does not exist yet, for several ranks.
    """

    directory: Path | None
    last: int
    every: int = 2
    awaits_kill: bool = False
    rank: int = 0
    rank_count: int = 1
    rendezvous: Path | None = None


class Run:
    """One life of a training."""

    def __init__(self, plan: Plan, events: TextIO) -> None:
        self.plan = plan
        self.last = plan.last
        self._events = events
        self._eng: engine.Engine | None = None
        self._arena: engine.Arena | None = None
        self._saves: list[engine.Save] = []
        self._model: nn.Module = nn.Module()
        self._raw: nn.Module = self._model
        self._optimizers: dict[str, Any] = {}
        self._stateful: dict[str, Stateful] = {}
        warnings.showwarning = self._note_warning

    # -- for the trainings ----------------------------------------------------------------------------------------

    def steps(
        self, model: nn.Module, optimizer: Any = None, *, raw: nn.Module | None = None, **stateful: Stateful
    ) -> Iterator[int]:
        """The steps that are left to do; the body of the loop is one step."""
        start = self.begin(model, optimizer, raw=raw, **stateful)
        for step in range(start + 1, self.last + 1):
            yield step
            self.end(step)
        self.finish()

    def begin(
        self, model: nn.Module, optimizer: Any = None, *, raw: nn.Module | None = None, **stateful: Stateful
    ) -> int:
        """Adopt and resume; the step that is restored, or 0.

        Args:
            model, optimizer: for `Arena.adopt`.
            raw: the module whose names the files have to have; the model, unless it is wrapped.
            stateful: what else has a `state_dict()`; it is stored in `extra`.
        """
        self._model, self._raw, self._stateful = model, model if raw is None else raw, stateful
        named = optimizer.items() if isinstance(optimizer, Mapping) else enumerate(_as_list(optimizer))
        self._optimizers = {str(name): one for name, one in named}
        if self.plan.directory is None:
            return 0
        self._tell(event="adopting")
        self._arena = engine.Arena.adopt(model, optimizer)
        if self.plan.rank:
            return self._follow()
        self._eng = engine.Engine(self.plan.directory, keep=3, **TINY)
        start = engine.resume(self._arena, self._eng)
        if start:
            self._put_back(self._eng.extra(start))
        self._tell(event="resumed", step=start)
        return start

    def end(self, step: int) -> None:
        """A step has ended: report the digests, and save in every `every`-th step."""
        self._tell(event="step", step=step, digests=self._digests())
        if self._eng is None or step % self.plan.every:
            return
        assert self._arena is not None
        state = {name: one.state_dict() for name, one in self._stateful.items()}
        save = self._eng.checkpoint(self._arena, step, extra={"rng": engine.rng_state(), **state})
        self._tell(event="saving", step=step)
        if not self._saves:  # the kill has to find a checkpoint
            save.result()
        self._saves.append(save)

    def finish(self) -> None:
        """The last step has ended."""
        for save in self._saves:
            save.result()
        self._tell(event="finished")
        if self.plan.awaits_kill:
            signal.pause()
        if self._eng is not None:
            self._eng.close()

    # -- what it does ---------------------------------------------------------------------------------------------

    def _follow(self) -> int:
        """Restore what rank 0 has restored: an Engine has one rank, and any number of readers."""
        assert self.plan.directory is not None and self._arena is not None
        if not self.plan.directory.exists():  # rank 0 makes it
            return 0
        run = engine.open(self.plan.directory)
        start = engine.resume(self._arena, run)
        if start:
            self._put_back(run.extra(start))
        return start

    def _put_back(self, extra: Mapping[str, Any]) -> None:
        for name, one in self._stateful.items():
            one.load_state_dict(extra[name])
        engine.set_rng_state(extra["rng"])

    def _digests(self) -> dict[str, str]:
        found: dict[str, str] = {}
        with torch.no_grad():
            _digest(f"{MODEL}", dict(self._raw.state_dict()), found)
            _digest("buffers", dict(self._raw.named_buffers()), found)
            _digest("parameters", dict(self._raw.named_parameters()), found)
            for name, optimizer in self._optimizers.items():
                if not self.plan.rank:  # a sharding optimizer collects its state on one rank
                    _digest(f"optimizer {name}", optimizer.state_dict(), found)
            for name, one in self._stateful.items():
                _digest(name, one.state_dict(), found)
            _digest("rng", engine.rng_state(), found)
        return found

    def _note_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, engine.EngineWarning):
            self._tell(event="warned", what=str(message))

    def _tell(self, **event: Any) -> None:
        self._events.write(json.dumps({"rank": self.plan.rank, **event}) + "\n")
        self._events.flush()


# The digests of the model's state_dict() are under names that begin with this and a dot.
MODEL = "model"


def _as_list(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes; memory format and everything else of the object are left out."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.is_quantized:
        plain = plain.int_repr()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()[:16]


def _digest(path: str, value: Any, found: dict[str, str]) -> None:
    """Digests of the leaves of a tree, by path.  Sequences are lists, since a checkpoint does not tell them apart."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a subclass made of other tensors
        for name in value.__tensor_flatten__()[0]:
            _digest(f"{path}.{name}", getattr(value, name), found)
    elif isinstance(value, Tensor):
        found[path] = tensor_digest(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _digest(f"{path}.{key}", value[key], found)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            _digest(f"{path}.{index}", one, found)
    elif isinstance(value, enum.Enum):
        _digest(path, value.value, found)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # of numpy
        found[path] = hashlib.sha256(str(value.dtype).encode() + value.tobytes()).hexdigest()[:16]
    elif isinstance(value, bool | int | float | str | bytes | None | torch.dtype | torch.device):
        found[path] = repr(value)
    elif not isinstance(value, Callable):  # type: ignore[arg-type]
        _digest(path, vars(value), found)
