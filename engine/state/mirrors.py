"""Mirrors: segments of buffers that keep memory of their own, so that forward can resize them.

Theory of operation.  An arena's memory cannot grow, and `resize_()` of a tensor in it fails in the caller's forward.  A
**mirrored** buffer stays where it is, and its segment is a copy of it:

    refresh()       buffer ──▶ segment     before every save; a buffer of another size gets a new layout first
    restored()      buffer ◀── segment     after every restore

A save stages mirrored segments as it stages every buffer: before `checkpoint()` returns, or under ``cow``, where a
writer waits.  So the copy of the next save tears none.

Rules: nothing here knows names of modules.  Called by `arena`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mirror(NamedTuple):
    """A mirrored segment.  The tensors share one memory, `segment` is a view of the arena."""

    name: str
    tensors: tuple[Tensor, ...]
    segment: Tensor


class Mirrors:
    """The mirrored segments of one arrangement."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self._mirrors = mirrors
        self._buffers = [mirror.tensors[0].detach() for mirror in mirrors]
        self._segments = [mirror.segment for mirror in mirrors]

    def copy_in(self) -> None:
        """Copy every buffer to its segment."""
        if self._mirrors:
            _copy(self._segments, self._buffers)

    def copy_some_in(self, names: Collection[str]) -> None:
        """Copy these buffers to their segments."""
        for mirror in self._mirrors:
            if mirror.name in names:
                _copy([mirror.segment], [mirror.tensors[0].detach()])

    def copy_out(self, names: Collection[str]) -> None:
        """Copy these segments to their buffers."""
        for mirror in self._mirrors:
            if mirror.name in names:
                _copy([mirror.tensors[0]], [mirror.segment])


def own_memory(tensors: Sequence[Tensor]) -> None:
    """Give tensors that share one memory a memory that can grow, if theirs cannot."""
    if not tensors[0].untyped_storage().resizable():
        resize(tensors, tensors[0].shape)


def resize(tensors: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Give tensors that share one memory another one of some shape, with what they hold if the shape is theirs."""
    old = tensors[0].detach()
    new = old.clone() if old.shape == tuple(shape) else torch.empty(shape, dtype=old.dtype, device="cpu")
    for tensor in tensors:
        tensor.data = new


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # one call: a model may have a thousand of them
