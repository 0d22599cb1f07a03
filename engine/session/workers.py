"""Workers: the commit threads of one engine.

Theory of operation.  A few threads take calls from a queue and run them.  This is less than a ThreadPoolExecutor on
purpose: Ctrl-C may strike inside any Python code that the caller's thread runs, and an executor's `submit` takes
locks in Python that an interrupt leaves taken for ever.  Here `submit` is `SimpleQueue.put` itself, one call into C:
as the first thing in an ``except`` it is done before Ctrl-C can strike again.

The end of a thread is awaited at a `Gate`, not with `Thread.join`: Ctrl-C inside `join` marks a running thread as
stopped (CPython 3.11), and the next `join` returns at once.

The threads are daemons, so that an engine that is not closed does not keep the process alive; the engine's finalizer
drains them at exit, while Python still runs.  Called by `engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from engine.errors import PlatformError
from engine.session.gate import Gate

Call = Callable[[], None]


class _Local(threading.local):
    calls: SimpleQueue[Call | None] | None = None


_local = _Local()


class Workers:
    """Threads that run what is submitted, in order of submission.  A call that is submitted never raises.

    There are none before `start`, so that its caller can have `close` end them wherever Ctrl-C strikes.

    Attributes:
        submit: has a call run.  Returns at once.
        is_closed: whether `close` was called; a call that is submitted after that is never run.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self.is_closed = False
        self.submit: Callable[[Call], None] = self._calls.put
        self._threads: list[tuple[threading.Thread, Gate]] = []

    def start(self, count: int) -> None:
        """Start `count` threads.  After an error or Ctrl-C `close` ends those that were started.

        Raises:
            PlatformError: a thread could not be started.
        """
        try:
            for index in range(count):
                ended, name = Gate(), f"engine-commit-{index}"
                thread = threading.Thread(target=_work, args=(self._calls, ended), daemon=True, name=name)
                self._threads.append((thread, ended))  # before it starts: Ctrl-C may come at any line
                thread.start()
        except RuntimeError as error:  # threading's, for pthread_create(3) with EAGAIN
            cause = f"{count} commit threads could not be started: {error}"
            raise PlatformError(cause, "raise the limit on threads (ulimit -u, or pids.max of the cgroup)") from None

    def is_current(self) -> bool:
        """Whether this thread is one of these."""
        return _local.calls is self._calls

    def close(self, look: Callable[[], object] = lambda: None) -> None:
        """Run all that has been submitted, and end the threads.  Blocks.  May be called again, also after Ctrl-C.

        `look` is called again and again meanwhile.
        """
        self.is_closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread, ended in self._threads:
            if thread.ident is not None:  # else it was never started
                ended.wait(look=look)


def _work(calls: SimpleQueue[Call | None], ended: Gate) -> None:
    _local.calls = calls
    try:
        for call in iter(calls.get, None):
            call()
            del call  # or the last save would live on until the next one
    finally:
        ended.open()
