"""Checkpoints of plain buffers, without torch: enough to use a Store alone.

Theory of operation.  A `Content` consists of a layout and addresses.  Here the tensors are Python buffers (a bytearray,
an mmap, a numpy array), so a Store can be driven where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.format.layout import DTYPES, TensorSpec, lay_out
from engine.format.manifest import encode_rows
from engine.format.plan import Source, file_runs
from engine.io.binding import ffi
from engine.io.packing import pack_sources
from engine.store.reader import Checkpoint, Target
from engine.store.store import Store
from engine.store.writer import Content, pack_all_sources, pack_plan

Buffers = Mapping[str, Any]


def address(buffer: Any) -> int:
    """Where a buffer's bytes are."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def content_of(buffers: Buffers, block_bytes: int, dtype: str = "uint8") -> Content:
    """The content of a checkpoint of buffers, each as a tensor of one dimension."""
    itemsize = DTYPES[dtype].itemsize
    specs = [TensorSpec(n, dtype, (memoryview(b).nbytes // itemsize,), "model", "") for n, b in buffers.items()]
    layout = lay_out(specs)
    names = [segment.name for segment in layout.segments]
    runs = file_runs(layout, [(len(layout.files) + index, 0) for index in range(len(names))])
    plan = pack_plan(layout, runs, encode_rows(layout), (), block_bytes, 16 * block_bytes)
    sources = pack_all_sources(
        layout, [Source(address(buffers[name]), memoryview(buffers[name]).nbytes) for name in names]
    )
    return Content(plan, sources, owners=buffers)


def save(store: Store, step: int, content: Content) -> None:
    """Save, and wait until it is committed."""
    write = store.writer.prepare(step, content, checked=False)
    store.writer.start(write)
    store.writer.finish(write, lambda: None)


def load(store: Store, step: int | None = None) -> dict[str, bytearray]:
    """Every tensor's bytes."""

    def fill(checkpoint: Checkpoint) -> dict[str, bytearray]:
        segments = checkpoint.manifest.segments
        buffers = {record.name: bytearray(record.nbytes) for record in segments}
        targets = [Target(record, index, 0) for index, record in enumerate(segments)]
        sources = pack_sources([Source(address(buffers[record.name]), record.nbytes) for record in segments])
        store.reader.read(checkpoint, targets, sources, buffers, whole=True)
        return buffers

    return store.reader.use(step, fill)[0]
