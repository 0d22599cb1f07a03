"""Facts: the tags and metrics of committed steps, for the retention rule.

Theory of operation.  They are read from a step's manifest when the rule first asks for them, and kept.  A step whose
manifest cannot be read has no facts, and the rule keeps it.

Called by `catalog`, with its lock held.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import CheckpointError, NotFoundError, StorageError, warn
from engine.store.directory import Directory
from engine.store.retention import StepFacts


class Facts:
    """The facts of the steps of a directory.

    Args:
        directory: of the checkpoints.
        load: returns the facts of a step, or None if they cannot be read; by default from its manifest.
    """

    def __init__(self, directory: Directory, load: Callable[[int], StepFacts | None] | None = None) -> None:
        self._directory = directory
        self._load = load
        self._known: dict[int, StepFacts] = {}
        self._untold: set[int] = set()  # steps whose facts could not be read, and were warned of

    def of(self, step: int) -> StepFacts | None:
        """Tag and metrics of a committed step; None, with one warning, if they cannot be read."""
        if step not in self._known:
            found = (self._load or self._read)(step)
            if found is None:
                return None
            self._known[step] = found
        return self._known[step]

    def forget(self, step: int) -> None:
        """Forget a step that is no longer committed."""
        self._known.pop(step, None)

    def _read(self, step: int) -> StepFacts | None:
        try:
            with self._directory.opened(step) as opened:
                found = opened.summary()
        except NotFoundError:  # it was deleted by hand
            return StepFacts(step)
        except (CheckpointError, StorageError) as error:
            if step not in self._untold:
                self._untold.add(step)
                warn(
                    f"step {step} is kept, since its tag and metrics cannot be read: {error}; delete({step}) deletes it"
                )
            return None
        return StepFacts(step, found.tag, {name: x for name, x in found.metrics.items() if x is not None})
