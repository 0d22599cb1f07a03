"""Have the kernel refuse system calls to this process, as a container's seccomp profile does.

Theory of operation.  A filter is a program of the classic Berkeley packet filter that looks at the number of each
system call (seccomp(2), SECCOMP_SET_MODE_FILTER).  It can never be taken off again, so it belongs in a process of its
own; threads that are started later have it too, those that run already do not.
"""

from __future__ import annotations

import ctypes
import struct

# Of io_uring_setup, io_uring_enter and io_uring_register: the same on every architecture (asm-generic/unistd.h).
SETUP, ENTER, REGISTER = 425, 426, 427
IO_URING = (SETUP, ENTER, REGISTER)

# linux/prctl.h, linux/seccomp.h and linux/bpf_common.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET = 0  # of `nr` in struct seccomp_data


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(error: int, numbers: tuple[int, ...] = IO_URING) -> None:
    """Answer these system calls with an errno from now on."""

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    # Each comparison jumps over those that follow, and over the permission, to the refusal.
    comparisons = [instruction(_JUMP_IF_EQUAL, number, len(numbers) - index) for index, number in enumerate(numbers)]
    program = b"".join(
        [
            instruction(_LOAD_WORD, _NUMBER_OFFSET),
            *comparisons,
            instruction(_RETURN, _RET_ALLOW),
            instruction(_RETURN, _RET_ERRNO | error),
        ]
    )
    libc = ctypes.CDLL(None, use_errno=True)
    filtered = _Program(len(program) // 8, program)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filtered)),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
