"""Flat state: a training in one flat tensor, as PCcheck's `initialize` and `set_storage` make it.

Theory of operation.  `initialize` adopts the model, its optimizers and one tensor for each gradient in one arena, and
returns the arena's memory as a flat tensor of float32.  Tensors of every dtype are views of its bytes:

    gpu_ar    parameters | buffers, gradients | optimizer state

The space of a gradient is stored as `gradients.<parameter>`, in a file of its own.  Autograd puts a gradient elsewhere
after `zero_grad()` has dropped the one before; the next save copies it into its space (`gather`), and after a restore
every gradient is in its space again (`scatter`).

Rules: only the public API of the engine is used.  Called by `pccheck`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import engine

_ATTRIBUTE = "_engine_flat_state"  # of a tensor that `initialize` has returned


class _Gradient(NamedTuple):
    """The space of one parameter's gradient."""

    name: str
    param: Tensor
    space: Tensor


class StepCount:
    """A hook that counts the steps of an optimizer."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self, *_: object) -> None:
        """One more."""
        self.value += 1


class FlatState:
    """What a flat tensor stands for: an arena, and the gradients that have space in it."""

    def __init__(
        self, arena: engine.Arena, gradients: Sequence[_Gradient] = (), steps: StepCount | None = None
    ) -> None:
        self.arena = arena
        self._gradients = gradients
        self._steps = steps

    @property
    def training_step(self) -> int | None:
        """The steps that the first optimizer has taken, those before a restore included; None without an optimizer."""
        return None if self._steps is None else self._steps.value

    def resume(self, training_step: int) -> None:
        """A restore has brought the training to this step."""
        if self._steps is not None:
            self._steps.value = training_step

    def bind(self) -> None:
        """Make every gradient a view of its space; one that is absent becomes zero."""
        for _, param, space in self._gradients:
            _move(param, space)
            param.grad = space

    def gather(self) -> list[str]:
        """Move the gradients that are elsewhere into their space; returns the names of those that are absent."""
        for _, param, space in self._gradients:
            if param.grad is not None and param.grad is not space:
                _move(param, space)
                param.grad = space
        return [name for name, param, _ in self._gradients if param.grad is None]

    def scatter(self, absent: Iterable[str]) -> None:
        """Give every parameter the gradient that was restored into its space, and none to those named."""
        names = set(absent)
        for name, param, space in self._gradients:
            param.grad = None if name in names else space


def _move(param: Tensor, space: Tensor) -> None:
    if param.grad is not None and param.grad is not space:
        with torch.no_grad():
            space.copy_(param.grad)


def initialize(
    model: nn.Module, optimizer_list: Sequence[Optimizer] | Optimizer, do_opt_step: bool = True
) -> tuple[Tensor, int]:
    """Bring a training into one arena, and return its memory as a flat float32 tensor, with its number of elements.

    Parameters, buffers, optimizer state and space for the gradients are in it, each at a multiple of 256 bytes.  State
    that an optimizer has not made yet is made such that the next step is exactly what it would have been.

    Args:
        model: the module, not its `state_dict()`.
        optimizer_list: the optimizers.
        do_opt_step: not used, because no step is needed to make the state.

    Raises:
        ArenaError: a tensor cannot be stored; nothing was changed.
        ArgumentError: an argument is no module, or no optimizer.
    """
    optimizers = [optimizer_list] if isinstance(optimizer_list, Optimizer) else list(optimizer_list)
    if not isinstance(model, nn.Module):
        raise engine.ArgumentError(f"model is of {type(model)}; it must be a torch.nn.Module")
    gradients = [_Gradient(name, param, torch.zeros_like(param)) for name, param in _with_gradients(model, optimizers)]
    adopted = optimizers[0] if len(optimizers) == 1 else optimizers or None
    arena = engine.Arena.adopt(model, adopted, gradients={gradient.name: gradient.space for gradient in gradients})
    gpu_ar = arena.flat().view(torch.float32)
    setattr(gpu_ar, _ATTRIBUTE, FlatState(arena, gradients, _count_steps(optimizers)))
    return gpu_ar, gpu_ar.numel()


def _count_steps(optimizers: Sequence[Optimizer]) -> StepCount | None:
    """Count the steps of the first optimizer; None if there is none, or its class has no hooks."""
    count = StepCount()
    try:
        optimizers[0].register_step_post_hook(count)
    except (IndexError, AttributeError):  # a class that skips super().__init__()
        return None
    return count


def set_storage(model: nn.Module, optimizer_list: Sequence[Optimizer], gpu_ar: Tensor) -> None:
    """Make every gradient a view of `gpu_ar`, as parameters and optimizer state are since `initialize`.

    A parameter without a gradient gets one of zeros, until the next `zero_grad()`.

    Raises:
        ArgumentError: `initialize` did not return this tensor.
    """
    state = getattr(gpu_ar, _ATTRIBUTE, None)
    if not isinstance(state, FlatState):
        raise engine.ArgumentError(
            "gpu_ar is not the tensor that initialize() returned; pass that tensor itself, and no slice or copy of it"
        )
    state.arena.refresh()
    state.bind()


def get_total_size(model: nn.Module, optimizer_list: Sequence[Optimizer]) -> int:
    """The number of elements and plain numbers in the state of a model and its optimizers, as they are now.

    `initialize` returns more: space for gradients, state that is not made yet, and padding.
    """
    states: list[Any] = [model.state_dict()]
    states += [state for each in optimizer_list for state in each.state_dict()["state"].values()]
    values = [value for state in states for value in state.values()]
    return sum(value.numel() if isinstance(value, Tensor) else 1 for value in values if _is_counted(value))


def _is_counted(value: object) -> bool:
    return isinstance(value, Tensor | int | float) and not isinstance(value, bool)


def _with_gradients(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[tuple[str, Tensor]]:
    """The parameters whose gradients get space: those that an optimizer has and autograd gives dense gradients."""
    names = {id(param): name for name, param in model.named_parameters()}
    # The gradient of such a weight is a sparse tensor, and SparseAdam refuses any other.
    sparse = {id(module.weight) for module in model.modules() if getattr(module, "sparse", False) is True}
    found: dict[int, tuple[str, Tensor]] = {}
    for number, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                name = names.get(id(param), f"optimizer.{number}.{group_index}.{index}")
                if param.requires_grad and id(param) not in sparse:
                    found.setdefault(id(param), (name, param))
    return list(found.values())


def state_of(gpu_ar: Tensor) -> FlatState:
    """The training that `initialize` has brought into this tensor, or the tensor itself under the name `gpu_ar`."""
    state = getattr(gpu_ar, _ATTRIBUTE, None)
    return state if isinstance(state, FlatState) else FlatState(engine.Arena.wrap({"gpu_ar": gpu_ar}))
