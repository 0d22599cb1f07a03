"""Tears: saves with a writer beside them, and the check that each is exact, or torn where that is permitted.

Theory of operation.  A `Life` is one Engine, or two, and one training whose writer strikes at a random moment after
each `checkpoint()`.  Before the call every tensor is hashed, because clones of an arena of 8 GB have no room.  After
the save the checkpoint is loaded and hashed.  There are three ends:

    exact   every tensor has its hash
    torn    the save failed with TornSnapshot
    mixed   a checkpoint was committed, and a tensor differs

`permitted` is the table of guards: which ends a writer may have.  Any other end is a `Tear`.  All choices follow from
the seed and the number of the life.  The moments of threads do not, so that a replay makes the same choices, and may
end differently.
"""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from disk import same
from hooked import HookedFilesystem
from torch import Tensor, nn
from writers import (
    OPTIMIZERS,
    WIDTH,
    WRITERS,
    Model,
    Sight,
    Training,
    fork_workers,
    memory_view,
    numpy_view,
    spawn_workers,
)

import engine
from engine.options import Choice, GuardName

End = Literal["exact", "torn", "mixed"]
Digest = tuple[torch.dtype, torch.Size, bytes]

BACKENDS: tuple[Choice, ...] = ("io_uring", "threads", "buffered")
MODES: dict[Any, float] = {"auto": 3, "lazy": 4, "eager": 1, "checked": 2}

# Staging slots and their size: few and small ones wait for the disk, so that writers strike in the middle.
_SLOTS = ((512 << 10, 256 << 10), (256 << 10, 64 << 10), (1 << 20, 256 << 10), (2 << 20, 512 << 10))

SAVES_IN_A_LIFE = 8

# A process that starts Python takes seconds, and a writer that holds the GIL may have to wait for the guard's patience.
_RARE: dict[Callable[[Training], None], float] = {
    spawn_workers: 0.05,
    memory_view: 0.1,
    numpy_view: 0.3,
    fork_workers: 0.3,
}

# No save of a few megabytes takes so long, but one that hangs.
_HANG_S = 300


class Tear(AssertionError):
    """A save had an end that its guard does not permit."""


