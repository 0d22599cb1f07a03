"""Workers: the commit threads of one engine.

Theory of operation.  A few threads take calls from a queue and run them.  This is less than a ThreadPoolExecutor on
purpose: Ctrl-C may strike inside any Python code that the caller's thread runs, and an executor's `submit` takes
locks in Python that an interrupt leaves taken for ever.  Here the caller's side is one `SimpleQueue.put`, which is
one call into C.

The threads are daemons, so that a process is not kept alive by an engine that nobody has closed; the engine's
finalizer drains them at exit, while Python still runs.  Called by `engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Call = Callable[[], None]


class _Local(threading.local):
    is_worker = False


_local = _Local()


def is_worker() -> bool:
    """Whether this is a commit thread, of whichever engine."""
    return _local.is_worker


class Workers:
    """`count` threads that run what is submitted, in order of submission.  A call that is submitted never raises.

    Raises:
        RuntimeError: a thread could not be started; none is left.
    """

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for index in range(count):
                thread = threading.Thread(target=_work, args=(self._calls,), daemon=True, name=f"engine-commit-{index}")
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, call: Call) -> None:
        """Have a call run.  Returns at once."""
        self._calls.put(call)

    def close(self) -> None:
        """Run all that has been submitted, and end the threads.  Blocks.  May be called again."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()


def _work(calls: SimpleQueue[Call | None]) -> None:
    _local.is_worker = True
    for call in iter(calls.get, None):
        call()
        del call  # or the last save would live on until the next one
