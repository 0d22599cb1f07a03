"""Late: state of optimizers that a restore makes, because nothing but a step would make it otherwise.

Theory of operation.  Some optimizers make state in the middle of a step (`optimizers.is_late`).  A fresh one has none,
and the checkpoint says what there was.  The same is true of a frozen parameter of any optimizer: no state is made for
it in advance, but the training that was saved may have trained it before it was frozen, or after the arena was adopted.

An option that was set in the saved training and is not here (`amsgrad`), or the other way round, makes all state of
that optimizer like late state.

`plan_state` compares names and kinds, and changes nothing.  The plan puts tensors of the stored kinds into
`optimizer.state`, lets names share a tensor that shared one when they were saved, and takes away what the checkpoint
lacks.  Then the arena takes the tensors in, and the restore fills them.  The state of a parameter that has another
shape or dtype in the checkpoint stays as it is.

State that is a tensor subclass is made of its components, as the checkpoint describes it (`components`).

A name of state is that of its parameter and a key.  No name of a parameter is the beginning of another one's, and only
keys without a dot are made, so the name says which parameter it is.

Rules: only state of late optimizers, of those with other options, and of frozen parameters is touched.  A plan that
fails is undone.  Called by `arena`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.errors import MismatchError
from engine.format.layout import TensorSpec
from engine.format.values import Json
from engine.state.components import leaves, make_wrapper
from engine.state.optimizers import Owned, sharing_state


class _Place(NamedTuple):
    """An item of an optimizer's state."""

    optimizer: Optimizer
    param: Tensor
    key: str


class Owner(NamedTuple):
    """An optimizer, the names of what it owns, and the prefixes of state that only a step would make."""

    optimizer: Optimizer
    owned: Owned
    late: Mapping[str, Tensor]

    @classmethod
    def of(cls, optimizer: Optimizer, owned: Owned, is_late: bool, left_out: Collection[str]) -> Owner:
        """Find those prefixes.

        Args:
            optimizer: which.
            owned: the names of what it owns.
            is_late: whether it makes all its state in a step, or its options stand for other state.
            left_out: names that the arena does not hold; no state is made of a frozen parameter among them.
        """
        absent = {id(param) for name, param in owned.params.items() if name in left_out}
        late = {
            prefix: param
            for prefix, param in owned.prefixes.items()
            if is_late or not (param.requires_grad or id(param) in absent)
        }
        return cls(optimizer, owned, late)


class Known(NamedTuple):
    """The tensors of an arena or a checkpoint: segments, aliases, and what tensor subclasses are, encoded."""

    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    wrappers: Mapping[str, Json]


class StatePlan(NamedTuple):
    """What a restore does to state that only a step would make.

    Attributes:
        wraps: the name of new state that is a tensor subclass, to its place.
        stored: of the checkpoint.
        makes: the name of new state, to its place and its kind.
        shares: the name of state that is another name of stored state, to its place and that name.
        drops: the name of state that the checkpoint lacks, to its place.
    """

    makes: Mapping[str, tuple[_Place, TensorSpec]]
    shares: Mapping[str, tuple[_Place, str]]
    drops: Mapping[str, _Place]
    wraps: Mapping[str, _Place]
    stored: Known

    @property
    def names(self) -> set[str]:
        """All names that come, go, or get another kind."""
        aliases = self.stored.aliases
        components = {aliases.get(leaf, leaf) for name in self.wraps for leaf in leaves(name, self.stored.wrappers)}
        return {*self.makes, *self.shares, *self.drops, *components}

    def apply(self, live: Mapping[str, Tensor]) -> Callable[[], None]:
        """Do it, and return what undoes it.

        Args:
            live: the tensors of the arena by name.
        """
        before = [(place, _item(place)) for place in self._places()]

        def undo() -> None:
            for place, items in before:
                _put(place, items)

        made: dict[str, Tensor] = {}
        try:
            with torch.inference_mode(False):  # or training could not write to them
                for name, (place, spec) in self.makes.items():
                    made[name] = _make(place.param, spec)
                    _put(place, [made[name]])
                for name, place in self.wraps.items():
                    component = partial(self._component, made, live, place.param)
                    _put(place, [make_wrapper(name, self.stored.wrappers, component)])
        except BaseException:
            undo()
            raise
        for place, name in self.shares.values():
            _put(place, [made[name] if name in made else live[name]])
        for place in self.drops.values():
            _put(place, [])
        return undo

    def _component(self, made: dict[str, Tensor], live: Mapping[str, Tensor], param: Tensor, name: str) -> Tensor:
        """A plain tensor in a tensor subclass; the same one for each of its names."""
        name = self.stored.aliases.get(name, name)
        if name not in made:
            if name not in self.stored.specs:
                raise MismatchError(
                    f"the checkpoint lacks {name!r}, a component of a tensor subclass; restore another step"
                )
            spec = self.stored.specs[name]
            dtype = getattr(torch, spec.dtype)
            made[name] = live[name] if name in live else torch.zeros(spec.shape, dtype=dtype, device=param.device)
        return made[name]

    def _places(self) -> Iterator[_Place]:
        yield from (place for place, _ in self.makes.values())
        yield from self.wraps.values()
        yield from (place for place, _ in self.shares.values())
        yield from self.drops.values()


