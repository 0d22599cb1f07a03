"""Forks: what a forked child closes, so that it keeps neither a monitor's channels nor its memory.

Theory of operation.  A child with a copy of a channel would hide that a process has ended, and a copy of a memfd would
keep its memory.  What `listed` has been given is closed in the child.  It is made and listed inside `no_fork`, and a
fork waits for that, so none comes between the two.

A signal handler may interrupt the thread that is in `no_fork` and wait for another thread, as `Engine.close` does.  So
nothing here waits for longer than a second.  What is made or forked after that has no protection: the child may keep a
copy until it ends or calls exec.

Called by `protocol` and `shared_memory`.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from engine.io.descriptor import Descriptor

# Making a pair of sockets takes microseconds.
_WAIT_S = 1.0


class Closable(Protocol):
    """An owner of a descriptor, such as a socket."""

    def close(self) -> None:
        """Close it; in a child, `close_in_child` is called instead where there is one."""


T = TypeVar("T", bound=Closable)


class UnforkedDescriptor(Descriptor):
    """A descriptor that can be listed, and that no fork finds half closed: its number may be another file's by then."""

    __slots__ = ("__weakref__",)

    def close(self) -> None:
        """Close it.  May be called again."""
        with no_fork():
            super().close()


class UnforkedSocket(socket.socket):
    """A socket that no fork finds half closed: its number is forgotten before it is closed."""

    def close(self) -> None:
        """Close it.  May be called again."""
        with no_fork():
            super().close()


_listed: weakref.WeakSet[Closable] = weakref.WeakSet()
_lock = threading.RLock()
_forking: set[int] = set()  # the threads that fork and hold the lock


@contextmanager
def no_fork() -> Iterator[None]:
    """Keep forks of other threads away.  May be nested."""
    lock = _lock
    is_held = lock.acquire(timeout=_WAIT_S)
    try:
        yield
    finally:
        if is_held:
            lock.release()


def listed(owner: T) -> T:
    """Have a forked child close this.  Called inside `no_fork`."""
    _listed.add(owner)
    return owner


def _before() -> None:
    if _lock.acquire(timeout=_WAIT_S):
        _forking.add(threading.get_ident())


def _after_in_parent() -> None:
    if threading.get_ident() in _forking:
        _forking.discard(threading.get_ident())
        _lock.release()


def _after_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it, and is not here
    _forking.clear()
    for owner in tuple(_listed):
        getattr(owner, "close_in_child", owner.close)()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
