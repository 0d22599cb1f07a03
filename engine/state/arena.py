"""Arena: one contiguous buffer that really holds a training's tensors, and the table of what lies where.

Theory of operation.  An **adopted** arena lays every tensor that `gather` finds into one buffer and makes the
tensors views of it.  It does so with ``tensor.data = view`` on the tensors that are there, so that whoever
holds one (the module, the optimizer, an EMA) goes on holding it.  Each view is a storage of its own over the
arena's pages, so that a tensor copies, pickles and shares as it did before.  A **wrapped** arena moves nothing:
its tensors are read where they lie.

    buffer   | segment  .| segment   .|seg.| reserved .|      . is padding to 256 bytes, always zero
    source 0 |-----------------------------------------|      contiguous segments are read here
    source 1             |-----------|                        a channels_last one has a source of its own

Training code may take a tensor out again (`p.data = ...`, `model.half()`, `share_memory()`), so every save begins
with `refresh()`.  Its fast path compares what was seen last time; only where something differs is everything
gathered anew.  If the same segments come out, what moved is copied back into its place; otherwise there is a new
layout in a new buffer.  A layout is never changed: callers may cache by its identity.

While a save is being staged nobody may write here.  The engine leaves a `wait` with `hold()`, and `fence()`
calls it before `optimizer.step()`, before `load_state_dict()` and before this file writes.  Its hook is the first
of the optimizer's own; torch's global optimizer hooks run before it.  They, and whatever else writes outside of
`step()` and `load_state_dict()` (`reset_parameters()`, an EMA, a hook on a gradient), have to call the save's
`wait_staged()` first.  What is known to change without them is in `unfenced`, and is staged first of all.

Rules: a refused tensor leaves all as it was; the hooks hold the arena weakly, and go with it; not thread-safe.  A
view of the old memory held by others (a flat buffer) is left behind by adoption: wrap that instead.  Wrapped
memory is held as long as a save reads it; but a storage that is resized or moved to shared memory in the meantime
gives it up all the same (`untyped_storage().resize_()`, `share_memory_()`): wait for the staging before that.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from engine.errors import ArenaError, ArgumentError, MismatchError, UsageError
from engine.format.layout import ARENA_ALIGNMENT, DTYPES, ROLES, Layout, Segment, TensorSpec, lay_out
from engine.format.manifest import Rows, encode_rows
from engine.format.plan import Extents, Source, file_runs
from engine.format.values import Names
from engine.state.inventory import (
    Census,
    Lie,
    dense_stride,
    gather,
    gather_tensors,
    lie_of,
    makes_state_late,
    merge_dims,
)
from engine.state.watch import TensorWatch


class Arena:
    """The tensors of a training, where a checkpoint finds them.  Made by `adopt` or `wrap`."""

    def __init__(self, find: Callable[[], Census], model: nn.Module | None, optimizer: Optimizer | None) -> None:
        """Not for callers: `adopt` and `wrap` know what to pass.  What is wrapped has no model."""
        self._find = find
        self._model = model
        self._optimizer = optimizer
        self._hooks: _Hooks = weakref.WeakKeyDictionary()
        weakref.finalize(self, _unhook, self._hooks).atexit = False
        self._held: deque[Callable[[float | None], bool]] = deque()
        self._torn = False
        self._layout = lay_out(())
        self._rows = encode_rows(self._layout)
        self._runs: tuple[Extents, ...] | None = None  # places, and so these, follow from the layout
        self._table = _Table({}, {}, {}, frozenset())
        self._pages, self._address = _allocate(self._layout)
        self._gather()

    @classmethod
    def adopt(cls, model: nn.Module, optimizer: Optimizer | None = None) -> Arena:
        """Move a model's and its optimizer's tensors into one buffer; training goes on bit-identically.

        Raises:
            ArenaError: a tensor cannot be stored; nothing was changed.
            ArgumentError: this is no model, or no optimizer.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {_type_name(model)}; it must be a torch.nn.Module")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"optimizer is a {_type_name(optimizer)}; it must be one torch.optim.Optimizer")
        return cls(lambda: gather(model, optimizer), model, optimizer)

    @classmethod
    def wrap(cls, tensors: Mapping[str, Tensor]) -> Arena:
        """Name tensors that stay where they are.

        Raises:
            ArenaError: a tensor cannot be stored.
            ArgumentError: this is no mapping from names to tensors.
        """
        if not isinstance(tensors, Mapping):
            raise ArgumentError(f"tensors is a {_type_name(tensors)}; it must map names to tensors")
        named = dict(tensors)
        for name, tensor in named.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name!r} is mapped to a {_type_name(tensor)}; map names (str) to tensors")
        return cls(lambda: gather_tensors(named), None, None)

    @property
    def layout(self) -> Layout:
        """Where everything goes; another object once that has changed."""
        return self._layout

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The table of stored tensors, in arena order."""
        return self._layout.segments

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, without padding."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of stored tensors (tied weights), alias to segment name."""
        return self._census.aliases

    @property
    def sources(self) -> tuple[Source, ...]:
        """What `places` refer to, as of the last `refresh()`."""
        return self._sources

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each segment, the index of its source and its offset there in bytes."""
        return self._places

    @property
    def runs(self) -> tuple[Extents, ...]:
        """What the files are made of: of their headers, which are the first sources, and of `sources` after them.

        Made with the layout, when it is adopted or has changed, so that the first save need not.
        """
        assert self._runs is not None
        return self._runs

    @property
    def rows(self) -> Rows:
        """What every manifest says of the segments, encoded: made with the layout, as `runs` are."""
        return self._rows

    @property
    def memory(self) -> object:
        """What must stay alive for `sources` to be readable, whatever becomes of the tensors.

        The pages themselves: a storage over them can be given others in place, as `share_memory()` does.
        """
        return self._memory

    @property
    def fenced(self) -> bool:
        """Whether `optimizer.step()` waits until a save is staged."""
        return self._optimizer is not None

    @property
    def unfenced(self) -> frozenset[str]:
        """Segments that change by other ways than `step()`: module buffers, and parameters that it does not train.

        Such are those of another optimizer, or frozen ones, which forward may average into a teacher.  Without an
        optimizer only the buffers: nothing is fenced then, and who asks for a lazy save does all the waiting.
        """
        return self._table.unfenced

    @property
    def makes_state_late(self) -> bool:
        """Whether only the first step of the optimizer makes its state, and could tell what that will be."""
        return self._optimizer is not None and makes_state_late(self._optimizer)

    @property
    def torn(self) -> bool:
        """Whether a restore failed half-way, so that the tensors are of no one step."""
        return self._torn

    def mark_torn(self) -> None:
        """A restore begins: until `restored` or `mark_whole`, the tensors are of no one step."""
        self._torn = True

    def mark_whole(self) -> None:
        """A restore of a part has ended well, and the arena was whole before it."""
        self._torn = False

    def state_dict(self) -> dict[str, Tensor]:
        """Every name, aliases included, to a tensor that shares the live one's memory.  Does `refresh()` first."""
        self.refresh()
        tensors = {}
        for segment in self.segments:
            live = self._census.entries[segment.name].tensors
            tensors[segment.name] = live[0].detach() if live else self._view(segment)
        return tensors | {alias: tensors[name] for alias, name in self.aliases.items()}

    def hold(self, wait_staged: Callable[[float | None], bool]) -> None:
        """Have the next `fence()` wait for a save.

        Args:
            wait_staged: blocks until the save has stopped reading the arena, at most for so many seconds, and
                says whether it has.  Never raises for a failed save.
        """
        while self._held and self._held[0](0):
            self._held.popleft()  # a loop that never steps must not collect every save it has made
        self._held.append(wait_staged)

    def fence(self) -> None:
        """Return once no save is reading the arena."""
        while self._held:
            self._held[0](None)  # taken out only after it: an interrupted wait has not been waited for
            self._held.popleft()

    def refresh(self) -> None:
        """Take in what was changed behind the arena's back; about 0.4 us a tensor when nothing was.

        Raises:
            ArenaError: a tensor that is there now cannot be stored; nothing was changed.
        """
        if self._watch is not None and self._census.watch.unchanged() and self._watch.unchanged():
            return
        self.fence()
        self._gather()

    def options(self) -> dict[str, Any]:
        """What the optimizer keeps besides tensors, as of the last `refresh()`; {} without one."""
        if self._optimizer is None:
            return {}
        groups, absent, plain = self._kept
        return {
            "param_groups": [
                _hyperparameters(group) | {"params": Names(names)}
                for group, names in zip(self._optimizer.param_groups, groups, strict=True)
            ],
            "state": {name: {key: state[key] for key in keys} for name, state, keys in plain},
            "absent": Names(absent),
        }

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that `restored()` could not put back.

        Raises:
            MismatchError: they are of another optimizer; the message says how.
        """
        if self._optimizer is None and not options:
            return
        if self._optimizer is None or not options:
            has, lacks = ("checkpoint", "arena") if options else ("arena", "checkpoint")
            raise MismatchError(f"the {has} has an optimizer and the {lacks} has none; select the names to restore")
        saved_count, count = len(options["param_groups"]), len(self._optimizer.param_groups)
        if saved_count != count:
            raise MismatchError(
                f"the checkpoint's optimizer has {saved_count} parameter groups and the arena's has {count}; "
                "give the optimizer the same groups"
            )
        for index, names in enumerate(self._census.groups):
            saved_names = options["param_groups"][index].get("params")
            if saved_names != names:
                raise MismatchError(
                    f"parameter group {index} of the checkpoint's optimizer has {saved_names}, and that of the "
                    f"arena's has {names}; give the optimizer the same groups in the same order"
                )
        unknown = sorted(set(options["state"]) - set(self._census.params))
        unknown += sorted(set(options["absent"]) - set(self._census.optional))
        if unknown:
            raise MismatchError(
                f"the checkpoint has optimizer state that the arena's optimizer cannot take: {', '.join(unknown)}; "
                "use the optimizer and the trainable parameters of the run that was saved"
            )

    def restored(self, options: Mapping[str, Any]) -> None:
        """Put back what `options()` gave, after all segments were filled from the same checkpoint.

        Autograd is not told: no version counter counts a restore, so a backward through a forward from before it
        computes with what was restored.
        """
        self.check_options(options)
        if self._optimizer is not None:
            for group, saved in zip(self._optimizer.param_groups, options["param_groups"], strict=True):
                _put_hyperparameters(group, _hyperparameters(saved))
            for name, param in self._census.params.items():
                _put_plain_state(self._optimizer.state, param, options["state"].get(name, {}))
            self._put_optional(self._census.optional, options["absent"])
        self.refresh()
        self._torn = False

    def restored_part(self, names: Collection[str], absent: Collection[str]) -> None:
        """Take note that these segments were filled; `absent` are those that the checkpoint's optimizer lacked.

        Nothing else is put back: no hyperparameters, and nothing that the optimizer keeps besides tensors.
        """
        if not self._census.optional.keys().isdisjoint(names):
            self._put_optional(names, absent)
            self.refresh()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "an Arena cannot be copied or pickled: it stands for tensors of this process; copy or pickle the model "
            "and the optimizer without it, and adopt the copies"
        )

    def __repr__(self) -> str:
        counts = Counter(segment.role for segment in self.segments)
        parts = [f"{len(self.segments)} segments", f"{self.nbytes / 1e6:.1f} MB"]
        if counts:
            parts.append(" / ".join(f"{role} {counts[role]}" for role in ROLES if counts[role]))
        parts += ["cpu", "wrapped" if self._model is None else "adopted"]
        return f"Arena({', '.join(parts + ['torn'] * self._torn)})"

    def _gather(self) -> None:
        """Find the tensors and make the arena hold them: in the places there are, or else in a new layout."""
        # What is made under inference_mode() could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            self._take(self._find())

    def _take(self, census: Census) -> None:
        self._watch: TensorWatch | None = None  # until all is done: if interrupted, the next refresh() goes on
        table = self._tabulate(census)
        if table != self._table:
            layout = lay_out([entry.spec for entry in census.entries.values()], census.aliases)
            if self._model is not None and (layout.segments, table.strides) != (self.segments, self._table.strides):
                # The old pages are freed when the last of their tensors has moved.
                self._pages, self._address = _allocate(layout)
            self._layout, self._rows, self._table, self._runs = layout, encode_rows(layout), table, None
        self._census = census
        self._kept = _kept_besides(self._optimizer, census)
        self._awaits_state = any(not census.entries[name].tensors for name in census.optional)
        self._tensors = [tensor for entry in census.entries.values() for tensor in entry.tensors]
        if self._model is not None:
            self._bind()
            self._hook(self._model)
        self._locate()
        self._watch = TensorWatch(self._tensors, census.params.values())

    def _tabulate(self, census: Census) -> _Table:
        specs = {name: entry.spec for name, entry in census.entries.items()}
        # Wrapped tensors are read where they lie, whatever their strides.
        strides = {} if self._model is None else {n: dense_stride(e.like) for n, e in census.entries.items()}
        # A frozen parameter changes in no step, even if the optimizer has it.
        trained = {census.aliases.get(name, name) for name, param in census.params.items() if param.requires_grad}
        roles = {"buffer", "model"} if self.fenced else {"buffer"}
        unfenced = frozenset(name for name, spec in specs.items() if spec.role in roles and name not in trained)
        return _Table(specs, strides, census.aliases, unfenced)

    def _view(self, segment: Segment) -> Tensor:
        """A tensor over a segment's pages, with a storage and a version counter of its own."""
        dtype, stride = getattr(torch, segment.dtype), self._table.strides[segment.name]
        count = math.prod(segment.shape)
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu").as_strided(segment.shape, stride)
        flat = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=segment.arena_offset)
        return flat.as_strided(segment.shape, stride)

    def _bind(self) -> None:
        """Copy what lies elsewhere into its place, and make it a view of that place."""
        moves: list[tuple[Segment, tuple[Tensor, ...], Tensor | None]] = []
        end = self._address + len(self._pages)
        for segment in self.segments:
            tensors = self._census.entries[segment.name].tensors
            if not tensors:
                self._view(segment).zero_()
            elif any(lie_of(tensor) != self._place(segment) for tensor in tensors):
                # Where two tensors have changed places, the first copy would overwrite the second.
                inside = self._address <= tensors[0].data_ptr() < end
                moves.append((segment, tensors, tensors[0].detach().clone() if inside else None))
        for segment, tensors, content in moves:
            # One at a time, and nothing else holds what lies elsewhere: as the new pages fill, the old are freed.
            view = self._view(segment)
            view.copy_(tensors[0].detach() if content is None else content)
            for tensor in tensors:
                _point(tensor, view)

    def _place(self, segment: Segment) -> Lie:
        """How a tensor lies that is a view of the segment."""
        address = self._address + segment.arena_offset if segment.nbytes else 0  # as data_ptr() of no elements is
        return address, getattr(torch, segment.dtype), segment.shape, self._table.strides[segment.name]

    def _hook(self, model: nn.Module) -> None:
        """Have whatever loads into the model, or steps the optimizer, wait at the fence; once each."""
        for module in model.modules():  # each: load_state_dict() may be called on any of them
            if module not in self._hooks:
                load = module.register_load_state_dict_pre_hook(_Hook(self.fence))
                self._hooks[module] = (load,)
        if self._optimizer is not None and self._optimizer not in self._hooks:
            before = self._optimizer.register_step_pre_hook(_Hook(self.fence))
            after = self._optimizer.register_step_post_hook(_Hook(self._settle))
            self._hooks[self._optimizer] = (before, after)
            hooks = self._optimizer._optimizer_step_pre_hooks
            if isinstance(hooks, OrderedDict):  # as torch makes it; another hook may write, so ours goes first
                hooks.move_to_end(before.id, last=False)

    def _locate(self) -> None:
        """Work out sources and places from where the tensors lie now."""
        adopted = self._model is not None
        sources = [Source(self._address, 1, (), ())] if adopted else []
        places = []
        for segment in self.segments:
            if adopted:
                address, stride = self._address + segment.arena_offset, self._table.strides[segment.name]
            else:
                tensor = self._census.entries[segment.name].tensors[0]
                address, stride = tensor.data_ptr(), tensor.stride()
            dims = merge_dims(segment.shape, stride)
            plain = segment.nbytes == 0 or not dims or (len(dims) == 1 and dims[0][1] == 1)
            if plain and adopted:
                places.append((0, segment.arena_offset))
                continue
            source_shape, source_stride = ((), ()) if plain else tuple(zip(*dims, strict=True))
            places.append((len(sources), 0))
            sources.append(Source(address, DTYPES[segment.dtype].itemsize, source_shape, source_stride))
        self._sources, self._places = tuple(sources), tuple(places)
        if self._runs is None:
            file_count = len(self._layout.files)
            self._runs = file_runs(self._layout, [(source + file_count, offset) for source, offset in places])
        self._memory: object = self._pages if adopted else [tensor.detach() for tensor in self._tensors]

    def _put_optional(self, names: Collection[str], absent: Collection[str]) -> None:
        """Give the optimizer the optional state among `names` that a checkpoint had, and take away what it had not."""
        segments = {segment.name: segment for segment in self.segments}
        for name, (param, key) in self._census.optional.items():
            if name not in names:
                continue
            assert self._optimizer is not None
            state = self._optimizer.state[param]
            if name in absent:
                state.pop(key, None)
            elif state.get(key) is None:
                with torch.inference_mode(False):  # or training could not write to it
                    state[key] = self._view(segments[name])

    def _settle(self) -> None:
        """After a step: if it created optional state, move that into its reserved place at once.

        Never raises, being called inside the caller's `optimizer.step()`; the next `refresh()` tells.
        """
        if self._awaits_state:
            with contextlib.suppress(ArenaError):
                self.refresh()


