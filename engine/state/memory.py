"""Memory: pages of the host, tensors over them, and how a tensor occupies memory.

Theory of operation.  An adopted arena is one `HostMemory`, an anonymous mapping.  Its pages come from the kernel
and cost nothing until they are touched, so adoption needs no second copy of a training: as the new pages fill, the old
memory of the tensors is freed.  Each `view` has its own storage and version counter, so a tensor copies, pickles
and shares as before, and autograd sees no write to a neighbour.

A mapping lives as long as a view of it or a `HostMemory` does.

Rules: nothing here knows names, modules or optimizers.  Called by `inventory`, `arena` and `tensors`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.format.layout import REGION_ALIGNMENT, align_up

# The native copy of a strided source has one counter a dimension in an array of this length (ENG_DIMS_MAX).
SOURCE_DIMS_MAX = 8


class HostMemory:
    """Zeroed pages of this process, for an arena of so many bytes.

    Attributes:
        address: a multiple of `REGION_ALIGNMENT`, so that write protection of the memory splits no huge page.
        nbytes: of whole pages.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = align_up(max(nbytes, 1), mmap.PAGESIZE)  # a mapping of no bytes cannot be made
        self._pages = allocate_pages(self.nbytes + REGION_ALIGNMENT)
        start: int = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        self.address = align_up(start, REGION_ALIGNMENT)
        self._skipped_bytes = self.address - start  # never touched

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        """A tensor over the pages; the strides must be dense."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu").as_strided(shape, stride)
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=self._skipped_bytes + offset).as_strided(
            shape, stride
        )


def allocate_pages(nbytes: int) -> mmap.mmap:
    """Zeroed pages of this process alone; huge pages where the kernel has them, which are faster to walk."""
    # Private: a forked DataLoader worker must not write into its parent's weights.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that is built without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class TensorLocation(NamedTuple):
    """The memory of a tensor, and how it is read.  Two tensors with elements are one if they have the same location."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def location_of(tensor: Tensor) -> TensorLocation:
    """The location of a tensor; its address is 0 if the tensor has no elements."""
    return TensorLocation(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def merge_dims(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """The fewest (extent, stride) pairs that walk the same elements in the same order; strides in elements."""
    dims: list[tuple[int, int]] = []
    for extent, step in zip(shape, stride, strict=True):
        if extent == 1:
            continue
        if dims and dims[-1][1] == extent * step:
            dims[-1] = (dims[-1][0] * extent, step)
        else:
            dims.append((extent, step))
    return dims


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor in an arena: its own if it is dense, else those of its dense copy.

    Kernels choose their code by strides (channels_last), so the same strides keep results bit-identical.
    """
    meta = torch.empty_like(tensor.detach(), device="meta", memory_format=torch.preserve_format)
    strides: tuple[int, ...] = meta.stride()
    assert math.prod(meta.shape) == tensor.numel()
    return strides
