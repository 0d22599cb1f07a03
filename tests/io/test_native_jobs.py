"""Native code refuses every job that contradicts itself, and the pipeline takes the next one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import (
    SLOT_BYTES,
    WRITE,
    Memory,
    Stage,
    assert_usable,
    content,
    cut,
    finish,
    make_job,
    noise,
    plain,
    rewrite,
    run,
    whole,
)

from engine._native import ffi, lib
from engine.format.plan import ALIGNMENT, Extent
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job

# Rows of `loosened` arrays, so that a wrong count stays inside our memory.
ROOM = 32


def loosened(job: Job, arena: torch.Tensor) -> Any:
    """A job's struct with arrays that may be changed and are longer than they need to be."""
    c_job = job.c_job
    arrays = {"sources": "eng_source", "extents": "eng_extent", "blocks": "eng_block", "order": "uint32_t"}
    arrays |= {"checksums": "eng_hash", "states": "uint8_t"}
    counts = [c_job.source_count, c_job.extent_count, *(4 * [c_job.block_count])]
    kept = []
    for (name, ctype), count in zip(arrays.items(), counts, strict=True):
        array = ffi.new(f"{ctype}[{ROOM}]")
        ffi.memmove(array, getattr(c_job, name), count * ffi.sizeof(ctype))
        setattr(c_job, name, array)
        kept.append(array)
    for row in range(ROOM):
        c_job.sources[row].address = arena.data_ptr()
        if row >= counts[0]:
            c_job.sources[row].nbytes = arena.nbytes
    job.owners_of_arrays = kept  # type: ignore[attr-defined]
    return c_job


# A plain source and a strided one of 3 x 4 x 5 int32 in three blocks, the second with two extents.
ARENA = torch.zeros(8 << 20, dtype=torch.uint8)
BASE_SOURCES = [plain(ARENA), Memory(ARENA.data_ptr(), 4, (3, 4, 5), (40, 10, 2), ARENA)]
BASE_PLAN = cut(
    [[Extent(0, 0, 0, SLOT_BYTES + 16), Extent(1, 0, SLOT_BYTES + 16, 240)], [Extent(0, 0, 0, 10)]], SLOT_BYTES
)


def edited(path: str, value: int) -> Callable[[Any], None]:
    """A change of one number of a job: ``"blocks.0.nbytes"`` or ``"direction"``."""

    def edit(c_job: Any) -> None:
        *names, last = path.split(".")
        at = c_job
        for name in names:
            at = at[int(name)] if name.isdigit() else getattr(at, name)
        if last.isdigit():
            at[int(last)] = value
        else:
            setattr(at, last, value)

    edit.__name__ = f"{path}={value}"
    return edit


INVALID = [
    ("direction", 2),
    ("block_count", 0),
    ("urgent_count", 4),
    ("file_count", 0),
    ("file_count", 1),
    ("sources.0.nbytes", SLOT_BYTES + 15),
    ("sources.0.nbytes", 0),
    ("sources.1.nbytes", 239),
    ("sources.1.nbytes", 241),
    ("sources.1.ndim", 9),
    ("sources.1.ndim", 2**32 - 1),
    ("sources.1.itemsize", 0),
    ("sources.1.itemsize", 3),
    ("sources.1.itemsize", 32),
    ("sources.1.shape.0", 0),
    ("sources.1.shape.2", -1),
    ("sources.1.shape.0", 2**62),
    ("sources.1.shape.0", 2**62 + 3),
    ("sources.1.shape.1", 2**58),
    ("extents.0.source", 2),
    ("extents.1.source", 2**32 - 1),
    ("extents.0.nbytes", 0),
    ("extents.0.nbytes", SLOT_BYTES - 1),
    ("extents.0.nbytes", SLOT_BYTES + 1),
    ("extents.0.nbytes", 2**32 - 1),
    ("extents.0.source_offset", 2**64 - 1),
    ("extents.1.block_offset", 1),
    ("extents.2.block_offset", 15),
    ("extents.2.block_offset", 17),
    ("extents.2.block_offset", 2**32 - 1),
    ("extents.2.source_offset", 4),
    ("extents.2.source_offset", 2),
    ("extents.2.nbytes", 236),
    ("blocks.0.nbytes", 0),
    ("blocks.0.nbytes", SLOT_BYTES - 1),
    ("blocks.0.nbytes", SLOT_BYTES + 1),
    ("blocks.0.nbytes", 2**32 - 1),
    ("blocks.2.file", 2),
    ("blocks.2.file", 2**32 - 1),
    ("blocks.1.file_offset", SLOT_BYTES + 1),
    ("blocks.1.file_offset", 2**63 - SLOT_BYTES),
    ("blocks.1.file_offset", 2**64 - ALIGNMENT),
    ("blocks.1.extent_start", 3),
    ("blocks.1.extent_start", 2**32 - 1),
    ("blocks.1.extent_count", 1),
    ("blocks.1.extent_count", 4),
    ("blocks.1.extent_count", 2**32 - 1),
    ("order.0", 3),
    ("order.2", 2**32 - 1),
]


