"""Restore: from a checkpoint to an arena, or to new tensors.

Theory of operation.  Names, shapes and dtypes that do not fit are found before a byte of the arena changes.  While
bytes arrive the arena is marked torn.  If the restore fails half-way it stays torn, and no checkpoint is taken of it
until a whole restore succeeds.

State that an optimizer would only make in a step of its own is made before the bytes arrive (`state.late`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from engine.errors import ArgumentError, MismatchError
from engine.format.layout import Segment, TensorSpec
from engine.format.manifest import Manifest, SegmentRecord
from engine.format.plan import Source
from engine.io.packing import pack_sources
from engine.state.arena import Arena, check_arena
from engine.state.late import StatePlan
from engine.state.select import Select, Selection
from engine.state.tensors import decode, decode_options, make_tensor
from engine.store.reader import Checkpoint, PassedOver, Reader, Target

Tensors = dict[str, Tensor]


class RestoreInfo(NamedTuple):
    """A restored checkpoint.  `nbytes_read` counts what came from disk, the manifest included."""

    step: int
    checkpoint_id: str
    path: str
    extra: Any
    nbytes_read: int
    passed_over: tuple[PassedOver, ...]


def restore(reader: Reader, arena: Arena, step: int | None, select: Select) -> RestoreInfo:
    """Fill an arena, or the selected part of it, and return what was restored.  Blocks."""
    check_arena(arena)
    arena.fence()
    arena.refresh()
    selection = Selection(select)
    was_torn = arena.torn

    def fill(checkpoint: Checkpoint) -> RestoreInfo:
        manifest = checkpoint.manifest
        extra = decode(manifest.extra)
        options = {name: decode_options(value) for name, value in manifest.optimizers.items()}
        _refuse_shards(manifest, manifest.segments)
        if selection.is_all:
            arena.check_options(options)  # before a long list of the names of other optimizers' state
        plan = _plan_state(arena, manifest, options) if selection.is_all else StatePlan({}, {}, {})
        targets = _match(arena, manifest, selection, plan.names)
        arena.mark_torn()  # before the first byte, so that an interrupt leaves it torn
        if plan.names:
            targets = _make_state(arena, manifest, plan, was_torn)
        if arena.resize({target.record.name: target.record.shape for target in targets}):
            targets = _match(arena, manifest, selection, ())
        nbytes = reader.read(checkpoint, targets, pack_sources(arena.sources), arena.memory, whole=selection.is_all)
        if selection.is_all:
            arena.restored(options)
        else:
            absent = {name for each in options.values() for name in each["absent"]}
            arena.restored_part({target.record.name for target in targets}, absent)
            if not was_torn:
                arena.mark_whole()
        return _info(checkpoint, extra, nbytes)

    info, passed_over = reader.use(step, fill)
    return info._replace(passed_over=passed_over)


def load(reader: Reader, step: int | None, select: Select) -> Tensors:
    """Read tensors into new memory, without an arena.  Blocks."""
    selection = Selection(select)

    def fill(checkpoint: Checkpoint) -> Tensors:
        manifest = checkpoint.manifest
        decode(manifest.extra)  # a manifest with a damaged part is damaged as a whole
        absent = {
            name for options in manifest.optimizers.values() for name in decode_options(options).get("absent", ())
        }
        by_role = {record.name for record in manifest.segments if selection.has_role(record.role)}
        aliases = {
            alias: name for alias, name in manifest.aliases.items() if name in by_role or selection.has_alias(alias)
        }
        needed = set(aliases.values())
        wanted = [r for r in manifest.segments if r.name not in absent and (r.name in needed or selection.has(r))]
        if not wanted and not selection.is_all:
            raise ArgumentError(_no_match(manifest, selection))
        _refuse_shards(manifest, wanted)
        targets = [Target(record, index, 0) for index, record in enumerate(wanted)]
        tensors = [make_tensor(record) for record in wanted]
        stored = {record.name: tensor for record, tensor in zip(wanted, tensors, strict=True)}
        sources = pack_sources([Source(tensor.data_ptr(), tensor.nbytes) for tensor in tensors])
        reader.read(checkpoint, targets, sources, tensors, whole=selection.is_all)
        names = {target.record.name for target in targets if selection.has(target.record)}
        result = {name: tensor for name, tensor in stored.items() if name in names}
        return result | {alias: stored[name] for alias, name in aliases.items() if name in stored}

    return reader.use(step, fill)[0]


def _refuse_shards(manifest: Manifest, records: Sequence[SegmentRecord]) -> None:
    """Refuse shards: the format has them, but this engine does not join them yet."""
    shards = sorted({record.name for record in records if record.global_shape})
    if shards:
        raise MismatchError(
            f"step {manifest.step} holds {', '.join(shards[:4])} in shards, which this engine cannot join"
        )


def _info(checkpoint: Checkpoint, extra: Any, nbytes: int) -> RestoreInfo:
    return RestoreInfo(
        checkpoint.step,
        checkpoint.manifest.checkpoint_id,
        checkpoint.path,
        extra,
        checkpoint.manifest_bytes + nbytes,
        (),
    )


def _no_match(manifest: Manifest, selection: Selection) -> str:
    known = selection.suggest(manifest.segments, manifest.aliases)
    return f"select={selection.select!r} matches no tensor of step {manifest.step}; {known}"


class _Here(NamedTuple):
    """A segment of the arena, and its location: a source and an offset there."""

    segment: Segment
    source: int
    offset: int


def _plan_state(arena: Arena, manifest: Manifest, options: Mapping[str, Mapping[str, Any]]) -> StatePlan:
    """The state that the arena's optimizers lack, and only their own steps would make."""
    stored = {
        record.name: TensorSpec(record.name, record.dtype, record.shape, record.role, record.layer)
        for record in manifest.segments
        if record.role == "optimizer" and not arena.leaves_out(record)
    }
    return arena.plan_state(stored, manifest.aliases, options)


