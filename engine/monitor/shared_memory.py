"""Shared memory: what a trainer and its monitor both map.

Theory of operation.  There are two kinds of memfd (memfd_create(2)), each sealed against shrinking, so that neither
process can be ended by the other's ftruncate.

    slots   one for each monitor: the header of `native/moving/shared.h`, then the staging slots
    board   one for each save: a word, the checksums of its blocks, and their states

The trainer's native thread writes a block's checksum before its state says that the block is staged.  The word is
written by the trainer's commit thread, when all is staged and nothing has changed the tensors meanwhile.  A board with
that word is a whole save, even if the trainer is dead: each block is written, or is in a slot.  Slots are found by the
hash of their content, so no table says which slot has which block, and none can be wrong.

The descriptors are closed once both sides have mapped the memory, and the kernel frees it with the last mapping.  A
forked child closes its copies of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from engine.io.binding import ffi, lib
from engine.io.descriptor import Descriptor
from engine.io.job import HASH_BYTES
from engine.monitor.forks import UnforkedDescriptor, listed, no_fork

# The word, and room to the next cache line.
_WORD_BYTES = 64

_STAGED = b"\1"


def open_unforked(opener: Callable[[], int]) -> Descriptor:
    """A descriptor of which a forked child keeps no copy; see `Descriptor.fill`."""
    descriptor = UnforkedDescriptor()
    with no_fork():
        listed(descriptor).fill(opener)
    return descriptor


def make_memory(name: str, nbytes: int) -> Descriptor:
    """A memfd of this size, zeroed and sealed, that has all of its pages.

    Raises:
        OSError: there are no descriptors, or no memory.
    """
    descriptor = open_unforked(partial(os.memfd_create, name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        # A page that the kernel refuses at its first touch, as with vm.overcommit_memory=2, ends the process by SIGBUS.
        os.posix_fallocate(descriptor.number, 0, nbytes)
    except OSError as error:
        full = error.errno == errno.ENOSPC  # of a device, says its text
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) if full else error from None
    fcntl.fcntl(descriptor.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def slots_bytes(slot_count: int, slot_bytes: int) -> int:
    """The size of the memory for these slots."""
    return int(lib.ENG_SHARED_HEADER_BYTES) + slot_count * slot_bytes


class Board:
    """The states and checksums of one save's blocks; `io.job.JobMemory`.  The views are good as long as it lives.

    Args:
        descriptor: of the memfd; may be closed afterwards.
        block_count: of the save.

    Raises:
        OSError: the memory is smaller, or not sealed, or there is no room to map it.
    """

    def __init__(self, descriptor: int, block_count: int) -> None:
        checksums_end = _WORD_BYTES + HASH_BYTES * block_count
        nbytes = board_bytes(block_count)
        mapping = ffi.new("eng_mapping *")
        result = lib.eng_map_shared(descriptor, nbytes, mapping)
        if result < 0:
            raise OSError(-result, f"the board of a save cannot be mapped: {os.strerror(-result)}")
        self._owner = ffi.gc(mapping, lib.eng_unmap_shared)
        # No memoryviews: one in a cycle of references that a cffi view is of crashes CPython's collector (3.11).
        self._word = ffi.buffer(mapping.address, len(_STAGED))
        self.checksums: Any = ffi.buffer(mapping.address + _WORD_BYTES, checksums_end - _WORD_BYTES)
        self.states: Any = ffi.buffer(mapping.address + checksums_end, nbytes - checksums_end)

    def mark_staged(self) -> None:
        """Record that all is staged, and that nothing changed meanwhile."""
        self._word[:] = _STAGED

    @property
    def is_staged(self) -> bool:
        """Whether `mark_staged` was called."""
        return bytes(self._word) == _STAGED

    def block_states(self) -> bytes:
        """One `BlockState` a block, as they are at this moment."""
        return bytes(self.states)

    def block_checksums(self) -> list[bytes]:
        """The blocks' content hashes."""
        packed = bytes(self.checksums)
        return [packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES)]


def board_bytes(block_count: int) -> int:
    """The size of a board."""
    return _WORD_BYTES + (HASH_BYTES + 1) * max(1, block_count)
