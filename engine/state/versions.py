"""Versions: which tensors were written to while a save read them, as far as torch counts writes.

Theory of operation.  Torch counts the in-place writes to each tensor, for autograd.  A save notes the counts when it
begins, and compares them when its arena is staged, before a writer that waited for that goes on.  Writes that torch
does not see (`.data`, numpy, C) are not counted.

Rules: `settle` may be called from any thread; only the first call counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Versions:
    """The counts of some tensors, at the moment when this is made."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors that were made under inference_mode() have no count.
        self._counted = [(name, tensor, tensor._version) for name, tensor in tensors if not tensor.is_inference()]
        self._changed: tuple[str, ...] | None = None

    def settle(self) -> tuple[str, ...]:
        """The names of the tensors that have changed, as of the first call."""
        if self._changed is None:
            changed = tuple(name for name, tensor, version in self._counted if tensor._version != version)
            if self._changed is None:
                self._changed, self._counted = changed, []
        return self._changed
