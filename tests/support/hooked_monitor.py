"""A monitor that a test stops or kills at one operation; `monitors` starts it in place of the real one.

Theory of operation.  It is the real server with another file system, which asks the test before each operation through
a Unix socket.  The test's answer may be late, or an error to raise.  The test may also kill this process before it
answers.

Rules: no torch.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys

from hooked import HookedFilesystem

from engine.monitor.server import main

# The socket that the test listens on.
ADDRESS = "ENGINE_TEST_HOOKS"


class AskingFilesystem(HookedFilesystem):
    """Has the test asked."""

    def before(self, operation: str, path: str, target: str = "") -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[ADDRESS])
            connection.sendall(pickle.dumps((os.getpid(), operation, path, target)))
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                refusal = pickle.loads(answer.read())
        if refusal is not None:
            raise refusal


if __name__ == "__main__":
    main(int(sys.argv[1]), AskingFilesystem())
