"""The handover of layers: a block is complete when all of its segments are taken, whatever the order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from strategies import SMALL_SHAPES, specs

from engine.format.handover import Handover, Layers, Spans
from engine.format.layout import Layout, lay_out
from engine.format.plan import ALIGNMENT, Plan, file_runs, make_plan

# Few paths, so that layers are within layers and have several tensors.
PATHS = st.builds(
    lambda path, leaf: ".".join([*path, leaf]),
    st.lists(st.sampled_from(["a", "b", "ab", "0"]), max_size=3),
    st.text("wxyz", min_size=1, max_size=3),
)


@st.composite
def planned(draw: st.DrawFn) -> tuple[Layout, Plan]:
    layout = lay_out(draw(specs(SMALL_SHAPES | st.sampled_from([[3000], [5000]]), max_count=10, names=PATHS)))
    first = len(layout.files)
    runs = file_runs(layout, [(first, segment.arena_offset) for segment in layout.segments])
    block_bytes = draw(st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, 16 * ALIGNMENT]))
    return layout, make_plan(layout, runs, block_bytes, draw(st.sampled_from([ALIGNMENT, 4 * ALIGNMENT])))


def touches(plan: Plan, layout: Layout, block: int, segment: int) -> bool:
    """Whether a block holds a byte of a segment, in the obvious way."""
    b, s = plan.blocks[block], layout.segments[segment]
    ends = min(b.file_offset + b.nbytes, s.file_offset + s.nbytes)
    return b.file_index == s.file_index and max(b.file_offset, s.file_offset) < ends


@given(planned())
def test_spans_are_the_blocks_that_hold_a_byte(drawn: tuple[Layout, Plan]) -> None:
    layout, plan = drawn
    spans = Spans.of(plan, layout)
    for index in range(len(layout.segments)):
        want = [block for block in range(len(plan.blocks)) if touches(plan, layout, block, index)]
        assert list(range(spans.firsts[index], spans.lasts[index])) == want
    assert sum(spans.counts) == sum(b - a for a, b in zip(spans.firsts, spans.lasts, strict=True))


@given(planned(), st.data())
def test_a_block_is_complete_with_its_last_segment_and_every_early_byte_is_named(
    drawn: tuple[Layout, Plan], data: st.DataObject
) -> None:
    layout, plan = drawn
    handover = Handover(plan, layout, Spans.of(plan, layout))
    left = data.draw(st.permutations(range(len(layout.segments))))
    complete = set(handover.ownerless())
    assert complete == {
        block
        for block in range(len(plan.blocks))
        if not any(touches(plan, layout, block, each) for each in range(len(layout.segments)))
    }
    taken: list[int] = []
    while left:
        count = data.draw(st.integers(1, len(left)))
        group, left = left[:count], left[count:]
        assert sorted(handover.left([*group, *taken])) == sorted(group)
        result = handover.take(group)
        taken += group
        want = {
            block for block in range(len(plan.blocks)) if not any(touches(plan, layout, block, each) for each in left)
        }
        assert complete.isdisjoint(result.blocks) and len(set(result.blocks)) == len(result.blocks)
        complete |= set(result.blocks)
        assert complete == want
        early = {(part.block, part.segment) for part in result.early}
        assert early == {
            (block, each)
            for block in set(range(len(plan.blocks))) - complete
            for each in group
            if touches(plan, layout, block, each)
        }
        for part in result.early:
            block, segment = plan.blocks[part.block], layout.segments[part.segment]
            start = max(block.file_offset, segment.file_offset) - segment.file_offset
            end = min(block.file_offset + block.nbytes, segment.file_offset + segment.nbytes) - segment.file_offset
            assert (part.start, part.end) == (start, end)
        layers = {layout.segments[each].layer for each in left} - {""}
        names = {layout.segments[each].name for each in left}
        missing = set(handover.missing())
        assert layers <= missing <= layers | names and bool(missing) == bool(left)


@given(planned(), st.lists(st.sampled_from(["a", "b", "ab", "0"]), max_size=3))
def test_a_layer_has_its_own_segments_and_those_of_the_layers_in_it(
    drawn: tuple[Layout, Plan], path: list[str]
) -> None:
    segments = drawn[0].segments
    layers, layer = Layers(segments), ".".join(path)
    within = [i for i, each in enumerate(segments) if not path or f"{each.layer}.".startswith(f"{layer}.")]
    assert layers.within(layer) == within
    assert layers.of(layer) == [i for i, each in enumerate(segments) if each.layer == layer]
    assert all(layers.named(each.name) == i for i, each in enumerate(segments)) and layers.named("none") is None
