"""Backward: optimizers that step inside the backward pass, each as soon as its parameters have their gradients.

Theory of operation.  A hook of each parameter (`Tensor.register_post_accumulate_grad_hook`) notes that its gradient is
complete.  When the last parameter of an optimizer has its own, that optimizer steps and frees the gradients, while
autograd computes those of earlier layers.  Parameters that a backward pass does not reach get no gradient, so the
first hook of a pass also has autograd call `_Stepper.finish` at the end of it.

A pass that raises calls no `finish`.  The next one is known by a parameter that arrives a second time.

Reentrant activation checkpointing runs a backward pass inside the pass, for each of its segments.  Such a pass ends
before the others have added to the gradients, and the segments after it would be computed with parameters that were
stepped already.  A hook in one refuses it.

Rules: one backward pass is one step.  No layer may need a parameter after its gradient is complete; autograd never
does, because each use of a parameter adds to its gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.optim import Optimizer

from engine.errors import ArgumentError, UsageError


class _Stepper:
    """Steps one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.params: list[Tensor] = [
            param for group in optimizer.param_groups for param in group["params"] if param.requires_grad
        ]
        self._left: set[int] | None = None  # id() of the parameters without a gradient; None between two passes

    def arrive(self, param: Tensor) -> None:
        """The gradient of a parameter is complete."""
        if _is_nested():
            raise UsageError(
                "step_in_backward() would step in a backward pass inside the backward pass, before the gradients are "
                "complete: call torch.utils.checkpoint.checkpoint with use_reentrant=False"
            )
        if self._left is None or id(param) not in self._left:
            self._left = set(map(id, self.params))
            engine: Any = Variable._execution_engine
            engine.queue_callback(self.finish)
        self._left.discard(id(param))
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """Step, if a gradient has come since the last step."""
        if self._left is not None:
            self._left = None
            self._optimizer.step()
            self._optimizer.zero_grad()


def _is_nested() -> bool:
    """Whether a backward function written in Python has called the backward pass that calls this."""
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        frame = back
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
    return False


class StepsInBackward:
    """The hooks of `step_in_backward`."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Not for callers."""
        self._handles = [
            param.register_post_accumulate_grad_hook(stepper.arrive)
            for stepper in map(_Stepper, optimizers)
            for param in stepper.params
        ]

    def remove(self) -> None:
        """Remove the hooks: from here on the caller steps the optimizers.  May be called again."""
        while self._handles:
            self._handles.pop().remove()


def step_in_backward(optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]) -> StepsInBackward:
    """Have optimizers step inside `backward()`, each when the last of its parameters has its gradient.

        optimizers = [torch.optim.AdamW(layer.parameters()) for layer in model.layers]
        engine.step_in_backward(optimizers)
        with eng.layerwise(arena, step) as save, save.in_backward():
            loss.backward()                 # steps and hands over layer after layer

    The gradients are freed after each step.  An optimizer of which some parameters get no gradient steps at the end of
    `backward()`.  Every backward pass is a step, so gradients cannot be accumulated over several passes.  Activation
    checkpointing works with ``use_reentrant=False``; a reentrant one raises `UsageError` in `backward()`.

    Args:
        optimizer: as for `Arena.adopt`: one, a sequence or a dict.  Parameters that are added later, or are frozen now,
            are not looked at.

    Returns:
        the hooks, to be removed.

    Raises:
        ArgumentError: it is no optimizer.
    """
    given = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    optimizers = [given] if isinstance(given, Optimizer) else list(given)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ArgumentError(f"optimizer has a {type(each).__name__}; pass torch optimizers")
    return StepsInBackward(optimizers)
