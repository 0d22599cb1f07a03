"""Adopted: the optimizers that an arena is given, under their names and without their wrappers.

Theory of operation.  Libraries put an object of their own around an optimizer: accelerate and Lightning pass calls on,
Lookahead and SAM add work to a step.  The state is that of the innermost optimizer, so that one is adopted.

* A wrapper without state of its own, whose `state_dict()` adds no key, is left out.
* A wrapper that has a `state` of its own is kept beside the optimizer.  Its `state` must stay empty, because the names
  of the inner optimizer's state are taken.  A save of other state is refused, with the remedy to adopt both.

The **face** is the object whose `state_dict()` and `load_state_dict()` a user calls.  If these are not torch's own,
every save asks the face for the keys that it adds, and refuses state that is there and not in `optimizer.state`.

Rules: nothing is changed here.  A refusal names the optimizer, and comes before a tensor moves.  Called by `arena` and
`inventory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import Any, NamedTuple

from torch.optim import Optimizer

from engine.errors import ArenaError, ArgumentError
from engine.format.layout import OPTIMIZER_NAME

# The keys of every optimizer's state_dict().
_STATE_DICT_KEYS = ("state", "param_groups")

# Modules of optimizers, and of wrappers, that write to parameters inside a hooked `step()` only.
_WRITE_IN_STEP = ("torch.optim.", "accelerate.", "lightning.", "pytorch_lightning.", "lightning_fabric.")

_GIVE = "it must be a torch.optim.Optimizer, a list of them, or a dict from names to them"


class Adopted(NamedTuple):
    """One optimizer of an arena.

    Attributes:
        label: the optimizer for a message.
        optimizer: has the state and the groups.
        face: its `state_dict()` is what a user would save.
        wrappers: those around it that have a `state` of their own, outermost first.
    """

    label: str
    optimizer: Optimizer
    face: Any
    wrappers: tuple[Any, ...] = ()

    @property
    def steppers(self) -> tuple[Any, ...]:
        """The objects whose `step()` writes to parameters."""
        return (self.optimizer, *self.wrappers)

    @property
    def writes_in_step_only(self) -> bool:
        """Whether every write is known to be inside a hooked `step()`."""
        return all(type(each).__module__.startswith(_WRITE_IN_STEP) for each in self.steppers)

    def added(self) -> dict[str, Any]:
        """The keys that `state_dict()` has beside those of every optimizer; empty for a plain one.

        Raises:
            ArenaError: it has state that `optimizer.state` lacks, or a wrapper has.
        """
        for wrapper in self.wrappers:
            self._check_wrapper(wrapper)
        if _has_plain_state_dict(self.face):
            return {}
        content = _state_dict(self.label, self.face)
        self._check_visible(content)
        return {key: value for key, value in content.items() if key not in _STATE_DICT_KEYS}

    def _check_wrapper(self, wrapper: Any) -> None:
        if any(not isinstance(state, Mapping) or state for state in wrapper.state.values()):
            raise ArenaError(
                f"{self.label} is wrapped in a {_type_name(wrapper)}, which keeps state of its own; adopt both: "
                "Arena.adopt(model, {'wrapper': wrapper, 'inner': the optimizer in it})"
            )

    def _check_visible(self, content: Mapping[str, Any]) -> None:
        saved, groups = content.get("state", {}), content.get("param_groups", [])
        live_groups = self.optimizer.param_groups
        if not isinstance(saved, Mapping) or not isinstance(groups, Sequence) or len(groups) > len(live_groups):
            raise ArenaError(f"state_dict() of {self.label} has not the form of torch's; {_WRAP}")
        params: list[Any] = [param for group in live_groups for param in group["params"]]
        for key, state in saved.items():
            live = self.optimizer.state.get(params[key], {}) if key in range(len(params)) else {}
            hidden = [name for name in state if name not in live] if isinstance(state, Mapping) else [key]
            if hidden:
                raise ArenaError(
                    f"state_dict() of {self.label} has the state {hidden[0]!r} of parameter {key}, which is not in its "
                    f"`state`: it shards or hides its state; {_WRAP}"
                )
        for index, (group, live_group) in enumerate(zip(groups, live_groups, strict=False)):
            more = sorted(map(str, set(group) - set(live_group) - {"params"}))
            if more:
                raise ArenaError(
                    f"state_dict() of {self.label} has {more[0]!r} in parameter group {index}, which is not in its "
                    f"`param_groups`; {_WRAP}"
                )


_WRAP = "store its tensors with Arena.wrap(), or its state_dict() by other means"


def adopt_optimizers(given: object) -> dict[str, Adopted]:
    """The optimizers by name; "" is the name of the only one.

    Args:
        given: None, an optimizer, or several in a sequence or under names; each may be wrapped.

    Raises:
        ArgumentError: it is none of these, or a name cannot be part of a file's name.
        ArenaError: an optimizer's state cannot be stored.
    """
    if given is None:
        return {}
    named = _named(given)
    given_ids = {id(each) for each in named.values()}
    adopted = {name: _adopt(name, each, given_ids) for name, each in named.items()}
    owners: dict[int, str] = {}
    for name, each in adopted.items():
        other = owners.setdefault(id(each.optimizer.state), name)
        if other != name:
            raise ArgumentError(f"the optimizers {other!r} and {name!r} are one; give each optimizer once")
    return adopted


def _named(given: object) -> dict[str, object]:
    if isinstance(given, Mapping):
        named = dict(given)
        for name in named:
            if not isinstance(name, str) or not name or not OPTIMIZER_NAME.fullmatch(name):
                shown = repr(name) if isinstance(name, str) else f"a {_type_name(name)}"
                raise ArgumentError(
                    f"an optimizer cannot be called {shown}: its name is part of a file's name; use 1 to 64 of a to z, "
                    "0 to 9 and -, or give a list"
                )
    elif isinstance(given, Sequence | ValuesView):
        each = list(given)
        named = {"": each[0]} if len(each) == 1 else {str(index): one for index, one in enumerate(each)}
    else:
        named = {"": given}
    if not named:
        raise ArgumentError(f"optimizer is an empty {_type_name(given)}; {_GIVE}")
    return named


def _adopt(name: str, given: object, given_ids: set[int]) -> Adopted:
    """Unwrap one optimizer, down to one that is given as well."""
    label = f"the optimizer {name!r}" if name else "the optimizer"
    chain: list[Any] = [given]
    while True:
        held = [each for each in _held_by(chain[-1]) if not any(each is outer for outer in chain)]
        inner = _outermost([each for each in held if id(each) not in given_ids])
        if not inner:
            break
        if len(inner) > 1:
            raise ArgumentError(
                f"{label} is a {_type_name(chain[-1])}, which holds {len(inner)} optimizers; adopt them instead: "
                "Arena.adopt(model, [first, second])"
            )
        if not _params(chain[-1]) <= _params(inner[0]):
            if _params(inner[0]) < _params(chain[-1]):
                raise ArgumentError(
                    f"{label} is a {_type_name(chain[-1])}, which holds an optimizer of some of its parameters; if "
                    "it shards its state over ranks, that cannot be stored: use the optimizer without sharding, or "
                    "else adopt both: Arena.adopt(model, [outer, inner])"
                )
            raise ArgumentError(
                f"{label} is a {_type_name(chain[-1])}, which holds an optimizer of other parameters; adopt both: "
                "Arena.adopt(model, [outer, inner])"
            )
        chain.append(inner[0])
    optimizer = chain[-1]
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"{label.removeprefix('the ')} is a {_type_name(given)}; {_GIVE}")
    label = f"{label} ({type(optimizer).__qualname__})"
    groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise ArenaError(f"{label} has no param_groups or no state; have its __init__ call super().__init__()")
    wrappers = [each for each in chain[:-1] if _has_own_state(each, state)]
    known = _added_keys(label, optimizer)
    faces = [each for each in chain[:-1] if _has_own_state(each, state) or _added_keys(label, each) - known]
    return Adopted(label, optimizer, faces[0] if faces else optimizer, tuple(wrappers))


def _held_by(holder: object) -> list[Optimizer]:
    """The optimizers in the attributes of an object, each once."""
    values = list(getattr(holder, "__dict__", {}).values())
    for value in list(values):
        if isinstance(value, Mapping) and value is not getattr(holder, "state", None):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    found = {id(value): value for value in values if isinstance(value, Optimizer) and value is not holder}
    return list(found.values())


def _outermost(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those of them that no other one holds."""
    held = {id(inner) for each in optimizers for inner in _held_by(each)}
    return [each for each in optimizers if id(each) not in held]


