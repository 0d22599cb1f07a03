"""Gather: find and name the tensors of a model and its optimizer, and refuse what cannot be stored.

Theory of operation.  A **census** is one walk over the owners of the tensors.  It lists every tensor under
its name, joins the names that share one memory (tied weights), and keeps a watch over the dictionaries it
walked, so that a later walk is needed only when one of them has changed.

    nn.Module      parameters and persistent buffers, under the names `state_dict()` gives them
    Optimizer      state[param][key] as `optimizer.<param name>.<key>`; a parameter that the model does not
                   own is stored itself, as `optimizer.params.<group>.<index>`

Nothing is stored of non-persistent buffers and of `get_extra_state()`: the first are recomputed by their
module, the second is no tensor and belongs in `extra`.

State an optimizer has not created yet is created here where its first step would make it by code that can
be called alone: the `_init_group` of torch's own optimizers (`create_state`).  There are two exceptions.

* SGD's first step makes momentum a copy of the gradient, without dampening, so it cannot exist before.  A
  place is reserved for it and the census calls it optional.
* LBFGS, SparseAdam and optimizers that are not torch's make state in the middle of their step.  Nobody can
  know what it will be (`makes_state_late`); it is found by the first walk after that step.

Rules: a refusal names the tensor and leaves everything as it was; no tensor is moved here.  Called by `arena`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from engine.errors import ArenaError
from engine.format.layout import DTYPES, TensorSpec, lay_out
from engine.state.watch import ContainerWatch

# The native copy of a strided tensor keeps one counter a dimension in a fixed array (native/engine_native.h).
SOURCE_DIMS_MAX = 8

# Where modules and optimizers keep their containers.  ModuleList's `del` and an optimizer's load_state_dict() put other
# containers there.
_MODULE_MEMBERS = tuple(map(attrgetter, ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")))
_OPTIMIZER_MEMBERS = tuple(map(attrgetter, ("state", "param_groups")))
_group_params = itemgetter("params")

# An address, and the dtype, shape and strides of what is there.
Lie = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


class Found(NamedTuple):
    """One tensor under one name.  An optional tensor not created yet is None, and will look like `like`."""

    name: str
    role: str
    layer: str
    tensor: Tensor | None
    like: Tensor


class Entry(NamedTuple):
    """One memory: what is stored once, and every tensor object that shares it (none where yet absent)."""

    spec: TensorSpec
    like: Tensor
    tensors: tuple[Tensor, ...]


class Census(NamedTuple):
    """What one walk found.

    Attributes:
        entries: stored name to entry, in the order of the walk.
        aliases: other names of the same memory, alias to stored name.
        params: the optimizer's parameters by name, in the order of its groups.
        groups: the names of the parameters of each of its groups.
        optional: names that the optimizer may not have created yet, to the parameter and its state's key.
        watch: tells whether the walk would find the same objects again.
    """

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    params: Mapping[str, Tensor]
    groups: Sequence[Sequence[str]]
    optional: Mapping[str, tuple[Tensor, str]]
    watch: ContainerWatch


@dataclass(slots=True)
class _Owned:
    """What a walk learns of an optimizer beside its tensors; see `Census`."""

    params: dict[str, Tensor] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    optional: dict[str, tuple[Tensor, str]] = field(default_factory=dict)


def gather(model: nn.Module, optimizer: Optimizer | None) -> Census:
    """The census of a model and its optimizer, whose missing state is created first.

    Raises:
        ArenaError: a tensor cannot be stored; nothing was changed.
    """
    census = _walk(model, optimizer)  # refuses what is there before anything is created
    if optimizer is None:
        return census
    created: list[Tensor] = []
    try:
        create_state(optimizer, created)
        if created:
            census = _walk(model, optimizer)
            # Names that no file can hold must be refused here as well, while what was created can be taken away.
            lay_out([entry.spec for entry in census.entries.values()], census.aliases)
    except BaseException:
        for param in created:
            optimizer.state.pop(param, None)
        raise
    return census


def gather_tensors(tensors: Mapping[str, Tensor]) -> Census:
    """The census of tensors that the caller names.

    Raises:
        ArenaError: a tensor cannot be stored.
    """
    found = []
    for name, tensor in tensors.items():
        found.append(Found(name, "model", name.rpartition(".")[0], tensor, tensor))
    return _join(found, ContainerWatch(), _Owned())


def makes_state_late(optimizer: Optimizer) -> bool:
    """Whether only the optimizer's own first step knows what state it will have.

    Only torch's own `_init_group` is trusted to make that state, and nothing else, when it is called alone: a
    subclass that brings its own step may expect no state before it.
    """
    methods = (getattr(optimizer, "_init_group", None), type(optimizer).step)
    return not all(getattr(method, "__module__", "").startswith("torch.optim.") for method in methods)


@torch.no_grad()
def create_state(optimizer: Optimizer, created: list[Tensor]) -> None:
    """Make the state that the first step would make, and add the parameters that have got it to `created`.

    `_init_group` makes it for every parameter that has a gradient, and reads of the gradient no more than its
    shape and dtype; so each parameter gets zeros for one, one at a time to bound the memory.
    """
    if makes_state_late(optimizer) or isinstance(optimizer, SGD):
        return
    init_group: Callable[..., object] = optimizer._init_group  # type: ignore[attr-defined]
    names = list(inspect.signature(init_group).parameters)[1:]
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad or optimizer.state.get(param):
                continue
            created.append(param)
            grad = param.grad
            try:
                param.grad = torch.zeros_like(param, memory_format=torch.preserve_format)
                # Lists that it appends to, except for a flag: `amsgrad` of AdamW before torch 2.7.
                arguments = [group[name] if isinstance(group.get(name), bool) else [] for name in names]
                init_group({**group, "params": [param]}, *arguments)
            finally:
                param.grad = grad


def merge_dims(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """The fewest (extent, stride) pairs that walk the same elements in the same order; strides in elements."""
    dims: list[tuple[int, int]] = []
    for extent, step in zip(shape, stride, strict=True):
        if extent == 1:
            continue
        if dims and dims[-1][1] == extent * step:
            dims[-1] = (dims[-1][0] * extent, step)
        else:
            dims.append((extent, step))
    return dims


def _walk(model: nn.Module, optimizer: Optimizer | None) -> Census:
    watch = ContainerWatch()
    found = list(_find_model(model, watch))
    if optimizer is None:
        return _join(found, watch, _Owned())
    names: dict[int, tuple[str, str]] = {}
    for item in found:
        names.setdefault(id(item.tensor), (item.name, item.layer))
    owned = _Owned()
    found += _find_optimizer(optimizer, names, watch, owned)
    return _join(found, watch, owned)


def _find_model(model: nn.Module, watch: ContainerWatch) -> Iterator[Found]:
    # A shared module is walked under each of its paths, as state_dict() does: its tensors get all their names.
    for path, module in model.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set
        for member in _MODULE_MEMBERS:
            watch.member(member, module)
        watch.mapping(module._modules)
        watch.mapping(module._parameters)
        watch.mapping(module._buffers)
        watch.names(hidden)
        prefix = f"{path}." if path else ""
        for key, param in module._parameters.items():
            if param is not None:
                yield Found(prefix + key, "model", path, param, param)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in hidden:
                yield Found(prefix + key, "buffer", path, buffer, buffer)


def _find_optimizer(
    optimizer: Optimizer, names: Mapping[int, tuple[str, str]], watch: ContainerWatch, owned: _Owned
) -> Iterator[Found]:
    for member in _OPTIMIZER_MEMBERS:
        watch.member(member, optimizer)
    watch.sequence(optimizer.param_groups)
    watch.mapping(optimizer.state)
    for group_index, group in enumerate(optimizer.param_groups):
        watch.member(_group_params, group)
        watch.sequence(group["params"])
        if isinstance(optimizer, SGD):
            # Not the number: a scheduler may change that in every step.
            watch.member(_has_momentum, group)
        owned.groups.append([])
        for index, param in enumerate(group["params"]):
            name, layer = names.get(id(param), (f"optimizer.params.{group_index}.{index}", ""))
            if id(param) not in names:
                yield Found(name, "optimizer", layer, param, param)
            owned.params[name] = param
            owned.groups[-1].append(name)
            prefix = f"optimizer.{name}" if id(param) in names else name
            if isinstance(optimizer, SGD) and _has_momentum(group) and param.requires_grad:
                # SGD will make it, or has made it, in its own first step.
                owned.optional[f"{prefix}.momentum_buffer"] = (param, "momentum_buffer")
            yield from _find_state(optimizer, param, prefix, layer, watch, owned.optional)
    _check_state_owners(optimizer, names, owned.params.values())


def _has_momentum(group: Mapping[str, Any]) -> bool:
    return bool(group["momentum"] != 0)


def _find_state(
    optimizer: Optimizer,
    param: Tensor,
    prefix: str,
    layer: str,
    watch: ContainerWatch,
    optional: Mapping[str, tuple[Tensor, str]],
) -> Iterator[Found]:
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        raise ArenaError(f"the optimizer state of {prefix!r} is a {type(state).__name__}; only a dict can be stored")
    watch.mapping(state)
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = f"{prefix}.{key}"
            # Momentum lies as its parameter does, so that its place can be reserved before it exists.
            like = param if name in optional and _same_kind(value, param) else value
            yield Found(name, "optimizer", layer, value, like)
    momentum = f"{prefix}.momentum_buffer"
    if momentum in optional and state.get("momentum_buffer") is None:
        yield Found(momentum, "optimizer", layer, None, param)


def _same_kind(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


def _check_state_owners(optimizer: Optimizer, names: Mapping[int, tuple[str, str]], params: Iterable[Tensor]) -> None:
    owners = {id(param) for param in params}
    for key in optimizer.state:
        if id(key) not in owners:
            known = names.get(id(key))
            what = repr(known[0]) if known else f"a {type(key).__name__} it does not own"
            raise ArenaError(
                f"the optimizer keeps state for {what}, which is in none of its parameter groups; "
                "delete that entry of optimizer.state, or add the parameter to a group"
            )


def _join(found: Iterable[Found], watch: ContainerWatch, owned: _Owned) -> Census:
    """Join the names that share one memory, and refuse what cannot be stored."""
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    stored: dict[object, str] = {}
    for item in found:
        if item.name in entries or item.name in aliases:
            raise ArenaError(f"two tensors are called {item.name!r}; names must be unique")
        if item.tensor is not None:
            _check_tensor(item.name, item.tensor)
        name = stored.setdefault(_memory(item), item.name)
        if name == item.name:
            tensors = () if item.tensor is None else (item.tensor,)
            spec = TensorSpec(name, _dtype_name(item.like), tuple(item.like.shape), item.role, item.layer)
            entries[name] = Entry(spec, item.like, tensors)
            continue
        aliases[item.name] = name
        entry = entries[name]
        assert item.tensor is not None, item
        if not any(item.tensor is tensor for tensor in entry.tensors):
            entries[name] = entry._replace(tensors=(*entry.tensors, item.tensor))
    _check_overlaps(entries)
    return Census(entries, aliases, owned.params, owned.groups, owned.optional, watch)


def _memory(item: Found) -> object:
    """What two names have in common when they are one tensor: the memory, or the object where that is empty."""
    tensor = item.tensor
    if tensor is None:
        return item.name
    if tensor.numel() == 0:
        return id(tensor)
    return lie_of(tensor)


def lie_of(tensor: Tensor) -> Lie:
    """Where and how a tensor lies: two tensors of which this is the same are one, or have no elements."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensor(name: str, tensor: Tensor) -> None:
    reason = _refusal(tensor)
    if reason is not None:
        raise ArenaError(f"tensor {name!r} {reason}")