class SlowFilesystem(HookedFilesystem):
    """Files come late: until then a save stages as many blocks as it has slots."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def before(self, operation: str, path: str, target: str = "") -> None:
        if operation == "allocate":
            time.sleep(self._delay_s)


class Setting(NamedTuple):
    """How one save is made, and who writes beside it."""

    guard: GuardName
    is_lazy: bool
    is_checked: bool
    sight: Sight


@dataclass
class Figures:
    """What was seen."""

    ends: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # guard, writer, end
    choices: Counter[tuple[str, str]] = field(default_factory=Counter)
    save_count: int = 0
    early_count: int = 0  # saves that were not staged when the writer began
    documented_count: int = 0  # mixed by writers that the fence is documented not to stop


def permitted(setting: Setting) -> tuple[End, ...]:
    """The table of guards (docs/architecture.md, "Guards")."""
    if not setting.is_lazy or setting.sight is Sight.FENCED:
        return ("exact",)
    if setting.guard == "cow":
        # A writer that holds the GIL may keep the save from its files, and is let go on (decision 0021).
        return ("exact", "torn") if setting.sight is Sight.HOLDS_GIL else ("exact",)
    if setting.guard == "detect" or setting.is_checked:
        return ("exact", "torn")
    # Nothing sees it, or an operation that is counted when it ends, which may be after staging.  Both are documented.
    return ("exact", "torn", "mixed")


class Life:
    """One training and its Engines."""

    def __init__(
        self, root: Path, seed: int, number: int, figures: Figures, guards: Sequence[GuardName], width: int = WIDTH
    ) -> None:
        self._chance = random.Random(f"{seed} {number}")
        self._figures = figures
        self._root = root
        self._width = width
        self._guard = guards[number % len(guards)]
        self._backend = self._chance.choice(BACKENDS)
        self._optimizer_name = self._chance.choice(list(OPTIMIZERS))
        self._staged_s = 0.02  # of the save before: the writer strikes about then
        self._torn: set[int] = set()  # Engines that have had a torn save under "auto"

    def live(self, save_count: int = SAVES_IN_A_LIFE) -> None:
        """Make saves, and check each.

        Raises:
            Tear: one is not as it must be.
        """
        torch.manual_seed(self._chance.getrandbits(32))
        torch.set_num_threads(self._chance.choice([1, 1, 1, 2]))
        self._make_training()
        engines = [self._open(index) for index in range(self._chance.choice([1, 1, 2]))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", engine.EngineWarning)
                for save_number in range(save_count):
                    self._round(engines, is_last=save_number == save_count - 1)
        finally:
            for eng in engines:
                eng.close()

    def _open(self, index: int) -> engine.Engine:
        staging_bytes, block_bytes = self._chance.choice(_SLOTS)
        return engine.Engine(
            self._root / str(index),
            guard=self._guard,
            backend=self._backend,
            staging_bytes=staging_bytes,
            block_bytes=block_bytes,
            staging_threads=self._chance.choice([1, 1, 2, 4]),
            chunk_bytes=self._chance.choice([block_bytes, 4 << 20]),
            rewrite_all=self._chance.random() < 0.1,
            retention=engine.Retention(last=2),
            filesystem=SlowFilesystem(self._chance.choice([0, 0.01, 0.03])),
        )

    def _make_training(self) -> None:
        model = Model(self._width)
        optimizer = OPTIMIZERS[self._optimizer_name]([p for p in model.parameters() if p.requires_grad])
        self._training = Training(model, optimizer, self._chance)
        optimizer.step()  # so that all of its state is there
        self._arena: engine.Arena | None = engine.Arena.adopt(model, optimizer)

    def _round(self, engines: list[engine.Engine], is_last: bool) -> None:
        """One save, or one on each Engine, and a writer."""
        chance = self._chance
        writer = chance.choices(list(WRITERS), [_RARE.get(each, 1.0) for each in WRITERS])[0]
        moments = [max(0.0, chance.uniform(-0.4, 0.9)) for _ in range(len(engines) + 1)]
        repetitions = chance.choice([1, 1, 2, 3])
        mode = chance.choices(list(MODES), list(MODES.values()))[0]
        drops_arena = is_last and chance.random() < 0.5
        assert self._arena is not None
        saves = []
        for index, eng in enumerate(engines):
            want = {name: digest(tensor) for name, tensor in self._arena.state_dict().items()}
            setting = self._setting(index, mode, writer)
            saves.append((eng, eng.checkpoint(self._arena, snapshot=mode), want, setting, index))
            time.sleep(moments[index] * self._staged_s)
        if drops_arena:
            self._arena = None
        self._figures.early_count += sum(not save.wait_staged(0) for _, save, *_ in saves)
        for _ in range(repetitions):
            writer(self._training)
        for eng, save, want, setting, index in saves:
            self._check(eng, save, want, setting, index, writer.__name__, mode)

    def _setting(self, index: int, mode: str, writer: Callable[[Training], None]) -> Setting:
        assert self._arena is not None
        trusted = self._guard != "fence" or self._arena.steps_by_torch
        is_lazy = {"lazy": True, "checked": True, "eager": False, "auto": trusted and index not in self._torn}[mode]
        return Setting(self._guard, is_lazy, mode == "checked", WRITERS[writer])

    def _check(
        self,
        eng: engine.Engine,
        save: engine.Save,
        want: dict[str, Digest],
        setting: Setting,
        index: int,
        writer: str,
        mode: str,
    ) -> None:
        figures = self._figures
        end, mixed = end_of(eng, save, want)
        if end == "torn" and mode == "auto":
            self._torn.add(index)
        if staged_ns := save.stats()["staged_ns"]:
            self._staged_s = min(0.2, 0.5 * self._staged_s + 0.5 * staged_ns / 1e9)
        figures.save_count += 1
        figures.ends[setting.guard, writer, end] += 1
        for choice in (("backend", eng.backend), ("mode", mode), ("optimizer", self._optimizer_name)):
            figures.choices[choice] += 1
        if end not in permitted(setting):
            raise Tear(
                f"{writer} beside a save under {setting.guard!r}, {eng.backend!r}, snapshot={mode!r}: the save is "
                f"{end}, which must be one of {', '.join(permitted(setting))}; tensors of another moment: {mixed}"
            )
        figures.documented_count += end == "mixed"


def digest(tensor: Tensor) -> Digest:
    """The dtype, the shape and a hash of the bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, xxhash.xxh3_128_digest(flat.numpy().data)


def end_of(eng: engine.Engine, save: engine.Save, want: dict[str, Digest]) -> tuple[End, list[str]]:
    """How a save ended, and the tensors that differ."""
    try:
        save.result(_HANG_S)
    except engine.TornSnapshot:
        return "torn", []
    loaded = eng.load(save.step)
    mixed = [name for name in want if name not in loaded or digest(loaded[name]) != want[name]]
    return ("mixed" if mixed else "exact"), mixed


def report(figures: Figures) -> str:
    """The figures, a line for each guard and writer."""
    lines = [
        f"{figures.save_count} saves; in {figures.early_count} the writer began before all was staged; "
        f"{figures.documented_count} mixed under the fence, as documented"
    ]
    for guard, writer in sorted({(guard, writer) for guard, writer, _ in figures.ends}):
        exact, torn, mixed = (figures.ends[guard, writer, end] for end in ("exact", "torn", "mixed"))
        lines.append(f"  {guard:6} {writer:18} exact {exact:6}  torn {torn:6}  mixed {mixed:6}")
    lines.append(
        "  " + ", ".join(f"{kind} {name} {number}" for (kind, name), number in sorted(figures.choices.items()))
    )
    return "\n".join(lines) + "\n"


# -- for other tests of guards -----------------------------------------------------------------------------------------


SLOW: dict[str, Any] = {"staging_bytes": 512 << 10, "block_bytes": 256 << 10}


def make_model(norm: bool = False) -> nn.Sequential:
    """12 MB of parameters, with gradients."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(nn.Linear(1000, 1000))
        if norm:
            layers.append(nn.BatchNorm1d(1000))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def copies(arena: engine.Arena) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in arena.state_dict().items()}


def is_exact(eng: engine.Engine, save: engine.Save, want: dict[str, Tensor]) -> bool:
    """Whether a save is exact; False if it is torn.  Fails for a mixed one."""
    try:
        save.result()
    except engine.TornSnapshot:
        return False
    loaded = eng.load(save.step)
    mixed = [name for name in want if not same(loaded[name], want[name])]
    assert not mixed, f"these are of another moment: {mixed}"
    return True