def _params(optimizer: object) -> set[int]:
    groups = getattr(optimizer, "param_groups", [])
    return {id(param) for group in groups for param in group["params"]}


def _has_own_state(wrapper: object, state: Mapping[Any, Any]) -> bool:
    own = getattr(wrapper, "state", None)
    return isinstance(own, Mapping) and own is not state


def _added_keys(label: str, face: Any) -> set[str]:
    if not callable(getattr(face, "state_dict", None)) or _has_plain_state_dict(face):
        return set()
    return set(_state_dict(label, face)) - set(_STATE_DICT_KEYS)


def _has_plain_state_dict(face: object) -> bool:
    """Whether `state_dict()` is torch's own, so that it has `state` and `param_groups` and nothing else."""
    hooks = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    is_own = getattr(type(face), "state_dict", None) is not Optimizer.state_dict
    return not (is_own or "state_dict" in vars(face) or any(vars(face).get(hook) for hook in hooks))


def _state_dict(label: str, face: Any) -> dict[str, Any]:
    try:
        return dict(face.state_dict())
    except Exception as error:
        raise ArenaError(f"state_dict() of {label} raises {type(error).__name__}: {error}; {_WRAP}") from error


def optimizers_in(adopted: Mapping[str, Adopted]) -> Iterator[Optimizer]:
    """The innermost optimizers."""
    return (each.optimizer for each in adopted.values())


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
