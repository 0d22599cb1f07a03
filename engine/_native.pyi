"""The compiled module, as cffi makes it of `native/engine_native.h`.

Theory of operation.  mypy checks every call of native code against this stub, and tests/io/test_binding.py holds the
stub against the header.  A pointer is whatever cffi takes for one, which no type can say.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

Pointer: TypeAlias = Any

class Hash:
    digest: Any

class Lib:
    ENG_VERSION: int
    ENG_ALIGNMENT: int
    ENG_JOBS_MAX: int
    ENG_JOB_PLACES: int
    ENG_NO_PLACE: int
    ENG_STAGING_THREADS_MAX: int
    ENG_STAGING_BLOCKS_MAX: int
    ENG_DIMS_MAX: int
    ENG_RING_REGISTERED: int
    ENG_RING_PLAIN: int
    ENG_THREADS: int
    ENG_REFUSED_NOTHING: int
    ENG_REFUSED_RESOURCES: int
    ENG_REFUSED_RING: int
    ENG_REFUSED_BUFFERS: int
    ENG_REFUSED_FILES: int
    ENG_REFUSED_USERFAULTFD: int
    ENG_REFUSED_PROTECTION: int
    ENG_REFUSED_SCAN: int
    ENG_REFUSED_RANGE: int
    ENG_GUARD_COW: int
    ENG_GUARD_DETECT: int
    ENG_WRITE: int
    ENG_READ: int
    ENG_PENDING: int
    ENG_STAGED: int
    ENG_WRITTEN: int
    ENG_FAILED: int
    ENG_WITHHELD: int
    ENG_URGENT: int
    ENG_ALL_STAGED: int
    ENG_DONE: int
    ENG_NO_FAILURE: int
    ENG_IO_FAILURE: int
    ENG_SHORT_FAILURE: int
    ENG_CHECKSUM_FAILURE: int
    ENG_TORN_FAILURE: int
    ENG_INVALID_FAILURE: int
    ENG_ABORTED_FAILURE: int

    def eng_open(self, config: Pointer, pipeline: Pointer, /) -> int: ...
    def eng_close(self, pipeline: Pointer, error: int, timeout_ns: int, /) -> int: ...
    def eng_free(self, pipeline: Pointer, /) -> None: ...
    def eng_submit(self, pipeline: Pointer, job: Pointer, timeout_ns: int, /) -> int: ...
    def eng_attach(
        self, pipeline: Pointer, job: Pointer, fds: Pointer, known: Pointer, is_known: Pointer, /
    ) -> int: ...
    def eng_release(self, pipeline: Pointer, job: Pointer, blocks: Pointer, count: int, /) -> int: ...
    def eng_abort(self, pipeline: Pointer, job: Pointer, error: int, /) -> None: ...
    def eng_wait(self, pipeline: Pointer, job: Pointer, milestone: int, timeout_ns: int, /) -> int: ...
    def eng_reached(self, job: Pointer, milestone: int, /) -> int: ...
    def eng_direct_alignment(self, fd: int, /) -> int: ...
    def eng_allocate(self, fd: int, offset: int, nbytes: int, /) -> int: ...
    def eng_close_file(self, fd: Pointer, /) -> None: ...
    def eng_guard_open(self, kind: int, address: int, nbytes: int, refused: Pointer, guard: Pointer, /) -> int: ...
    def eng_guard_arm(self, job: Pointer, /) -> int: ...
    def eng_guard_disarm(self, job: Pointer, /) -> None: ...
    def eng_guard_free(self, guard: Pointer, /) -> None: ...
    def eng_hash_bytes(self, bytes: Pointer, nbytes: int, /) -> Hash: ...

class FFI:
    NULL: Pointer
    def new(self, cdecl: str, init: object = ..., /) -> Any: ...
    def cast(self, cdecl: str, value: object, /) -> Any: ...
    def from_buffer(self, cdecl_or_buffer: object, buffer: object = ..., /) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def unpack(self, cdata: Any, length: int, /) -> Any: ...
    def memmove(self, dest: object, src: object, n: int, /) -> None: ...
    def sizeof(self, cdecl_or_cdata: object, /) -> int: ...
    def gc(self, cdata: Any, destructor: Callable[[Any], object] | None, size: int = ...) -> Any: ...
    def release(self, cdata: Any, /) -> None: ...
    def callback(
        self,
        cdecl: str,
        python_callable: Callable[..., Any],
        error: Any = ...,
        onerror: Callable[..., Any] | None = ...,
    ) -> Any: ...

ffi: FFI
lib: Lib
