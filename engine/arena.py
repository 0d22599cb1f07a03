"""Arena: one contiguous buffer that really holds a training's tensors, and the table of what lies where.

Theory of operation.  An **adopted** arena lays every tensor that `gather` finds into one buffer and makes the
tensors views of it.  It does so with ``tensor.data = view`` on the tensors that are there, so that whoever
holds one (the module, the optimizer, an EMA) goes on holding it.  A **wrapped** arena moves nothing: its
tensors are read where they lie.

    buffer   | segment  .| segment   .|seg.| reserved .|      . is padding to 256 bytes, always zero
    source 0 |-----------------------------------------|      contiguous segments are read here
    source 1             |-----------|                        a channels_last one has a source of its own

Training code may take a tensor out again (`p.data = ...`, `model.half()`, `load_state_dict(assign=True)`), so
every save begins with `refresh()`.  Its fast path compares what was seen last time; only where something
differs is everything gathered anew.  If the same segments come out, what moved is copied back into its place;
otherwise there is a new layout in a new buffer.  A layout is never changed: callers may cache by its identity.

While a save is being staged nobody may write here.  The engine leaves a `wait` with `hold()`, and `fence()`
calls it before `optimizer.step()`, before `load_state_dict()` and before this file writes.

Rules: a refused tensor leaves all as it was; the hooks hold the arena weakly; not thread-safe.  A view of
the old memory held by others (a flat buffer, `share_memory()`) is left behind by adoption: wrap those instead.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import ArenaError, MismatchError
from engine.gather import Census, Entry, dense_stride, gather, gather_tensors, merge_dims
from engine.layout import ARENA_ALIGNMENT, ROLES, Layout, Segment, TensorSpec, lay_out


class Source(NamedTuple):
    """Where bytes are read from.

    With shape () it is plain memory; otherwise a strided tensor, which native code serialises row-major
    (strides in elements, dimensions that continue each other merged, at most 8).
    """

    address: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Arena:
    """The tensors of a training, where a checkpoint finds them.  Made by `adopt` or `wrap`."""

    def __init__(self, find: Callable[[], Census], adopted: bool, optimizer: Optimizer | None) -> None:
        """Not for callers: `adopt` and `wrap` know what to pass."""
        self._find = find
        self._adopted = adopted
        self._optimizer = optimizer
        self._held: deque[Callable[[float | None], bool]] = deque()
        self._torn = False
        self._layout = lay_out(())
        self._buffer = _allocate(self._layout)
        self._table: _Table = {}, {}, {}
        self._views: dict[str, Tensor] = {}
        self._gather()

    @classmethod
    def adopt(cls, model: nn.Module, optimizer: Optimizer | None = None) -> Arena:
        """Move a model's and its optimizer's tensors into one buffer; training goes on bit-identically.

        Raises:
            ArenaError: a tensor cannot be stored; nothing was changed.
        """
        arena = cls(lambda: gather(model, optimizer), True, optimizer)
        for module in model.modules():  # each: load_state_dict() may be called on any of them
            module.register_load_state_dict_pre_hook(_Hook(arena.fence))  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.register_step_pre_hook(_Hook(arena.fence))
            optimizer.register_step_post_hook(_Hook(arena._settle))
        return arena

    @classmethod
    def wrap(cls, tensors: Mapping[str, Tensor]) -> Arena:
        """Name tensors that stay where they are.

        Raises:
            ArenaError: a tensor cannot be stored.
        """
        named = dict(tensors)
        return cls(lambda: gather_tensors(named), False, None)

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
    def memory(self) -> object:
        """What must stay alive for `sources` to be readable, whatever becomes of the tensors."""
        return self._memory

    @property
    def fenced(self) -> bool:
        """Whether `optimizer.step()` waits until a save is staged."""
        return self._optimizer is not None

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
        """Every name, aliases included, to a tensor that shares the live one's memory."""
        tensors = {}
        for name, entry in self._census.entries.items():
            tensors[name] = (entry.tensors[0] if entry.tensors else self._views[name]).detach()
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
        """Take in what was changed behind the arena's back; about 0.5 us a tensor when nothing was.

        Raises:
            ArenaError: a tensor that is there now cannot be stored; nothing was changed.
        """
        if self._census.watch.unchanged() and _look(self._tensors) == self._seen:
            return
        self.fence()
        self._gather()

    def options(self) -> dict[str, Any]:
        """What the optimizer keeps besides tensors; {} without one."""
        if self._optimizer is None:
            return {}
        entries, optional = self._census.entries, self._census.optional
        absent = [name for name in optional if not entries[name].tensors]
        awaited = {(id(param), key) for param, key in map(optional.__getitem__, absent)}
        state = {}
        for name, param in self._census.params.items():
            items = self._optimizer.state.get(param, {}).items()
            plain = {k: v for k, v in items if not isinstance(v, Tensor) and (id(param), k) not in awaited}
            if plain:
                state[name] = plain
        return {
            "param_groups": [_hyperparameters(g) for g in self._optimizer.param_groups],
            "state": state,
            "absent": absent,
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
        unknown = sorted(set(options["state"]) - set(self._census.params))
        unknown += sorted(set(options["absent"]) - set(self._census.optional))
        if unknown:
            raise MismatchError(
                f"the checkpoint has optimizer state that the arena's optimizer cannot take: {', '.join(unknown)}; "
                "use the optimizer and the trainable parameters of the run that was saved"
            )

    def restored(self, options: Mapping[str, Any]) -> None:
        """Put back what `options()` gave, after all segments were filled from the same checkpoint."""
        self.check_options(options)
        if self._optimizer is not None:
            for group, saved in zip(self._optimizer.param_groups, options["param_groups"], strict=True):
                _put_hyperparameters(group, saved)
            for name, param in self._census.params.items():
                _put_plain_state(self._optimizer.state, param, options["state"].get(name, {}))
            self._put_optional(set(options["absent"]))
        self.refresh()
        self._torn = False

    def __repr__(self) -> str:
        counts = Counter(segment.role for segment in self.segments)
        parts = [f"{len(self.segments)} segments", f"{self.nbytes / 1e6:.1f} MB"]
        if counts:
            parts.append(" / ".join(f"{role} {counts[role]}" for role in ROLES if counts[role]))
        parts += ["cpu", "adopted" if self._adopted else "wrapped"]
        return f"Arena({', '.join(parts + ['torn'] * self._torn)})"

    def _gather(self) -> None:
        """Find the tensors and make the arena hold them: in the places there are, or else in a new layout."""
        # What is made under inference_mode() could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            self._take(self._find())

    def _take(self, census: Census) -> None:
        table = _tabulate(census, self._adopted)
        if table != self._table:
            layout = lay_out([entry.spec for entry in census.entries.values()], census.aliases)
            if self._adopted:
                buffer = _allocate(layout)
                self._views = {s.name: _view(buffer, s, table[1][s.name]) for s in layout.segments}
                # The old buffer is freed when the last of its tensors has moved.
                self._buffer = buffer
            self._layout, self._table = layout, table
        self._census = census
        self._awaits_state = any(not census.entries[name].tensors for name in census.optional)
        self._tensors = [tensor for entry in census.entries.values() for tensor in entry.tensors]
        self._seen: _Look | None = None  # until all has moved: if interrupted, the next refresh() goes on
        if self._adopted:
            self._bind(census.entries)
        self._locate()
        self._seen = _look(self._tensors)

    def _bind(self, entries: Mapping[str, Entry]) -> None:
        """Copy what lies elsewhere into its place, and make it a view of that place."""
        moves: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for name, entry in entries.items():
            view = self._views[name]
            for tensor in entry.tensors:
                if _look([tensor]) != _look([view]):
                    # Where two tensors have changed places, the first copy would overwrite the second.
                    inside = tensor.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()
                    moves.append((tensor, view, tensor.detach().clone() if inside else None))
            if not entry.tensors:
                view.zero_()
        for tensor, view, content in moves:
            # One at a time, and nothing else holds what lies elsewhere: as the new buffer fills, the old is freed.
            view.copy_(tensor.detach() if content is None else content)
            _point(tensor, view)

    def _locate(self) -> None:
        """Work out sources and places from where the tensors lie now."""
        sources = [Source(self._buffer.data_ptr(), 1, (), ())] if self._adopted else []
        places = []
        for segment in self.segments:
            tensor = self._views[segment.name] if self._adopted else self._census.entries[segment.name].tensors[0]
            dims = merge_dims(tensor.shape, tensor.stride())
            plain = tensor.numel() == 0 or not dims or (len(dims) == 1 and dims[0][1] == 1)
            if plain and self._adopted:
                places.append((0, segment.arena_offset))
                continue
            shape, stride = ((), ()) if plain else tuple(zip(*dims, strict=True))
            places.append((len(sources), 0))
            sources.append(Source(tensor.data_ptr(), tensor.element_size(), shape, stride))
        self._sources, self._places = tuple(sources), tuple(places)
        self._memory = self._buffer if self._adopted else [tensor.detach() for tensor in self._tensors]

    def _put_optional(self, absent: set[str]) -> None:
        """Give the optimizer the optional state that a checkpoint had, and take away what it had not."""
        assert self._optimizer is not None
        for name, (param, key) in self._census.optional.items():
            state = self._optimizer.state[param]
            if name in absent:
                state.pop(key, None)
            elif state.get(key) is None:
                view = self._views[name]
                state[key] = _point(torch.empty(0, dtype=view.dtype, device="cpu"), view)

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


_Look = tuple[list[int], list[tuple[torch.dtype, torch.Size]], list[tuple[int, ...]], list[bool]]
_dtype_and_shape = attrgetter("dtype", "shape")

# What a layout and its places depend on: specs and strides by name, and aliases.
_Table = tuple[Mapping[str, TensorSpec], Mapping[str, tuple[int, ...]], Mapping[str, str]]


def _look(tensors: Sequence[Tensor]) -> _Look:
    """All that `tensor.data = other` can change of where and how tensors lie.

    Column by column, because every save asks, and so the loops are C's: about 0.4 us a tensor.
    """
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_dtype_and_shape, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.is_conj, tensors)),
    )


