"""Native jobs for tests: tensors and runs are packed into a job and run through a pipeline.

`engine.format.plan` cuts them, and has its own tests.  The packing is that of `writer` and `reader`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from engine.format.plan import (
    ALIGNMENT,
    Chunk,
    Extent,
    Extents,
    Plan,
    PlannedFile,
    Source,
    block_rows,
    extent_columns,
    lay_extents,
    merge_runs,
    plan_geometry,
)
from engine.io.job import Direction, Job, Milestone
from engine.io.packing import pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline

WRITE, READ = Direction.WRITE, Direction.READ
SLOT_BYTES = 4 * ALIGNMENT
LOOK_NS = 1  # a wait that only looks

# Far longer than any test takes: it ends a test that hangs.
HANG_NS = 60_000_000_000


class Memory(NamedTuple):
    """A source: plain memory if `shape` is empty, else a strided tensor.  `owner` keeps the memory."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    owner: torch.Tensor

    @property
    def source(self) -> Source:
        """As a job takes it."""
        nbytes = self.itemsize * math.prod(self.shape) if self.shape else self.owner.nbytes
        return Source(self.address, nbytes, *self[1:4])


def plain(tensor: torch.Tensor) -> Memory:
    """A contiguous tensor, as the bytes it is."""
    assert tensor.is_contiguous()
    return Memory(tensor.data_ptr(), 1, (), (), tensor)


def strided(tensor: torch.Tensor) -> Memory:
    """Any tensor, as shape and strides."""
    return Memory(tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tuple(tensor.stride()), tensor)


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    """The same random bytes for the same seed."""
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row-major order, as numpy serialises them."""
    return tensor.numpy().tobytes()


def columns(runs: Iterable[Extent]) -> Extents:
    """Runs as a plan takes them."""
    extents = Extents([], [], [], [])
    for run in runs:
        extents.append(*run)
    return extents


def cut(files: Sequence[Sequence[Extent]], block_bytes: int) -> Plan:
    """A plan of files that are made of these runs, one chunk each."""
    sizes = [max(run.file_offset + run.nbytes for run in runs) for runs in files]
    planned = tuple(PlannedFile(f"{index}", nbytes, 0) for index, nbytes in enumerate(sizes))
    chunks = tuple(Chunk(index, 0, 0, nbytes) for index, nbytes in enumerate(sizes))
    return lay_extents(plan_geometry(planned, chunks, block_bytes), [merge_runs(columns(runs)) for runs in files])


def whole(nbytes: int, block_bytes: int) -> Plan:
    """A plan of one file that is source 0 from its start."""
    return cut([[Extent(0, 0, 0, nbytes)]], block_bytes)


def make_job(direction: Direction, plan: Plan, sources: Sequence[Memory], **options: Any) -> Job:
    """The job that moves a plan; `options` are Job's.  `order` is the plan's own unless given."""
    order = options.pop("order", range(len(plan.blocks)))
    return Job(
        direction,
        pack_sources(memory.source for memory in sources),
        pack_extents(*extent_columns(plan)),
        pack_blocks(block_rows(plan.blocks)),
        pack_order(order),
        len(plan.files),
        owners=(sources, options.pop("owners", None)),
        **options,
    )


def finish(pipeline: Pipeline, job: Job) -> Job:
    """Wait for a job to be done, and fail if it hangs."""
    assert pipeline.wait(job, Milestone.DONE, HANG_NS), "the job was never done"
    return job


def run(pipeline: Pipeline, job: Job, descriptors: Sequence[int]) -> Job:
    """Wait for the end of a job, success or failure."""
    pipeline.submit(job)
    pipeline.attach(job, descriptors)
    return finish(pipeline, job)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline_ns = time.monotonic_ns() + HANG_NS
    while not condition():
        assert time.monotonic_ns() < deadline_ns, "it never happened"
        time.sleep(0.001)


class Stage(NamedTuple):
    """A pipeline, and a file to write to and read from."""

    pipeline: Pipeline
    path: Path
    fd: int


def content(fd: int, nbytes: int) -> bytes:
    """The start of a file, read without the flags of its descriptor."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(nbytes)


def rewrite(fd: int, offset: int, changed: bytes) -> None:
    """Change a file behind the pipeline's back."""
    with open(f"/proc/self/fd/{fd}", "r+b") as file:
        file.seek(offset)
        file.write(changed)


def checksums_of(plan: Plan, stored: list[bytes]) -> list[bytes]:
    """The content hashes of the blocks of a plan, by the xxhash package."""
    return [xxhash.xxh3_128_digest(stored[b.file_index][b.file_offset : b.file_offset + b.nbytes]) for b in plan.blocks]


def assert_usable(pipeline: Pipeline, fd: int) -> None:
    """The pipeline takes a write and a read of it, through every slot."""
    bytes_before, plan = noise(5 * SLOT_BYTES + 5, seed=7), whole(5 * SLOT_BYTES + 5, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(bytes_before)]), [fd])
    assert written.failure is None
    bytes_after = torch.zeros_like(bytes_before)
    read = run(pipeline, make_job(READ, plan, [plain(bytes_after)], checksums=written.checksums()), [fd])
    assert read.failure is None
    assert torch.equal(bytes_before, bytes_after)
