"""Run: `engine.open`, which reads a run and changes nothing.

Theory of operation.  A `Run` takes no lock and creates nothing, so it works beside a training, on a read-only mount,
and in another user's or a container's directory.  Each call lists the steps afresh.  The native thread that reads
blocks is started for the first block; it pins no memory, so that it takes none of the training's limit.

If a step is retired while it is read, the call raises `RetiredError`, or reads the next newest if the newest was asked
for.  It never gets another step's bytes: see `store.directory`.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

from engine.errors import ClosedError, ForkedError, UsageError
from engine.io.backend import open_to_read
from engine.io.pipeline import Pipeline
from engine.options import Options, Tunables, with_tunables
from engine.session.reading import Lent, Reading
from engine.session.save import SaveStatus
from engine.session.status import in_flight_of
from engine.store.directory import Directory, path_of
from engine.store.filesystem import Filesystem
from engine.store.reader import Reader
from engine.store.verify import Verifier

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Run(Reading):
    """A run that is read, made by `engine.open`.  Closed by `close`, by collection, or at exit."""

    def __new__(cls, *given: object, **_named: object) -> Run:
        """Refuse a call by anybody but `open_run`, which gives a `Directory`."""
        if not given or not isinstance(given[0], Directory):
            raise UsageError('a Run is made by engine.open("path of the run")')
        return super().__new__(cls)

    def __init__(self, directory: Directory, options: Options) -> None:
        """Not for callers: `open_run` makes them."""
        self._directory = directory
        self._pipelines = _Pipelines(options)
        reader = Reader(directory, self._pipelines.get)
        self._lent = Lent(reader, Verifier(directory, reader))
        self._pid = os.getpid()
        self._closer = weakref.finalize(self, self._pipelines.close)

    @property
    def path(self) -> str:
        """The run's directory."""
        return self._directory.root

    def in_flight(self) -> tuple[SaveStatus, ...]:
        """The saves in flight of the training that has this run, by step, and how far each chunk has come.

        Nothing if none is in flight, or no Engine of this host has the run.

        Raises:
            PlatformError: the process that has the run does not answer, or cannot be asked: it is another user's.
        """
        self._lend()
        return in_flight_of(self.path)

    def close(self) -> None:
        """Stop the native thread, if one was started.  May be called again."""
        self._closer()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({self.path!r}, {len(self._directory.steps())} checkpoints)"

    def _lend(self) -> Lent:
        if os.getpid() != self._pid:
            raise ForkedError(f"this Run was opened by process {self._pid}; call engine.open in this process")
        if not self._closer.alive:
            raise ClosedError(f"the Run of {self.path} has been closed; call engine.open again")
        return self._lent


class _Pipelines:
    """At most one pipeline, opened at first use."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._pid = os.getpid()
        self._mutex = threading.RLock()  # a signal handler may close in the middle of get
        self._closed = False
        self._pipeline: Pipeline | None = None

    def get(self) -> Pipeline:
        """The pipeline, open.

        Raises:
            ClosedError: `close` was called; a thread started now would never be stopped.
        """
        with self._mutex:
            if self._pipeline is None and not self._closed:
                options = self._options
                self._pipeline = open_to_read(options.slot_count, options.block_bytes, options.staging_threads)
            if self._closed:
                self.close()
                raise ClosedError("the Run has been closed; call engine.open again")
            assert self._pipeline is not None
            return self._pipeline

    def close(self) -> None:
        """Stop the pipeline's thread, in the process that started it."""
        if os.getpid() != self._pid:
            return  # a forked child: the mutex may have been held at the fork
        with self._mutex:
            self._closed = True
            pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()


def open_run(
    directory: str | bytes | os.PathLike[str], *, options: Options | None = None, **tunables: Unpack[Tunables]
) -> Run:
    """Open a run to read its checkpoints.  Takes no lock, creates nothing, and works beside a training.

    Args:
        directory: the run's.
        options: of these `staging_bytes` and `block_bytes` count; any may also be given by its own keyword.

    Raises:
        NotFoundError: there is no such directory, or it is no run.
        StorageError: the directory cannot be read.
    """
    options = with_tunables("engine.open", options or Options(), tunables, ["options"])
    return Run(Directory(path_of(directory), Filesystem()), options)
