"""Info: the public facts of a checkpoint.

Theory of operation.  A plain value that `Writer` and `Reader` return and the public API passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from engine.format.manifest import Manifest, Summary


class CheckpointInfo(NamedTuple):
    """A committed checkpoint.

    Attributes:
        step, checkpoint_id: its number, and 32 random hexadecimal digits.
        path: its directory.
        nbytes: bytes of its data files.
        created_ns: time of the save, in ns since 1970 by the host's clock.
        metrics: as given to `checkpoint()`; a value that is not finite is None.
        tag: as given to `checkpoint()`.
    """

    step: int
    checkpoint_id: str
    path: str
    nbytes: int
    created_ns: int
    metrics: Mapping[str, float | None]
    tag: str | None


def info_of(found: Manifest | Summary, path: str) -> CheckpointInfo:
    """The public part of a manifest, of the checkpoint in this directory."""
    return CheckpointInfo(
        found.step, found.checkpoint_id, path, found.nbytes, found.created_ns, found.metrics, found.tag
    )
