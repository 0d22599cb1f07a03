"""Components: the plain tensors that a tensor subclass is made of.

Theory of operation.  A subclass of quantized parameters or 8-bit optimizers is a wrapper: it has no memory, and its
content is in plain tensors, its attributes.  `__tensor_flatten__` names them, for torch.compile.  Each is stored under
the name of the attribute:

    optimizer.head.weight.exp_avg   ->   optimizer.head.weight.exp_avg.codes, optimizer.head.weight.exp_avg.scale

The other half of `__tensor_flatten__`, its **context**, is in the manifest, in the form of `extra`, with the wrapper's
class, shape and stride.  A restore compares it, and gives it to `__tensor_unflatten__` where a wrapper is to be made.

Rules: a component may be a wrapper in turn.  Wrappers of torch.distributed are not taken apart, because their
components are the part of one rank.  A class is made only if this process has imported it: a checkpoint imports
nothing.  Called by `inventory`, `arena` and `late`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.errors import CorruptError, ExtraError, MismatchError
from engine.format.manifest import listed
from engine.format.values import Json
from engine.state.tensors import decode, encode
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


def describe(name: str, tensor: Any) -> Iterator[tuple[str, Json]]:
    """The names of a wrapper and of the wrappers in it, and what each is besides its components, encoded."""
    attributes, context = tensor.__tensor_flatten__()
    about = {
        "class": _class_name(type(tensor)),
        "parts": list(attributes),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }
    try:
        yield name, encode({**about, "context": context}, name)
    except ExtraError:  # it is not plain
        yield name, encode(about, name)
    for attribute in attributes:
        component = getattr(tensor, attribute)
        if is_wrapper(component):
            yield from describe(f"{name}.{attribute}", component)


def check_wrappers(here: Mapping[str, Json], stored: Mapping[str, Json], components: Iterable[str]) -> None:
    """Refuse wrappers of a checkpoint whose components would mean something else here.

    Args:
        here: the descriptions of the arena's.
        stored: those of the checkpoint's.
        components: the names that are restored; only wrappers that have one matter.

    Raises:
        MismatchError: naming the wrappers.
    """
    both = here.keys() & stored.keys()
    concerned = {name for each in components for name in _ancestors(each) if name in both} if both else set()
    names = sorted(name for name in concerned if not _is_same(here[name], stored[name], name))
    if names:
        there, live = (_show(each[names[0]], names[0]) for each in (stored, here))
        raise MismatchError(
            f"{listed(names)} in the checkpoint: {there}, and in the arena: {live}; make the tensor subclasses as the "
            "run that was saved did, or keep them out with exclude="
        )


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _is_same(one: Json, other: Json, name: str) -> bool:
    """Whether all but the shapes are equal: other shapes do not fit anyway, and are reported with the components."""
    left, right = (_read(each, name) for each in (one, other))
    return all(encode(left.get(key)) == encode(right.get(key)) for key in (left.keys() | right.keys()) - _SHAPES)


_SHAPES = {"shape", "stride"}

# Wrappers in wrappers; those of torch and torchao are one or two deep.
DEPTH_MAX = 16


def _read(about: Json, name: str) -> dict[str, Any]:
    """A description from a manifest.

    Raises:
        CorruptError: it is none.
    """
    content = decode(about, name)
    shape = {"class": str, "parts": list, "shape": list, "stride": list}
    if not isinstance(content, dict) or any(type(content.get(key)) is not kind for key, kind in shape.items()):
        raise CorruptError(f"the manifest's description of {name!r} is not that of a tensor subclass")
    numbers = (*content["shape"], *content["stride"])
    if not all(type(part) is str for part in content["parts"]) or not all(type(n) is int for n in numbers):
        raise CorruptError(f"the manifest's description of {name!r} is not that of a tensor subclass")
    return content


def make_wrapper(name: str, stored: Mapping[str, Json], component: Callable[[str], Tensor]) -> Tensor:
    """A wrapper as a checkpoint describes it.

    Args:
        name: its name.
        stored: the descriptions.
        component: makes the plain tensor of a name.

    Raises:
        MismatchError: it cannot be made; the message names it and says why.
    """
    about = _read(stored[name], name)
    parts = {}
    for attribute in about["parts"]:
        inner = f"{name}.{attribute}"
        parts[attribute] = make_wrapper(inner, stored, component) if inner in stored else component(inner)
    kind = _find_class(about["class"])
    if kind is None or "context" not in about:
        why = "its context is no plain value" if kind is not None else "this process has no such class of tensors"
        raise MismatchError(_unmakeable(name, about["class"], why))
    try:
        made: Tensor = kind.__tensor_unflatten__(parts, about["context"], about["shape"], about["stride"])
    except Exception as error:
        raise MismatchError(_unmakeable(name, about["class"], f"{type(error).__name__}: {error}")) from error
    return made


def leaves(name: str, stored: Mapping[str, Json], depth: int = 0) -> list[str]:
    """The names of the plain tensors in a wrapper of a checkpoint.

    Raises:
        CorruptError: its description is none.
    """
    if depth > DEPTH_MAX:
        raise CorruptError(f"the manifest has tensor subclasses in each other, over {DEPTH_MAX} deep, in {name!r}")
    inner = [f"{name}.{attribute}" for attribute in _read(stored[name], name)["parts"]]
    return [leaf for each in inner for leaf in (leaves(each, stored, depth + 1) if each in stored else [each])]


def _unmakeable(name: str, kind: str, why: str) -> str:
    return (
        f"{name!r} is a {kind} in the checkpoint, which the arena lacks and a restore cannot make: {why}; take one "
        "step before adopting, then restore"
    )


def _show(about: Json, name: str) -> str:
    content = _read(about, name)
    return f"{content['class']} {tuple(content['shape'])} with {content.get('context')!r}"


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _find_class(name: str) -> Any:
    """The class of tensors of this name, if this process has imported it."""
    module, _, qualname = name.rpartition(".")
    found = vars(sys.modules[module]).get(qualname) if module in sys.modules else None
    is_wrapper_class = isinstance(found, type) and issubclass(found, Tensor) and hasattr(found, "__tensor_unflatten__")
    return found if is_wrapper_class else None
