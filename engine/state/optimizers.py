"""Optimizers: the state that torch's optimizers make, and their options.

Theory of operation.  An arena has one layout, so the state of an optimizer should exist before its first step.

* Most of torch's optimizers make their state in `_init_group`, as a function of the parameter alone.  `create_state`
  calls that early, which changes nothing that the first step does.  An option that is set later (`amsgrad`) adds to
  that state, before the next step or save.
* SGD's first step makes momentum a copy of the gradient, so momentum cannot exist earlier.  Its segment is reserved
  under its name, and the name is absent until the step has made the tensor.
* LBFGS, SparseAdam and optimizers that are not torch's make state in the middle of a step (`makes_state_late`).  The
  first walk after that step finds it.  A restore makes it from the checkpoint: see `late`.

Everything else that an optimizer keeps is in `Options`: hyperparameters of its groups, state that is no tensor, the
absent names, its own random generators, and the keys that its `state_dict()` adds.

Rules: tensors are created but never moved here.  Called by `inventory` and `arena`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from engine.errors import MismatchError
from engine.format.manifest import listed
from engine.format.values import Names
from engine.state.adopted import Adopted
from engine.state.generators import check_generators, find_generators, put_generators, read_generators

# The state that SGD makes of a gradient.
MOMENTUM = "momentum_buffer"


@dataclass(slots=True)
class Owned:
    """The names of what an optimizer owns.

    Attributes:
        params: name to parameter, in the order of the groups.
        groups: the names of the parameters of each group.
        reserved: name of a state tensor that may not exist yet, to its parameter and the key of that state.
        prefixes: the name of a parameter's state without its key, to the parameter.
    """

    params: dict[str, Tensor] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    reserved: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    prefixes: dict[str, Tensor] = field(default_factory=dict)


def makes_state_late(optimizer: Optimizer) -> bool:
    """Whether only the optimizer's own first step knows what state it will have.

    Only torch's own `_init_group` makes that state and nothing else when it is called alone.  A subclass with a step of
    its own may expect no state before it.
    """
    methods = (getattr(optimizer, "_init_group", None), type(optimizer).step)
    return not all(getattr(method, "__module__", "").startswith("torch.optim.") for method in methods)


def is_late(adopted: Adopted) -> bool:
    """Whether a step may make state that `create_state` does not: that of the optimizer, or of a wrapper."""
    return bool(adopted.wrappers) or makes_state_late(adopted.optimizer)


class Created(NamedTuple):
    """State that was made in advance, under these keys."""

    optimizer: Optimizer
    param: Tensor
    keys: tuple[Any, ...]

    def undo(self) -> None:
        """Take it away again."""
        state = self.optimizer.state[self.param]
        for key in self.keys:
            del state[key]
        if not state:
            del self.optimizer.state[self.param]


def create_state(optimizer: Optimizer, created: list[Created]) -> None:
    """Make the state that the next step would make or expect, and append what was made to `created`.

    That is all state of a parameter that has none.  Torch's step does not add to state that is there, so where an
    option of the group was set since the last call, the state that it stands for is added here.
    """
    if makes_state_late(optimizer) or isinstance(optimizer, SGD):
        return
    before = _made_for.get(optimizer, [])
    options = [options_set(group) for group in optimizer.param_groups]
    for index, group in enumerate(optimizer.param_groups):
        is_other = index < len(before) and before[index] is not options[index]
        for param in group["params"]:
            held = optimizer.state.get(param, {})
            if param.requires_grad and (is_other or not held):
                new = {key: value for key, value in _first_state(optimizer, group, param).items() if key not in held}
                if new:
                    created.append(Created(optimizer, param, tuple(new)))
                    optimizer.state.setdefault(param, {}).update(new)
    _made_for[optimizer] = options


# The options that were set in each group when state was made for its parameters.
_made_for: WeakKeyDictionary[Optimizer, list[tuple[str, ...]]] = WeakKeyDictionary()


def sharing_state(optimizer: Optimizer, params: Collection[int]) -> set[int]:
    """The parameters, by id(), whose state has the shape of one of these, beside these: LBFGS has one state for all."""
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return own if isinstance(optimizer, LBFGS) and not own.isdisjoint(params) else set()


@torch.no_grad()
def _first_state(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> dict[Any, Any]:
    """The state that a first step would make of a parameter.

    `_init_group` makes state for every parameter that has a gradient, and reads only the shape and dtype of the
    gradient.  So the parameter gets zeros for a gradient, and a stand-in for the optimizer gets the state.
    """
    standin = object.__new__(type(optimizer))
    vars(standin).update(vars(optimizer), state=defaultdict(dict))
    names = list(inspect.signature(standin._init_group).parameters)[1:]  # type: ignore[attr-defined]
    # Lists that it appends to, except for a flag: `amsgrad` of AdamW before torch 2.7.
    arguments = [group[name] if isinstance(group.get(name), bool) else [] for name in names]
    grad = param.grad
    try:
        param.grad = torch.zeros_like(param, memory_format=torch.preserve_format)
        standin._init_group({**group, "params": [param]}, *arguments)  # type: ignore[attr-defined]
    finally:
        param.grad = grad
    return dict(standin.state[param])


def options_set(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a group that may stand for state: flags that are True, and momentum.

    The same object as long as they are the same, as a watch needs it.
    """
    names = tuple(key for key, value in group.items() if value is True or (key == "momentum" and value != 0))
    return _known_options.setdefault(names, names)


