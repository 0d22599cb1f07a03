"""Guarded memory for tests: pages of their own, and what a thread does to them while a job reads them."""

from __future__ import annotations

import mmap

import pytest
import torch
from jobs import WRITE, make_job, plain

from engine.format.plan import Plan
from engine.io.guard import KINDS, Guard, GuardError, Kind
from engine.io.job import Job
from engine.io.pipeline import Pipeline

UNIT_BYTES = 2 << 20


def _works(kind: Kind) -> bool:
    try:
        Guarded(kind, UNIT_BYTES).guard.close()
    except GuardError:
        return False
    return True


class Guarded:
    """Memory with a guard.

    Attributes:
        tensor: its bytes.
        guard: of a kind.
    """

    def __init__(self, kind: Kind, nbytes: int, huge: bool = True) -> None:
        self._pages = mmap.mmap(-1, nbytes + UNIT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        everything = torch.frombuffer(self._pages, dtype=torch.uint8)
        start = -everything.data_ptr() % UNIT_BYTES
        self.tensor = everything[start : start + nbytes]
        self.guard = Guard(kind, self.tensor.data_ptr(), nbytes)

    def fill(self, seed: int) -> None:
        """Random bytes, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        self.tensor.copy_(torch.randint(0, 256, self.tensor.shape, dtype=torch.uint8, generator=generator))

    def bytes_now(self) -> bytes:
        """The memory's content."""
        return self.tensor.numpy().tobytes()

    def make_job(self, plan: Plan) -> Job:
        """A write of the plan, with the memory as source 0, ready to be armed."""
        previous = self.guard.previous(plan)
        # The job owns the guard: a test that ends early frees neither before the pipeline has stopped.
        options = {"guard": self.guard.c_guard, "previous": previous, "owners": self}
        return make_job(WRITE, plan, [plain(self.tensor)], **options)

    def begin(self, pipeline: Pipeline, plan: Plan) -> Job:
        """Arm a job and submit it."""
        job = self.make_job(plan)
        self.guard.arm(job, plan)
        pipeline.submit(job)
        return job


# The kinds that this user may have: cow needs a privilege.  `test_guards_that_need_a_privilege` runs the tests with it.
KINDS_HERE: tuple[Kind, ...] = tuple(kind for kind in KINDS if _works(kind))

needs_cow = pytest.mark.skipif("cow" not in KINDS_HERE, reason="run under sudo by test_guards_that_need_a_privilege")
