"""Handover: which blocks of a plan are complete as the layers of an arena are handed over one by one.  Pure.

Theory of operation.  A block may be staged once every segment that it holds a part of is final.  `Spans` has for each
segment the blocks that it is in, and for each block the number of its segments; it depends on the plan alone.  A
`Handover` counts down for one save.

    segment  | layers.0 ..| layers.1 ........|
    block    |-------|-------|-------|-------|     the second one is complete when both layers are

The part of a layer in a block that is not complete yet is **early**: nothing protects it until the block is released.

Rules: no torch, no I/O.  Called by `session.layerwise`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.format.layout import Layout, Segment
from engine.format.plan import Plan


class Layers:
    """The segments of each layer of a layout, by index."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._by_layer: dict[str, list[int]] = {}
        for index, segment in enumerate(segments):
            self._by_layer.setdefault(segment.layer, []).append(index)
        self._sorted = sorted(self._by_layer)
        self._by_name = {segment.name: index for index, segment in enumerate(segments)}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that hold a tensor, in order of the layout."""
        return tuple(self._by_layer)

    def of(self, layer: str) -> list[int]:
        """The segments of this very layer."""
        return self._by_layer.get(layer, [])

    def within(self, layer: str) -> list[int]:
        """The segments of a layer and of every layer in it; of "" all."""
        if not layer:
            return sorted(index for indices in self._by_layer.values() for index in indices)
        found = list(self.of(layer))
        prefix = f"{layer}."
        at = bisect_left(self._sorted, prefix)
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            found += self._by_layer[self._sorted[at]]
            at += 1
        return sorted(found)

    def named(self, name: str) -> int | None:
        """The segment with this name, or None."""
        return self._by_name.get(name)


class Spans(NamedTuple):
    """The blocks of each segment, and the number of segments of each block.

    Attributes:
        firsts, lasts: for each segment its first block and the block after its last one; equal if it has no bytes.
        counts: for each block.
    """

    firsts: tuple[int, ...]
    lasts: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(plan: Plan, layout: Layout) -> Spans:
        """The spans of a plan of this layout."""
        starts = [(block.file_index, block.file_offset) for block in plan.blocks]
        firsts, lasts, counts = [], [], [0] * len(starts)
        for segment in layout.segments:
            first = last = 0
            if segment.nbytes:
                last = bisect_left(starts, (segment.file_index, segment.file_offset + segment.nbytes))
                first = bisect_left(starts, (segment.file_index, segment.file_offset + 1)) - 1
            firsts.append(first)
            lasts.append(last)
            for block in range(first, last):
                counts[block] += 1
        return Spans(tuple(firsts), tuple(lasts), tuple(counts))


class Early(NamedTuple):
    """A part of a segment that is in a block which is not complete: `start` and `end` are bytes of the segment."""

    block: int
    segment: int
    start: int
    end: int


class Taken(NamedTuple):
    """The blocks that have become complete, and the parts that are early."""

    blocks: tuple[int, ...]
    early: tuple[Early, ...]


class Handover:
    """The progress of one save."""

    def __init__(self, plan: Plan, layout: Layout, spans: Spans) -> None:
        self._plan = plan
        self._segments = layout.segments
        self._spans = spans
        self._counts = list(spans.counts)
        self._is_taken = [False] * len(layout.segments)

    def ownerless(self) -> list[int]:
        """The blocks that hold no segment, only a header: they are complete from the start."""
        return [block for block, count in enumerate(self._spans.counts) if count == 0]

    def left(self, indices: Iterable[int]) -> list[int]:
        """Those of these segments that are not taken."""
        return [index for index in indices if not self._is_taken[index]]

    def missing(self) -> list[str]:
        """The layers of the segments that are not taken, and the names of those that belong to none.

        Optimizer state without a layer is that of a parameter without one, so it is named only if nothing else is left.
        """
        left = [self._segments[index] for index in self.left(range(len(self._segments)))]
        shown = [each for each in left if each.layer or each.role != "optimizer"] or left
        return sorted({each.layer or each.name for each in shown})

    def take(self, indices: Sequence[int]) -> Taken:
        """Segments are final; none was taken before."""
        complete: list[int] = []
        touched: list[tuple[int, int]] = []
        for index in indices:
            assert not self._is_taken[index], index
            self._is_taken[index] = True
            for block in range(self._spans.firsts[index], self._spans.lasts[index]):
                self._counts[block] -= 1
                touched.append((block, index))
                if self._counts[block] == 0:
                    complete.append(block)
        early = [self._part(block, index) for block, index in touched if self._counts[block]]
        return Taken(tuple(complete), tuple(early))

    def _part(self, block_index: int, segment_index: int) -> Early:
        block, segment = self._plan.blocks[block_index], self._segments[segment_index]
        start = max(0, block.file_offset - segment.file_offset)
        end = min(segment.nbytes, block.file_offset + block.nbytes - segment.file_offset)
        return Early(block_index, segment_index, start, end)
