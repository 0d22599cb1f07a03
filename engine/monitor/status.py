"""Status: what the owner of a run has in flight, asked from any process.

Theory of operation.  A run that is owned has a socket in it (`listener`).  Without one, or with one that nobody listens
to, there is no owner, or none that can be asked.  A monitor whose trainer is dead ends by itself when it has committed
or discarded what was in flight, and its connections end with it.
"""

from __future__ import annotations

import os
import socket
import time

from engine.errors import PlatformError
from engine.monitor.forks import UnforkedSocket, no_fork
from engine.monitor.listener import socket_path
from engine.monitor.protocol import AskStatus, Channel, ChannelEnded, Status

# A monitor answers at once, but may be waiting for its turn on a busy host.
_ANSWER_S = 10.0

# Between looks at a queue that is full.
_RETRY_S = 0.02


def ask_status(root: str) -> Status | None:
    """The status of the owner of a run; None if there is none, or none that can be asked.

    Raises:
        PlatformError: it does not answer.
    """
    channel = _connect(root)
    if channel is None:
        return None
    with channel:
        return _ask(channel, root)


def await_orphan(root: str) -> bool:
    """If the monitor that owns a run has lost its trainer, wait until it has ended.  Blocks.

    Returns False if its trainer lives.  True if there is no monitor (any more): it may be tried again to own the run.
    """
    channel = _connect(root)
    if channel is None:
        return True
    with channel:
        status = _ask(channel, root)
        if status is not None and not status.is_orphan:
            return False
        channel.await_end()
        return True


def _ask(channel: Channel, root: str) -> Status | None:
    channel.set_timeout(_ANSWER_S)
    try:
        channel.send(AskStatus())
        return channel.expect(Status)
    except TimeoutError:
        raise _silent(root) from None
    except ChannelEnded:
        return None
    finally:
        channel.set_timeout(None)


def _silent(root: str) -> PlatformError:
    cause = f"the process that saves to {root} does not answer"
    return PlatformError(cause, "it is stopped (send it SIGCONT), or its host is overloaded; ask again")


def _connect(root: str) -> Channel | None:
    with no_fork():
        connection = UnforkedSocket(socket.AF_UNIX)
        channel = Channel(connection)
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            connection.setblocking(False)
            with socket_path(root) as path:
                connection.connect(path)
            connection.setblocking(True)
            break
        except BlockingIOError:  # its queue is full
            if time.monotonic() > deadline:
                channel.close()
                raise _silent(root) from None
            time.sleep(_RETRY_S)
        except OSError:  # no socket, nobody who listens, or another user's
            channel.close()
            return None
        except BaseException:
            channel.close()
            raise
    if channel.peer()[1] not in (os.getuid(), 0) and os.getuid() != 0:  # another user has put it there
        channel.close()
        return None
    return channel
