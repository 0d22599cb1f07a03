"""The store alone: it writes, restores and verifies bytes, with no torch in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from buffers import address, content_of, load, save

from engine.format.plan import Source
from engine.io.packing import pack_sources
from engine.options import Options
from engine.store.filesystem import Filesystem
from engine.store.reader import Checkpoint, Target
from engine.store.retention import Retention
from engine.store.store import Store
from engine.store.writer import Content, pack_all_sources

WITHOUT_TORCH = """
import mmap, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not to be imported here")

sys.meta_path.insert(0, Refuse())

import numpy
from buffers import content_of, load, save

from engine.options import Options
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention
from engine.store.store import Store

OPTIONS = Options(staging_bytes=64 << 10, block_bytes=16 << 10)
pages = mmap.mmap(-1, 300_000)
pages.write(bytes(range(256)) * 1171)
buffers = {"pages": pages, "array": numpy.arange(50_000, dtype=numpy.float32), "empty": bytearray()}
want = {name: bytes(memoryview(buffer).cast("B")) if len(buffer) else b"" for name, buffer in buffers.items()}

store = Store(sys.argv[1], OPTIONS, Retention(last=2), Filesystem())
content = content_of(buffers, OPTIONS.block_bytes)
for step in (1, 2, 3):
    save(store, step, content)
    store.retire()
assert store.steps() == [2, 3], store.steps()
assert {name: bytes(buffer) for name, buffer in load(store).items()} == want
assert store.verifier.verify(None) == ()
store.close()
assert "torch" not in sys.modules
print("done")
"""

IMPORT = "import sys, engine, engine.store.store, engine.options; print('torch' in sys.modules, 'numpy' in sys.modules)"


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()


def test_the_store_saves_and_restores_buffers_without_torch(tmp_path: Path) -> None:
    assert run(WITHOUT_TORCH, str(tmp_path / "run")) == "done"


def test_importing_the_store_imports_neither_torch_nor_numpy() -> None:
    assert run(IMPORT) == "False False"


def test_memory_shorter_than_a_tensor_is_refused_as_a_bug(tmp_path: Path) -> None:
    options = Options(staging_bytes=64 << 10, block_bytes=16 << 10)
    store = Store(str(tmp_path / "run"), options, Retention(last=2), Filesystem())
    buffers = {"a": bytearray(b"1" * 50_000)}
    content = content_of(buffers, options.block_bytes)
    short = Source(address(buffers["a"]), 49_999)
    with pytest.raises(RuntimeError, match=r"the save of .* is refused: .*beyond the memory.* report this as a bug"):
        save(store, 1, replace(content, sources=pack_all_sources(content.packed.layout, [short])))
    save(store, 2, content)

    def fill(checkpoint: Checkpoint) -> None:
        targets = [Target(checkpoint.manifest.segments[0], 0, 0)]
        store.reader.read(checkpoint, targets, pack_sources([short]), buffers, whole=True)

    with pytest.raises(RuntimeError, match=r"the read of .* is refused: .*beyond the memory.* report this as a bug"):
        store.reader.use(None, fill)
    assert load(store) == buffers and not store.reader.damaged
    store.close()


def test_content_that_is_amended_as_it_is_let_go_stays_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit thread lets go of a save that has failed while its caller replaces a field of the content."""
    options = Options(staging_bytes=64 << 10, block_bytes=16 << 10)
    store = Store(str(tmp_path / "run"), options, Retention(last=2), Filesystem())
    content = content_of({"a": bytearray(100)}, options.block_bytes)
    write = store.writer.prepare(1, content, checked=False)
    write.amend(tag="kept")
    assert write.content is not None and write.content.tag == "kept"

    def late(found: Content, **fields: Any) -> Content:
        write.let_go()
        return replace(found, **fields)

    monkeypatch.setattr("engine.store.writer.replace", late)
    write.amend(tag="late")
    assert write.content is None
    write.amend(tag="later")
    assert write.content is None
    store.close()
