"""Process: a monitor as its trainer starts it, asks it and ends it.

Theory of operation.  A `Monitor` is one process, its control channel, and the pipeline that posts to it.  It is lost
when the process has ended: then the mover fails every block, and each request raises `MonitorLostError`.

A process that is stopped (SIGSTOP) answers nothing, and must not be waited for without an end.  A thread that waits for
its start or its end calls `look` meanwhile.  A monitor that was stopped at many looks in a row is left: its channels
are shut down.  For this process it is then as if the monitor had ended, and for the monitor as if this process had.
Once it is continued it commits what was staged, gives the directory back and ends.

Rules: no torch.  A forked child has neither the channels nor the shared memory, and gets `ForkedError` (`Pipeline`).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec

from engine.errors import MonitorLostError, PlatformError
from engine.io.backend import Attempt, Probe
from engine.io.descriptor import Descriptor
from engine.io.pipeline import Pipeline, Shared
from engine.monitor.protocol import IGNORED, Call, Channel, ChannelEnded, Done, Hello, Request, Welcome
from engine.monitor.shared_memory import make_memory, open_unforked, slots_bytes
from engine.options import Options
from engine.store.retention import Retention

_REMEDY = "run the same command by hand for its error, or use isolation='none'"

# Between looks at a process whose end is awaited, and at how many in a row it has to be stopped: ten seconds of this
# process's own time, so that a job that is stopped and continued as a whole leaves nothing.
_LOOK_S = 0.2
_STOPPED_LOOKS = 50

_log = logging.getLogger("engine")

_left: list[subprocess.Popen[bytes]] = []  # that have been left, to be reaped when another one is started


def command(descriptor: int) -> list[str]:
    """The command that starts a monitor."""
    return [sys.executable, "-m", "engine.monitor", str(descriptor)]


class Monitor:
    """One monitor: its process, its control channel, and the pipeline that posts to it.

    Raises:
        EngineError: the monitor cannot be started, or refuses the directory.
    """

    def __init__(self, root: str, options: Options, retention: Retention | None) -> None:
        self._control, theirs = Channel.pair()
        self._requests: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._process: subprocess.Popen[bytes] | None = None
        self.root = root
        self._was_left = False
        self._stopped_looks = 0
        self._next_look = 0.0
        shared = _Memory()
        try:
            with theirs:
                self._process = _start(theirs.fileno())
            self.pid = self._process.pid
            shared.make(options)
            hello = Hello(
                root,
                options.max_async,
                retention,
                options.rewrite_all,
                options.backend,
                options.slot_count,
                options.block_bytes,
            )
            self._control.send(hello, shared.descriptors())
            while not self._control.await_message(_LOOK_S):
                self.look()
            welcome = self._control.expect(Welcome)
            self.root, self.retention = welcome.root, welcome.retention
            attempts = tuple(Attempt(*attempt) for attempt in welcome.attempts)
            self.probe = Probe(welcome.root, welcome.backend, attempts)
            self.pipeline = Pipeline(
                options.slot_count,
                options.block_bytes,
                welcome.backend,
                options.staging_threads,
                shared=shared.with_peer(self._control.number),
            )
        except BaseException as error:
            status = self.close()
            if isinstance(error, ChannelEnded):
                if self._was_left:
                    raise self.lost() from None
                cause = f"the monitor's process has ended with status {status} while it started"
                raise PlatformError(cause, _REMEDY) from None
            raise
        finally:
            shared.close()

    @property
    def is_lost(self) -> bool:
        """Whether the process has ended, or was left."""
        return self._control.is_ended()

    def lost(self) -> MonitorLostError:
        """The error of whatever needed this monitor."""
        if self._was_left:
            return MonitorLostError(
                f"the monitor of {self.root} (process {self.pid}) is stopped, and is not waited for any more: it has "
                f"the directory until it is continued (kill -CONT {self.pid}), and then commits what was staged"
            )
        return MonitorLostError(
            f"the monitor of {self.root} (process {self.pid}) has ended: what it had not committed is discarded; "
            "training goes on, and the next save starts another monitor; see dmesg for whether the kernel ended it "
            "for want of memory"
        )

    @contextmanager
    def request(self) -> Iterator[Channel]:
        """A channel of its own for one request.

        Raises:
            MonitorLostError: the monitor ends before the `with` block does.
        """
        channel = self.open_request()
        with channel, self.living():
            yield channel

    def open_request(self) -> Channel:
        """The same, to be closed by the caller.

        Takes no lock, because a signal handler may interrupt this and wait for another thread that asks: the kernel
        queues a message of a few bytes as a whole.
        """
        self.pipeline.check_owner()
        channel, theirs = Channel.pair()
        try:
            self._requests.add(channel)
            with theirs, self.living():
                self._control.send(Request(), [theirs.fileno()])
        except BaseException:
            channel.close()
            raise
        return channel

    @contextmanager
    def living(self) -> Iterator[None]:
        """Turn the end of the process into an error of the engine's."""
        try:
            yield
        except ChannelEnded:
            raise self.lost() from None

    def call(self, name: str, step: int | None = None) -> list[int] | str | None:
        """Have the owner of the directory do this."""
        with self.request() as channel:
            channel.send(msgspec.convert({"type": "Call", "name": name, "step": step}, Call))
            return channel.expect(Done).value

    def look(self) -> None:
        """Called again and again by a thread that waits for the process: leave it if it stays stopped."""
        now = time.monotonic()
        if now < self._next_look or self._was_left:
            return
        self._next_look = now + _LOOK_S
        is_stopped = self._process is not None and _is_stopped(self._process.pid)
        self._stopped_looks = self._stopped_looks + 1 if is_stopped else 0
        if self._stopped_looks > _STOPPED_LOOKS:
            self._was_left = True
            _log.warning("%s", self.lost())
            self._control.shut_down()  # first, so that no request can be begun any more
            for channel in _all(self._requests):
                channel.shut_down()

    def close(self) -> int | None:
        """Let the process end, wait for it, and return its status; None if it was left.  May be called again."""
        pipeline = getattr(self, "pipeline", None)
        while pipeline is not None and not pipeline.close(int(_LOOK_S * 1e9)):
            self.look()
        self._control.shut_down()
        status = None if self._process is None else self._await_end(self._process)
        self._control.close()
        return status

    def _await_end(self, process: subprocess.Popen[bytes]) -> int | None:
        while not self._was_left:
            try:
                return process.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                self.look()
        _left.append(process)
        return None


