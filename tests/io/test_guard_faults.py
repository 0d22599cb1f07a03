"""Faults of the kernel under a guard: a writer goes on, and the save fails.

The kernel refuses a system call of userfaultfd(2) by a seccomp filter, which cannot be removed, so each test has a
process of its own.
"""

from __future__ import annotations

from guarded import needs_cow
from processes import in_a_process_of_its_own

pytestmark = needs_cow

SCENE = """
import faulthandler; faulthandler.dump_traceback_later(40, exit=True)
import ctypes, errno, os, platform, tempfile, threading
import seccomp
from guarded import Guarded
from jobs import content, finish, whole
from engine.format.plan import ALIGNMENT
from engine.io.guard import Guard, GuardError
from engine.io.job import FailureKind
from engine.io.pipeline import Pipeline

MIB = 1 << 20
NBYTES, BLOCK_BYTES = 8 * MIB, 1 * MIB
READ, IOCTL = (63, 29) if platform.machine() == "aarch64" else (0, 16)
CLONE3 = 435
UFFDIO_WRITEPROTECT = 0xC018AA06  # linux/userfaultfd.h: _IOWR(0xAA, 6, struct uffdio_writeprotect)
file = tempfile.TemporaryFile()  # made now: open() calls ioctl(2) with the GIL, which the answer needs
refused = []  # the number of each refused call; empty: nothing is refused yet
is_faulty = False

def end():
    '''Leave at once: the thread that answers for the kernel does not live as long as the interpreter.'''
    print("done", flush=True)
    os._exit(0)

def is_uffd(fd):
    return "userfaultfd" in os.readlink(f"/proc/self/fd/{fd}")

def write_beside(pipeline, memory, plan, fd):
    '''Write to all blocks, of which two slots can stage two, until the file comes.'''
    job = memory.begin(pipeline, plan)
    writer = threading.Thread(target=memory.tensor.fill_, args=(7,), daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive(), "the writer hangs"
    assert memory.bytes_now() == b"\\7" * NBYTES
    pipeline.attach(job, [fd])
    failure = finish(pipeline, job).failure
    assert failure is not None and (failure.kind, failure.errno) == (FailureKind.TORN, errno.ETIMEDOUT), failure
    assert refused, "nothing was refused"
    return job

def assert_unguarded(memory, plan):
    '''No save can be armed any more, and nobody waits.'''
    try:
        memory.guard.arm(memory.make_job(plan), plan)
    except Exception as error:
        assert "EBADF" in str(error), error
    else:
        raise AssertionError("the guard was armed")
    memory.tensor.fill_(3)
    memory.guard.close()
"""


def run(code: str) -> None:
    done = in_a_process_of_its_own(SCENE + code)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


def test_a_fault_that_cannot_be_read_lets_writers_go_on() -> None:
    run("""
def answer(number, arguments):
    if is_faulty and is_uffd(arguments[0]):
        refused.append(number)
        return errno.EIO
    return 0

seccomp.supervise(answer, (READ,))
pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), Guarded("cow", NBYTES), whole(NBYTES, BLOCK_BYTES)
is_faulty = True
write_beside(pipeline, memory, plan, file.fileno())
assert_unguarded(memory, plan)
end()
""")


def test_a_unit_that_cannot_be_unprotected_lets_writers_go_on() -> None:
    run("""
def answer(number, arguments):
    if is_faulty and arguments[1] == UFFDIO_WRITEPROTECT:
        if ctypes.c_uint64.from_address(arguments[2] + 16).value == 0:  # `mode`: unprotect
            refused.append(number)
            return errno.ENOMEM
    return 0

seccomp.supervise(answer, (IOCTL,))
pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), Guarded("cow", NBYTES), whole(NBYTES, BLOCK_BYTES)
is_faulty = True
write_beside(pipeline, memory, plan, file.fileno())
assert_unguarded(memory, plan)
end()
""")


def test_memory_that_cannot_be_protected_is_refused() -> None:
    run("""
def answer(number, arguments):
    if is_faulty and arguments[1] == UFFDIO_WRITEPROTECT:
        if ctypes.c_uint64.from_address(arguments[2] + 16).value:
            refused.append(number)
            return errno.ENOMEM
    return 0

seccomp.supervise(answer, (IOCTL,))
pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), Guarded("cow", NBYTES), whole(NBYTES, BLOCK_BYTES)
is_faulty = True
try:
    memory.begin(pipeline, plan)
except Exception as error:
    assert refused and "ENOMEM" in str(error), error
else:
    raise AssertionError("the guard was armed")
memory.tensor.fill_(3)
is_faulty = False
job = memory.begin(pipeline, plan)
pipeline.attach(job, [file.fileno()])
assert finish(pipeline, job).failure is None
end()
""")


def test_a_guard_whose_thread_does_not_start_protects_nothing() -> None:
    run("""
def answer(number, arguments):
    if is_faulty:
        refused.append(number)
        return errno.EAGAIN
    return 0

seccomp.supervise(answer, (CLONE3,))
memory = Guarded("cow", NBYTES)
memory.guard.close()
descriptors = os.listdir("/proc/self/fd")
is_faulty = True
try:
    Guard("cow", memory.tensor.data_ptr(), NBYTES)
except GuardError as error:
    assert refused, error
else:
    raise AssertionError("the guard was opened")
assert os.listdir("/proc/self/fd") == descriptors
is_faulty = False  # torch starts threads
memory.tensor.zero_()
end()
""")