def plan_state(
    owners: Mapping[str, Owner], arena: Known, checkpoint: Known, options: Mapping[str, Mapping[str, Any]]
) -> StatePlan:
    """Compare the state that only a step would make with that of a checkpoint.

    Args:
        owners: the arena's optimizers by name.
        arena: its tensors.
        checkpoint: its tensors.
        options: of the checkpoint, by the same names as `owners`.

    Raises:
        MismatchError: state must be made for an optimizer of another class.
    """
    (here, here_aliases, here_wrappers), (stored, stored_aliases, stored_wrappers) = arena, checkpoint
    reserved = {name for owner in owners.values() for name in owner.owned.reserved}  # there before a step
    unfit = {
        id(param)
        for owner in owners.values()
        for name, param in owner.owned.params.items()
        if _differ(here.get(here_aliases.get(name, name)), stored.get(stored_aliases.get(name, name)))
    }
    for owner in owners.values():
        unfit |= sharing_state(owner.optimizer, unfit)
    places = {prefix: place for prefix, place in _places_by_prefix(owners).items() if id(place[1]) not in unfit}
    makes, shares, drops, wraps = {}, {}, {}, {}
    for name in stored_wrappers:
        place = None if name in here_wrappers else _place(places, name)
        if place is not None and any(
            stored_aliases.get(leaf, leaf) in stored for leaf in leaves(name, stored_wrappers)
        ):
            wraps[name] = place
    for name, spec in stored.items():
        place = None if name in reserved else _place(places, name)
        if place is not None and (name not in here or _differ(here[name], spec)):
            makes[name] = place, spec
    for alias, name in stored_aliases.items():
        place = _place(places, alias)
        if place is not None and here_aliases.get(alias) != name and (name in here or name in stored):
            shares[alias] = place, name
    for name in (*here, *here_aliases):
        place = None if name in reserved else _place(places, name)
        if place is not None and name not in stored and name not in stored_aliases and name not in wraps:
            drops[name] = place
    for name, (optimizer, _, _) in owners.items():
        saved, own = options[name].get("class"), type(optimizer).__qualname__
        if saved not in (None, own) and any(
            place.optimizer is optimizer for place in (*wraps.values(), *(place for place, _ in makes.values()))
        ):
            raise MismatchError(
                f"the checkpoint's optimizer is a {saved}, and the arena's, which lacks state, is a {own}; adopt an "
                "optimizer of the same class"
            )
    return StatePlan(makes, shares, drops, wraps, checkpoint)


def _places_by_prefix(owners: Mapping[str, Owner]) -> dict[str, tuple[Optimizer, Tensor]]:
    return {prefix: (optimizer, param) for optimizer, _, late in owners.values() for prefix, param in late.items()}


def _place(places: Mapping[str, tuple[Optimizer, Tensor]], name: str) -> _Place | None:
    prefix, _, key = name.rpartition(".")
    owner = places.get(prefix)
    return _Place(*owner, key) if owner is not None and key.isidentifier() else None


def _differ(one: TensorSpec | None, other: TensorSpec | None) -> bool:
    """Whether both exist, and are of two kinds."""
    return one is not None and other is not None and (one.dtype, one.shape) != (other.dtype, other.shape)


def _make(param: Tensor, spec: TensorSpec) -> Tensor:
    """A tensor of stored state.  It has its parameter's strides, as `zeros_like` gives it, if it has its shape."""
    dtype = getattr(torch, spec.dtype)
    if spec.shape == param.shape:
        return torch.empty_like(param.detach(), dtype=dtype, memory_format=torch.preserve_format)
    return torch.empty(spec.shape, dtype=dtype, device=param.device)


def _item(place: _Place) -> list[Any]:
    """The value at a place, or nothing."""
    state = place.optimizer.state.get(place.param, {})
    return [state[place.key]] if place.key in state else []


def _put(place: _Place, items: list[Any]) -> None:
    if items:
        place.optimizer.state.setdefault(place.param, {})[place.key] = items[0]
    elif place.param in place.optimizer.state:
        place.optimizer.state[place.param].pop(place.key, None)
        if not place.optimizer.state[place.param]:
            del place.optimizer.state[place.param]  # as before the first step
