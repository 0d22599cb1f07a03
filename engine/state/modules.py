"""Modules: the walk over a model, and the names of its tensors.

Theory of operation.  The names are those of `state_dict()` of the raw module.  A **wrapper** holds one module and adds
its own key to every name:

    torch.compile(model)         _orig_mod.layers.0.weight       ->  layers.0.weight
    DistributedDataParallel      module.layers.0.weight          ->  layers.0.weight

So a checkpoint is the same whether a model, or a part of it, is compiled or distributed.  A function of the caller's
can map these names to others.

Some modules resize their buffers in place, as the observers of quantization-aware training do.  Only memory of torch's
own can grow, so those buffers stay in theirs (`mirrors`).  Such a module is known by its code: a method of its class
calls `resize_`.

Rules: a wrapper is known by its class.  A module of another class keeps its key, even if that is `module`.  Called by
`inventory`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

from engine.errors import ArenaError

Rename = Callable[[str], str]

# The last part of the name of an extra state in `state_dict()`: _EXTRA_STATE_KEY_SUFFIX of torch.nn.modules.module.
EXTRA_STATE = "_extra_state"

# The wrappers of torch, and the key under which each holds its module.  By name: to import them takes seconds.
_KEYS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}


def walk_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, wrappers included; a shared module under each of its paths, as in `state_dict()`."""
    yield path, module
    wrapped = _wrapped_key(module)
    for key, child in module._modules.items():
        if child is not None:
            yield from walk_modules(child, path if key == wrapped else f"{path}.{key}" if path else key)


def _wrapped_key(module: nn.Module) -> str | None:
    """The key under which a wrapper holds its module, or None."""
    classes = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((_KEYS[name] for name in classes if name in _KEYS), None)


def resizes_buffers(module: nn.Module) -> bool:
    """Whether a method of the module's class, or of a base, calls `resize_`."""
    kind = type(module)
    if kind not in _resizing:
        _resizing[kind] = any(_calls_resize(member) for base in kind.__mro__ for member in vars(base).values())
    return _resizing[kind]


_resizing: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _calls_resize(member: object) -> bool:
    # Decorators such as torch.no_grad() leave the function in __wrapped__.
    function = inspect.unwrap(member) if callable(member) else None
    return isinstance(function, FunctionType) and "resize_" in function.__code__.co_names


def names_beside_tensors(model: nn.Module) -> list[str]:
    """The keys of `model.state_dict()` whose values are neither parameters, buffers nor extra state of its modules.

    Only a module that makes its `state_dict()` in a way of its own, or has a hook there, is asked: others have none.
    """
    modules = [module for _, module in walk_modules(model)]
    if not any(map(_has_own_state_dict, modules)):
        return []
    known = {id(tensor) for each in modules for tensor in (*each._parameters.values(), *each._buffers.values())}
    content = model.state_dict(keep_vars=True)
    return [key for key, value in content.items() if id(value) not in known and not key.endswith(EXTRA_STATE)]


def _has_own_state_dict(module: nn.Module) -> bool:
    kind = type(module)
    return bool(
        kind.state_dict is not nn.Module.state_dict
        or kind._save_to_state_dict is not nn.Module._save_to_state_dict
        or module._state_dict_hooks
    )


class Names:
    """The names of one walk, renamed by a function of the caller's.

    Args:
        rename: None to keep the names.
    """

    def __init__(self, rename: Rename | None) -> None:
        self._rename = rename
        self._originals: dict[str, str] = {}

    def take(self, name: str) -> str:
        """The name under which a tensor is stored.

        Raises:
            ArenaError: `rename` fails, or gives one name to two tensors.
        """
        if self._rename is None:
            return name
        try:
            new = self._rename(name)
        except Exception as error:
            raise ArenaError(f"rename({name!r}) raises {error!r}; it must map every name to a name") from error
        if not isinstance(new, str) or not new:
            raise ArenaError(f"rename({name!r}) is {new!r}; it must be the name (str) to store the tensor under")
        other = self._originals.setdefault(new, name)
        if other != name:
            raise ArenaError(f"rename maps {other!r} and {name!r} both to {new!r}; names must be unique")
        return new
