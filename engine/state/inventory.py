"""Inventory: find and name the tensors of a model and its optimizer, and refuse what cannot be stored.

Theory of operation.  An **inventory** is what one walk over the owners of the tensors found.  It lists every tensor
under its name, joins the names that share one memory (tied weights), and watches the containers it walked, so that
another walk is needed only after one of them has changed.

    nn.Module      parameters and persistent buffers, under the names that `modules` gives them
    Optimizer      state[param][key] as `optimizer.<param name>.<key>`; a parameter that the model does not own is
                   stored itself, as `optimizer.params.<group>.<index>`
    several        `optimizer.<name>.` in place of `optimizer.`; a name has no dot

Not stored are non-persistent buffers, which their module recomputes.  What `get_extra_state()` gives is no tensor: see
`extra_state`.  State that the optimizer has not made yet is made or reserved as `optimizers` says.

Rules: a refusal names the tensor and leaves everything as it was.  No tensor is moved here.  Called by `arena`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter, itemgetter, methodcaller
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from engine.errors import ArenaError
from engine.format.layout import DTYPES, TensorSpec, lay_out
from engine.state.adopted import Adopted, optimizers_in
from engine.state.choice import Choice
from engine.state.components import components_of, is_wrapper
from engine.state.extra_state import ExtraStates
from engine.state.memory import SOURCE_DIMS_MAX, location_of, merge_dims
from engine.state.modules import Names, Rename, resizes_buffers, walk_modules
from engine.state.optimizers import MOMENTUM, Created, Owned, create_state, options_set, reserves_momentum
from engine.state.watch import ContainerWatch

# The containers of modules and optimizers.  ModuleList's `del` and an optimizer's load_state_dict() replace them.
_MODULE_MEMBERS = tuple(map(attrgetter, ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")))
_OPTIMIZER_MEMBERS = tuple(map(attrgetter, ("state", "param_groups")))
_group_params = itemgetter("params")
_own_step = methodcaller("get", "step")  # of the optimizer's __dict__: a scheduler or a user has put it there

# Each file is opened, synced and verified by itself.  More optimizers than this (one for each parameter, stepped in
# backward) share one file.
OPTIMIZER_FILES_MAX = 8


class Found(NamedTuple):
    """One tensor under one name.

    A reserved tensor that does not exist yet is None, and will look like `like`.  A mirrored one keeps its own memory.
    """

    name: str
    role: str
    layer: str
    tensor: Tensor | None
    like: Tensor
    optimizer: str = ""
    mirrored: bool = False


class Entry(NamedTuple):
    """One memory that is stored once, and all tensor objects that share it (none if it is reserved)."""

    spec: TensorSpec
    like: Tensor
    tensors: tuple[Tensor, ...]
    mirrored: bool


class Whole(NamedTuple):
    """A tensor that is stored as its components, and their names."""

    tensor: Tensor
    parts: tuple[str, ...]


class Inventory(NamedTuple):
    """What one walk found.

    Attributes:
        entries: stored name to entry, in the order of the walk.
        aliases: other names of the same memory, alias to stored name.
        owned: the names of what each optimizer owns, by its name.
        watch: tells whether another walk would find the same objects.
        wholes: the tensors that are stored as their components, by name.
        left_out: the names that `only=` and `exclude=` keep out.
        extra_states: of the modules.
    """

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    owned: Mapping[str, Owned]
    watch: ContainerWatch
    wholes: Mapping[str, Whole]
    left_out: frozenset[str]
    extra_states: ExtraStates

    def absent(self, owned: Owned) -> list[str]:
        """The reserved names that an optimizer has not made yet."""
        entries = self.entries
        return [name for name in owned.reserved if name in entries and not entries[name].tensors]

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters of all optimizers, by name."""
        return {name: param for owned in self.owned.values() for name, param in owned.params.items()}

    @property
    def trained(self) -> set[str]:
        """The stored names that the steps of optimizers write, besides their own state.

        A frozen parameter changes in no step, even if an optimizer has it.
        """
        names = [name for name, param in self.params.items() if param.requires_grad]
        return {self.aliases.get(part, part) for name in names for part in self.parts(name)}

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the components of a tensor, or its own."""
        return self.wholes[name].parts if name in self.wholes else (name,)


def gather(
    model: nn.Module,
    optimizers: Mapping[str, Adopted],
    rename: Rename | None,
    choice: Choice,
    gradients: Mapping[str, Tensor],
) -> Inventory:
    """The inventory of a model and its optimizers, whose missing state is made first.

    Args:
        rename: maps the names of the model's tensors.
        choice: which of them are held.
        gradients: space for gradients, by the name of the parameter.

    Raises:
        ArenaError: a tensor cannot be stored; nothing was changed.
    """
    walk = partial(_walk, model, optimizers, rename, choice, gradients)
    inventory = walk()  # refuses existing tensors before anything is created
    inventory.extra_states.encode()  # refuses what no save could store
    created: list[Created] = []
    try:
        for optimizer in optimizers_in(optimizers):
            create_state(optimizer, created)
        if created:
            inventory = walk()
            # Names that no file can hold must be refused here as well, while what was created can be taken away.
            lay_out([entry.spec for entry in inventory.entries.values()], inventory.aliases)
    except BaseException:
        for each in created:
            each.undo()
        raise
    return inventory


def gather_tensors(tensors: Mapping[str, Tensor]) -> Inventory:
    """The inventory of tensors that the caller names.

    Raises:
        ArenaError: a tensor cannot be stored.
    """
    found = []
    for name, tensor in tensors.items():
        found.append(Found(name, "model", name.rpartition(".")[0], tensor, tensor))
    return _join(found, ContainerWatch(), {}, Choice(), ExtraStates())


def _walk(
    model: nn.Module,
    optimizers: Mapping[str, Adopted],
    rename: Rename | None,
    choice: Choice,
    gradients: Mapping[str, Tensor],
) -> Inventory:
    watch = ContainerWatch()
    extra_states = ExtraStates()
    found = list(_find_model(model, watch, Names(rename), extra_states))
    names: dict[int, tuple[str, str]] = {}
    for item in found:
        names.setdefault(id(item.tensor), (item.name, item.layer))
    owned: dict[str, Owned] = {}
    for name, adopted in optimizers.items():
        adopted.added()  # refuses state that the walk would not find
        owned[name] = Owned()
        file = name if len(optimizers) <= OPTIMIZER_FILES_MAX else ""
        items = _find_optimizer(name, adopted.optimizer, names, watch, owned[name])
        found += [item._replace(optimizer=file) for item in items]
        for wrapper in adopted.wrappers:
            watch.mapping(wrapper.state)
    for name, space in gradients.items():
        stored = f"gradients.{name}"
        found.append(Found(stored, "grad", stored.rpartition(".")[0], space, space))
    return _join(found, watch, owned, choice, extra_states)


def _find_model(model: nn.Module, watch: ContainerWatch, names: Names, extra_states: ExtraStates) -> Iterator[Found]:
    for path, module in walk_modules(model):
        hidden = module._non_persistent_buffers_set
        resizes = bool(module._buffers) and resizes_buffers(module)
        for member in _MODULE_MEMBERS:
            watch.member(member, module)
        watch.mapping(module._modules)
        watch.mapping(module._parameters)
        watch.mapping(module._buffers)
        watch.names(hidden)
        prefix = f"{path}." if path else ""
        extra_states.add(prefix, module, names)
        for key, param in module._parameters.items():
            if param is not None:
                name = names.take(prefix + key)
                yield Found(name, "model", name.rpartition(".")[0], param, param)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in hidden:
                name = names.take(prefix + key)
                yield Found(name, "buffer", name.rpartition(".")[0], buffer, buffer, mirrored=resizes)


def _find_optimizer(
    own_name: str, optimizer: Optimizer, names: Mapping[int, tuple[str, str]], watch: ContainerWatch, owned: Owned
) -> Iterator[Found]:
    stem = f"optimizer.{own_name}" if own_name else "optimizer"
    watch.member(_own_step, vars(optimizer))
    for member in _OPTIMIZER_MEMBERS:
        watch.member(member, optimizer)
    watch.sequence(optimizer.param_groups)
    watch.mapping(optimizer.state)
    for group_index, group in enumerate(optimizer.param_groups):
        watch.member(_group_params, group)
        watch.sequence(group["params"])
        watch.member(options_set, group)
        owned.groups.append([])
        for index, param in enumerate(group["params"]):
            name, layer = names.get(id(param), (f"{stem}.params.{group_index}.{index}", ""))
            if id(param) not in names:
                yield Found(name, "optimizer", layer, param, param)
            owned.params[name] = param
            owned.groups[-1].append(name)
            prefix = f"{stem}.{name}" if id(param) in names else name
            owned.prefixes[prefix] = param
            if reserves_momentum(optimizer, group, param) and not is_wrapper(param):
                owned.reserved[f"{prefix}.{MOMENTUM}"] = (param, MOMENTUM)
            yield from _find_state(optimizer, param, prefix, layer, watch, owned)
    _check_state_owners(optimizer, names, owned.params.values())


def _find_state(
    optimizer: Optimizer,
    param: Tensor,
    prefix: str,
    layer: str,
    watch: ContainerWatch,
    owned: Owned,
) -> Iterator[Found]:
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        raise ArenaError(f"the optimizer state of {prefix!r} is a {type(state).__name__}; only a dict can be stored")
    watch.mapping(state)
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = f"{prefix}.{key}"
            if is_wrapper(value):
                owned.reserved.pop(name, None)  # which is one segment
            # Momentum has the strides of its parameter, so that its segment can be reserved before it exists.
            like = param if name in owned.reserved and _same_kind(value, param) else value
            yield Found(name, "optimizer", layer, value, like)
    momentum = f"{prefix}.{MOMENTUM}"
    if momentum in owned.reserved and state.get(MOMENTUM) is None:
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


def _join(
    found: Sequence[Found],
    watch: ContainerWatch,
    owned: Mapping[str, Owned],
    choice: Choice,
    extra_states: ExtraStates,
) -> Inventory:
    """Join the names that share one memory, and refuse the tensors that cannot be stored."""
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    stored: dict[object, str] = {}
    wholes: dict[str, Whole] = {}
    held, left_out = _choose(found, owned, choice)
    for item in _take_apart(held, watch, wholes):
        if item.name in entries or item.name in aliases:
            raise ArenaError(f"two tensors are called {item.name!r}; names must be unique")
        if item.tensor is not None:
            _check_tensor(item.name, item.tensor)
        name = stored.setdefault(_memory(item), item.name)
        if name == item.name:
            tensors = () if item.tensor is None else (item.tensor,)
            shape = tuple(item.like.shape)
            spec = TensorSpec(name, _dtype_name(item.like), shape, item.role, item.layer, item.optimizer)
            entries[name] = Entry(spec, item.like, tensors, item.mirrored)
            continue
        aliases[item.name] = name
        entry = entries[name] = entries[name]._replace(mirrored=entries[name].mirrored or item.mirrored)
        assert item.tensor is not None, item
        if not any(item.tensor is tensor for tensor in entry.tensors):
            entries[name] = entry._replace(tensors=(*entry.tensors, item.tensor))
    _check_overlaps(entries)
    out = frozenset(_names_of(left_out)) | extra_states.leave_out(choice)
    return Inventory(entries, aliases, owned, watch, wholes, out, extra_states)


def _choose(
    found: Sequence[Found], owned: Mapping[str, Owned], choice: Choice
) -> tuple[Sequence[Found], Sequence[Found]]:
    """What a choice holds, and what it leaves out."""
    if choice.is_all:
        return found, ()
    trained = {id(param) for each in owned.values() for param in each.params.values() if param.requires_grad}
    wanted = {_tie(item) for item in found if choice.has(item, id(item.tensor) in trained)}
    if found and not wanted:
        raise ArenaError("only= and exclude= leave nothing of this training in the arena; change their patterns")
    held = [item for item in found if _tie(item) in wanted]
    return held, [item for item in found if _tie(item) not in wanted]


def _tie(item: Found) -> object:
    """As `_memory`, for tensors that may be of a kind that cannot be stored."""
    tensor = item.tensor
    if tensor is None or is_lazy(tensor) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return item.name if tensor is None else id(tensor)
    return _memory(item) if type(tensor.detach()) is Tensor else id(tensor)


def _names_of(left_out: Iterable[Found]) -> Iterator[str]:
    for item in left_out:
        if item.tensor is None or is_lazy(item.tensor):
            yield item.name
        else:
            yield from (name for name, _ in components_of(item.name, item.tensor, ContainerWatch()))


def _take_apart(found: Iterable[Found], watch: ContainerWatch, wholes: dict[str, Whole]) -> Iterator[Found]:
    """The plain tensors of what was found; those that had to be taken apart are added to `wholes`."""
    for item in found:
        if item.tensor is None or not is_wrapper(item.tensor):
            yield item
            continue
        parts = list(components_of(item.name, item.tensor, watch))
        wholes[item.name] = Whole(item.tensor, tuple(name for name, _ in parts))
        for name, tensor in parts:
            yield item._replace(name=name, tensor=tensor, like=tensor)


def _memory(item: Found) -> object:
    """A key that two names share if they are one tensor: its location, or the object if it has no elements."""
    tensor = item.tensor
    if tensor is None:
        return item.name
    if tensor.numel() == 0:
        return id(tensor)
    return location_of(tensor)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensor(name: str, tensor: Tensor) -> None:
    reason = _refusal(tensor)
    if reason is not None:
        raise ArenaError(f"tensor {name!r} {reason}")


def _refusal(tensor: Tensor) -> str | None:
    """Why a tensor cannot be stored, with the remedy, or None.  Tensors without a data pointer are refused first."""
    if is_lazy(tensor):
        return "is not initialized; run one batch through the model first"
    # Parameter and Buffer detach to a plain Tensor, and wrappers have been taken apart.
    if type(tensor.detach()) is not Tensor:
        return f"is a {type(tensor).__name__}, which is no plain tensor and {_why_whole(tensor)}"
    if tensor.is_nested:
        return "is nested; store its components, or pad it with torch.nested.to_padded_tensor()"
    if tensor.is_quantized:
        return "is quantized; store the tensor of dequantize() or int_repr()"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}); convert it with to_dense()"
    if tensor.device.type == "meta":
        return "is on the meta device and has no bytes; give it some, e.g. with model.to_empty(device='cpu')"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}; an arena is on one device, the CPU: move the tensor there with .cpu()"
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


def _why_whole(tensor: Tensor) -> str:
    """Why a tensor subclass is not stored as its components, with the remedy."""
    if type(tensor).__module__.startswith("torch.distributed."):
        return "holds the part of one rank, and an arena is of one; adopt the model before it is distributed"
    return "names no components in __tensor_flatten__(); keep it out with exclude=, store the tensors it is made of"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride is smaller than the span of the smaller strides."""
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
    """Refuse two entries with an element in common.  Only spans that overlap are examined more closely."""
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
    """Refuse an element in common among spans that overlap in a chain, e.g. base[:, :2] and base[:, 1:]."""
    if len(cluster) < 2:
        return
    first = cluster[0]
    itemsize = first.tensor.element_size()
    # Contiguous tensors fill their spans.  One map cannot tell elements of two sizes apart.
    if all(span.tensor.is_contiguous() for span in cluster) or any(
        span.tensor.element_size() != itemsize or (span.start - first.start) % itemsize for span in cluster
    ):
        _refuse_overlap(first, cluster[1])
    element_count = (max(span.end for span in cluster) - first.start) // itemsize
    owners = torch.zeros(element_count, dtype=torch.int32, device="cpu")
    for number, span in enumerate(cluster, start=1):
        offset = (span.start - first.start) // itemsize
        elements = owners.as_strided(span.tensor.shape, span.tensor.stride(), offset)
        owner = int(elements.max())
        if owner:
            _refuse_overlap(cluster[owner - 1], span)
        elements.fill_(number)


def _refuse_overlap(one: _Span, other: _Span) -> None:
    shared_bytes = min(one.end, other.end) - other.start
    raise ArenaError(
        f"tensors {one.name!r} and {other.name!r} overlap within {shared_bytes} bytes of memory but are not the same "
        "tensor; clone() one of them, or make both the same parameter"
    )
