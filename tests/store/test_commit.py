"""Seal and publish: several writers of one checkpoint, each with its own files and part of the manifest."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import CorruptError, StorageError
from engine.format.manifest import DigestedFile
from engine.io.descriptor import Descriptor
from engine.store.catalog import Catalog
from engine.store.commit import WrittenFile, publish, seal
from engine.store.filesystem import Filesystem

RANKS = range(3)


class Recorded(Filesystem):
    """The real file system, with a list of the syncs and renames."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        super().sync_file(descriptor, path)
        self.done.append(("sync", os.path.basename(path)))

    def sync_directory(self, path: str) -> None:
        super().sync_directory(path)
        self.done.append(("sync", os.path.basename(path)))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.done.append(("rename", os.path.basename(target)))


@pytest.fixture
def filesystem() -> Recorded:
    return Recorded()


@pytest.fixture
def catalog(tmp_path: Path, filesystem: Recorded) -> Iterator[Catalog]:
    opened = Catalog(str(tmp_path / "run"), filesystem, spare_max=1)
    yield opened
    opened.close()


def seal_as(filesystem: Filesystem, partial: str, rank: int) -> DigestedFile:
    """Write and seal the files of a rank."""
    path = os.path.join(partial, f"model-{rank}.safetensors")
    descriptor = filesystem.open_for_blocks(path, write=True, direct=False)
    os.pwrite(descriptor.number, bytes([rank]) * 200, 0)
    file = WrittenFile(descriptor, path, 100)
    part = seal(filesystem, partial, [file], {}, (f"manifest-{rank:05d}.json", b"part" * rank))
    filesystem.close(descriptor)
    assert part is not None
    return part


def seal_all(filesystem: Filesystem, partial: str) -> list[DigestedFile]:
    """All ranks, each in its own thread."""
    parts: dict[int, DigestedFile] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: parts.update({rank: seal_as(filesystem, partial, rank)}))
        for rank in RANKS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [parts[rank] for rank in RANKS]


def test_the_parts_of_several_writers_are_published_together(catalog: Catalog, filesystem: Recorded) -> None:
    partial = catalog.begin(7, []).path
    filesystem.done.clear()
    parts = seal_all(filesystem, partial)
    for rank in RANKS:
        mine = [
            at
            for at, (_, name) in enumerate(filesystem.done)
            if name.endswith((f"{rank}.json", f"-{rank}.safetensors"))
        ]
        assert [filesystem.done[at][1] for at in mine] == [f"model-{rank}.safetensors", f"manifest-{rank:05d}.json"]
        assert ("sync", "step-00000007.partial") in filesystem.done[mine[-1] :], "its names are not durable"
    filesystem.done.clear()
    path = Path(publish(catalog, 7, b"{}", parts))
    assert filesystem.done == [
        ("sync", "manifest.json"),
        ("sync", "step-00000007.partial"),
        ("rename", "step-00000007"),
        ("sync", "run"),
    ]
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == {
        "manifest.json": b"{}",
        **{f"model-{rank}.safetensors": bytes([rank]) * 100 for rank in RANKS},
        **{f"manifest-{rank:05d}.json": b"part" * rank for rank in RANKS},
    }


def test_a_changed_part_prevents_publishing(catalog: Catalog) -> None:
    partial = Path(catalog.begin(1, []).path)
    parts = seal_all(catalog.filesystem, str(partial))
    path = partial / parts[2].name
    for content in (b"tarpart"[:8], b"part", b"partpartpart", None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CorruptError, match=r"manifest-00002\.json"):
            publish(catalog, 1, b"{}", parts)
        assert catalog.steps() == [] and not (partial / "manifest.json").exists()
    path.write_bytes(b"part" * 2)
    publish(catalog, 1, b"{}", parts)
    assert catalog.steps() == [1]


class Failing(Filesystem):
    """Refuses the first fsync of a file with this ending."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        if path.endswith(self.suffix):
            raise StorageError(errno.EIO, "fsync", path)
        super().sync_file(descriptor, path)


@pytest.mark.parametrize("suffix", ["model-1.safetensors", "manifest-00001.json"])
def test_a_failed_seal_leaves_no_part(catalog: Catalog, suffix: str) -> None:
    partial = catalog.begin(1, []).path
    with pytest.raises(StorageError, match="fsync"):
        seal_as(Failing(suffix), partial, 1)
    catalog.discard(1)
    assert catalog.steps() == []
