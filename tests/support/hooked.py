"""A file system that calls a test before each operation, so that the test can delay or refuse it.

Theory of operation.  `before` is called with the operation, in the thread that is about to do it.  It may block, and it
may raise.  In a monitor, `hooked_monitor` sends the call to the test.

Rules: no torch; the monitor's process imports this.
"""

from __future__ import annotations

from engine.io.descriptor import Descriptor
from engine.store.filesystem import Filesystem


class HookedFilesystem(Filesystem):
    """The real one, which asks `before` first.

    Operations are named after their methods, but files that are opened to be read: those are ``"open_to_read"``.
    """

    def before(self, operation: str, path: str, target: str = "") -> None:
        """Called before an operation; only a rename and a link have a target."""

    def make_directory(self, path: str) -> None:
        self.before("make_directory", path)
        super().make_directory(path)

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        self.before("open_for_blocks" if write else "open_to_read", path)
        return super().open_for_blocks(path, write, direct, directory)

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self.before("allocate", path)
        super().allocate(descriptor, nbytes, path)

    def truncate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self.before("truncate", path)
        super().truncate(descriptor, nbytes, path)

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        self.before("sync_file", path)
        super().sync_file(descriptor, path)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        self.before("write_new_file", path)
        super().write_new_file(path, content)

    def sync_directory(self, path: str) -> None:
        self.before("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        self.before("rename", source, target)
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self.before("link", source, target)
        super().link(source, target)

    def read_range(self, descriptor: Descriptor, offset: int, nbytes: int, path: str) -> bytes:
        self.before("read_range", path)
        return super().read_range(descriptor, offset, nbytes, path)

    def write_range(self, descriptor: Descriptor, offset: int, content: bytes, path: str) -> None:
        self.before("write_range", path)
        super().write_range(descriptor, offset, content, path)
