"""Arena: one buffer that holds a training's tensors, and the table of its segments.

Theory of operation.  An **adopted** arena lays the tensors of an inventory out in one buffer and makes them views of
it.  It sets ``tensor.data = view`` on the existing tensors, so that modules, optimizers and averaged models keep the
objects that they hold.  A **wrapped** arena moves nothing: its tensors are read at their own locations.

Training code may take a tensor out again (`p.data = ...`, `model.half()`, `share_memory()`), so every save begins with
`refresh()`.  Its fast path compares containers and tensors with the last inventory.  Only after a difference is another
inventory taken.  If it has the same segments, the tensors that left are copied back to their segments.  Otherwise there
is a new layout in a new buffer: see `arrangement`.

No writer may change the arena while a save is staged.  `fence.py` lists the writers that wait by themselves.  Segments
that change without those writers are `unfenced`, and are staged first.  Buffers that forward resizes are mirrored.

Rules: a refused tensor leaves everything as it was.  An interrupted `refresh()` is completed by the next one.  An arena
is not thread-safe.  Adoption leaves other views of a tensor's old memory behind (a flat buffer): wrap such tensors
instead.  A save holds wrapped memory until it is staged, but `untyped_storage().resize_()` and `share_memory_()` free
the memory of a storage all the same: wait for the staging before calling them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import ArenaError, ArgumentError, UsageError, warn
from engine.format.layout import ROLES, Layout, Segment, TensorSpec
from engine.format.manifest import Rows, listed
from engine.format.plan import Extents, Source
from engine.format.values import Json
from engine.state.adopted import Adopted, adopt_optimizers, optimizers_in
from engine.state.arrangement import Table, arrange, sources_of, tabulate
from engine.state.choice import Choice
from engine.state.components import describe
from engine.state.extra_state import ExtraName
from engine.state.fence import Fence
from engine.state.inventory import Inventory, gather, gather_tensors
from engine.state.late import Known, Owner, StatePlan, plan_state
from engine.state.memory import HostMemory, TensorLocation, location_of
from engine.state.mirrors import Mirror, Mirrors, own_memory, resize
from engine.state.modules import Rename, names_beside_tensors
from engine.state.optimizers import Options, check_names, create_state, is_late, sharing_state
from engine.state.select import Named, Select
from engine.state.versions import Counted, Handed, Versions
from engine.state.watch import TensorWatch

# What completion offers.
_PUBLIC_NAMES = (
    *("adopt", "wrap", "refresh", "state_dict", "flat"),
    *("aliases", "layout", "nbytes", "segments", "fenced", "unfenced", "torn"),
)


class _Listed(type):
    """A class whose `dir()` has the names for callers; the others are for the rest of the engine."""

    def __dir__(cls) -> list[str]:
        return sorted(_PUBLIC_NAMES)


class Arena(metaclass=_Listed):
    """The tensors of a training, ready for a checkpoint.  Made by `adopt` or `wrap`."""

    def __new__(cls, *given: object, **_named: object) -> Arena:
        """Refuse a call by anybody but `adopt` and `wrap`, which give a function."""
        if not given or not isinstance(given[0], FunctionType):
            raise UsageError("an Arena is made by Arena.adopt(model, optimizer), or by Arena.wrap(tensors)")
        return super().__new__(cls)

    def __init__(
        self,
        find: Callable[[], Inventory],
        model: nn.Module | None,
        optimizers: Mapping[str, Adopted],
        split_untrained: bool = False,
    ) -> None:
        """Called by `adopt` and `wrap` only.  A wrapped arena has no model."""
        self._split_untrained = split_untrained
        self._find = find
        self._model = model
        self._optimizers = optimizers
        self._names = {id(stepper): name for name, each in optimizers.items() for stepper in each.steppers}
        self._choice = Choice()
        self._fence = Fence()
        self._torn = False
        self._untrained: Mapping[str, frozenset[int]] = {}
        self._is_looked_over = False
        self._after_any_step: Callable[[Collection[str]], None] | None = None
        self._watch: TensorWatch | None = None
        self._arrangement = arrange(Table({}, {}, {}, frozenset(), False), model is not None, None)
        bare = {id(each): _params_without_state(each) for each in optimizers_in(optimizers)}
        try:
            self._take_in()
        except BaseException:
            self._fence.release()
            for optimizer in optimizers_in(optimizers):
                for param in bare[id(optimizer)]:
                    optimizer.state.pop(param, None)
            raise

    @classmethod
    def adopt(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        *,
        only: Select = None,
        exclude: Select = None,
        rename: Rename | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        split_untrained: bool = False,
    ) -> Arena:
        """Move a model's and its optimizers' tensors into one buffer; training goes on bit-identically.

        Args:
            model: compiled and distributed ones are stored under the names of the modules that they wrap.
            optimizer: the optimizer; or several, which have the names "0", "1", ... in a list and their keys in a dict.
                An optimizer that a library has wrapped is unwrapped.
            only: patterns of names or layers, as for `Engine.load`: only these tensors are held.  Or "trained": the
                parameters that the optimizers train, their state, and all buffers.
            exclude: patterns of names or layers that are left out.  These tensors keep their memory.
            rename: maps the name of each of the model's tensors to the name to store it under, which is also that of
                its optimizer state and its layer: `lambda name: name.removeprefix("backbone.")`.
            gradients: tensors to hold beside, by the names of parameters whose gradients are kept in them.  They are
                stored as `gradients.<parameter>`, with the role ``"grad"``, in a file of their own.
            split_untrained: lay the tensors out as `Options.split_untrained` says, so that the first save of an Engine
                with that option need not move them.

        Raises:
            ArenaError: a tensor cannot be stored, or state of an optimizer or a module; nothing was changed.
            ArgumentError: an argument is no model, or no optimizer.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {_type_name(model)}; it must be a torch.nn.Module")
        optimizers = adopt_optimizers(optimizer)
        if rename is not None and not callable(rename):
            raise ArgumentError(f"rename is a {_type_name(rename)}; it must be a function from names to names")
        choice = Choice(only, exclude)
        if choice.is_trained_only and not optimizers:
            raise ArgumentError("only='trained' needs the optimizer: Arena.adopt(model, optimizer, only='trained')")
        spaces = _named({} if gradients is None else gradients, "gradients")
        arena = cls(lambda: gather(model, optimizers, rename, choice, spaces), model, optimizers, split_untrained)
        arena._choice = choice
        arena.warn_of_untrained()
        arena._warn_of_unstored(model)
        return arena

    @classmethod
    def wrap(cls, tensors: Mapping[str, Tensor]) -> Arena:
        """Name tensors that keep their memory.

        Raises:
            ArenaError: a tensor cannot be stored.
            ArgumentError: the argument is no mapping from names to tensors.
        """
        named = _named(tensors, "tensors")
        return cls(lambda: gather_tensors(named), None, {})

    @classmethod
    def over(cls, model: nn.Module) -> Arena:
        """The tensors of a model at their own locations, under the names of an adopted arena; for a restore.

        Raises:
            ArenaError: a tensor cannot be stored.
        """
        return cls(lambda: gather(model, {}, None, Choice(), {}), None, {})

    @property
    def layout(self) -> Layout:
        """The offsets of all segments; another object after a change."""
        return self._arrangement.layout

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The table of stored tensors, in arena order."""
        return self.layout.segments

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, without padding."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of stored tensors (tied weights), alias to segment name."""
        return self._inventory.aliases

    @property
    def wrappers(self) -> Mapping[str, Json]:
        """What the tensor subclasses are besides their components, encoded, as of when they were taken in."""
        return self._wrappers

    @property
    def left_out(self) -> frozenset[str]:
        """The names that `only=` and `exclude=` keep out, as of the last `refresh()`."""
        return self._inventory.left_out

    def leaves_out(self, segment: Named) -> bool:
        """Whether `only=` and `exclude=` keep out a segment of a checkpoint."""
        return segment.name in self.left_out or not self._choice.has(segment, is_trained=True)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The memory that `locations` refer to, as of the last `refresh()`."""
        return self._sources

    @property
    def locations(self) -> tuple[tuple[int, int], ...]:
        """For each segment, the index of its source and its offset there in bytes."""
        return self._arrangement.locations

    @property
    def runs(self) -> tuple[Extents, ...]:
        """The content of each file, as runs of sources: first the headers of the files, then `sources`.

        Made with the layout, so that the first save need not.
        """
        return self._arrangement.runs

    @property
    def rows(self) -> Rows:
        """The rows of the segments in every manifest, encoded; made with the layout."""
        return self._arrangement.rows

    @property
    def buffer(self) -> HostMemory | None:
        """The memory of an adopted arena, which can be guarded; None for a wrapped one."""
        return self._arrangement.buffer

    @property
    def steps_by_torch(self) -> bool:
        """Whether there are optimizers, and each is of a kind that writes in its hooked step only, as torch's own."""
        return self.fenced and all(each.writes_in_step_only for each in self._optimizers.values())

    @property
    def memory(self) -> object:
        """Keeps `sources` readable while it is alive, whatever becomes of the tensors.

        For an adopted arena that is the buffer itself: `share_memory()` gives a storage over it other pages in place.
        """
        return self._memory

    @property
    def fenced(self) -> bool:
        """Whether `optimizer.step()` waits until a save is staged."""
        return bool(self._optimizers)

    @property
    def unfenced(self) -> frozenset[str]:
        """Segments that change without `step()`: the untrained ones, such as buffers and frozen parameters.

        Without an optimizer only the buffers: nothing is fenced then, and the caller of a lazy save does the waiting.
        """
        return self._arrangement.table.unfenced

    @property
    def makes_state_late(self) -> bool:
        """Whether an optimizer makes its state in its first step, so that it is unknown before."""
        return any(map(is_late, self._optimizers.values()))

    @property
    def torn(self) -> bool:
        """Whether a restore failed half-way, so that the tensors are of no one step."""
        return self._torn

    def state_of(self, names: Collection[str]) -> set[str]:
        """The segments of optimizer state of these parameters."""
        entries = self._inventory.entries
        params = {id(tensor) for name in names for tensor in entries[name].tensors}
        for optimizer in optimizers_in(self._optimizers):
            params |= sharing_state(optimizer, params)
        stems = tuple(
            f"{prefix}."
            for owned in self._inventory.owned.values()
            for prefix, param in owned.prefixes.items()
            if id(param) in params
        )
        return {name for name in entries if name.startswith(stems)}

    def can_resize(self, name: str) -> bool:
        """Whether `resize` can give a segment another shape."""
        return self._model is not None and self._inventory.entries[name].mirrored

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Give segments that `can_resize` these shapes, and return whether any has changed; those have no content."""
        changed = [segment for segment in self.segments if shapes.get(segment.name, segment.shape) != segment.shape]
        with torch.inference_mode(False):
            for segment in changed:
                resize(self._inventory.entries[segment.name].tensors, shapes[segment.name])
        self.refresh()
        return bool(changed)

    def mark_torn(self) -> None:
        """A restore begins: until `restored` or `mark_whole`, the tensors are of no one step."""
        self._torn = True

    def mark_whole(self) -> None:
        """A restore of a part has succeeded, and the arena was whole before it."""
        self._torn = False

    def state_dict(self) -> dict[str, Tensor]:
        """Every name, aliases included, to a tensor that shares the live one's memory.  Does `refresh()` first."""
        self.refresh()
        tensors = {}
        for segment in self.segments:
            live = self._inventory.entries[segment.name].tensors
            tensors[segment.name] = live[0].detach() if live else self._view(segment)
        return tensors | {alias: tensors[name] for alias, name in self.aliases.items()}

    def flat(self) -> Tensor:
        """The memory of an adopted arena as one tensor of bytes: its segments, and the padding between them.

        It is that memory until a `refresh()` changes the layout, as a new parameter does; then it is the old memory.

        Raises:
            UsageError: the arena is wrapped: each of its tensors has memory of its own.
        """
        buffer = self._arrangement.buffer
        if buffer is None:
            raise UsageError("a wrapped arena has no memory of its own; adopt the model: Arena.adopt(model, optimizer)")
        return buffer.view(0, torch.uint8, (self.layout.arena_bytes,), (1,))

    def hold(self, wait_staged: Callable[[float | None], bool], holds_writers: bool) -> None:
        """Let the next `fence()` wait for a save; see `Fence.hold`."""
        self._fence.hold(wait_staged, holds_writers)

    def versions(self) -> Versions:
        """The write counts of the segments that nobody may write to while a save is staged."""
        return Versions(self._counted)

    def hand_over(self, names: Collection[str], handed: Handed) -> None:
        """Segments are final: what is kept elsewhere is copied to them, and the counts of writes to them are noted."""
        self._mirrors.copy_some_in(names)
        entries = self._inventory.entries
        handed.add([(name, tensor) for name in names for tensor in entries[name].tensors], self.unfenced)

    def is_current(self) -> bool:
        """Whether `refresh()` would find nothing to take in."""
        return self._watch is not None and self._inventory.watch.unchanged() and self._watch.unchanged()

    def watch_steps(self, after_step: Callable[[Collection[str]], None] | None) -> None:
        """After every step of an optimizer of the arena, call this with the names of the parameters that it wrote.

        None ends that.
        """
        self._after_any_step = after_step

    @property
    def trained(self) -> set[str]:
        """The stored names of the parameters that the arena's optimizers step."""
        return self._inventory.trained & {segment.name for segment in self.segments}

    def take_foreign(self) -> list[str]:
        """The parameters that another optimizer has stepped since the last call, in order."""
        names = sorted(self._fence.foreign)
        self._fence.foreign.clear()
        return names

    def fence(self) -> None:
        """Return once no save is reading the arena."""
        self._fence.wait_staged()

    def split_untrained(self) -> None:
        """From the next `refresh()` on, give the untrained tensors of an adopted model files of their own."""
        if not self._split_untrained and self._model is not None:
            self._watch = None
            self._split_untrained = True

    def refresh(self) -> None:
        """Take in every change of containers and tensors since the last call; about 1 us a tensor without one.

        Raises:
            ArenaError: a new tensor cannot be stored; nothing was changed.
        """
        if self.is_current():
            self._mirrors.copy_in()
            return
        self.fence()
        self._take_in()

    def options(self) -> dict[str, dict[str, Any]]:
        """What each optimizer keeps besides tensors, by its name, as of the last `refresh()`.

        Raises:
            ArenaError: an optimizer has state that cannot be stored.
        """
        return {name: options.read() for name, options in self._options.items()}

    def extra_states(self) -> dict[str, Json]:
        """What `get_extra_state()` of each module gives, encoded, by its name in `state_dict()`.

        Raises:
            ArenaError: a value cannot be stored.
        """
        return self._inventory.extra_states.encode()

    def compare_extra_states(self, stored: Collection[str]) -> tuple[list[str], list[str]]:
        """The names of extra states that only the arena has, and that only a checkpoint has.

        None for a wrapped arena, which has no modules.
        """
        if self._model is None:
            return [], []
        held = [name for name in stored if not self.leaves_out(ExtraName(name))]
        states = self._inventory.extra_states
        return states.missing(held), states.unexpected(held)

    def restored_extra_states(self, values: Mapping[str, object]) -> None:
        """Give the modules their extra state; those that have no value here keep theirs.

        Raises:
            MismatchError: a module refuses its value.
        """
        self._inventory.extra_states.put_back(values)

    def check_options(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse options that `restored()` could not put back.

        Raises:
            MismatchError: they are of other optimizers; the message says how.
        """
        check_names(options, self._options)
        for name, each in self._options.items():
            each.check(options[name])

    def plan_state(
        self,
        stored: Mapping[str, TensorSpec],
        aliases: Mapping[str, str],
        options: Mapping[str, Mapping[str, Any]],
        wrappers: Mapping[str, Json],
    ) -> StatePlan:
        """The state that optimizers lack and only their own steps would make; see `late`.

        Args:
            stored: the segments of a checkpoint.
            aliases: its aliases.
            options: its options, which fit.
            wrappers: what its tensor subclasses are.

        Raises:
            MismatchError: an optimizer that lacks state is of another class, or a tensor subclass cannot be made.
        """
        owners = {
            name: Owner.of(
                each.optimizer,
                self._inventory.owned[name],
                is_late(each) or self._options[name].differs_in_state(options[name]),
                self.left_out,
            )
            for name, each in self._optimizers.items()
        }
        here = {name: entry.spec for name, entry in self._inventory.entries.items()}
        return plan_state(owners, Known(here, self.aliases, self._wrappers), Known(stored, aliases, wrappers), options)

    def make_state(self, plan: StatePlan) -> None:
        """Give the optimizers planned state, whose content is undefined, and take it in.

        Raises:
            ArenaError: a tensor cannot be stored; nothing was changed.
        """
        live = {name: entry.tensors[0] for name, entry in self._inventory.entries.items() if entry.tensors}
        undo = plan.apply(live)
        try:
            self.refresh()
        except BaseException:
            undo()
            raise

    def restored(self, options: Mapping[str, Mapping[str, Any]], extra_states: Mapping[str, object]) -> None:
        """Put back options and extra states, after all segments were filled from the same checkpoint.

        No version counter counts a restore.  So a backward whose forward ran before it computes with restored values,
        and autograd does not notice.
        """
        self.check_options(options)
        self._mirrors.copy_out(self._inventory.entries)
        for name, each in self._options.items():
            each.put_back(options[name])
            self._put_reserved(name, self._inventory.owned[name].reserved, options[name]["absent"])
        self.restored_extra_states(extra_states)
        self.refresh()
        self._torn = False

    def restored_options(self, options: Mapping[str, Mapping[str, Any]], unfit: Collection[str]) -> str:
        """Put back hyperparameters and plain state alone, but not the state of these parameters.

        `check_options` has found that they fit.

        Returns:
            why the whole state of an optimizer was left as it is; or "".
        """
        names = {*unfit, *(alias for alias, name in self.aliases.items() if name in unfit)}
        params = self._inventory.params
        ids = {id(params[name]) for name in names if name in params}
        left = ""
        for name, each in self._options.items():
            adopted = self._optimizers[name]
            sharing = sharing_state(adopted.optimizer, ids)
            own = {param for param, tensor in self._inventory.owned[name].params.items() if id(tensor) in sharing}
            each.put_back(options[name], names | own)
            if sharing:
                left = (
                    f"all state of {adopted.label} stays as it is: it is of all parameters together, and the "
                    f"checkpoint has another shape or dtype of {listed(sorted(unfit))}"
                )
        return left

    def restored_part(self, names: Collection[str], absent: Collection[str]) -> None:
        """Take in that these segments were filled; `absent` are those that the checkpoint's optimizers lacked.

        Hyperparameters and the plain state of the optimizers stay as they are.
        """
        self._mirrors.copy_out(names)
        if any([self._put_reserved(name, names, absent) for name in self._options]):
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
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out")
        parts += ["cpu", "wrapped" if self._model is None else "adopted"]
        return f"Arena({', '.join(parts + ['torn'] * self._torn)})"

    def __dir__(self) -> list[str]:
        """The names for callers; the others are for the rest of the engine."""
        return sorted(_PUBLIC_NAMES)

    def _take_in(self) -> None:
        """Find the tensors and make the arena hold them, in the present layout if it still fits."""
        # Tensors that are made under inference_mode() could never be trained again.
        with torch.inference_mode(False):
            inventory = self._find()
            self._watch = None  # until all is done, so that the next refresh() completes an interrupted one
            self._is_looked_over = False
            adopted = self._model is not None
            table = tabulate(inventory, adopted, self.fenced, self._split_untrained)
            if table != self._arrangement.table:
                # The old buffer is freed when the last of its tensors has moved.
                self._arrangement = arrange(table, adopted, self._arrangement)
            self._inventory = inventory
            self._wrappers = {
                part: about for name, whole in inventory.wholes.items() for part, about in describe(name, whole.tensor)
            }
            self._options = {
                name: Options(self._optimizers[name], owned, inventory.absent(owned))
                for name, owned in inventory.owned.items()
            }
            self._bind()
            self._mirrors = Mirrors(
                [
                    Mirror(segment.name, entry.tensors, self._view(segment))
                    for segment in self.segments
                    if (entry := inventory.entries[segment.name]).mirrored and adopted
                ]
            )
            self._mirrors.copy_in()
            tensors = [tensor for entry in inventory.entries.values() for tensor in entry.tensors]
            buffer = self._arrangement.buffer
            self._memory: object = buffer if buffer is not None else [tensor.detach() for tensor in tensors]
            self._sources = sources_of(self._arrangement, inventory)
            self._counted = Counted(
                (segment.name, tensor)
                for segment in self.segments
                if segment.name not in self.unfenced
                for tensor in inventory.entries[segment.name].tensors
            )
            self._watch = TensorWatch(tensors, inventory.params.values())

    def _bind(self) -> None:
        """Copy the tensors that are not in an adopted arena's buffer into it, and make them views of it."""
        buffer = self._arrangement.buffer
        if buffer is None or self._model is None:
            return
        self._guard(self._model)
        moves: list[tuple[Segment, tuple[Tensor, ...], Tensor | None]] = []
        for segment in self.segments:
            _, _, tensors, mirrored = self._inventory.entries[segment.name]
            if mirrored:
                own_memory(tensors)
            elif not tensors:
                self._view(segment).zero_()
            elif location_of(tensors[0]) != self._location(segment):  # which they share
                # If two tensors were swapped, the first copy would overwrite the second.
                inside = tensors[0].data_ptr() in buffer
                moves.append((segment, tensors, tensors[0].detach().clone() if inside else None))
        for segment, tensors, content in moves:
            # One at a time, and nothing else holds the old memory: as the new pages fill, the old ones are freed.
            view = self._view(segment)
            view.copy_(tensors[0].detach() if content is None else content)
            for tensor in tensors:
                _point(tensor, view)

    def _guard(self, model: nn.Module) -> None:
        """Hook the writers.  Called before a tensor moves, because it may fail."""
        self._fence.guard_loads(model)
        params = {
            id(tensor): segment.name
            for segment in self.segments
            if segment.role == "model"
            for tensor in self._inventory.entries[segment.name].tensors
        } | {id(whole.tensor): whole.parts[0] for whole in self._inventory.wholes.values()}
        self._fence.guard_params(params, self.unfenced, self._names)
        for each in self._optimizers.values():
            for stepper in each.steppers:
                self._fence.guard_steps(stepper, self._before_step, self._after_step)

    def warn_of_untrained(self) -> None:
        """Name the trainable parameters that no optimizer of the arena has, each tensor once.

        A save calls it after `refresh()`: a layer may have been replaced since, and the optimizer has the old one.
        """
        if self._is_looked_over or not self._optimizers:
            return
        trained = self._inventory.trained
        forgotten = {
            name: frozenset(map(id, entry.tensors))
            for name, entry in self._inventory.entries.items()
            if entry.spec.role == "model" and name not in trained and any(each.requires_grad for each in entry.tensors)
        }
        new = [name for name, tensors in forgotten.items() if tensors != self._untrained.get(name)]
        self._is_looked_over, self._untrained = True, forgotten
        if new:
            warn(
                f"no optimizer of the arena trains {listed(new)}: adopt every optimizer, "
                "Arena.adopt(model, [first, second]), or the state of the others is in no checkpoint; "
                "requires_grad_(False) says that a parameter is not trained"
            )

    def _warn_of_unstored(self, model: nn.Module) -> None:
        """Name what the model's `state_dict()` has, and no checkpoint will."""
        beside = names_beside_tensors(model)
        names = [name for name in beside if self._choice.has(ExtraName(name), is_trained=False)]
        if names:
            warn(
                f"state_dict() of the model has {listed(names, 'values')}, which no parameter, buffer or "
                "get_extra_state() of a module holds, and so no checkpoint: store them in extra=, or say "
                "exclude= with their names"
            )

    def _view(self, segment: Segment) -> Tensor:
        """A tensor over a segment of the buffer."""
        buffer, location = self._arrangement.buffer, self._location(segment)
        assert buffer is not None
        return buffer.view(segment.arena_offset, location.dtype, location.shape, location.stride)

    def _location(self, segment: Segment) -> TensorLocation:
        """The location of a tensor that is a view of the segment."""
        buffer = self._arrangement.buffer
        assert buffer is not None
        address = buffer.address + segment.arena_offset if segment.nbytes else 0  # as data_ptr() of no elements is
        strides = self._arrangement.table.strides
        return TensorLocation(address, getattr(torch, segment.dtype), segment.shape, strides[segment.name])

    def _put_reserved(self, name: str, names: Collection[str], absent: Collection[str]) -> bool:
        segments = {segment.name: segment for segment in self.segments}
        return self._options[name].put_reserved(
            segments.keys() & names, absent, lambda each: self._view(segments[each])
        )

    def _before_step(self, stepper: Any) -> None:
        """Wait for the saves that the step would tear, and make the state that it expects by an option set since."""
        self._fence.hold_writer()
        name = self._names.get(id(stepper))  # None: a copy of a stepper whose step was wrapped
        if name is not None and self._options[name].has_other_options:
            create_state(self._optimizers[name].optimizer, [])

    def _after_step(self, stepper: Any) -> None:
        """Move state that the step has made into its reserved segment at once.

        Never raises, because it is called inside the caller's `step()`; the next `refresh()` raises instead.
        """
        name = self._names[id(stepper)]
        if self._options[name].has_made_awaited:
            with contextlib.suppress(ArenaError):
                self.refresh()
        if self._after_any_step is not None:
            owned, aliases = self._inventory.owned[name], self.aliases
            stepped = [each for each, param in owned.params.items() if param.grad is not None]
            self._after_any_step({aliases.get(part, part) for each in stepped for part in self._inventory.parts(each)})


def _named(tensors: object, argument: str) -> dict[str, Tensor]:
    """Tensors that the caller names, checked; a copy."""
    if not isinstance(tensors, Mapping):
        raise ArgumentError(f"{argument} is a {_type_name(tensors)}; it must map names to tensors")
    named = dict(tensors)
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name!r} is mapped to a {_type_name(tensor)}; map names (str) to tensors")
    return named


def _point(tensor: Tensor, view: Tensor) -> None:
    """Make an existing tensor a view of the buffer.

    `tensor.data = view` keeps the object, which others hold, and its autograd version counter.  To autograd the tensor
    was not written to, so a backward that needs it goes on.
    """
    tensor.data = view


def _params_without_state(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]


def check_arena(arena: object) -> None:
    """Raise ArgumentError unless this is an Arena: a model or a dict of tensors is what callers give by mistake."""
    if not isinstance(arena, Arena):
        raise ArgumentError(
            f"arena is a {_type_name(arena)}; it must be an engine.Arena, which Arena.adopt(model, optimizer) or "
            "Arena.wrap(tensors) makes once, before the first save"
        )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
