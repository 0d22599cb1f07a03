"""Info: what the store tells of a checkpoint and of damage to it.

Theory of operation.  Plain values, which `Writer`, `Reader` and `Verifier` return and the public API hands on.
"""

from __future__ import annotations

from typing import NamedTuple


class CheckpointInfo(NamedTuple):
    """A committed checkpoint.

    Attributes:
        step, checkpoint_id: which; the id is 32 random hexadecimal digits.
        path: its directory.
        nbytes: bytes of its data files.
    """

    step: int
    checkpoint_id: str
    path: str
    nbytes: int
