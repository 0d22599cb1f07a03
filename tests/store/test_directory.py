"""The read side: a run is read beside a training, on a read-only mount, and while its steps are retired.

The steps here are written by hand, with a valid manifest and a data file that holds its own step.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from strategies import plan_of
from volumes import as_root, volume

from engine.errors import ArgumentError, CorruptError, NotFoundError, RetiredError
from engine.format.layout import lay_out
from engine.format.manifest import (
    FORMAT,
    MANIFEST_NAME,
    READER,
    VERSION,
    FileRecord,
    Manifest,
    chunk_layers,
    chunk_records,
    encode,
)
from engine.format.plan import ALIGNMENT
from engine.store.catalog import Catalog
from engine.store.directory import Directory, path_of
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention

DATA_NAME = "model.safetensors"


def manifest_of(step: int) -> bytes:
    """The manifest of a step without tensors."""
    layout = lay_out([])
    plan = plan_of(layout, [], ALIGNMENT, ALIGNMENT)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        min_reader=READER,
        step=step,
        checkpoint_id=f"{step:032x}",
        created_ns=0,
        block_bytes=ALIGNMENT,
        files=tuple(FileRecord(*file) for file in plan.files),
        chunks=chunk_records(plan, chunk_layers(plan, layout), [bytes(16)]),
        segments=(),
        aliases={},
        optimizers={},
        extra=None,
    )
    return bytes(encode(manifest))


def save(catalog: Catalog, step: int) -> None:
    """Save a step over recycled files, and retire the steps that the rule does not keep."""
    path = Path(catalog.begin(step, [DATA_NAME]).path)
    with open(path / DATA_NAME, "r+b" if (path / DATA_NAME).exists() else "wb") as file:
        file.write(str(step).encode() * 4)
    (path / MANIFEST_NAME).write_bytes(manifest_of(step))
    catalog.publish(step)
    catalog.retire()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    opened = Catalog(str(root), Filesystem(), spare_max=1, retention=Retention(last=1))
    yield opened
    opened.close()


def test_a_run_is_read_beside_its_writer_and_steps_are_listed_afresh(catalog: Catalog, root: Path) -> None:
    directory = Directory(str(root), Filesystem())
    assert directory.steps() == []
    for step in (1, 2):
        save(catalog, step)
        assert directory.steps() == [step] == catalog.steps()
        with directory.opened(step) as opened:
            manifest, nbytes = opened.manifest()
            assert manifest.step == step and nbytes == len(manifest_of(step))
            descriptor, length = opened.open_file(DATA_NAME, direct=False)
            assert os.pread(descriptor, length + 1, 0) == str(step).encode() * 4
    with pytest.raises(NotFoundError, match="holds no step 1; committed steps: 2"), directory.opened(1):
        raise AssertionError


class MovesOn(Filesystem):
    """A training that commits a step and retires the one before it, once a reader has listed the names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_due = False

    def list_directory(self, path: str) -> list[str]:
        names = super().list_directory(path)
        if self.is_due:
            self.is_due = False
            (self.root / "step-00000002").mkdir()
            (self.root / "step-00000001").rename(self.root / ".engine" / "00000001")
        return names


def test_a_run_whose_only_step_is_replaced_during_a_listing_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / ".engine").mkdir()
    (tmp_path / "step-00000001").mkdir()
    training = MovesOn(tmp_path)
    directory = Directory(str(tmp_path), training)
    training.is_due = True
    assert directory.steps() == [2]


def test_a_path_that_is_no_run_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other" / "step-3").mkdir(parents=True)
    for name in ("mistyped", "file", "other", "file/below"):
        with pytest.raises(NotFoundError, match=r"is no run.*check the path"):
            Directory(str(tmp_path / name), Filesystem())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "step-3"]


def test_a_copy_without_the_private_directory_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / MANIFEST_NAME).write_bytes(manifest_of(3))
    directory = Directory(str(tmp_path), Filesystem())
    with directory.opened(3) as opened:
        assert directory.steps() == [3] and opened.manifest()[0].step == 3
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_a_run_is_read_on_a_read_only_mount() -> None:
    with volume("ext4", 16 << 20) as mounted:
        catalog = Catalog(str(mounted / "run"), Filesystem(), spare_max=1)
        save(catalog, 1)
        catalog.close()
        subprocess.run([*as_root(), "mount", "-o", "remount,ro", str(mounted)], check=True)
        directory = Directory(str(mounted / "run"), Filesystem())
        with directory.opened(1) as opened:
            assert directory.steps() == [1] and opened.manifest()[0].step == 1


def test_a_step_retired_while_it_is_read_is_named_and_gives_no_bytes_of_a_later_step(
    catalog: Catalog, root: Path
) -> None:
    """A retired step can still be read.  A recycled step's files are gone, and never those of a later step."""
    save(catalog, 1)
    directory = Directory(str(root), Filesystem())
    told = pytest.raises(RetiredError, match=r"step 1 .* was retired while it was read; committed steps: 4")
    with told, directory.opened(1) as opened:
        for step in (2, 3, 4):
            if step == 3:  # not recycled yet
                descriptor = os.open(DATA_NAME, os.O_RDONLY, dir_fd=opened._descriptor.number)
                assert os.pread(descriptor, 100, 0) == b"1111"
                os.close(descriptor)
                assert opened.manifest()[0].step == 1 and not opened.is_in_place()
            save(catalog, step)
        opened.open_file(DATA_NAME, direct=False)
    with pytest.raises(RetiredError), directory.opened(4) as opened:
        for step in (5, 6, 7):
            save(catalog, step)
        opened.manifest()


def test_a_file_that_a_reader_has_open_is_not_overwritten(catalog: Catalog, root: Path) -> None:
    save(catalog, 1)
    with Directory(str(root), Filesystem()).opened(1) as opened:
        descriptor = opened.open_file(DATA_NAME, direct=False).descriptor
        for step in (2, 3, 4):
            save(catalog, step)
        assert os.pread(descriptor, 100, 0) == b"1111"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)  # closed with the step


def test_damage_is_not_reported_as_retirement(catalog: Catalog, root: Path) -> None:
    save(catalog, 1)
    (root / "step-00000001" / DATA_NAME).unlink()
    with pytest.raises(CorruptError, match="missing"), Directory(str(root), Filesystem()).opened(1) as opened:
        opened.open_file(DATA_NAME, direct=False)


@pytest.mark.parametrize("path", ["", b"", "a\0b", b"a\0b"])
def test_an_invalid_path_is_refused(path: str | bytes) -> None:
    with pytest.raises(ArgumentError, match="it must be a path"):
        path_of(path)


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    assert path_of(os.fsencode(tmp_path)) == path_of(tmp_path) == str(tmp_path)