@pytest.mark.parametrize("edit", [edited(*pair) for pair in INVALID], ids=lambda edit: edit.__name__)
def test_a_job_that_contradicts_itself_is_refused(stage: Stage, edit: Callable[[Any], None]) -> None:
    rewrite(stage.fd, 0, b"untouched")
    job = make_job(WRITE, BASE_PLAN, BASE_SOURCES)
    edit(loosened(job, ARENA))
    stage.pipeline.submit(job)
    assert finish(stage.pipeline, job).failure == Failure(FailureKind.INVALID, errno.EINVAL, None)
    assert content(stage.fd, 9) == b"untouched"
    assert_usable(stage.pipeline, stage.fd)


def test_the_unchanged_job_is_valid(stage: Stage) -> None:
    job = make_job(WRITE, BASE_PLAN, BASE_SOURCES)
    loosened(job, ARENA)
    assert run(stage.pipeline, job, [stage.fd, stage.fd]).failure is None


@pytest.mark.parametrize("direction", Direction)
def test_an_order_that_omits_a_block_is_no_success(stage: Stage, direction: Direction) -> None:
    tensor, plan = noise(3 * SLOT_BYTES), whole(3 * SLOT_BYTES, SLOT_BYTES)
    checksums = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd]).checksums()
    job = make_job(direction, plan, [plain(tensor)], order=[0, 2, 2], checksums=checksums)
    assert run(stage.pipeline, job, [stage.fd]).failure == Failure(FailureKind.INVALID, errno.EINVAL, 1)
    assert_usable(stage.pipeline, stage.fd)


# Values around every rule.  None makes a valid source reach further than ARENA is long: the caller answers for
# addresses and lengths (native/pipeline/job.c), so no wrong address and no greater length is among them.
COUNTS = st.integers(0, ROOM)
EDITS: dict[str, st.SearchStrategy[int]] = {
    "direction": st.integers(0, 2),
    "checked": st.integers(0, 2),
    "source_count": COUNTS,
    "extent_count": COUNTS,
    "block_count": COUNTS,
    "urgent_count": COUNTS,
    "file_count": st.sampled_from([0, 1, 2, 3, 8, 9, ROOM]),
    "sources.{row}.nbytes": st.sampled_from([0, 1, 239, 240, 241, SLOT_BYTES + 16]),
    "sources.{row}.itemsize": st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 2**32 - 1]),
    "sources.{row}.ndim": st.sampled_from([0, 1, 2, 3, 8, 9, 2**32 - 1]),
    "sources.{row}.shape.{column}": st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**62]),
    "sources.{row}.stride.{column}": st.sampled_from([0, 1, 2, 3]),
    "extents.{row}.source_offset": st.sampled_from([0, 1, 2, 4, 8, 240, 2048, 2**64 - 1]),
    "extents.{row}.block_offset": st.sampled_from([0, 1, 16, 4095, SLOT_BYTES, 2**32 - 1]),
    "extents.{row}.nbytes": st.sampled_from([0, 1, 8, 16, 240, SLOT_BYTES, SLOT_BYTES + 1, 2**32 - 1]),
    "extents.{row}.source": st.sampled_from([0, 1, 2, ROOM - 1, 2**32 - 1]),
    "blocks.{row}.file_offset": st.sampled_from([0, 1, 4096, SLOT_BYTES, 2**40, 2**63 - SLOT_BYTES, 2**64 - 4096]),
    "blocks.{row}.nbytes": st.sampled_from([0, 1, 10, 256, SLOT_BYTES, SLOT_BYTES + 1, 2**32 - 1]),
    "blocks.{row}.file": st.sampled_from([0, 1, 2, 7, 8, 2**32 - 1]),
    "blocks.{row}.extent_start": st.sampled_from([0, 1, 2, 3, ROOM - 1, 2**32 - 1]),
    "blocks.{row}.extent_count": st.sampled_from([0, 1, 2, 4, ROOM, 2**32 - 1]),
    "order.{row}": st.sampled_from([0, 1, 2, 3, 2**32 - 1]),
}


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int]]:
    drawn = []
    for template in draw(st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=4)):
        path = template.format(row=draw(st.integers(0, 3)), column=draw(st.integers(0, 3)))
        drawn.append((path, draw(EDITS[template])))
    return drawn


@settings(max_examples=200)
@given(direction=st.sampled_from(Direction), drawn=edits())
def test_no_job_harms_the_pipeline(stage: Stage, direction: Direction, drawn: list[tuple[str, int]]) -> None:
    written = run(stage.pipeline, make_job(WRITE, BASE_PLAN, BASE_SOURCES), [stage.fd, stage.fd])
    job = make_job(direction, BASE_PLAN, BASE_SOURCES, checksums=written.checksums())
    c_job = loosened(job, ARENA)
    for path, value in drawn:
        edited(path, value)(c_job)
    stage.pipeline.submit(job)
    descriptors = ffi.new("int32_t[]", [stage.fd] * ROOM)
    lib.eng_attach(stage.pipeline._c_pipeline, c_job, descriptors, ffi.NULL, ffi.NULL)
    finish(stage.pipeline, job)
    if job.failure is None:
        assert set(ffi.buffer(c_job.states, c_job.block_count)[:]) == {BlockState.WRITTEN}
    assert_usable(stage.pipeline, stage.fd)
