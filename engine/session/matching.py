"""Matching: which of a checkpoint's segments fill which of an arena's.

Theory of operation.  Segments pair by name.  A pair fits if dtype and shape are equal, or the arena can give its
segment the stored shape.  A `Match` holds the pairs that fit and all that is left over on both sides, so that a strict
restore refuses everything at once, and another one reports what it left out.

A message about many tensors is read by a person: tensors of one layer, or one kind of optimizer state, with the same
problem share a line, and there are at most `LINES_MAX` lines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from engine.errors import MismatchError
from engine.format.layout import Segment
from engine.format.manifest import Manifest, SegmentRecord, listed
from engine.state.arena import Arena
from engine.state.components import check_wrappers
from engine.state.select import Selection
from engine.store.reader import Target

# The lines of a message: they fit on a screen together with a traceback.
LINES_MAX = 10


class Match(NamedTuple):
    """A checkpoint's and an arena's segments, as far as a selection picks them.

    Attributes:
        targets: the pairs that fit, but for the state of a parameter that does not.
        missing: segments of the arena that the checkpoint lacks.
        unexpected: segments of the checkpoint that the arena lacks.
        mismatched: pairs of two dtypes or shapes: the checkpoint's first.
    """

    targets: tuple[Target, ...]
    missing: tuple[Segment, ...]
    unexpected: tuple[SegmentRecord, ...]
    mismatched: tuple[tuple[SegmentRecord, Segment], ...]

    @property
    def fits(self) -> bool:
        """Whether nothing is left over."""
        return not (self.missing or self.unexpected or self.mismatched)


class _Here(NamedTuple):
    """A segment of the arena, and its location: a source and an offset there."""

    segment: Segment
    source: int
    offset: int


def no_match(manifest: Manifest, selection: Selection) -> str:
    """The message that a selection picks nothing."""
    known = selection.suggest(manifest.segments, manifest.aliases)
    return f"select={selection.select!r} matches no tensor of step {manifest.step}; {known}"


def match(arena: Arena, manifest: Manifest, selection: Selection, planned: Collection[str]) -> Match:
    """Pair the segments that a selection picks; those that are planned are left over on no side.

    Raises:
        MismatchError: it picks nothing of the checkpoint, or components that mean something else there.
    """
    stored = _picked(arena, manifest, selection)
    here = {
        segment.name: _Here(segment, *place)
        for segment, place in zip(arena.segments, arena.locations, strict=True)
        if segment.name in stored or selection.has(segment)
    }
    stored = {name: record for name, record in stored.items() if name in here or not arena.leaves_out(record)}
    if not stored and not here and not selection.is_all:
        raise MismatchError(f"{no_match(manifest, selection)}; nothing was changed")
    targets, mismatched = [], []
    for name, record in stored.items():
        if name not in here:
            continue
        found = here[name]
        if _fits(arena, record, found.segment):
            targets.append(Target(record, found.source, found.offset))
        elif name not in planned:
            mismatched.append((record, found.segment))
    check_wrappers(arena.wrappers, manifest.wrappers, [target.record.name for target in targets])
    # A count of steps fits any parameter, but belongs to moments of the stored one.
    unfit = arena.state_of([segment.name for _, segment in mismatched])
    known_there, known_here = stored.keys() | set(planned), here.keys() | set(planned)
    return Match(
        tuple(target for target in targets if target.record.name not in unfit),
        tuple(found.segment for name, found in here.items() if name not in known_there),
        tuple(record for name, record in stored.items() if name not in known_here),
        tuple(mismatched),
    )


def match_tensors(arena: Arena, manifest: Manifest, selection: Selection) -> tuple[Match, list[tuple[str, str]]]:
    """Pair the tensors of a wrapped arena that a selection picks with what the checkpoint stores under their names.

    Returns:
        the match; and pairs of names, if several tensors are of one tied weight: what is read, and its copy.

    Raises:
        MismatchError: it picks nothing, or components that mean something else there.
    """
    records = {record.name: record for record in manifest.segments}
    targets: dict[str, tuple[Target, str]] = {}
    missing, mismatched, copies = [], [], []
    for segment, location in zip(arena.segments, arena.locations, strict=True):
        # Of a tensor with several names, as a tied weight in a state_dict(), the checkpoint may know any.
        names = [segment.name, *(alias for alias, name in arena.aliases.items() if name == segment.name)]
        stored = [(each, record) for each in names if (record := records.get(manifest.aliases.get(each, each)))]
        if not any(_is_picked(selection, each, record) for each, record in stored):
            if not stored and (selection.is_all or selection.has(segment)):
                missing.append(segment)
            continue
        record = stored[0][1]
        if (record.dtype, record.shape) != (segment.dtype, segment.shape):
            mismatched.append((record, segment))
        elif record.name in targets:
            copies.append((targets[record.name][1], segment.name))
        else:
            targets[record.name] = Target(record, *location), segment.name
    if not (targets or missing or mismatched):
        raise MismatchError(f"{no_match(manifest, selection)}, or none that the dict has; nothing was changed")
    check_wrappers(arena.wrappers, manifest.wrappers, list(targets))
    in_order = tuple(targets[name][0] for name in records if name in targets)
    return Match(in_order, tuple(missing), (), tuple(mismatched)), copies


def _is_picked(selection: Selection, name: str, record: SegmentRecord) -> bool:
    """Whether a segment is picked under this name, which may be an alias."""
    if name == record.name:
        return selection.has(record)
    return selection.has_role(record.role) or selection.has_alias(name)


def check_match(arena: Arena, manifest: Manifest, found: Match, selection: Selection) -> None:
    """Refuse whatever is left over.

    Raises:
        MismatchError: listing what differs, and the calls that would work.
    """
    if found.fits:
        return
    text = "\n  ".join(_lines(found))
    if arena.makes_state_late and any(record.role == "optimizer" for record in found.unexpected):
        text += (
            "\nthe optimizer makes its state in its first step: "
            + ("" if selection.is_all else "a restore without select= makes it; or ")
            + "take one step before adopting, then restore (LBFGS: two or more)"
        )
    state_only = bool(found.missing) and all(segment.role == "optimizer" for segment in found.missing)
    if state_only and not (found.unexpected or found.mismatched):
        text += (
            "\nif these parameters were frozen when it was saved: restore(arena, strict=False) leaves their fresh "
            "state as it is, or adopt with requires_grad as it was then"
        )
    if found.missing and not found.unexpected:
        text += (
            "\nif the checkpoint holds a part of this training: adopt with the only= and exclude= of the run that "
            "was saved, or restore what it holds with select="
        )
    left_over: list[Segment | SegmentRecord] = [
        *found.missing,
        *found.unexpected,
        *(record for record, _ in found.mismatched),
    ]
    if not any(each.role != "optimizer" for each in left_over):
        text += '\nto restore the model alone: restore(arena, select=engine.role("model", "buffer"))'
    elif found.targets:
        select = "" if selection.is_all else ", select=..."
        text += (
            f"\nto restore only the tensors that fit ({len(found.targets)}): restore(arena{select}, strict=False), "
            "which returns the names of the others"
        )
    raise MismatchError(f"step {manifest.step} does not fit the arena; nothing was changed:\n  {text}")


def match_extra_states(
    arena: Arena, manifest: Manifest, selection: Selection, strict: bool
) -> tuple[Sequence[str], Sequence[str]]:
    """The names of modules' extra state that only the arena has, and that only the checkpoint has.

    Raises:
        MismatchError: there are such names, and `strict` is True.
    """
    missing, unexpected = arena.compare_extra_states(manifest.modules) if selection.is_all else ([], [])
    lines = [
        f"{listed(names, 'names')}: not in the {where}"
        for names, where in ((missing, "checkpoint"), (unexpected, "arena"))
        if names
    ]
    if lines and strict:
        raise MismatchError(
            f"step {manifest.step} does not fit the arena; nothing was changed:\n  "
            + "\n  ".join(lines)
            + "\nextra state comes from get_extra_state() of a module's class; use the classes of the run that was "
            "saved, or leave these modules as they are: restore(arena, strict=False)"
        )
    return missing, unexpected


def _fits(arena: Arena, record: SegmentRecord, segment: Segment) -> bool:
    return record.dtype == segment.dtype and (record.shape == segment.shape or arena.can_resize(record.name))


def _lines(found: Match) -> list[str]:
    """One line for each group of tensors, of many groups the first and a count of tensors."""
    groups: dict[tuple[str, str], list[str]] = {}
    for segment, problem in _problems(found):
        kind = segment.name.rpartition(".")[2] if segment.role == "optimizer" else ""
        groups.setdefault((problem, kind or f"{segment.layer}."), []).append(segment.name)
    lines = sorted((listed(names), problem, len(names)) for (problem, _), names in groups.items())
    shown = [f"{names}: {problem}" for names, problem, _ in lines[:LINES_MAX]]
    if rest := sum(count for _, _, count in lines[LINES_MAX:]):
        shown.append(f"and {rest} more")
    return shown


def _problems(found: Match) -> Iterator[tuple[Segment | SegmentRecord, str]]:
    for segment in found.missing:
        yield segment, "not in the checkpoint"
    for record in found.unexpected:
        yield record, "not in the arena"
    for record, segment in found.mismatched:
        yield segment, f"{_type(record)} in the checkpoint, {_type(segment)} in the arena"


def _type(segment: Segment | SegmentRecord) -> str:
    return f"{segment.dtype}{list(segment.shape)}"


def _picked(arena: Arena, manifest: Manifest, selection: Selection) -> Mapping[str, SegmentRecord]:
    """The checkpoint's segments to restore into an arena.

    A tied name picks the segment that stores it.  An arena without an optimizer does not need the optimizer state of a
    layer, so a pattern that matches only the layer leaves that out.
    """
    tied = {name for alias, name in manifest.aliases.items() if not selection.is_all and selection.has_alias(alias)}
    picked = {}
    for record in manifest.segments:
        by_layer = arena.fenced or record.role not in ("optimizer", "grad")
        by_name = selection.has_name(record.name) or record.name in tied or selection.has_role(record.role)
        if by_name or (by_layer and selection.has_layer(record.layer)):
            picked[record.name] = record
    return picked
