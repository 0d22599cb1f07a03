"""Hypothesis strategies for the pure modules: segment tables, ways to cut them, and their manifests.

`nearly_valid` is a manifest by a hostile writer: valid, with one field changed and the right digest.  `tagged` is the
same for `engine.format.values`.  Tests and fuzz targets use both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from dtypes import TORCH_DTYPES
from hypothesis import strategies as st

from engine.format.layout import ARENA_ALIGNMENT, ROLES, Layout, TensorSpec, align_up, lay_out
from engine.format.manifest import (
    FORMAT,
    READER,
    VERSION,
    DigestedFile,
    FileRecord,
    Manifest,
    chunk_layers,
    chunk_records,
    digest_of,
    segment_records,
)
from engine.format.plan import ALIGNMENT, Plan, file_runs, make_plan

# Any name that layout takes: all text that UTF-8 can hold, but for one word.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")

OPTIMIZERS = st.sampled_from(["", "", "generator", "2-b"])

# Around every boundary that the code rounds to, and past 32 and 40 bits.
EDGES = [0, 1, *(edge + step for edge in (ARENA_ALIGNMENT, ALIGNMENT) for step in (-1, 0, 1))]
FAR_EDGES = [2**32 - 1, 2**32 + 1, 2**40 + 1]

SMALL_SHAPES = st.lists(st.integers(0, 5), max_size=3) | st.sampled_from(EDGES).map(lambda extent: [extent])
ANY_SHAPES = SMALL_SHAPES | st.sampled_from(FAR_EDGES).map(lambda extent: [extent]) | st.just([2**20, 2**21])


@st.composite
def specs(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[list[int]],
    max_count: int = 12,
    names: st.SearchStrategy[str] = NAMES,
) -> list[TensorSpec]:
    """A table of tensors with distinct names."""
    drawn = draw(st.lists(names, unique=True, max_size=max_count))
    return [
        TensorSpec(
            name,
            draw(st.sampled_from(sorted(TORCH_DTYPES))),
            tuple(draw(shapes)),
            draw(st.sampled_from(ROLES)),
            name.rpartition(".")[0],
            draw(OPTIMIZERS),
        )
        for name in drawn
    ]


@st.composite
def places(draw: st.DrawFn, layout: Layout) -> list[tuple[int, int]]:
    """The locations of the segments: all in one arena (adopted), or each in its own source (wrapped)."""
    first = len(layout.files)
    if draw(st.booleans()):
        return [(first, segment.arena_offset) for segment in layout.segments]
    offsets = st.sampled_from([0, 1, 4095, 2**33])
    return [(first + index, draw(offsets)) for index in range(len(layout.segments))]


def plan_of(layout: Layout, where: Sequence[tuple[int, int]], block_bytes: int, chunk_bytes: int) -> Plan:
    """The plan of segments at these locations."""
    return make_plan(layout, file_runs(layout, where), block_bytes, chunk_bytes)


@st.composite
def planned(
    draw: st.DrawFn, shapes: st.SearchStrategy[list[int]], max_count: int = 12
) -> tuple[Layout, list[tuple[int, int]], int, int]:
    """The arguments of `plan_of`: a layout, its locations, and sizes of blocks and chunks that cut it a few times."""
    layout = lay_out(draw(specs(shapes, max_count)))
    # At most a few dozen pieces, however large the file: a plan has as many rows as blocks.
    least = align_up(max(file.nbytes for file in layout.files) // 16 + 1, ALIGNMENT)
    sizes = st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT, 7 * ALIGNMENT]).map(lambda size: max(size, least))
    multiples = st.integers(1, 5)
    return layout, draw(places(layout)), draw(sizes) * draw(multiples), draw(sizes) * draw(multiples)


# Values that round trip through JSON: `options` and `extra` consist of them.
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | FLOATS
JSON = st.recursive(
    JSON_SCALARS | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


HASHES = st.binary(min_size=16, max_size=16)


def user_files() -> st.SearchStrategy[tuple[DigestedFile, ...]]:
    """Files beside the data files."""
    names = st.sampled_from(["config.json", "tokenizer.model", "A_b-c.0", "vocab.txt"])
    file = st.builds(digest_of, names, st.binary(max_size=3))
    return st.lists(file, max_size=2, unique_by=lambda one: one.name).map(tuple)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """The record of any plan, as `writer` makes it."""
    layout, where, block_bytes, chunk_bytes = draw(planned(SMALL_SHAPES))
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    segments = segment_records(layout)
    names = [segment.name for segment in segments]
    free_names = NAMES.filter(lambda name: name not in names)
    aliases = draw(st.dictionaries(free_names, st.sampled_from(names), max_size=2)) if names else {}
    checksums = draw(st.lists(HASHES, min_size=len(plan.blocks), max_size=len(plan.blocks)))
    return Manifest(
        format=FORMAT,
        version=VERSION,
        min_reader=READER,
        step=draw(st.sampled_from([0, 1, 2**63 - 1])),
        checkpoint_id=f"{draw(st.integers(0, 2**128 - 1)):032x}",
        created_ns=draw(st.integers(0, 2**63 - 1)),
        block_bytes=block_bytes,
        files=tuple(FileRecord(*file) for file in plan.files),
        chunks=chunk_records(plan, chunk_layers(plan, layout), checksums),
        segments=segments,
        aliases=aliases,
        optimizers=draw(st.dictionaries(OPTIMIZERS, JSON, max_size=2)),
        extra=draw(JSON),
        metrics=draw(st.dictionaries(st.sampled_from("ab"), st.sampled_from([None, 0.0, -1.5, 5e-324, 1e308]))),
        tag=draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
        user_files=draw(user_files()),
        modules=draw(st.dictionaries(NAMES, JSON, max_size=2)),
        wrappers=draw(st.dictionaries(NAMES, JSON, max_size=2)),
    )


def sealed(body: bytes) -> bytes:
    """A manifest.json of this body, with the digest that fits."""
    return b'{"sha256":"%s","body":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


# Hostile values of a field: beyond every width of integer, and every way for a name to lead elsewhere.
HOSTILE: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 4095, 4096, 4097, 2**30, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
        *(-(2**63), 2**64, 10**40, 0.5, 1e308, "", ".", "..", "../model.safetensors", "/model.safetensors"),
        *(
            "a/b.safetensors",
            "a\0.safetensors",
            "manifest.json",
            "model.safetensors",
            "\ud800",
            "\N{OHM SIGN}",
            "x" * 300,
        ),
        *([], [0], [-1], [2**62, 2**62, 0], [2**32, 2**32], [1] * 100, {}, {"dict": []}, {"": None}),
    ]
)


@st.composite
def nearly_valid(draw: st.DrawFn, base: st.SearchStrategy[Manifest] | None = None) -> bytes:
    """A manifest.json with the right digest and one thing wrong in it, or nothing that matters."""
    manifest = draw(manifests() if base is None else base)
    body: Any = msgspec.to_builtins(manifest)
    within, key = body, draw(st.sampled_from(sorted(body)))
    while isinstance(within[key], list | dict | tuple) and within[key] and draw(st.integers(0, 3)):
        if isinstance(within[key], tuple):
            within[key] = list(within[key])
        within = within[key]
        key = draw(st.sampled_from(sorted(within) if isinstance(within, dict) else range(len(within))))
    change(draw, within, key)
    return sealed(json.dumps(body, separators=(",", ":"), ensure_ascii=draw(st.booleans())).encode(errors="replace"))


def change(draw: st.DrawFn, within: Any, key: Any) -> None:
    """Change one value of a JSON tree in place: another value, a neighbouring one, removed or doubled."""
    value = within[key]
    kinds = ["hostile", "gone"]
    if type(value) is int:
        kinds += ["more", "less"]
    if isinstance(within, list):
        kinds += ["twice", "swapped"]
    match draw(st.sampled_from(kinds)):
        case "hostile":
            within[key] = draw(HOSTILE)
        case "gone":
            del within[key]
        case "more":
            within[key] = value + draw(st.sampled_from([1, 8, 4096, 2**32]))
        case "less":
            within[key] = value - draw(st.sampled_from([1, 8, 4096, 2**32]))
        case "twice":
            within.insert(key, value)
        case "swapped":
            other = draw(st.integers(0, len(within) - 1))
            within[key], within[other] = within[other], within[key]


# The tags of engine.format.values, and one that is none.
TAGS = (
    *("int", "float", "bytes", "tuple", "set", "frozenset", "dict", "ordered_dict", "counter", "tensor", "array"),
    *("dtype", "size", "path", "list"),
)
TEXTS = ("0x1f", "-0x0", "0x" + "f" * 40, "7ff8000000000000", "aGk=", "AACAPw==", "float32", "uint8", "nonsense", "")


def _tagged_around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)
    tensors = st.tuples(
        st.sampled_from(["float32", "uint8", "complex128", "float128", "<f4", "|u1", "<c16", "|O"]),
        st.none() | st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**62, 2**63]), max_size=4),
        st.sampled_from(["", "AACAPw==", "AAAAAAAAAAAAAAAAAAAAAA==", "=A"]),
    ).map(list)
    payloads = inner | st.lists(inner, max_size=3) | pairs | tensors
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAGS), payloads, min_size=1, max_size=1)


def tagged() -> st.SearchStrategy[Any]:
    """JSON that resembles, and often is, a result of `engine.format.values.encode`."""
    leaves = JSON_SCALARS | st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    return st.recursive(leaves, _tagged_around, max_leaves=12)
