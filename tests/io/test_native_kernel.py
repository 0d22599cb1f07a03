"""Answers that other kernels give to the native pipeline: unknown flags, a busy ring.

Each script runs in its own process, because limits and filters of system calls cannot be removed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import SLOT_BYTES
from processes import descriptor_numbers, in_a_process_of_its_own, stays_open_in_exec

from engine.io.pipeline import Pipeline
from engine.options import Backend


def check(script: str, *arguments: str) -> None:
    """Run a script that asserts."""
    finished = in_a_process_of_its_own(script, *arguments)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.every_backend
def test_every_descriptor_is_closed_by_exec(rung: Backend) -> None:
    before = descriptor_numbers()
    pipeline = Pipeline(2, SLOT_BYTES, rung)
    try:
        made = descriptor_numbers() - before
        assert made and not any(map(stays_open_in_exec, made))
    finally:
        pipeline.close()


OLD_KERNEL = """
import ctypes, errno, os, sys
from jobs import *
from seccomp import SETUP, supervise
from engine.io.pipeline import OpenError, Refused

asked, refused = [], 1 << 30

def answer(_number, arguments):
    asked.append(ctypes.c_uint32.from_address(arguments[1] + 8).value)  # flags, in struct io_uring_params
    return errno.EINVAL if len(asked) <= refused else 0

supervise(answer, (SETUP,))
try:
    Pipeline(2, SLOT_BYTES, sys.argv[1])
except OpenError as error:
    assert (error.refused, error.errno) == (Refused.RING, errno.EINVAL)
else:
    raise AssertionError("a ring without flags is refused, and there is one")
rungs = asked[:]
assert rungs[-1] == 0 and len(set(rungs)) == len(rungs), rungs  # no kernel refuses a ring without any flag
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
for refused in range(len(rungs)):
    asked.clear()
    pipeline = Pipeline(2, SLOT_BYTES, sys.argv[1])
    assert_usable(pipeline, file)
    pipeline.close()
    assert asked == rungs[: refused + 1]
"""


@pytest.mark.parametrize("backend", ["io_uring", "io_uring_plain"])
def test_flags_that_an_older_kernel_refuses_are_left_out(tmp_path: Path, backend: str) -> None:
    check(OLD_KERNEL, backend, str(tmp_path / "blocks"))


BUSY = """
import errno, os, sys, time
from jobs import *
from seccomp import ENTER, SETUP, supervise
from engine.store.filesystem import Filesystem

refuses_flags, asked, refused = sys.argv[3] == "old", 0, 0

def answer(number, _arguments):
    global asked, refuses_flags, refused
    if number == SETUP:
        refuse_now, refuses_flags = refuses_flags, False
        return errno.EINVAL if refuse_now else 0
    asked += 1
    if asked % 2:
        return 0
    time.sleep(0.005)  # submitted operations complete meanwhile
    refused += 1
    return errno.EBUSY

supervise(answer, (SETUP, ENTER))
pipeline = Pipeline(4, SLOT_BYTES, sys.argv[1])
for flags in (0, os.O_DIRECT):  # from the page cache reads complete within the submission
    file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | flags)
    for _ in range(5):
        assert_usable(pipeline, file)
assert refused > 5
pipeline.close()
"""


@pytest.mark.parametrize("flags", ["all", "old"])
@pytest.mark.parametrize("backend", ["io_uring", "io_uring_plain"])
def test_completions_beside_a_submission_error_are_kept(tmp_path: Path, backend: str, flags: str) -> None:
    check(BUSY, backend, str(tmp_path / "blocks"), flags)


FILES = """
import errno, os, sys
from jobs import *
from seccomp import REGISTER, supervise

asked = 0

def answer(_number, _arguments):
    global asked
    asked += 1
    return 0

supervise(answer, (REGISTER,))
pipeline = Pipeline(4, SLOT_BYTES, "io_uring")
files = [os.open(f"{sys.argv[1]}-{index}", os.O_RDWR | os.O_CREAT) for index in range(3)]
tensors = [noise(SLOT_BYTES + index, index) for index in range(3)]
plan = cut([[Extent(index, 0, 0, len(tensor))] for index, tensor in enumerate(tensors)], SLOT_BYTES)
for _ in range(2):
    before = asked
    assert run(pipeline, make_job(WRITE, plan, [*map(plain, tensors)]), files).failure is None
    assert asked - before == 2, asked - before  # given at once, and taken out at once
assert [content(file, len(tensor)) for file, tensor in zip(files, tensors)] == [*map(bytes_of, tensors)]
failure = run(pipeline, make_job(WRITE, plan, [*map(plain, tensors)]), [files[0], 1 << 20, files[2]]).failure
assert failure.errno == errno.EBADF, failure
assert_usable(pipeline, files[0])
"""


def test_all_files_of_a_job_are_registered_in_one_call(tmp_path: Path) -> None:
    check(FILES, str(tmp_path / "blocks"))