def _refusal(tensor: Tensor) -> str | None:
    """Why a tensor cannot be stored and what to do about it, or None.  What has no data pointer comes first."""
    if is_lazy(tensor):
        return "is not initialized; run one batch through the model first"
    # Parameter and Buffer detach to a plain Tensor; DTensor, FakeTensor and their kin stay what they are.
    if type(tensor.detach()) is not Tensor:
        return f"is a {type(tensor).__name__}, not a plain tensor; store the tensors it is made of"
    if tensor.is_nested:
        return "is nested; store its components, or pad it with torch.nested.to_padded_tensor()"
    if tensor.is_quantized:
        return "is quantized; store what dequantize() or int_repr() give"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}); convert it with to_dense()"
    if tensor.device.type == "meta":
        return "is on the meta device and has no bytes; give it some, e.g. with model.to_empty(device='cpu')"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}; an arena lies on one device, and only on the CPU: move it there with .cpu()"
    if tensor.is_conj():
        return "is a lazy conjugate; materialise it with resolve_conj()"
    if tensor.is_neg():
        return "is a lazy negative; materialise it with resolve_neg()"
    if _dtype_name(tensor) not in DTYPES:
        return f"has dtype {_dtype_name(tensor)}, which safetensors cannot hold; convert it first"
    if _overlaps_itself(tensor):
        return f"has elements that share memory (shape {tuple(tensor.shape)}, strides {tensor.stride()}); clone() it"
    if len(merge_dims(tensor.shape, tensor.stride())) > SOURCE_DIMS_MAX:
        return f"has more than {SOURCE_DIMS_MAX} dimensions that cannot be merged; make it contiguous()"
    return None


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride is smaller than what the smaller strides span."""
    if tensor.numel() == 0:
        return False
    span = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride < span:
                return True
            span += stride * (extent - 1)
    return False


class _Span(NamedTuple):
    """The bytes between a tensor's first and last element; a view may leave gaps in it."""

    start: int
    end: int
    name: str
    tensor: Tensor


