"""Watching: the native walk over Python's containers and torch's tensors, typed.

Theory of operation.  These functions look at Python's objects, so they are called with the GIL, which cffi lets go of:
ctypes calls them by their address.  `engine_native.h` says what the words mean.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from enum import IntEnum

from engine.io.binding import ffi, lib


class Watched(IntEnum):
    """What of a container is watched: its size, everything in it, or what some keys of a dictionary lead to."""

    SIZE = lib.ENG_SIZED
    DICT = lib.ENG_DICT
    LIST = lib.ENG_LIST
    MEMBERS = lib.ENG_MEMBERS


class Grad(IntEnum):
    """What is known of a tensor's `requires_grad`."""

    UNWANTED = lib.ENG_GRAD_UNWANTED
    WANTED = lib.ENG_GRAD_WANTED
    IGNORED = lib.ENG_GRAD_IGNORED


def _with_gil(name: str, *arguments: type) -> Callable[..., int]:
    """A function that is called with the GIL, which cffi lets go of: native/watch.c looks at Python's objects."""
    address = int(ffi.cast("uintptr_t", ffi.addressof(lib, name)))
    return ctypes.PYFUNCTYPE(ctypes.c_int, *arguments)(address)


_same_containers = _with_gil("eng_same_containers", ctypes.c_void_p, ctypes.c_uint64)
_describe_tensors = _with_gil("eng_describe_tensors", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
_same_tensors = _with_gil("eng_same_tensors", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def exchange_address(capsule: object) -> int:
    """The address of the DLPackExchangeAPI in a type's `__dlpack_c_exchange_api__`; it outlives the process."""
    return int(_capsule_pointer(capsule, b"dlpack_exchange_api"))


def same_containers(words: array[int]) -> bool:
    """Whether containers hold the very objects that `words` say; see `engine_native.h`, also for the next two.

    The objects that words are addresses of are the caller's to keep alive.
    """
    return bool(_same_containers(*words.buffer_info()))


def describe_tensors(exchange: int, words: array[int]) -> bool:
    """Fill in how tensors lie, of which `words` have object, grad and ndim; False if one cannot be described."""
    return bool(_describe_tensors(exchange, *words.buffer_info()))


def same_tensors(exchange: int, words: array[int]) -> bool:
    """Whether tensors that were described lie as they lay."""
    return bool(_same_tensors(exchange, *words.buffer_info()))
