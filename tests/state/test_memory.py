"""Memory: pages and views of them, and the fewest dimensions of a strided tensor."""

from __future__ import annotations

import gc
import math
import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.format.layout import ARENA_ALIGNMENT
from engine.io.binding import lib
from engine.state.arena import Arena
from engine.state.memory import SOURCE_DIMS_MAX, HostMemory, location_of, merge_dims


@pytest.mark.parametrize("nbytes", [0, 1, 4097])
def test_pages_are_aligned_and_zero(nbytes: int) -> None:
    memory = HostMemory(nbytes)
    assert memory.address % ARENA_ALIGNMENT == 0
    assert memory.address in memory
    assert not memory.view(0, torch.uint8, (nbytes,), (1,)).any()


def test_an_address_is_in_memory_up_to_its_end() -> None:
    memory = HostMemory(4096)
    inside = [memory.address + offset in memory for offset in (-1, 0, 4095, 4096)]
    assert inside == [False, True, True, False]


def test_a_view_has_the_location_asked_for() -> None:
    memory = HostMemory(4096)
    view = memory.view(256, torch.float32, (2, 3), (1, 2))
    assert location_of(view) == (memory.address + 256, torch.float32, (2, 3), (1, 2))
    empty = memory.view(256, torch.float32, (2, 0), (1, 1))
    assert location_of(empty) == (0, torch.float32, (2, 0), (1, 1))


def test_a_view_outlives_its_memory() -> None:
    memory = HostMemory(4096)
    view = memory.view(0, torch.int64, (512,), (1,))
    view.fill_(7)
    del memory
    gc.collect()
    others = [HostMemory(4096) for _ in range(4)]  # would get the address of freed pages
    assert len(others) == 4 and bool((view == 7).all())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # torch has threads; the child starts none
def test_a_forked_child_writes_to_its_own_copy() -> None:
    view = HostMemory(4096).view(0, torch.uint8, (4096,), (1,))
    child = os.fork()
    if child == 0:
        try:
            view[0] = 1
        finally:
            os._exit(int(view[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert view[0] == 0


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms(use_true_random=False))
def test_merged_dims_walk_the_same_elements(shape: list[int], random: Any) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    numbers = torch.arange(math.prod(shape)).reshape([shape[axis] for axis in order])
    tensor = numbers.permute([order.index(axis) for axis in range(len(shape))])
    offsets = [0]
    dims = merge_dims(tensor.shape, tensor.stride())
    for extent, stride in dims:
        offsets = [offset + step * stride for offset in offsets for step in range(extent)]
    assert offsets == tensor.reshape(-1).tolist()
    assert all(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(dims)), "could be merged further"


def test_the_limit_of_dimensions_is_that_of_the_native_code() -> None:
    assert SOURCE_DIMS_MAX == lib.ENG_DIMS_MAX == 8
    tensor = torch.zeros([4] * 8)[tuple([slice(None, None, 2)] * 8)]
    assert len(Arena.wrap({"w": tensor}).sources[0].shape) == 8
