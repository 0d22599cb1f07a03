"""Shared by all tests: hypothesis profiles, the choice of backends, and fixtures.

There is no deadline, because the two cores may be shared with other work.  In CI the examples are the same each time,
so that a result depends on the change only.  Elsewhere they differ, and find more.

A test marked `every_backend` runs once for each rung of the ladder (engine/io/backend.py): its Engines find only that
one.  One marked `remote_owner` runs once more, on the first rung, with Engines whose directory a monitor owns.  One
marked `every_staging` runs once for each number of staging threads; without the marker there is one.  Tests that
compare trainings bit by bit use `one_thread`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import FaultTable
from hypothesis import settings
from jobs import SLOT_BYTES, Stage, until
from leaks import held
from monitors import Hooks

import engine
import engine.engine as facade
from engine.io import backend
from engine.io.pipeline import Pipeline
from engine.options import Backend
from engine.store.filesystem import Filesystem

# In the place of a rung: the first one, with a monitor.
REMOTE = "remote"

# The native thread alone, with one helper, and with more helpers than these hosts have cores.
STAGING_THREADS = (1, 2, 4)

# A process that a test starts prints every stack when it crashes, as pytest does.
os.environ["PYTHONFAULTHANDLER"] = "1"

settings.register_profile("engine", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("engine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests with a marker once for each rung, or for each number of staging threads."""
    if metafunc.definition.get_closest_marker("every_backend"):
        remote = [REMOTE] if metafunc.definition.get_closest_marker("remote_owner") else []
        metafunc.parametrize("rung", [*backend.LADDER, *remote], indirect=True)
    if metafunc.definition.get_closest_marker("every_staging"):
        metafunc.parametrize("staging_threads", STAGING_THREADS, indirect=True, ids="{}-staging".format)


@pytest.fixture
def monitored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives every Engine of the test a monitor, which calls the Engine's file system before its operations."""
    hooks = Hooks(monkeypatch)
    monkeypatch.setattr(facade, "Store", hooks.make_store)
    yield
    hooks.close()


@pytest.fixture(autouse=True)
def rung(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one backend that ``"auto"`` finds; without the marker it finds the host's best."""
    only: str = getattr(request, "param", backend.LADDER[0])
    if only == REMOTE:
        request.getfixturevalue("monitored")
        return backend.LADDER[0]
    if only != backend.LADDER[0]:
        monkeypatch.setattr(backend, "LADDER", (only,))
        _check_rung(only)
    return only


@functools.cache
def _check_rung(only: str) -> None:
    """Without effect on Engines, the narrowing above would leave all rungs but the first untested, and nothing fail.

    Once for each rung: whether it has an effect is a matter of names, and stays so.
    """
    before = held()
    with (
        tempfile.TemporaryDirectory() as directory,
        engine.Engine(directory, staging_bytes=2 * SLOT_BYTES, block_bytes=SLOT_BYTES) as eng,
    ):
        assert eng.backend == only, f"Engines are to find {only!r} alone, and found {eng.backend!r}"
    until(lambda: held() == before)  # the kernel ends a ring's workers in its own time, and tests count them


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them; and there are few cores to share."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


# These fixtures drive the native pipeline without an Engine.


@pytest.fixture
def staging_threads(request: pytest.FixtureRequest) -> int:
    count: int = getattr(request, "param", 1)
    return count


@pytest.fixture(
    scope="module",
    params=[("io_uring", 1), ("io_uring_plain", 1), ("threads", 1), ("io_uring", 2)],
    ids=["io_uring", "io_uring_plain", "threads", "2-staging"],
)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    path = tmp_path_factory.mktemp("native") / "blocks"
    fd = Filesystem().open_for_blocks(str(path), write=True, direct=True)
    pipeline = Pipeline(4, SLOT_BYTES, *request.param)
    yield Stage(pipeline, path, fd.number)
    pipeline.close()
    fd.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = Filesystem().open_for_blocks(str(tmp_path / "blocks"), write=True, direct=True)
    yield descriptor.number
    descriptor.close()


@pytest.fixture
def buffered_fd(tmp_path: Path) -> Iterator[int]:
    """A file without O_DIRECT, for `FaultTable`: it moves any number of bytes, from memory of any alignment."""
    descriptor = os.open(tmp_path / "buffered", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def open_pipeline(rung: Backend, staging_threads: int) -> Iterator[Callable[..., Pipeline]]:
    """Opens pipelines, and closes them at the end."""
    opened: list[tuple[Pipeline, FaultTable | None]] = []  # the table too: it must outlive its pipeline

    def open_one(slot_count: int, slot_bytes: int = SLOT_BYTES, table: FaultTable | None = None) -> Pipeline:
        c_table = None if table is None else table.c_table
        pipeline = Pipeline(slot_count, slot_bytes, rung, staging_threads, io_table=c_table)
        opened.append((pipeline, table))
        return pipeline

    yield open_one
    for pipeline, _ in opened:
        pipeline.close()
