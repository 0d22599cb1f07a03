"""Host: the kernel's words about this process and about errors, for messages.

Theory of operation.  `backend` and `guard_probe` explain a refusal by its errno, a limit, and files under /proc and
/sys.  A file that cannot be read says nothing.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path


def content_of(path: str) -> str:
    """What a file of the kernel's says; nothing where it is not there."""
    try:
        # A process may have any bytes for its name, which /proc/self/status begins with.
        return Path(path).read_bytes().decode("ascii", errors="replace").strip()
    except OSError:
        return ""


def limit_of(which: int) -> int | None:
    """A limit of this process, or None where there is none."""
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def named(error: int) -> str:
    """An errno by its name and text."""
    return f"{errno.errorcode.get(error, error)}, {os.strerror(error)}"
