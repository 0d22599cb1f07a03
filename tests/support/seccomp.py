"""Make the kernel refuse system calls of this process, as a container's seccomp profile does.

Theory of operation.  A filter is a program of the classic Berkeley packet filter that examines the number of each
system call (seccomp(2), SECCOMP_SET_MODE_FILTER).  It cannot be removed, so use it in a separate process.
Threads that start later inherit it; running threads do not get it.

`refuse` always gives the same answer.  `supervise` calls a function each time (seccomp_unotify(2)), so that a call can
be refused once, late, or only in some state.
"""

from __future__ import annotations

import ctypes
import fcntl
import platform
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

# Of io_uring_setup, io_uring_enter and io_uring_register: the same on every architecture (asm-generic/unistd.h).
SETUP, ENTER, REGISTER = 425, 426, 427
IO_URING = (SETUP, ENTER, REGISTER)
_SECCOMP = 277 if platform.machine() == "aarch64" else 317

# linux/prctl.h, linux/seccomp.h and linux/bpf_common.h
_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _FLAG_NEW_LISTENER = 38, 1, 1 << 3
_RET_ALLOW, _RET_ERRNO, _RET_USER_NOTIF = 0x7FFF0000, 0x00050000, 0x7FC00000
_NOTIF_RECV, _NOTIF_SEND, _NOTICE_BYTES, _REPLY_CONTINUE = 0xC0502100, 0xC0182101, 80, 1
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET = 0  # of `nr` in struct seccomp_data


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(error: int, numbers: tuple[int, ...] = IO_URING) -> None:
    """Answer these system calls with an errno from now on."""
    _install(numbers, _RET_ERRNO | error, 0)


def supervise(answer: Callable[[int, list[int]], int], numbers: tuple[int, ...] = IO_URING) -> None:
    """Call a function for each of these system calls of this thread, and of threads that it starts from now on.

    The function gets its number and arguments, in a separate thread, and returns an errno, or 0 to allow the call.
    """
    listening: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_answer, args=(listening, answer), daemon=True).start()
    listening.put(_install(numbers, _RET_USER_NOTIF, _FLAG_NEW_LISTENER))


def _answer(listening: SimpleQueue[int], answer: Callable[[int, list[int]], int]) -> None:
    listener = listening.get()
    while True:
        with suppress(FileNotFoundError):  # the call was interrupted, and is made again
            notice = bytearray(_NOTICE_BYTES)
            fcntl.ioctl(listener, _NOTIF_RECV, notice)
            cookie, number, *arguments = struct.unpack("=Q8xi12x6Q", notice)
            error = answer(number, arguments)
            reply = struct.pack("=QqiI", cookie, 0, -error, 0 if error else _REPLY_CONTINUE)
            fcntl.ioctl(listener, _NOTIF_SEND, bytearray(reply))


def _install(numbers: tuple[int, ...], verdict: int, flags: int) -> int:
    """Load a filter for this thread.  Returns the result of seccomp(2)."""

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    # Each comparison jumps over those that follow, and over the permission, to the verdict.
    comparisons = [instruction(_JUMP_IF_EQUAL, number, len(numbers) - index) for index, number in enumerate(numbers)]
    program = b"".join(
        [
            instruction(_LOAD_WORD, _NUMBER_OFFSET),
            *comparisons,
            instruction(_RETURN, _RET_ALLOW),
            instruction(_RETURN, verdict),
        ]
    )
    libc = ctypes.CDLL(None, use_errno=True)
    filtered = _Program(len(program) // 8, program)
    result: int = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if result == 0:
        result = libc.syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(filtered))
    if result < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return result