def _all(channels: weakref.WeakSet[Channel]) -> tuple[Channel, ...]:
    while True:
        try:
            return tuple(channels)
        except RuntimeError:  # another thread has added one meanwhile
            continue


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; not while a debugger looks at it (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"T")
    except OSError:
        return False


class _Memory:
    """The slots' memory and the two eventfds, until both processes have them."""

    def __init__(self) -> None:
        self._opened: list[Descriptor] = []

    def make(self, options: Options) -> None:
        nbytes = slots_bytes(options.slot_count, options.block_bytes)
        try:
            self._opened.append(make_memory("engine-slots", nbytes))
            for _ in ("post", "wake"):
                self._opened.append(open_unforked(partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))
        except OSError as error:
            raise refused(error, f"{nbytes} bytes of memory to share with a monitor") from None

    def descriptors(self) -> list[int]:
        return [descriptor.number for descriptor in self._opened]

    def with_peer(self, peer: int) -> Shared:
        memory, post, wake = self.descriptors()
        return Shared(memory, post, wake, peer)

    def close(self) -> None:
        for descriptor in self._opened:
            descriptor.close()


def refused(error: OSError, what: str) -> PlatformError:
    """The error of a resource that the kernel refuses."""
    cause = f"the kernel refused {what}: {error}"
    return PlatformError(cause, "free memory or descriptors, lower staging_bytes, or use isolation='none'")


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    """Start a monitor, which inherits this descriptor and standard error, and nothing else.

    It has a session of its own, so that a signal to the trainer's process group or terminal does not reach it.  Signals
    to every process of a job are blocked until it ignores them itself: a new program keeps the mask of its maker.
    """
    if not sys.executable:
        raise PlatformError("this Python does not know its own executable, which a monitor runs", _REMEDY)
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    _left[:] = [process for process in _left if process.poll() is None]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        return subprocess.Popen(
            command(descriptor),
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
    except OSError as error:
        raise refused(error, "a process for the monitor") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