def _make_state(arena: Arena, manifest: Manifest, plan: StatePlan, was_torn: bool) -> list[Target]:
    """Carry a plan out, and pair again: all locations are new."""
    try:
        arena.make_state(plan)
    except Exception:  # it was undone
        if not was_torn:
            arena.mark_whole()
        raise
    return _match(arena, manifest, Selection(None), ())


def _match(arena: Arena, manifest: Manifest, selection: Selection, planned: Collection[str]) -> list[Target]:
    """Pair the checkpoint's segments with the arena's, or list all differences; without planned state.

    Raises:
        MismatchError: listing every name, shape and dtype that differs.
    """
    stored = _picked(arena, manifest, selection)
    here = {
        segment.name: _Here(segment, *place)
        for segment, place in zip(arena.segments, arena.locations, strict=True)
        if segment.name in stored or selection.has(segment)
    }
    problems = [f"{name}: not in the checkpoint" for name in here.keys() - stored.keys() - set(planned)]
    stored = {name: record for name, record in stored.items() if name in here or not arena.leaves_out(record)}
    problems += [f"{name}: not in the arena" for name in stored.keys() - here.keys() - set(planned)]
    for name in (stored.keys() & here.keys()) - set(planned):
        record, segment = stored[name], here[name].segment
        if record.dtype != segment.dtype or (record.shape != segment.shape and not arena.can_resize(name)):
            problems.append(
                f"{name}: {record.dtype}{list(record.shape)} in the checkpoint, "
                f"{segment.dtype}{list(segment.shape)} in the arena"
            )
    if problems:
        lines = "\n  ".join(sorted(problems))
        if arena.makes_state_late and any(stored[name].role == "optimizer" for name in stored.keys() - here.keys()):
            lines += (
                "\nthe optimizer makes its state in its first step: "
                + ("" if selection.is_all else "a restore without select= makes it; or ")
                + "take one step before adopting, then restore (LBFGS: two or more)"
            )
        if here.keys() > stored.keys():
            lines += (
                "\nif the checkpoint holds a part of this training: adopt with the only= and exclude= of the run that "
                "was saved, or restore what it holds with select="
            )
        raise MismatchError(f"step {manifest.step} does not fit the arena; nothing was changed:\n  {lines}")
    if not stored and not selection.is_all:
        raise MismatchError(f"{_no_match(manifest, selection)}; nothing was changed")
    return [Target(record, here[name].source, here[name].offset) for name, record in stored.items() if name in here]


def _picked(arena: Arena, manifest: Manifest, selection: Selection) -> Mapping[str, SegmentRecord]:
    """The checkpoint's segments to restore into an arena.

    A tied name picks the segment that stores it.  An arena without an optimizer does not need the optimizer state of a
    layer, so a pattern that matches only the layer leaves that out.
    """
    tied = {name for alias, name in manifest.aliases.items() if not selection.is_all and selection.has_alias(alias)}
    picked = {}
    for record in manifest.segments:
        by_layer = arena.fenced or record.role != "optimizer"
        by_name = selection.has_name(record.name) or record.name in tied or selection.has_role(record.role)
        if by_name or (by_layer and selection.has_layer(record.layer)):
            picked[record.name] = record
    return picked
