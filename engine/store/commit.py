"""Commit: the durability sequence, in two readable functions.

Theory of operation.  A checkpoint is written by one writer or by several, each with its own files in one partial
directory.  When a writer's blocks have all been written and every completion read, it calls `seal`: its files become
durable under the partial name.  When all have sealed, one of them, the owner of the lock, calls `publish`: the
checkpoint becomes visible, and after the return a power cut cannot remove it (docs/durability.md, C1 to C7).  A
single writer calls `commit`, which is both, through the owner of the directory.

With several writers each writes a part of the manifest.  `publish` reads every part again and compares its digest with
the one that its writer reported.  The order of the lines is the product; the mutation table in docs/durability.md names
the test that fails if one is dropped or swapped.

A failure before the rename leaves no `step-N`.  `seal` and `publish` are called by `owner`, and `commit` by
`writer`, on the engine's commit threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.errors import CorruptError
from engine.format.manifest import MANIFEST_NAME, DigestedFile, digest_of
from engine.io.descriptor import Descriptor
from engine.store.access import WriteAccess
from engine.store.catalog import Catalog
from engine.store.filesystem import Filesystem


class WrittenFile(NamedTuple):
    """A data file whose blocks have all been written: its open descriptor, its path and its exact length."""

    descriptor: Descriptor
    path: str
    nbytes: int


def seal(
    filesystem: Filesystem,
    partial: str,
    files: Sequence[WrittenFile],
    small_files: Mapping[str, bytes],
    part: tuple[str, bytes | bytearray] | None = None,
) -> DigestedFile | None:
    """Make one writer's files durable under the partial name.  Blocks.

    Args:
        filesystem: the file operations.
        partial: the directory of the files.
        files: this writer's data files, written.
        small_files: this writer's other files, by name; they are written here.
        part: the name and the content of its part of the manifest; None for a single writer.

    Raises:
        StorageError: the kernel refused one operation; the save has failed, and nothing is retried.
    """
    for file in files:
        filesystem.truncate(file.descriptor, file.nbytes, file.path)
    for file in files:
        filesystem.sync_file(file.descriptor, file.path)
    for name, content in small_files.items():
        filesystem.write_new_file(os.path.join(partial, name), content)
    if part is None:
        return None  # `publish` syncs the directory
    name, raw = part
    filesystem.write_new_file(os.path.join(partial, name), raw)
    filesystem.sync_directory(partial)
    return digest_of(name, raw)


def publish(catalog: Catalog, step: int, manifest: bytes | bytearray, parts: Sequence[DigestedFile] = ()) -> str:
    """Make a checkpoint visible that every writer has sealed; return its path.  Blocks.

    Raises:
        CorruptError: a part differs from the one that its writer sealed.
        StorageError: the kernel refused one operation; the save has failed, and nothing is retried.
    """
    filesystem = catalog.filesystem
    partial = catalog.partial_path(step)
    catalog.check_place()  # the descriptors lead to the locked directory, but the names may lead to another one
    for part in parts:
        path = os.path.join(partial, part.name)
        if digest_of(part.name, filesystem.read_file(path, part.nbytes)) != part:
            raise CorruptError(f"{path} is not what its writer has sealed; save again")
    filesystem.write_new_file(os.path.join(partial, MANIFEST_NAME), manifest)
    filesystem.sync_directory(partial)
    return catalog.publish(step)


def commit(
    access: WriteAccess,
    step: int,
    small_files: Mapping[str, bytes],
    manifest: bytes | bytearray,
    await_turn: Callable[[], None],
) -> str:
    """Seal and publish a checkpoint of one writer; return its path.  Blocks; raises as they do.

    `await_turn` is called in between: steps become visible in order, but several may seal at the same time.
    """
    access.seal_save(step, small_files)
    await_turn()
    return access.publish_save(step, manifest)
