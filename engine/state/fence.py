"""Fence: holds the writers of an arena back while saves read it.

Theory of operation.  A save leaves a `wait` with `hold()`.  `wait_staged()` calls all of them, and hooks of torch call
`wait_staged()` before `optimizer.step()` and before `load_state_dict()` of any module.  In the optimizer the hook runs
before the optimizer's own hooks, but after torch's global ones.

Not held back is any other writer: a global optimizer hook, `reset_parameters()`, an averaged model, a hook on a
gradient.  Those must call `wait_staged()` of the save first.

Rules: hooks hold the fence weakly and are removed with it.  A fence is not thread-safe.  Called by `arena`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, MutableMapping

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Wait = Callable[[float | None], bool]


class Fence:
    """The saves that read an arena, and the hooks of its writers."""

    def __init__(self) -> None:
        self._held: deque[Wait] = deque()
        self._hooks: _Hooks = weakref.WeakKeyDictionary()
        weakref.finalize(self, _unhook, self._hooks).atexit = False

    def hold(self, wait: Wait) -> None:
        """Let the next `wait_staged()` wait for a save.

        Args:
            wait: blocks until the save has stopped reading the arena, at most for so many seconds, and returns whether
                it has.  Never raises for a failed save.
        """
        while self._held and self._held[0](0):
            self._held.popleft()  # a loop that never steps must not collect every save it has made
        self._held.append(wait)

    def wait_staged(self) -> None:
        """Return once no save reads the arena."""
        while self._held:
            self._held[0](None)  # removed only afterwards, so that an interrupted wait is repeated
            self._held.popleft()

    def guard_loads(self, model: nn.Module) -> None:
        """Hook every module that is not hooked yet: `load_state_dict()` may be called on any of them."""
        for module in model.modules():
            if module not in self._hooks:
                load = module.register_load_state_dict_pre_hook(_Hook(self.wait_staged))
                self._hooks[module] = (load,)

    def guard_steps(self, optimizer: Optimizer, after_step: Callable[[], None]) -> None:
        """Hook an optimizer, once.

        Args:
            optimizer: its steps wait.
            after_step: a method, held weakly, that is called after every step.
        """
        if optimizer in self._hooks:
            return
        before = optimizer.register_step_pre_hook(_Hook(self.wait_staged))
        after = optimizer.register_step_post_hook(_Hook(after_step))
        self._hooks[optimizer] = (before, after)
        hooks = optimizer._optimizer_step_pre_hooks
        if isinstance(hooks, OrderedDict):  # as torch makes it; another hook may write, so ours goes first
            hooks.move_to_end(before.id, last=False)


class _Hook:
    """Calls a method of an object that it holds weakly.

    A copy of a hooked model has a copy of its hooks.  The copied model is in no arena, so a copied hook does nothing.
    """

    __slots__ = ("_method",)

    def __init__(self, method: Callable[[], None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *_: object) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


# The hooked objects, and the handles that remove the hooks.  Weak, because modules come and go.
_Hooks = MutableMapping[nn.Module | Optimizer, tuple[RemovableHandle, ...]]


def _unhook(hooks: _Hooks) -> None:
    for handles in list(hooks.values()):
        for handle in handles:
            handle.remove()
