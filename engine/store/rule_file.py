"""Rule file: the retention rule that is stored with a run, in `.engine/retention.json`.

Theory of operation.  A rule that is given when an engine opens a run replaces the stored one; without one the stored
rule is in effect.  If the stored rule cannot be read, every checkpoint is kept.  The file is replaced by a rename, so a
kill leaves the old rule or the new one.

Called by `catalog`, which holds the run's lock.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

from engine.errors import CorruptError, StorageError, warn
from engine.store.filesystem import Filesystem
from engine.store.retention import (
    KEEP_ALL,
    RETENTION_BYTES_MAX,
    Retention,
    StepFacts,
    decode_rule,
    encode_rule,
    to_retire,
)


class RuleFile:
    """The file with the rule of one run.

    Args:
        filesystem: the file operations.
        private: the run's `.engine`.
        sync: makes a rename in a directory durable.
    """

    def __init__(self, filesystem: Filesystem, private: str, sync: Callable[[str], None]) -> None:
        self._filesystem = filesystem
        self._private = private
        self._sync = sync
        self._path = os.path.join(private, "retention.json")

    def settle(
        self, explicit: Retention | None, steps: Sequence[int], facts: Callable[[int], StepFacts | None]
    ) -> Retention:
        """The rule in effect: the given one, or the one stored with the run.  Stores a given rule, and a new run's.

        Args:
            explicit: the given rule, or None.
            steps: the committed steps.
            facts: returns the facts of a step, as for `to_retire`.
        """
        stored: Retention | None = None
        status = self._filesystem.status(self._path)
        is_stored = status is not None
        if status is not None:
            in_the_way = stat.S_ISDIR(status.st_mode)  # no rename replaces it
            try:
                stored = self._read()
            except CorruptError as error:
                if explicit is None:
                    first = "move it away: " if in_the_way else ""
                    warn(f"{error}; {first}every checkpoint is kept until an Engine is opened with a rule")
                elif in_the_way:
                    raise StorageError(errno.EISDIR, "open", self._path) from None
        if explicit is None and (is_stored or steps):
            return stored or KEEP_ALL
        rule = explicit or Retention()
        if rule != stored:
            surplus = to_retire(rule, steps, facts)
            if surplus:
                warn(
                    f"{rule} keeps fewer checkpoints of {os.path.dirname(self._private)} than are there: once the next "
                    f"save is durable, {len(surplus)} of {len(steps)} are retired; open it with another rule to keep "
                    "them"
                )
            self._store(rule)
        return rule

    def _read(self) -> Retention:
        raw = self._filesystem.read_file(self._path, RETENTION_BYTES_MAX)
        try:
            return decode_rule(raw)
        except CorruptError as error:
            raise CorruptError(f"{self._path}: {error}") from None

    def _store(self, rule: Retention) -> None:
        new = self._path + ".new"
        try:
            if self._filesystem.status(new) is not None:  # left by a kill
                self._filesystem.unlink(new)
            self._filesystem.write_new_file(new, encode_rule(rule))
            self._filesystem.rename(new, self._path)
            self._sync(self._private)
        except StorageError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk must not prevent a restore
                raise
            with suppress(StorageError):
                self._filesystem.unlink(new)
            warn(f"{rule} could not be stored with the run, and is forgotten when this Engine is closed: {error}")