class _Hook:
    """Calls a method of an arena that it holds weakly.

    A model takes its hooks along when it is copied; the copy is not in the arena, so its hook does nothing.
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


# What is hooked, to the handles that undo it.  Weak, because modules come and go.
_Hooks = MutableMapping[nn.Module | Optimizer, tuple[RemovableHandle, ...]]


def _unhook(hooks: _Hooks) -> None:
    for handles in list(hooks.values()):
        for handle in handles:
            handle.remove()


class _Kept(NamedTuple):
    """What `Arena.options` looks at, found once for each census, because every save asks.

    Attributes:
        groups: the names of each group's parameters.
        absent: names of optional state that the optimizer has not made yet.
        plain: the parameters that have state which is no tensor: name, state, and the keys of what is none.
    """

    groups: tuple[Names, ...]
    absent: Names
    plain: Sequence[tuple[str, Mapping[Any, Any], Sequence[Any]]]


def _kept_besides(optimizer: Optimizer | None, census: Census) -> _Kept:
    absent = Names(name for name in census.optional if not census.entries[name].tensors)
    awaited = {(id(param), key) for param, key in map(census.optional.__getitem__, absent)}
    plain = []
    for name, param in census.params.items():
        state = {} if optimizer is None else optimizer.state.get(param, {})
        keys = [k for k, v in state.items() if not isinstance(v, Tensor) and (id(param), k) not in awaited]
        if keys:
            plain.append((name, state, keys))
    return _Kept(tuple(map(Names, census.groups)), absent, plain)


class _Table(NamedTuple):
    """What a layout, its places and its plans depend on: specs, strides and aliases by name, and `unfenced`."""

    specs: Mapping[str, TensorSpec]
    strides: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    unfenced: frozenset[str]


def _allocate(layout: Layout) -> tuple[mmap.mmap, int]:
    """Zeroed pages for an arena, and their address.

    Pages straight from the kernel cost nothing until they are touched, so that adopting a training does not need
    its memory twice: as they fill, what the tensors leave is freed.
    """
    pages = allocate_pages(max(layout.arena_bytes, 1))  # an empty map cannot be made
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    assert address % ARENA_ALIGNMENT == 0
    return pages, address


def allocate_pages(nbytes: int) -> mmap.mmap:
    """Zeroed pages of this process alone, huge ones where the kernel has them: whoever walks them is as much faster."""
    # Private: a forked DataLoader worker must not write into its parent's weights.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that is built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _point(tensor: Tensor, view: Tensor) -> None:
    """Make an existing tensor a view of the arena.

    `tensor.data = view` keeps the object, which others hold, and its autograd version counter: it has not been
    written to, so a backward that needs it goes on.
    """
    tensor.data = view


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    # The parameters and their names belong to the live optimizer; a checkpoint has the names we know them by.
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _put_hyperparameters(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        live = group.get(key)
        if isinstance(live, Tensor) and isinstance(value, Tensor) and live.shape == value.shape:
            with torch.no_grad():
                live.copy_(value)  # in place: a compiled step or a scheduler may hold it
        else:
            group[key] = value


def _put_plain_state(states: dict[Any, Any], param: Tensor, saved: Mapping[Any, Any]) -> None:
    live = states.get(param, {})
    for key in [key for key, value in live.items() if not isinstance(value, Tensor) and key not in saved]:
        del live[key]
    if saved:
        states.setdefault(param, {}).update(saved)
