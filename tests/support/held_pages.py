"""Memory whose first touch waits: a native thread that reads or writes it stops there until the test lets it go on.

Theory of operation.  The pages are registered with userfaultfd(2) for missing pages, and nobody answers a fault before
`release`, which fills all of them.  Only faults of user code are caught, which needs no privilege.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import struct

import pytest
import torch

_SYS_USERFAULTFD = 282 if platform.machine() == "aarch64" else 323
_USER_MODE_ONLY = 1  # linux/userfaultfd.h
_API, _MODE_MISSING = 0xAA, 1
_IOC_API, _IOC_REGISTER, _IOC_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03

_libc = ctypes.CDLL(None, use_errno=True)


class HeldPages:
    """Memory of whole pages.

    Attributes:
        address: where it begins.
        content: what it holds once it is released.
    """

    def __init__(self, content: torch.Tensor) -> None:
        self.content = content
        self.nbytes = content.nbytes
        assert self.nbytes % mmap.PAGESIZE == 0
        self._pages = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._view = ctypes.c_char.from_buffer(self._pages)
        self.address = ctypes.addressof(self._view)
        self._uffd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        if self._uffd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self._uffd, _IOC_API, struct.pack("=QQQ", _API, 0, 0))
        fcntl.ioctl(self._uffd, _IOC_REGISTER, struct.pack("=QQQQ", self.address, self.nbytes, _MODE_MISSING, 0))
        self._is_held = True

    @property
    def is_touched(self) -> bool:
        """Whether a thread waits for the memory."""
        return bool(select.select([self._uffd], [], [], 0)[0])

    def tensor(self) -> torch.Tensor:
        """The memory, once it is released."""
        assert not self._is_held
        return torch.frombuffer(self._pages, dtype=torch.uint8)

    def release(self) -> None:
        """Fill the memory, and let every thread that waits for it go on.  May be called again."""
        if self._is_held:
            self._is_held = False
            copy = struct.pack("=QQQQq", self.address, self.content.data_ptr(), self.nbytes, 0, 0)
            fcntl.ioctl(self._uffd, _IOC_COPY, copy)
            os.close(self._uffd)


def _works() -> bool:
    try:
        HeldPages(torch.zeros(mmap.PAGESIZE, dtype=torch.uint8)).release()
    except OSError:
        return False
    return True


needs_held_pages = pytest.mark.skipif(not _works(), reason="this container refuses userfaultfd(2)")
