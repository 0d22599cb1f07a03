"""Commit: the durability sequence, in one readable function.

Theory of operation.  `commit` is called when every block of a save has been written and every completion read.
It takes the save from bytes that the device has accepted to a checkpoint that a power cut cannot take away
(DESIGN section 7, steps 4 to 6; docs/durability.md numbers the invariants).  The order of its lines is the
product; the mutation table in docs/durability.md says which test sees each of them dropped or swapped.

A failure before the rename leaves no `step-N`.  Called by `writer`, on the engine's commit threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from engine.format.manifest import MANIFEST_NAME
from engine.store.catalog import Catalog


class WrittenFile(NamedTuple):
    """A data file whose blocks have all been written: its open descriptor, its path and its exact length."""

    descriptor: int
    path: str
    nbytes: int


def commit(catalog: Catalog, step: int, files: Sequence[WrittenFile], manifest: bytes | bytearray) -> str:
    """Make a fully written `step-N.partial` durable and visible as `step-N`; return its path.  Blocks.

    Raises:
        StorageError: the kernel refused one operation; the save has failed, and nothing is retried.
    """
    filesystem = catalog.filesystem
    partial = catalog.partial_path(step)
    for file in files:
        filesystem.truncate(file.descriptor, file.nbytes, file.path)
    for file in files:
        filesystem.sync_file(file.descriptor, file.path)
    catalog.check_place()  # the descriptors lead to what was locked, and names may not any more
    filesystem.write_new_file(os.path.join(partial, MANIFEST_NAME), manifest)
    filesystem.sync_directory(partial)
    return catalog.publish(step)
