"""Unchanged: the files of a save that the checkpoint before may hold already, and what is known of their blocks.

Theory of operation.  A file may be unchanged if it is for untrained tensors (`FileLayout.is_untrained`), and if the
last checkpoint that this process committed has a file of the same name, length and blocks.  The owner links that file
beside the one to write, and the save takes its blocks as known: a block of the same content is not written.  When all
blocks are done, the file is unchanged if each has the hash that it had.  Otherwise the blocks that were not written are
copied from the linked file (`WriteAccess.settle_links`).

Pure.  Called by `committer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from engine.format.plan import Block, Plan
from engine.store.access import HeldRange


class Committed(NamedTuple):
    """A checkpoint that this process committed, and the content hashes of its blocks."""

    step: int
    plan: Plan
    checksums: Sequence[bytes]


# For each file that may be unchanged, by name, its blocks by index in the plan and the hash that each had.
Candidates = Mapping[str, Mapping[int, bytes]]


def candidates(plan: Plan, names: Collection[str], last: Committed | None) -> Candidates:
    """The files of these names that may be linked from the last checkpoint."""
    untrained = {index: file.name for index, file in enumerate(plan.files) if file.name in names}
    if last is None or not untrained:
        return {}
    before = {file: _blocks_of(last.plan, index) for index, file in enumerate(last.plan.files)}
    found = {}
    for index, name in untrained.items():
        blocks, earlier = _blocks_of(plan, index), before.get(plan.files[index], {})
        if [_range(block) for block in blocks.values()] == [_range(block) for block in earlier.values()]:
            hashes = [last.checksums[block] for block in earlier]
            found[name] = dict(zip(blocks, hashes, strict=True))
    return found


def changed_files(
    plan: Plan, held: Candidates, recycled: Sequence[bytes | None], checksums: Sequence[bytes]
) -> dict[str, list[HeldRange]]:
    """The linked files that have changed, and the ranges that were not written to the new file but are not in it.

    Args:
        plan: of the save.
        held: the linked files.
        recycled: for each block the hash that the file to write held before, or None.
        checksums: for each block the hash that it has now.
    """
    changed = {}
    for name, hashes in held.items():
        if all(checksums[block] == hash_ for block, hash_ in hashes.items()):
            continue
        missing = [block for block, hash_ in hashes.items() if checksums[block] == hash_ != recycled[block]]
        changed[name] = [HeldRange(*_range(plan.blocks[block]), checksums[block]) for block in missing]
    return changed


def only(held: Candidates, names: Collection[str]) -> Candidates:
    """The candidates that were linked."""
    return {name: hashes for name, hashes in held.items() if name in names}


def _blocks_of(plan: Plan, file_index: int) -> dict[int, Block]:
    return {index: block for index, block in enumerate(plan.blocks) if block.file_index == file_index}


def _range(block: Block) -> tuple[int, int]:
    return block.file_offset, block.nbytes