def _check_overlaps(entries: Mapping[str, Entry]) -> None:
    """Refuse two entries with an element in common.  Only spans that overlap are looked at more closely."""
    spans: list[_Span] = []
    for name, entry in entries.items():
        for tensor in entry.tensors[:1]:
            if tensor.numel() > 0:
                last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                spans.append(_Span(start, start + (last + 1) * tensor.element_size(), name, tensor))
    spans.sort(key=itemgetter(0))
    cluster: list[_Span] = []
    end = 0
    for span in spans:
        if span.start >= end:
            _check_cluster(cluster)
            cluster = []
        cluster.append(span)
        end = max(end, span.end)
    _check_cluster(cluster)


def _check_cluster(cluster: Sequence[_Span]) -> None:
    """Refuse an element in common among spans that hang together, e.g. base[:, :2] and base[:, 1:]."""
    if len(cluster) < 2:
        return
    first = cluster[0]
    itemsize = first.tensor.element_size()
    # Two contiguous tensors fill their spans; and elements of two sizes are not told apart by one map.
    if all(span.tensor.is_contiguous() for span in cluster) or any(
        span.tensor.element_size() != itemsize or (span.start - first.start) % itemsize for span in cluster
    ):
        _refuse_overlap(first, cluster[1])
    element_count = (max(span.end for span in cluster) - first.start) // itemsize
    owners = torch.zeros(element_count, dtype=torch.int32, device="cpu")
    for number, span in enumerate(cluster, start=1):
        place = (span.start - first.start) // itemsize
        owned = owners.as_strided(span.tensor.shape, span.tensor.stride(), place)
        owner = int(owned.max())
        if owner:
            _refuse_overlap(cluster[owner - 1], span)
        owned.fill_(number)


def _refuse_overlap(one: _Span, other: _Span) -> None:
    shared_bytes = min(one.end, other.end) - other.start
    raise ArenaError(
        f"tensors {one.name!r} and {other.name!r} overlap within {shared_bytes} bytes of memory but are not the same "
        "tensor; clone() one of them, or make both the same parameter"
    )


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Strides that a tensor keeps in the arena: its own where it is dense, else those of its dense copy.

    Kernels choose their path by strides (channels_last), so keeping them keeps results bit-identical.
    """
    meta = torch.empty_like(tensor.detach(), device="meta", memory_format=torch.preserve_format)
    strides: tuple[int, ...] = meta.stride()
    assert math.prod(meta.shape) == tensor.numel()
    return strides
