"""Store: one directory of checkpoints, and the native thread that moves their blocks.

Theory of operation.  A `Store` has the owner of the directory, which holds the lock, and one native pipeline with its
slots.  `Writer`, `Reader` and `Verifier` use both.  It knows bytes and steps, and neither tensors nor training: it runs
without torch.

Ctrl-C may come while a Store is opened, or before its opener has it.  A Store that is dropped closes everything: its
lock and its pipeline close themselves with their last reference, and no cycle of references holds them.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.io.backend import open_pipeline
from engine.options import Options
from engine.store.access import WriteAccess
from engine.store.committer import Committer
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner
from engine.store.reader import Reader
from engine.store.retention import Retention
from engine.store.verify import Verifier
from engine.store.writer import Writer


class Store:
    """One directory of checkpoints, open for writing.

    Args:
        directory: created if it does not exist.
        options: how blocks are moved.
        retention: which checkpoints are kept, or None for the rule that is stored with the run.
        filesystem: the file operations.
        own: makes the owner from the directory, the file system, the number of spares and the rule.

    Raises:
        LockedError: another Engine has the directory.
        PlatformError: the requested backend does not work here; has the cause and the remedy.
        StorageError: the directory cannot be created, read or synced.
    """

    def __init__(
        self,
        directory: str,
        options: Options,
        retention: Retention | None,
        filesystem: Filesystem,
        own: Callable[[str, Filesystem, int, Retention | None], WriteAccess] = Owner,
    ) -> None:
        self.catalog = own(directory, filesystem, options.max_async, retention)
        try:
            self.pipeline, self.probe = open_pipeline(
                self.catalog.root,
                filesystem,
                options.backend,
                options.slot_count,
                options.block_bytes,
                options.staging_threads,
            )
        except BaseException:  # Ctrl-C too
            self.catalog.close()
            raise
        try:
            pipeline = self.pipeline
            self.writer = Writer(pipeline, Committer(self.catalog, options.rewrite_all))
            self.reader = Reader(self.catalog, lambda: pipeline)
            self.verifier = Verifier(self.catalog, self.reader)
        except BaseException:
            self.close()
            raise

    @property
    def root(self) -> str:
        """The directory's real path."""
        return self.catalog.root

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.catalog.steps()

    def retire(self) -> None:
        """Retire every step that the retention rule does not keep."""
        self.catalog.retire()

    def look(self) -> None:
        """Called while the Engine waits for its saves to end: nothing to do; see `MonitoredStore.look`."""

    def close(self) -> None:
        """Drain the pipeline, and give the directory back.  Blocks.  May be called again."""
        self.pipeline.close()
        self.catalog.close()
