"""Components: the plain tensors that a tensor subclass is made of.

Theory of operation.  A subclass of quantized parameters or 8-bit optimizers is a wrapper: it has no memory, and its
content is in plain tensors, its attributes.  `__tensor_flatten__` names them, for torch.compile.  Each is stored under
the name of the attribute:

    optimizer.head.weight.exp_avg   ->   optimizer.head.weight.exp_avg.codes, optimizer.head.weight.exp_avg.scale

The other half of `__tensor_flatten__`, the wrapper's metadata, is not stored: a restore fills tensors that exist.

Rules: a component may be a wrapper in turn.  Wrappers of torch.distributed are not taken apart, because their
components are the part of one rank.  Called by `inventory`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.state.watch import ContainerWatch


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is stored as its components."""
    return (
        is_traceable_wrapper_subclass(tensor)
        and not tensor.is_nested
        and not type(tensor).__module__.startswith("torch.distributed.")
        and bool(_attributes(tensor))
    )


def components_of(name: str, tensor: Tensor, watch: ContainerWatch) -> Iterator[tuple[str, Tensor]]:
    """The names and plain tensors of a tensor: of a wrapper its components, of another one itself."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    watch.member(_attributes, tensor)
    for attribute in _attributes(tensor):
        getter = _getter(attribute)
        watch.member(getter, tensor)
        yield from components_of(f"{name}.{attribute}", getter(tensor), watch)


def _attributes(wrapper: Any) -> tuple[str, ...]:
    """The names of a wrapper's components: the same object as long as they are the same, as a watch needs it."""
    return _known.setdefault(names := tuple(wrapper.__tensor_flatten__()[0]), names)


_known: dict[tuple[str, ...], tuple[str, ...]] = {}


@functools.cache
def _getter(attribute: str) -> Callable[[Any], Any]:
    return attrgetter(attribute)  # one for all wrappers, as a watch needs it
