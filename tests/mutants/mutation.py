"""One small change to one file, and the random sample that a run tries.

Theory of operation.  A mutation replaces a byte range of a file.  Its name is `path:line:column:kind`, which stays the
same as long as the file does, so that a run's report is enough to try a mutation again.  Kinds are weighted equally
when a run samples: otherwise the constants, of which there are most, would be most of every run.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """Replaces `source[start:end]` of the file `path`."""

    path: str
    start: int
    end: int
    replacement: bytes
    kind: str
    line: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}:{self.column}:{self.kind}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement + source[self.end :]

    def describe(self, source: bytes) -> str:
        """The change, on one line."""

        def flat(text: bytes) -> str:
            words = " ".join(text.decode().split())
            return words if len(words) <= 90 else words[:60] + " ... " + words[-25:]

        return f"`{flat(source[self.start : self.end])}` -> `{flat(self.replacement)}`"


def at(path: str, source: bytes, start: int, end: int, replacement: bytes, kind: str) -> Mutation:
    """The mutation of a byte range, named by the line and column that it starts at."""
    line = source.count(b"\n", 0, start) + 1
    column = start - (source.rfind(b"\n", 0, start) + 1)
    return Mutation(path, start, end, replacement, kind, line, column)


def sample(mutations: Iterable[Mutation], seed: int) -> Iterator[Mutation]:
    """Every mutation once, in an order that the seed says; each next kind is drawn among those that have some left."""
    chance = random.Random(seed)
    by_kind: defaultdict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations:
        by_kind[mutation.kind].append(mutation)
    for kind in sorted(by_kind):
        by_kind[kind].sort()
        chance.shuffle(by_kind[kind])
    while by_kind:
        kind = chance.choice(sorted(by_kind))
        yield by_kind[kind].pop()
        if not by_kind[kind]:
            del by_kind[kind]
