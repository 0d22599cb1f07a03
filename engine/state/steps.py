"""Steps: has `optimizer.step()` call the fence, however that step is made.

Theory of operation.  Torch wraps the `step` of an optimizer's class so that it begins with the hooks.  There are steps
that do not: of a class whose `__init__` skips `super().__init__()`, and a `step` that was put on the optimizer itself.
Such a step is wrapped once more, on the optimizer:

    optimizer.__dict__["step"]  →  before(); the step as it was; after()

The wrapper of a learning rate scheduler only notes the call, so the step below it counts.

Rules: the wrapper is a bound method, because schedulers take its `__func__`.  It works on the optimizer that it is
called on, so that a copied optimizer steps itself.  Called by `fence`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim import Optimizer

# The code that every hooked step of torch shares.  Flags on a step are no proof: `functools.wraps` copies them.
_HOOKED_CODE = Optimizer.profile_hook_step(lambda optimizer: None).__code__
_SCHEDULERS = "torch.optim.lr_scheduler"


def calls_hooks(optimizer: Any) -> bool:
    """Whether a step begins with the hooks that are registered on the optimizer."""
    has_hooks = "_optimizer_step_pre_hooks" in vars(optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)
    return has_hooks and getattr(_first_function(optimizer), "__code__", None) is _HOOKED_CODE


class WrappedStep:
    """A step that calls the fence.  Removed as a hook of torch is."""

    def __init__(self, optimizer: Optimizer, before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
        self._previous = previous = vars(optimizer).get("step")

        @functools.wraps(optimizer.step)  # keeps the marks of schedulers
        def step(stepped: Any, *args: Any, **kwargs: Any) -> Any:
            before(stepped)
            if previous is None:  # looked up now: torch adds its hooks to a class when it likes
                result = type(stepped).step(stepped, *args, **kwargs)
            elif getattr(previous, "__self__", None) is optimizer:
                result = previous.__func__(stepped, *args, **kwargs)
            else:
                result = previous(*args, **kwargs)
            after(stepped)
            return result

        self._function = step
        self._method = MethodType(step, optimizer)
        optimizer.step = self._method  # type: ignore[method-assign]

    def is_first(self, optimizer: Any) -> bool:
        """Whether a step begins with this wrapper."""
        return _first_function(optimizer) is self._function

    def remove(self) -> None:
        """Put the step back as it was, unless it has been wrapped or replaced since."""
        optimizer = self._method.__self__
        if vars(optimizer).get("step") is self._method:
            if self._previous is None:
                del optimizer.__dict__["step"]
            else:
                optimizer.__dict__["step"] = self._previous


def _first_function(optimizer: Any) -> Any:
    """The function that a step begins with, below those that only note the call."""
    function = getattr(optimizer.step, "__func__", optimizer.step)
    while getattr(function, "__globals__", {}).get("__name__") == _SCHEDULERS and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
