"""Restore: from a checkpoint to an arena, to a module, to a dict of tensors, or to new tensors.

Theory of operation.  Names, shapes and dtypes that do not fit are found before a byte of the arena changes.  While
bytes arrive the arena is marked torn.  If the restore fails half-way it stays torn, and no checkpoint is taken of it
until a whole restore succeeds.

State that an optimizer would only make in a step of its own is made before the bytes arrive (`state.late`).

With ``strict=False`` whatever does not fit stays as it is, and the `RestoreInfo` names it.  Such a restore leaves a
torn arena torn, unless it fills every segment.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from engine.errors import ArgumentError, MismatchError
from engine.format.layout import TensorSpec
from engine.format.manifest import Manifest, SegmentRecord
from engine.format.plan import Source
from engine.io.packing import pack_sources
from engine.session.matching import Match, check_match, match, match_extra_states, match_tensors, no_match
from engine.state.arena import Arena, check_arena
from engine.state.fence import wait_for_saves_of
from engine.state.late import Known, StatePlan
from engine.state.select import Select, Selection, role
from engine.state.tensors import decode, decode_options, make_tensor
from engine.store.reader import Checkpoint, PassedOver, Reader, Target

Tensors = dict[str, Tensor]

NO_PLAN = StatePlan({}, {}, {}, {}, Known({}, {}, {}))

# How a RestoreInfo shows `extra`.
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


class RestoreInfo(NamedTuple):
    """A restored checkpoint.

    Attributes:
        nbytes_read: bytes that came from disk, the manifest included.
        passed_over: newer checkpoints that are damaged.
        missing, unexpected, mismatched: with ``strict=False`` the names of the tensors that only the arena has, that
            only the checkpoint has, and that have another dtype or shape there.  The names of modules' extra state
            (`<path>._extra_state`) are among the first two.
        hyperparameters: with ``strict=False`` why hyperparameters and plain optimizer state were not restored; else "".
    """

    step: int
    checkpoint_id: str
    path: str
    extra: Any
    nbytes_read: int
    passed_over: tuple[PassedOver, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    hyperparameters: str = ""

    def __repr__(self) -> str:
        """Only the beginning of `extra`, which with random generators has thousands of numbers: a notebook shows it."""
        parts = (
            f"{name}={_SHORT.repr(value) if name == 'extra' else repr(value)}" for name, value in self._asdict().items()
        )
        return f"RestoreInfo({', '.join(parts)})"


def restore_module(reader: Reader, model: nn.Module, step: int | None, select: Select, strict: bool) -> RestoreInfo:
    """Fill the parameters and buffers of a model at their own locations, as `restore`.  Blocks."""
    wait_for_saves_of(model.parameters())
    weights = role("model", "buffer") if select is None else select
    return restore(reader, Arena.over(model), step, weights, strict, takes_extra_states=select is None)


def restore_tensors(
    reader: Reader, tensors: Mapping[str, Tensor], step: int | None, select: Select, strict: bool
) -> RestoreInfo:
    """Fill tensors by their names, or the selected ones of them, at their own locations.  Blocks."""
    if not tensors:
        raise ArgumentError("the dict has no tensors to fill; load(select=...) returns new ones")
    arena = Arena.wrap(tensors)
    wait_for_saves_of(tensors.values())
    selection = Selection(select)

    def fill(checkpoint: Checkpoint) -> RestoreInfo:
        manifest = checkpoint.manifest
        extra = decode(manifest.extra)
        _extra_states(manifest)
        found, copies = match_tensors(arena, manifest, selection)
        _refuse_shards(manifest, [target.record for target in found.targets])
        if strict or not found.targets:
            check_match(arena, manifest, found, selection)
        nbytes = reader.read(checkpoint, found.targets, pack_sources(arena.sources), arena.memory, whole=False)
        live = arena.state_dict()
        for source, copy in copies:
            live[copy].copy_(live[source])
        return _info(checkpoint, extra, nbytes, found, (), (), "")

    info, passed_over = reader.use(step, fill)
    return info._replace(passed_over=passed_over)


def restore(
    reader: Reader,
    arena: Arena,
    step: int | None,
    select: Select,
    strict: bool,
    takes_extra_states: bool = False,
) -> RestoreInfo:
    """Fill an arena, or the selected part of it, and return what was restored.  Blocks.

    Args:
        takes_extra_states: of a restore of all weights: what modules keep besides tensors is restored, too.
    """
    check_arena(arena)
    arena.fence()
    arena.refresh()
    selection = Selection(select)
    was_torn = arena.torn

    def fill(checkpoint: Checkpoint) -> RestoreInfo:
        manifest = checkpoint.manifest
        extra = decode(manifest.extra)
        options = {name: decode_options(value) for name, value in manifest.optimizers.items()}
        extra_states = _extra_states(manifest)
        _refuse_shards(manifest, manifest.segments)
        plan, refusal = NO_PLAN, ""
        if selection.is_all:  # before a long list of the names of other optimizers' state
            plan, refusal = _plan_options(arena, manifest, options, strict)
        found = match(arena, manifest, selection, plan.names)
        if strict or not found.targets:
            check_match(arena, manifest, found, selection)
        missing, unexpected = match_extra_states(arena, manifest, selection, strict)
        whole = selection.is_all and found.fits
        arena.mark_torn()  # before the first byte, so that an interrupt leaves it torn
        if plan.names:
            _make_state(arena, plan, was_torn)
        resized = arena.resize({target.record.name: target.record.shape for target in found.targets})
        if plan.names or resized:
            found = match(arena, manifest, selection, ())  # all locations are new
        sources = pack_sources(arena.sources)
        nbytes = reader.read(checkpoint, found.targets, sources, arena.memory, whole=whole)
        if whole and not refusal:
            arena.restored(options, extra_states)
        else:
            if selection.is_all and not refusal:
                refusal = arena.restored_options(options, {record.name for record, _ in found.mismatched})
            absent = {name for each in options.values() for name in each["absent"]}
            arena.restored_part({target.record.name for target in found.targets}, absent)
            if selection.is_all or takes_extra_states:
                arena.restored_extra_states(extra_states)
            if not was_torn or whole:
                arena.mark_whole()
        return _info(checkpoint, extra, nbytes, found, missing, unexpected, refusal)

    info, passed_over = reader.use(step, fill)
    return info._replace(passed_over=passed_over)


def load(reader: Reader, step: int | None, select: Select) -> Tensors:
    """Read tensors into new memory, without an arena.  Blocks."""
    selection = Selection(select)

    def fill(checkpoint: Checkpoint) -> Tensors:
        manifest = checkpoint.manifest
        decode(manifest.extra)  # a manifest with a damaged part is damaged as a whole
        _extra_states(manifest)
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
            raise ArgumentError(no_match(manifest, selection))
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


def _extra_states(manifest: Manifest) -> dict[str, object]:
    """What the modules had besides tensors, by name."""
    return {name: decode(value, name) for name, value in manifest.modules.items()}


def _refuse_shards(manifest: Manifest, records: Sequence[SegmentRecord]) -> None:
    """Refuse shards: the format has them, but this engine does not join them yet."""
    shards = sorted({record.name for record in records if record.global_shape})
    if shards:
        raise MismatchError(
            f"step {manifest.step} holds {', '.join(shards[:4])} in shards, which this engine cannot join"
        )


def _info(
    checkpoint: Checkpoint,
    extra: Any,
    nbytes: int,
    found: Match,
    missing: Sequence[str],
    unexpected: Sequence[str],
    refusal: str,
) -> RestoreInfo:
    return RestoreInfo(
        checkpoint.step,
        checkpoint.manifest.checkpoint_id,
        checkpoint.path,
        extra,
        checkpoint.manifest_bytes + nbytes,
        (),
        (*(segment.name for segment in found.missing), *missing),
        (*(record.name for record in found.unexpected), *unexpected),
        tuple(record.name for record, _ in found.mismatched),
        refusal,
    )


def _plan_options(
    arena: Arena, manifest: Manifest, options: Mapping[str, Mapping[str, Any]], strict: bool
) -> tuple[StatePlan, str]:
    """The state that the arena's optimizers lack, and only their own steps would make; and why options do not fit.

    Raises:
        MismatchError: options do not fit, and `strict` is True.
    """
    stored = {
        record.name: TensorSpec(record.name, record.dtype, record.shape, record.role, record.layer)
        for record in manifest.segments
        if not arena.leaves_out(record)
    }
    try:
        arena.check_options(options)
        return arena.plan_state(stored, manifest.aliases, options, manifest.wrappers), ""
    except MismatchError as error:
        if not strict:
            return NO_PLAN, str(error)
        text = str(error)
        if "restore(arena, " not in text:
            text += (
                "\nto restore the tensors that fit, and no hyperparameters: restore(arena, strict=False); the model "
                'alone: restore(arena, select=engine.role("model", "buffer"))'
            )
        raise MismatchError(text) from None


def _make_state(arena: Arena, plan: StatePlan, was_torn: bool) -> None:
    """Carry a plan out."""
    try:
        arena.make_state(plan)
    except Exception:  # it was undone
        if not was_torn:
            arena.mark_whole()
        raise