def _tabulate(census: Census, adopted: bool) -> _Table:
    specs = {name: entry.spec for name, entry in census.entries.items()}
    # Wrapped tensors are read where they lie, whatever their strides.
    strides = {name: dense_stride(entry.like) for name, entry in census.entries.items()} if adopted else {}
    return specs, strides, census.aliases


def _allocate(layout: Layout) -> Tensor:
    """A zeroed buffer whose base is aligned as its segments are.

    Pages straight from the kernel cost nothing until they are touched, so that adopting a training does not need
    its memory twice: as the buffer fills, what the tensors leave is freed.
    """
    # Private: a forked DataLoader worker must not write into its parent's weights.  An empty map cannot be made.
    pages = mmap.mmap(-1, max(layout.arena_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=layout.arena_bytes or -1)[: layout.arena_bytes]
    assert memory.data_ptr() % ARENA_ALIGNMENT == 0
    return memory


def _view(buffer: Tensor, segment: Segment, stride: tuple[int, ...]) -> Tensor:
    place = buffer[segment.arena_offset : segment.arena_offset + segment.nbytes]
    return place.view(getattr(torch, segment.dtype)).as_strided(segment.shape, stride)


def _point(tensor: Tensor, view: Tensor) -> Tensor:
    """Make an existing tensor a view of the arena.

    `tensor.data = view` keeps the object and its own autograd version counter.  Putting the view in its stead
    would not: all views of one buffer share one counter, so a step on any of them would make backward refuse
    every other ("modified by an inplace operation").
    """
    tensor.data = view
    return tensor


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    # The parameters and their names belong to the live optimizer, not to the checkpoint.
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
