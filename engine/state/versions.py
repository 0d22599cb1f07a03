"""Versions: which tensors were written to while a save read them, as far as torch counts writes.

Theory of operation.  Torch counts the in-place writes to each tensor, for autograd.  A save notes the counts when it
begins, and compares them when its arena is staged, before a writer that waited for that goes on.  Writes that torch
does not see (`.data`, numpy, C) are not counted.

Rules: `settle` may be called from any thread; only the first call counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from operator import attrgetter

from torch import Tensor

_version = attrgetter("_version")


class Counted:
    """Tensors whose counts saves compare.  Made once for each inventory, because every save reads it."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors that were made under inference_mode() have no count.
        counted = [(name, tensor) for name, tensor in tensors if not tensor.is_inference()]
        self.names = [name for name, _ in counted]
        self.tensors = [tensor for _, tensor in counted]

    def versions(self) -> list[int]:
        """The counts now."""
        return list(map(_version, self.tensors))


class Handed:
    """The counts of tensors that are handed over one after the other.

    Those that change without a step are compared when `settle_first` is called, the others by `settle`.
    """

    def __init__(self) -> None:
        self._first: list[Versions] = []
        self._others: list[Versions] = []

    def add(self, tensors: Iterable[tuple[str, Tensor]], settles_first: Collection[str]) -> None:
        """Note the counts of tensors, by name, at this moment."""
        pairs = list(tensors)
        self._first.append(Versions(Counted(pair for pair in pairs if pair[0] in settles_first)))
        self._others.append(Versions(Counted(pair for pair in pairs if pair[0] not in settles_first)))

    def settle_first(self) -> None:
        """The tensors that change without a step may change from here on."""
        for versions in self._first:
            versions.settle()

    def settle(self) -> tuple[str, ...]:
        """The names of the tensors that have changed, as of the first call."""
        return tuple(name for versions in (*self._first, *self._others) for name in versions.settle())


class Versions:
    """The counts of some tensors, at the moment when this is made."""

    def __init__(self, counted: Counted) -> None:
        self._counted: Counted | None = counted
        self._versions = counted.versions()
        self._changed: tuple[str, ...] = ()

    def settle(self) -> tuple[str, ...]:
        """The names of the tensors that have changed, as of the first call."""
        counted = self._counted
        if counted is not None:
            pairs = zip(counted.names, self._versions, counted.versions(), strict=True)
            changed = tuple(name for name, before, now in pairs if before != now)
            if self._counted is not None:
                self._changed, self._counted = changed, None
        return self._changed
