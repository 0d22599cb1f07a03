"""Extra state: what modules keep besides tensors, as `get_extra_state()` gives it.

Theory of operation.  If the class of a module overrides `get_extra_state`, `state_dict()` has its result under
`<path>._extra_state`.  A checkpoint has it under that name, renamed as tensors are, in the form of `extra`.  A restore
of the whole checkpoint gives it to `set_extra_state`.  `only=` and `exclude=` hold it as they hold a buffer of the
module.

The value is encoded when a save begins, so it may change as soon as `checkpoint()` returns.

Rules: a refusal names the module, and comes before a tensor moves.  A module under several paths has one state, under
its first path.  Called by `inventory` and `arena`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from engine.errors import ArenaError, ExtraError, MismatchError
from engine.format.values import Json
from engine.state.choice import Choice
from engine.state.modules import EXTRA_STATE, Names
from engine.state.tensors import encode


class ExtraName(NamedTuple):
    """The name of an extra state, as a choice takes it."""

    name: str
    role: str = "buffer"

    @property
    def layer(self) -> str:
        """The path of the module."""
        return self.name.rpartition(".")[0]


class ExtraStates:
    """The modules of one walk that have extra state, by the name of that."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._known: set[int] = set()

    def add(self, prefix: str, module: nn.Module, names: Names) -> None:
        """Take in a module of the walk, if it has extra state.

        Raises:
            ArenaError: two modules would have one name.
        """
        if type(module).get_extra_state is nn.Module.get_extra_state or id(module) in self._known:
            return
        name = names.take(prefix + EXTRA_STATE)
        if name in self._modules:
            raise ArenaError(f"two modules have extra state called {name!r}; a wrapper must not have its own")
        self._known.add(id(module))
        self._modules[name] = module

    def leave_out(self, choice: Choice) -> frozenset[str]:
        """Drop what a choice does not hold, and return the names of that."""
        dropped = frozenset(name for name in self._modules if not choice.has(ExtraName(name), is_trained=True))
        for name in dropped:
            del self._modules[name]
        return dropped

    def encode(self) -> dict[str, Json]:
        """The states as they are now.

        Raises:
            ArenaError: one of them cannot be stored, or could not be given back.
        """
        return {name: _encode(name, module) for name, module in self._modules.items()}

    def missing(self, stored: Collection[str]) -> list[str]:
        """The names that are not among those of a checkpoint."""
        return [name for name in self._modules if name not in stored]

    def unexpected(self, stored: Collection[str]) -> list[str]:
        """The names of a checkpoint that no module has."""
        return [name for name in stored if name not in self._modules]

    def put_back(self, values: Mapping[str, object]) -> None:
        """Give the modules the values that there are for them.

        Raises:
            MismatchError: a module refuses its value.
        """
        for name, module in self._modules.items():
            if name not in values:
                continue
            try:
                module.set_extra_state(values[name])
            except Exception as error:
                raise MismatchError(
                    f"set_extra_state() of {_label(name, module)} refuses what its get_extra_state() gave: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _encode(name: str, module: nn.Module) -> Json:
    label = _label(name, module)
    if type(module).set_extra_state is nn.Module.set_extra_state:
        raise ArenaError(
            f"{label} has get_extra_state() and no set_extra_state(), so a restore could not give it back; define "
            f"both, or keep it out with exclude={name!r}"
        )
    try:
        value = module.get_extra_state()
    except Exception as error:
        raise ArenaError(f"get_extra_state() of {label} raises {type(error).__name__}: {error}") from error
    try:
        return encode(value, name)
    except ExtraError as error:
        raise ArenaError(
            f"get_extra_state() of {label} cannot be stored: {error}; or keep it out with exclude={name!r}"
        ) from error


def _label(name: str, module: nn.Module) -> str:
    """The module for a message."""
    path = ExtraName(name).layer
    kind = type(module).__qualname__
    return f"the module {path!r} ({kind})" if path else f"the model ({kind})"
