"""Select: the tensors that `select=`, `only=` and `exclude=` ask for, by pattern or by role.

Theory of operation.  A pattern (fnmatch(3), case-sensitive) picks a tensor by its name, by its layer, or by the name
of a member of its layer:  ``"layers.3.*"`` picks everything under layers.3, the optimizer's state of it included;
``"layers.3"`` only what belongs to that very module;  ``"*.exp_avg"`` one kind of state.  A tied name is a name like
any other.

`role("model", "buffer")` picks every tensor of these roles: the weights without the optimizer's state.  Of several
patterns and roles each adds what it picks.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import ArgumentError
from engine.format.layout import ROLES
from engine.format.manifest import listed


@dataclass(frozen=True, slots=True)
class Role:
    """Every tensor of some roles, for `select=`; made by `role`."""

    names: tuple[str, ...]


def role(*names: str) -> Role:
    """Pick by role: ``"model"`` (parameters), ``"buffer"`` (module buffers), ``"optimizer"`` (its state).

        eng.restore(arena, select=engine.role("model", "buffer"))    # weights only; no optimizer is needed

    Raises:
        ArgumentError: there is no such role.
    """
    for name in names:
        if name not in ROLES:
            raise ArgumentError(f"role has {name!r}; the roles are {', '.join(map(repr, ROLES))}")
    if not names:
        raise ArgumentError(f"role needs a name, of {', '.join(map(repr, ROLES))}")
    return Role(names)


Select = str | Role | Sequence[str | Role] | None


_NOTHING = "(?!)"  # an expression that matches nothing, not even the empty text


# Enough to find a misspelt name among.
_NEAR_COUNT = 3


def near(texts: Iterable[str], known: Iterable[str], names: Sequence[str] = ()) -> str:
    """For a message: the known names near these texts, or else the first of `names`, which are `known` unless given."""
    every = list(known)
    found = [name for text in texts for name in difflib.get_close_matches(text, every, _NEAR_COUNT)]
    if found:
        return f"near are {', '.join(dict.fromkeys(found))}"
    shown = names or every
    return f"it has {listed(shown)}" if shown else "it has no tensor"


class Named(Protocol):
    """A tensor of a walk, or a segment, in memory or of a manifest."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def role(self) -> str: ...


class Selection:
    """What one `select=` picks.

    Args:
        argument: its name in the caller's call.

    Raises:
        ArgumentError: it is none of None, a pattern, a role, and a list of those.
    """

    def __init__(self, select: Select, argument: str = "select") -> None:
        self.select = select
        self.is_all = select is None
        parts = (select,) if isinstance(select, (str, Role)) else tuple(select) if isinstance(select, Iterable) else ()
        if not self.is_all and (not parts or not all(isinstance(part, (str, Role)) for part in parts)):
            raise ArgumentError(
                f"{argument} is {select!r}; it must be a pattern (str), engine.role(...), or a list of those"
            )
        patterns = [part for part in parts if isinstance(part, str)]
        self._roles = {name for part in parts if isinstance(part, Role) for name in part.names}
        self._texts = [re.sub(r"[*?\[\]!]", "", pattern) for pattern in patterns]
        # One expression for all patterns, and each layer once: there may be a hundred thousand names to try.
        self._matches = re.compile("|".join(map(fnmatch.translate, patterns)) or _NOTHING).match
        self._layers: dict[str, bool] = {}

    def suggest(self, segments: Sequence[Named], aliases: Iterable[str]) -> str:
        """For the message that nothing was picked: the names and layers near the patterns, or else the first names."""
        names = [*(segment.name for segment in segments), *aliases]
        known = dict.fromkeys([*names, *(segment.layer for segment in segments if segment.layer)])
        return near(self._texts, known, names)

    def has_name(self, name: str) -> bool:
        """Whether a pattern matches the name itself."""
        return self.is_all or self._matches(name) is not None

    def has_layer(self, layer: str) -> bool:
        """Whether a pattern matches the layer, or whatever is in it."""
        if layer not in self._layers:
            self._layers[layer] = self.is_all or bool(self._matches(layer) or self._matches(f"{layer}."))
        return self._layers[layer]

    def has_role(self, name: str) -> bool:
        """Whether all tensors of a role are picked."""
        return self.is_all or name in self._roles

    def has(self, segment: Named) -> bool:
        """Whether a segment is picked under its own name."""
        return self.has_role(segment.role) or self.has_layer(segment.layer) or self.has_name(segment.name)

    def has_alias(self, alias: str) -> bool:
        """Whether another name of a segment is picked; its layer is the module path that the name begins with."""
        return self.has_layer(alias.rpartition(".")[0]) or self.has_name(alias)