_known_options: dict[tuple[str, ...], tuple[str, ...]] = {}


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Whether a group of SGD's has momentum.  A scheduler may change the number, but not the answer."""
    return bool(group["momentum"] != 0)


def reserves_momentum(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the optimizer's first step will make, or has made, the momentum of a parameter."""
    return isinstance(optimizer, SGD) and has_momentum(group) and param.requires_grad


class Options:
    """What an optimizer keeps besides tensors.  Made once for each inventory, because every save reads it.

    Args:
        adopted: the optimizer.
        owned: the names of what it owns.
        absent: those of `owned.reserved` that it has not made yet.
    """

    def __init__(self, adopted: Adopted, owned: Owned, absent: Collection[str]) -> None:
        self.absent = tuple(absent)
        self._adopted = adopted
        self._optimizer = adopted.optimizer
        self._owned = owned
        self._awaited = [owned.reserved[name] for name in absent]
        self._options_set = list(map(options_set, self._optimizer.param_groups))
        awaited = {(id(param), key) for param, key in self._awaited}
        # The parameters that have state which is no tensor: name, state, and the keys of that part.
        self._plain: list[tuple[str, Mapping[Any, Any], list[Any]]] = []
        for name, param in owned.params.items():
            state = self._optimizer.state.get(param, {})
            keys = [k for k, v in state.items() if not isinstance(v, Tensor) and (id(param), k) not in awaited]
            if keys:
                self._plain.append((name, state, keys))

    def read(self) -> dict[str, Any]:
        """The options as they are now.

        Raises:
            ArenaError: the optimizer has state that cannot be stored.
        """
        options: dict[str, Any] = {
            "param_groups": [
                _hyperparameters(group) | {"params": Names(names)}
                for group, names in zip(self._optimizer.param_groups, self._owned.groups, strict=True)
            ],
            "state": {name: {key: state[key] for key in keys} for name, state, keys in self._plain},
            "absent": Names(self.absent),
            "class": type(self._optimizer).__qualname__,
        }
        if generators := find_generators(self._adopted.steppers):
            options["generators"] = read_generators(generators)
        if added := self._adopted.added():
            options["added"] = added
        return options

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that `put_back` could not put back.

        Raises:
            MismatchError: they are of another optimizer; the message says how.
        """
        label = self._adopted.label.removeprefix("the ")
        saved_count, count = len(options["param_groups"]), len(self._optimizer.param_groups)
        if saved_count != count:
            raise MismatchError(
                f"the checkpoint's {label} has {saved_count} parameter groups and the arena's has {count}; "
                "give the optimizer the same groups; call add_param_group() before the restore if the saved run did"
            )
        for index, names in enumerate(self._owned.groups):
            saved_names = options["param_groups"][index].get("params")
            if saved_names != names:
                raise MismatchError(
                    f"parameter group {index} of the checkpoint's {label} has {saved_names}, and that of the "
                    f"arena's has {names}; give the optimizer the same groups in the same order"
                )
        unknown = sorted(set(options["state"]) - set(self._owned.params))
        unknown += sorted(set(options["absent"]) - set(self._owned.reserved))
        if unknown:
            raise MismatchError(
                f"the checkpoint has state that the arena's {label} cannot take: {', '.join(unknown)}; "
                "use the optimizer and the trainable parameters of the run that was saved"
            )
        check_generators(label, find_generators(self._adopted.steppers), options.get("generators", {}))

    def differs_in_state(self, options: Mapping[str, Any]) -> bool:
        """Whether checked options of an optimizer of this class may stand for other state than this one has."""
        is_own_class = options.get("class") == type(self._optimizer).__qualname__
        return is_own_class and list(map(options_set, options["param_groups"])) != self._options_set

    @property
    def has_other_options(self) -> bool:
        """Whether an option was set since these were made, so that the next step may expect more state."""
        return not all(map(is_, map(options_set, self._optimizer.param_groups), self._options_set))

    def put_back(self, options: Mapping[str, Any], unfit: Collection[str] = ()) -> None:
        """Give the optimizer the hyperparameters, plain state, added keys and generators of checked options.

        The state of the parameters in `unfit` stays as it is.

        Raises:
            MismatchError: its `load_state_dict()` refuses the added keys, or a generator its state.
        """
        for group, saved in zip(self._optimizer.param_groups, options["param_groups"], strict=True):
            _put_hyperparameters(group, _hyperparameters(saved))
        for name, param in self._owned.params.items():
            if name not in unfit:
                _put_plain_state(self._optimizer.state, param, options["state"].get(name, {}))
        if options.get("added"):
            self._put_added(options["added"])
        generators = find_generators(self._adopted.steppers)
        put_generators(self._adopted.label, generators, options.get("generators", {}))

    def _put_added(self, added: Mapping[str, Any]) -> None:
        """Have `load_state_dict()` of the optimizer take the added keys, and no tensor.

        Torch's `load_state_dict()` copies groups and casts state, so the live objects are put back afterwards.
        """
        optimizer, face = self._optimizer, self._adopted.face
        attributes = [
            (vars(each), name, vars(each)[name])
            for each in {id(each): each for each in (face, *self._adopted.steppers)}.values()
            for name in ("state", "param_groups")
            if name in vars(each)
        ]
        held = [(live, dict(live)) for live in (*optimizer.state.values(), *optimizer.param_groups)]
        try:
            face.load_state_dict({**face.state_dict(), **added})
        except Exception as error:
            raise MismatchError(
                f"load_state_dict() of {self._adopted.label} refuses what its state_dict() gave: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for attributes_of_one, name, value in attributes:
                attributes_of_one[name] = value
            for live, content in held:
                live.clear()
                live.update(content)

    @property
    def has_made_awaited(self) -> bool:
        """Whether the optimizer has made state that was absent."""
        states = self._optimizer.state
        return any(states[param].get(key) is not None for param, key in self._awaited if param in states)

    def put_reserved(self, names: Collection[str], absent: Collection[str], view: Callable[[str], Tensor]) -> bool:
        """Give the optimizer the reserved state among `names`, except for `absent`, of which it loses what it has.

        Args:
            names: segments that were restored.
            absent: names that the checkpoint's optimizer had not made.
            view: makes a tensor over a segment's memory.

        Returns:
            Whether there was any.
        """
        concerned = [name for name in self._owned.reserved if name in names]
        for name in concerned:
            param, key = self._owned.reserved[name]
            state = self._optimizer.state[param]
            if name in absent:
                state.pop(key, None)
            elif state.get(key) is None:
                with torch.inference_mode(False):  # or training could not write to it
                    state[key] = view(name)
        return bool(concerned)


def check_names(saved: Collection[str], here: Collection[str]) -> None:
    """Refuse a checkpoint of optimizers of other names.

    Raises:
        MismatchError: naming both.
    """
    if set(saved) == set(here):
        return
    if saved and here:
        raise MismatchError(
            f"the checkpoint has {_optimizer_names(saved)} and the arena has {_optimizer_names(here)}; adopt the "
            "optimizers that were saved, under their names: Arena.adopt(model, {name: optimizer, ...}) or a list"
        )
    has, lacks = ("checkpoint", "arena") if saved else ("arena", "checkpoint")
    adopt = "make it with Arena.adopt(model, optimizer), or " if lacks == "arena" else ""
    raise MismatchError(
        f"the {has} has an optimizer and the {lacks} has none; {adopt}restore the model alone: "
        'restore(arena, select=engine.role("model", "buffer"))'
    )


def _optimizer_names(names: Collection[str]) -> str:
    return f"the optimizers {listed(sorted(names), 'optimizers')}" if any(names) else "one optimizer without a name"


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    # The live optimizer owns its parameters and their names; a checkpoint has the names of the inventory.
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
