"""Fence: holds the writers of an arena back while saves read it.

Theory of operation.  A save leaves a `wait` with `hold()`.  `wait_staged()` calls all of them.  Hooks of torch call
those that hold writers back before `optimizer.step()` and before `load_state_dict()` of any module.  In the arena's own
optimizers the hook runs before the optimizer's other hooks, but after torch's global ones.  A step that calls no hooks
is wrapped (`steps`).  One global hook does the same for every other optimizer that has a parameter of the arena, and
notes which.

A save under a guard that lets writers wait by themselves (`io.guard`, ``cow``) holds nobody back.

Not held back is any other writer: a global optimizer hook, `reset_parameters()`, an averaged model, a hook on a
gradient.  Those must call `wait_staged()` of the save first, where the guard is not ``cow``.

Rules: hooks hold the fence weakly and are removed with it.  A fence is not thread-safe.  Called by `arena`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from engine.state.steps import WrappedStep, calls_hooks

Wait = Callable[[float | None], bool]


class Fence:
    """The saves that read an arena, and the hooks of its writers.

    Attributes:
        foreign: the parameters that another optimizer than the arena's own has stepped.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[Wait, bool]] = deque()
        self._params: Mapping[int, str] = {}
        self._unfenced: Collection[str] = ()
        self._own: Collection[int] = ()
        self.foreign: set[str] = set()
        self._hooks: _Hooks = weakref.WeakKeyDictionary()
        self._unhook = weakref.finalize(self, _unhook, self._hooks)
        self._unhook.atexit = False

    def release(self) -> None:
        """Remove all hooks."""
        self._unhook()
        self._params = {}

    def hold(self, wait: Wait, holds_writers: bool) -> None:
        """Let the next `wait_staged()` wait for a save.

        Args:
            wait: blocks until the save has stopped reading the arena, at most for so many seconds, and returns whether
                it has.  Never raises for a failed save.
            holds_writers: whether hooks wait for it, too.
        """
        while self._held and self._held[0][0](0):
            self._held.popleft()  # a loop that never steps must not collect every save it has made
        self._held.append((wait, holds_writers))

    def wait_staged(self) -> None:
        """Return once no save reads the arena."""
        while self._held:
            self._held[0][0](None)  # removed only afterwards, so that an interrupted wait is repeated
            self._held.popleft()

    @property
    def param_ids(self) -> AbstractSet[int]:
        """id() of the arena's parameters."""
        return self._params.keys()

    def hold_writer(self) -> None:
        """Return once no save reads the arena that must be waited for before a write."""
        if any(holds_writers for _, holds_writers in self._held):
            self.wait_staged()

    def guard_loads(self, model: nn.Module) -> None:
        """Hook every module that is not hooked yet: `load_state_dict()` may be called on any of them."""
        for module in model.modules():
            if module not in self._hooks:
                load = module.register_load_state_dict_pre_hook(_Hook(self.hold_writer))
                self._hooks[module] = (load,)

    def guard_params(self, params: Mapping[int, str], unfenced: Collection[str], own: Collection[int]) -> None:
        """Hold back every optimizer that steps one of these parameters.

        Args:
            params: the names of the arena's parameters, by id().
            unfenced: those of them that are staged before `checkpoint()` returns, so that no step need wait for them.
            own: id() of the arena's optimizers and their wrappers, which `guard_steps` hooks.
        """
        self._params, self._unfenced, self._own = params, unfenced, own
        _fences.add(self)
        _watch_all_steps()

    def before_step_of(self, optimizer: Optimizer) -> None:
        """Called before any optimizer's step."""
        if id(optimizer) in self._own or not self._params:
            return
        shared = [
            self._params[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in self._params
        ]
        if any(name not in self._unfenced for name in shared):
            self.hold_writer()
        self.foreign.update(shared)

    def guard_steps(self, stepper: Any, before_step: Callable[[Any], None], after_step: Callable[[Any], None]) -> None:
        """Hook the step of an optimizer, or of a wrapper of one, once; again if it has another step since.

        Args:
            stepper: its steps wait, as far as `before_step` calls `hold_writer`.
            before_step, after_step: methods, held weakly, that are called with the stepper around every step.
        """
        handles = self._hooks.get(stepper, ())
        if any(isinstance(handle, WrappedStep) and handle.is_first(stepper) for handle in handles):
            return
        if not calls_hooks(stepper):
            wrapped = WrappedStep(stepper, _StepHook(before_step), _StepHook(after_step))
            self._hooks[stepper] = (*handles, wrapped)
        elif all(isinstance(handle, WrappedStep) for handle in handles):  # of a step that has been replaced since
            before = stepper.register_step_pre_hook(_StepHook(before_step))
            after = stepper.register_step_post_hook(_StepHook(after_step))
            self._hooks[stepper] = (*handles, before, after)
            hooks = stepper._optimizer_step_pre_hooks
            if isinstance(hooks, OrderedDict):  # as torch makes it; another hook may write, so ours goes first
                hooks.move_to_end(before.id, last=False)


_fences: weakref.WeakSet[Fence] = weakref.WeakSet()
_global_hooks: list[RemovableHandle] = []


def _watch_all_steps() -> None:
    """Hook the steps of all optimizers, once in a process."""
    if not _global_hooks:
        _global_hooks.append(register_optimizer_step_pre_hook(_before_any_step))


def _before_any_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for fence in list(_fences):
        fence.before_step_of(optimizer)


def wait_for_saves_of(params: Iterable[Tensor]) -> None:
    """Return once no save reads an adopted arena that holds one of these parameters."""
    ids = {id(param) for param in params}
    for fence in list(_fences):
        if ids & fence.param_ids:
            fence.wait_staged()


class _Hook:
    """Calls a method of an object that it holds weakly.

    A copy of a hooked model has a copy of its hooks.  The copied model is in no arena, so a copied hook does nothing.
    """

    __slots__ = ("_method",)

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *_: object) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _StepHook(_Hook):
    """The same, for a method that takes what has stepped."""

    __slots__ = ()

    def __call__(self, stepper: Any, *_: object) -> None:  # type: ignore[override]
        method = None if self._method is None else self._method()
        if method is not None:
            method(stepper)


class _Handle(Protocol):
    def remove(self) -> None: ...


# The hooked objects, and the handles that remove the hooks.  Weak, because modules come and go.
_Hooks = MutableMapping[Any, tuple["_Handle", ...]]


def _unhook(hooks: _Hooks) -> None:
    for handles in list(hooks.values()):
        for handle in handles:
            handle.remove()
