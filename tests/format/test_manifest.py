"""The manifest: decoding undoes encoding, and `decode` refuses contradictions.

Theory of operation.  There are two kinds of damage.  The digest catches a flipped bit.  The rules of `checks` catch a
wrong body with a right digest.  `signed` makes the bytes of a manifest from any body, so that these tests reach the
rules.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import ANY_SHAPES, JSON, SMALL_SHAPES, manifests, plan_of, planned

from engine.errors import CorruptError, NewerFormatError
from engine.format.checks import SPLIT_DIMS_MAX
from engine.format.layout import HEADER_ALIGNMENT, Layout, TensorSpec, lay_out
from engine.format.manifest import (
    _ROWS_AT_ONCE,
    FORMAT,
    READER,
    VERSION,
    ChunkRecord,
    DigestedFile,
    FileRecord,
    Manifest,
    Part,
    SegmentRecord,
    Summary,
    affected,
    block_checksums,
    chunk_layers,
    chunk_records,
    decode,
    decode_part,
    decode_summary,
    digest_of,
    encode,
    encode_part,
    encode_rows,
    known_hashes,
    part_name,
    segment_records,
)
from engine.format.plan import ceil_div, plan_geometry

# Around how many rows are encoded at a time.
ROW_COUNTS = (0, 1, *(_ROWS_AT_ONCE + more for more in (-1, 0, 1, _ROWS_AT_ONCE)))


def signed(body: bytes | bytearray) -> bytes:
    """A manifest.json with this body: docs/format.md, in one line."""
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","body":' + body + b"}\n"


def example() -> Manifest:
    """Two files of several chunks, these of several blocks, an empty tensor and an alias."""
    specs = [
        TensorSpec("a.weight", "float32", (3000, 2), "model", "a"),
        TensorSpec("a.bias", "float64", (700,), "model", "a"),
        TensorSpec("b.empty", "int8", (0, 5), "buffer", "b"),
        TensorSpec("b.mask", "bool", (4099,), "buffer", "b"),
        TensorSpec("a.weight.exp_avg", "float32", (3000, 2), "optimizer", "a"),
    ]
    layout = lay_out(specs)
    plan = plan_of(layout, [(2, s.arena_offset) for s in layout.segments], 4096, 3 * 4096)
    segments = segment_records(layout)
    checksums = [bytes([index]) * 16 for index in range(len(plan.blocks))]
    return Manifest(
        format=FORMAT,
        version=VERSION,
        min_reader=READER,
        step=7,
        checkpoint_id="0123456789abcdef" * 2,
        created_ns=1_700_000_000_000_000_000,
        block_bytes=4096,
        files=tuple(FileRecord(*file) for file in plan.files),
        chunks=chunk_records(plan, chunk_layers(plan, layout), checksums),
        segments=segments,
        aliases={"head.weight": "a.weight"},
        optimizers={"": {"dict": []}},
        extra={"dict": []},
        metrics={"val_loss": 0.5, "steps": 3.0, "diverged": None},
        tag="before-lr-drop",
        user_files=(digest_of("config.json", b"{}"),),
        modules={"a._extra_state": {"dict": []}},
        wrappers={"a.weight": {"dict": []}},
    )


EXAMPLE = example()
BODY: dict[str, Any] = json.loads(encode(EXAMPLE))["body"]
assert len(BODY["files"]) == 2 and len(BODY["chunks"]) > 4 and len(BODY["chunks"][0]["checksums"]) > 2


# -- decoding undoes encoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_count", ROW_COUNTS)
def test_rows_encoded_beforehand_are_the_same_bytes(row_count: int) -> None:
    layout = lay_out([TensorSpec(f'"{i}"', "float32", (1, i % 3), "model", f"l.{i}") for i in range(row_count)])
    without = msgspec.structs.replace(EXAMPLE, segments=())
    manifest = msgspec.structs.replace(EXAMPLE, segments=segment_records(layout))
    assert encode(without, encode_rows(layout)) == encode(manifest)


@given(manifests())
def test_decoding_undoes_encoding(manifest: Manifest) -> None:
    raw = encode(manifest)
    decoded = decode(raw)
    assert decoded == manifest
    assert encode(decoded) == raw


@given(manifests())
def test_a_manifest_is_json_with_the_digest_of_its_body(manifest: Manifest) -> None:
    raw = encode(manifest)
    outer = json.loads(raw)
    assert set(outer) == {"sha256", "body"}
    assert raw.endswith(b"}\n")
    body = raw[raw.index(b'"body":') + len(b'"body":') : -2]
    assert hashlib.sha256(body).hexdigest() == outer["sha256"]
    assert raw == signed(body)


@given(manifests())
def test_a_summary_has_the_fields_of_the_manifest(manifest: Manifest) -> None:
    raw = encode(manifest)
    decoded, summary = decode(raw), decode_summary(raw)
    for field in Summary.__struct_fields__:
        assert getattr(summary, field) == getattr(manifest, field)
    assert summary.nbytes == manifest.nbytes
    geometry = decoded.geometry(decoded.chunks)
    assert geometry == plan_geometry(geometry.files, geometry.chunks, manifest.block_bytes)
    checksums = [text for chunk in manifest.chunks for text in chunk.checksums]
    assert [checksum.hex() for checksum in block_checksums(decoded.chunks)] == checksums
    assert len(checksums) == len(geometry.blocks)
    assert decoded.nbytes == sum(block.nbytes for block in geometry.blocks)


def test_places_beyond_32_bits_come_back() -> None:
    layout = lay_out(
        [TensorSpec("w", "float32", (3, 1 << 30), "model", "w"), TensorSpec("v", "int8", (1,), "model", "v")]
    )
    plan = plan_of(layout, [(1, 0), (2, 0)], 1 << 30, 1 << 33)
    segments = segment_records(layout)
    manifest = msgspec.structs.replace(
        EXAMPLE,
        block_bytes=1 << 30,
        files=tuple(FileRecord(*file) for file in plan.files),
        chunks=chunk_records(plan, chunk_layers(plan, layout), [b"\xff" * 16] * len(plan.blocks)),
        segments=segments,
        aliases={},
    )
    decoded = decode(encode(manifest))
    assert decoded == manifest
    assert decoded.nbytes == 4096 + (3 << 32) + 1
    last = decoded.geometry(decoded.chunks).blocks[-1]
    assert last.file_offset + last.nbytes == decoded.nbytes
    assert affected(decoded.segments, 0, 4096 + (3 << 32), 1) == "v"


# -- damage that the digest catches -----------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen() -> None:
    raw = encode(EXAMPLE)
    for index in range(len(raw)):
        for bit in range(8):
            flipped = raw[:index] + bytes([raw[index] ^ 1 << bit]) + raw[index + 1 :]
            with pytest.raises(CorruptError):
                decode(flipped)


@given(st.data())
def test_every_changed_byte_is_seen(data: st.DataObject) -> None:
    raw = encode(data.draw(manifests()))
    index = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != raw[index]))
    with pytest.raises(CorruptError):
        decode(raw[:index] + bytes([byte]) + raw[index + 1 :])


def test_every_other_length_is_seen() -> None:
    raw = encode(EXAMPLE)
    for nbytes in range(len(raw)):
        with pytest.raises(CorruptError):
            decode(raw[:nbytes])
    for extra in (b"\n", b" ", b"\0", b"}\n", raw):
        with pytest.raises(CorruptError):
            decode(raw + extra)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="form of a manifest"):
        decode(raw)


# -- wrong bodies with a right digest ---------------------------------------------------------------------------------

Path = tuple[str | int, ...]


def changed(path: Path, value: object) -> bytes:
    """The example with one value replaced, signed."""
    body = copy.deepcopy(BODY)
    at: Any = body
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return signed(json.dumps(body).encode())


def restructured(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The example after any edit, signed."""
    body = copy.deepcopy(BODY)
    edit(body)
    return signed(json.dumps(body).encode())


def test_signing_the_example_again_changes_nothing() -> None:
    assert decode(restructured(lambda body: None)) == EXAMPLE


ABSURD = [-1, -(2**63), 2**31, 2**32, 2**62, 2**63, 2**64, 10**30]
OFF_BY_ONE = [-1, 1]

# Every number, and how far its neighbours may go: nowhere, since each follows from the others.
NUMBERS: list[Path] = [
    ("files", 0, "nbytes"),
    ("files", 0, "header_bytes"),
    ("files", 1, "nbytes"),
    ("files", 1, "header_bytes"),
    ("chunks", 0, "file"),
    ("chunks", 0, "index"),
    ("chunks", 0, "offset"),
    ("chunks", 0, "nbytes"),
    ("chunks", 1, "offset"),
    ("chunks", 1, "nbytes"),
    ("chunks", -1, "file"),
    ("chunks", -1, "index"),
    ("chunks", -1, "offset"),
    ("chunks", -1, "nbytes"),
    ("segments", 0, 5),
    ("segments", 0, 6),
    ("segments", 0, 7),
    ("segments", 0, 2, 0),
    ("segments", 1, 2, 1),
    ("segments", -1, 5),
    ("segments", -1, 6),
    ("segments", -1, 7),
]


def value_at(path: Path) -> int:
    """The number in the example at this path."""
    at: Any = BODY
    for name in path:
        at = at[name]
    assert isinstance(at, int)
    return at


@pytest.mark.parametrize("path", NUMBERS, ids=str)
def test_a_wrong_number_is_refused(path: Path) -> None:
    right = value_at(path)
    for wrong in {*ABSURD, *(right + step for step in OFF_BY_ONE), right + 4096, right - 4096} - {right}:
        with pytest.raises(CorruptError, match=r"manifest\.json"):
            decode(changed(path, wrong))


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("step",), [-1, 2**63, 10**30]),
        (("created_ns",), [-1, 2**63, 10**30]),
        (("block_bytes",), [-4096, 0, 1, 4095, 4097, 8192, (1 << 30) + 4096, 2**62]),
        (("segments", 2, 2, 1), [-1, 2**63, 10**30]),  # beside a dimension of 0, where the product cannot tell
        (("format",), ["", "engine.checkpoint2"]),
        (("checkpoint_id",), ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 32 + "\n", "\u0660" * 32]),
        (("chunks", 0, "checksums", 0), ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0x" + "0" * 30, "0" * 32 + "\n"]),
        (("segments", 0, 1), ["float31", "", "torch.float32", "complex31"]),
        (("segments", 0, 3), ["", "models"]),
        (("segments", 0, 0), ["b.mask"]),
        (("metrics", "val_loss"), ["0.5", [], True]),
        (("tag",), [7, ["x"]]),
        (("user_files", 0, "nbytes"), [-1, 2**63, 10**30]),
        (("user_files", 0, "sha256"), ["", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n"]),
        (("aliases",), [{"a.weight": "a.weight"}, {"a.bias": "a.weight"}, {"head": "nothing"}, {"head": ""}]),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_refused(path: Path, values: list[object]) -> None:
    for wrong in values:
        with pytest.raises(CorruptError, match=r"manifest\.json"):
            decode(changed(path, wrong))


def swap(rows: list[Any], one: int, other: int) -> None:
    """Exchange two rows."""
    rows[one], rows[other] = rows[other], rows[one]


STRUCTURES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda body: body.update(files=[], chunks=[], segments=[], aliases={}),
    "no chunks": lambda body: body.update(chunks=[]),
    "no segments": lambda body: body.update(segments=[], aliases={}),
    "a file twice": lambda body: body["files"][1].update(name=body["files"][0]["name"]),
    "a file more": lambda body: body["files"].append({**body["files"][0], "name": "more.safetensors"}),
    "a file less": lambda body: body["files"].pop(),
    "files swapped": lambda body: swap(body["files"], 0, 1),
    "a chunk missing at the start": lambda body: body["chunks"].pop(0),
    "a chunk missing in between": lambda body: body["chunks"].pop(1),
    "a chunk missing at the end": lambda body: body["chunks"].pop(),
    "a chunk twice": lambda body: body["chunks"].insert(1, body["chunks"][1]),
    "the last chunk twice": lambda body: body["chunks"].append(body["chunks"][-1]),
    "a chunk of a file that is not there": lambda body: body["chunks"].append({**body["chunks"][0], "file": 2}),
    "chunks swapped": lambda body: swap(body["chunks"], 0, 1),
    "an empty chunk": lambda body: body["chunks"].insert(1, {**body["chunks"][1], "nbytes": 0, "checksums": []}),
    "two chunks that meet unaligned": lambda body: (
        body["chunks"][0].update(nbytes=body["chunks"][0]["nbytes"] - 8),
        body["chunks"][1].update(
            offset=body["chunks"][1]["offset"] - 8,
            nbytes=body["chunks"][1]["nbytes"] + 8,
            checksums=[*body["chunks"][1]["checksums"], "0" * 32],
        ),
    ),
    "a checksum missing": lambda body: body["chunks"][0]["checksums"].pop(),
    "a checksum more": lambda body: body["chunks"][0]["checksums"].append("0" * 32),
    "no checksums": lambda body: body["chunks"][0].update(checksums=[]),
    "a segment missing": lambda body: body["segments"].pop(0),
    "the last segment missing": lambda body: body["segments"].pop(),
    "a segment twice": lambda body: body["segments"].insert(0, body["segments"][0]),
    "segments swapped": lambda body: swap(body["segments"], 0, 1),
    "segments that overlap": lambda body: body["segments"][1].__setitem__(6, body["segments"][1][6] - 4),
    "a field missing": lambda body: body.pop("extra"),
    "a field of a file missing": lambda body: body["files"][0].pop("nbytes"),
    "a column missing": lambda body: body["segments"][0].__delitem__(slice(7, None)),
    "a user file twice": lambda body: body["user_files"].append(body["user_files"][0]),
    "half a shard": lambda body: body["segments"][0].__setitem__(8, body["segments"][0][2]),
    "a shard without its shape": lambda body: body["segments"][0].__setitem__(9, [0] * len(body["segments"][0][2])),
    "another type": lambda body: body.update(step="7"),
    "a fraction": lambda body: body.update(step=7.5),
    "no number": lambda body: body.update(step=None),
    "true": lambda body: body.update(step=True),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_contradiction_is_refused(name: str) -> None:
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        decode(restructured(STRUCTURES[name]))


@pytest.mark.parametrize("more_bytes", [8, HEADER_ALIGNMENT // 2, HEADER_ALIGNMENT])
def test_an_unaligned_header_is_refused_even_if_all_else_is_consistent(more_bytes: int) -> None:
    def lengthen(body: dict[str, Any]) -> None:
        file, chunk = body["files"][1], body["chunks"][-1]
        file["header_bytes"] += more_bytes
        file["nbytes"] += more_bytes
        chunk["nbytes"] += more_bytes
        block_count = ceil_div(chunk["nbytes"], body["block_bytes"])
        chunk["checksums"] += ["0" * 32] * (block_count - len(chunk["checksums"]))
        for row in body["segments"]:
            row[6] += more_bytes if row[5] == 1 else 0

    raw = restructured(lengthen)
    if more_bytes % HEADER_ALIGNMENT:
        with pytest.raises(CorruptError, match="header"):
            decode(raw)
    else:
        assert decode(raw).files[1].header_bytes == EXAMPLE.files[1].header_bytes + more_bytes


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "model", ".safetensors", "model.safetensors/", "/model.safetensors", "../m.safetensors"),
        *("a/b.safetensors", "a\\b.safetensors", "model.safetensors\0", "mo\0del.safetensors", "model.safetensors\n"),
        *("Model.safetensors", "-m.safetensors", ".m.safetensors", "a.b.safetensors", "a" * 101 + ".safetensors"),
        *(
            "m\u00f6del.safetensors",
            "\u0661.safetensors",
            "model.safetensors.partial",
            "manifest.json",
            "step-00000001",
        ),
    ],
)
def test_a_file_name_outside_the_directory_is_refused(name: str) -> None:
    with pytest.raises(CorruptError, match="cannot be a data file's name"):
        decode(changed(("files", 0, "name"), name))


@pytest.mark.parametrize(
    "path", [("files", 0, "nbytes"), ("chunks", 0, "nbytes"), ("segments", 0, 2, 0), ("step",)], ids=str
)
def test_a_huge_number_allocates_no_memory(path: Path) -> None:
    for absurd in (2**62, 2**63 - 1, 10**300):
        raw = changed(path, absurd)
        if decode_cost_bytes(raw) > 1 << 20:
            pytest.fail(f"{absurd} at {path} made decode allocate")


def decode_cost_bytes(raw: bytes) -> int:
    """The peak of Python's memory while it decodes these bytes, accepted or not."""
    tracemalloc.start()
    try:
        decode(raw)
    except CorruptError:
        pass
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak_bytes


def test_a_consistent_file_of_huge_length_is_refused_for_its_checksums() -> None:
    def stretch(body: dict[str, Any]) -> None:
        nbytes = body["files"][1]["nbytes"]
        grown = 2**62 - 2**62 % 4096
        body["files"][1]["nbytes"] += grown
        body["chunks"][-1]["nbytes"] += grown
        body["segments"][-1][7] += grown
        body["segments"][-1][2] = [(nbytes + grown - 4096) // 4]

    raw = restructured(stretch)
    with pytest.raises(CorruptError, match=r"checksums for \d+ blocks"):
        decode(raw)
    assert decode_cost_bytes(raw) < 1 << 20


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [1000, 1_000_000])
def test_deep_nesting_is_refused_or_read(brackets: tuple[str, str], depth: int) -> None:
    body = json.dumps({**BODY, "extra": "HERE"}).replace('"HERE"', brackets[0] * depth + "1" + brackets[1] * depth)
    with pytest.raises(CorruptError, match="cannot be decoded"):
        decode(signed(body.encode()))


@given(JSON)
def test_json_that_is_no_manifest_is_refused(value: object) -> None:
    with pytest.raises(CorruptError, match="cannot be decoded"):
        decode(signed(json.dumps(value).encode()))


@given(st.binary(max_size=100))
def test_a_signed_body_that_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(CorruptError):
        decode(signed(body))


def paths_of(value: Any, prefix: Path = ()) -> list[Path]:
    """The path to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*prefix, key), *paths_of(inner, (*prefix, key))]]


@settings(max_examples=300)
@given(st.sampled_from(paths_of(BODY)), JSON | st.sampled_from([*ABSURD, 10**400]))
def test_any_value_anywhere_is_read_or_refused(path: Path, value: object) -> None:
    try:
        manifest = decode(changed(path, value))
    except (CorruptError, NewerFormatError):
        return
    # A reader can use every accepted manifest.
    geometry, right = manifest.geometry(manifest.chunks), EXAMPLE.geometry(EXAMPLE.chunks)
    assert (geometry.blocks, manifest.nbytes) == (right.blocks, EXAMPLE.nbytes)
    assert len(block_checksums(manifest.chunks)) == len(geometry.blocks)
    assert decode(encode(manifest)) == manifest


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "a/b",
        ".config",
        "-x",
        "a" * 101,
        "manifest.json",
        "manifest-00001.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json\n",
        "a\0",
    ],
)
def test_a_user_file_outside_the_directory_is_refused(name: str) -> None:
    with pytest.raises(CorruptError, match="cannot be a user file's name"):
        decode(changed(("user_files", 0, "name"), name))


# -- other versions ---------------------------------------------------------------------------------------------------

ADDITIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field": lambda body: body.update(more={"any": ["thing"]}),
    "a field of a file": lambda body: body["files"][0].update(more=1),
    "a field of a chunk": lambda body: body["chunks"][0].update(more=1),
    "a column": lambda body: body["segments"][0].append("more"),
    "a field of a user file": lambda body: body["user_files"][0].update(more=1),
    "a later version": lambda body: body.update(version=2),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_unknown_fields_and_columns_are_ignored(name: str) -> None:
    raw = restructured(ADDITIONS[name])
    assert msgspec.structs.replace(decode(raw), version=VERSION) == EXAMPLE
    assert decode_summary(raw).step == EXAMPLE.step


@pytest.mark.parametrize("field", ["metrics", "tag", "user_files", "parts"])
def test_fields_that_may_be_absent(field: str) -> None:
    decoded = decode(restructured(lambda body: body.pop(field)))
    assert not getattr(decoded, field)


@pytest.mark.parametrize("read", [decode, decode_summary])
def test_a_manifest_for_a_later_reader_is_refused_and_not_called_damaged(read: Callable[[bytes], object]) -> None:
    """Also if its other fields have other types than today."""

    def edit(body: dict[str, Any]) -> None:
        body.update(version=3, min_reader=READER + 1, step="seven", chunks={})

    with pytest.raises(NewerFormatError, match=r"version 3 and needs a reader of version 2, .* reads 1; upgrade"):
        read(restructured(edit))


# -- shards -----------------------------------------------------------------------------------------------------------


@st.composite
def cut_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A box, and boxes that partition it, as (offset, shape), from random cuts."""
    whole = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes = [((0,) * len(whole), whole)]
    for _ in range(draw(st.integers(0, 5))):
        offset, shape = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(whole) - 1))
        at = draw(st.integers(0, shape[dim]))
        for start, extent in ((0, at), (at, shape[dim] - at)):
            moved = tuple(place + (start if d == dim else 0) for d, place in enumerate(offset))
            boxes.append((moved, tuple(extent if d == dim else size for d, size in enumerate(shape))))
    return whole, boxes


def points(offset: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every element of a box."""
    return product(*(range(start, start + extent) for start, extent in zip(offset, shape, strict=True)))


def sharded(whole: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Manifest:
    """A manifest of one tensor, each shard of which is in its own file."""
    files, chunks, segments = [], [], []
    for index, (offset, shape) in enumerate(boxes):
        nbytes = 4 * math.prod(shape)
        files.append(FileRecord(f"model-{index}.safetensors", 4096 + nbytes, 4096))
        checksums = ("0" * 32,) * (1 if nbytes == 0 else 2)
        chunks.append(ChunkRecord(index, 0, 0, 4096 + nbytes, ("w",), checksums))
        segments.append(SegmentRecord("w", "float32", shape, "model", "w", index, 4096, nbytes, whole, offset))
    rows = {"files": tuple(files), "chunks": tuple(chunks), "segments": tuple(segments)}
    return msgspec.structs.replace(EXAMPLE, **rows, aliases={})


@given(cut_boxes())
def test_shards_that_partition_their_tensor_are_accepted(
    drawn: tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]],
) -> None:
    manifest = sharded(*drawn)
    assert decode(encode(manifest)) == manifest


@given(cut_boxes(), st.data())
def test_shards_that_do_not_partition_their_tensor_are_refused(
    drawn: tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]], data: st.DataObject
) -> None:
    """One shard is moved, grown, shrunk, removed or doubled, so that some element is not covered exactly once."""
    whole, boxes = drawn
    index = data.draw(st.integers(0, len(boxes) - 1))
    (offset, shape), dim = boxes[index], data.draw(st.integers(0, len(whole) - 1))
    by = data.draw(st.sampled_from([-1, 1]))
    edits = {
        "moved": [(tuple(place + by * (d == dim) for d, place in enumerate(offset)), shape)],
        "resized": [(offset, tuple(max(0, size + by * (d == dim)) for d, size in enumerate(shape)))],
        "gone": [],
        "twice": [(offset, shape)] * 2,
    }
    boxes[index : index + 1] = edits[data.draw(st.sampled_from(sorted(edits)))]
    assume(boxes)
    covered = Counter(point for box in boxes for point in points(*box))
    assume(covered != Counter(points((0,) * len(whole), whole)))
    with pytest.raises(CorruptError, match="'w'"):
        decode(encode(sharded(whole, boxes)))


def test_a_name_is_of_one_whole_tensor_or_of_shards() -> None:
    manifest = sharded((4,), [((0,), (2,)), ((2,), (2,))])
    first, second = manifest.segments
    changes: dict[str, tuple[SegmentRecord, SegmentRecord]] = {
        "listed twice": (first, msgspec.structs.replace(second, global_shape=(), global_offset=())),
        "several dtypes": (first, msgspec.structs.replace(second, dtype="int32")),
        "global shapes": (first, msgspec.structs.replace(second, global_shape=(5,))),
        "several .* roles": (first, msgspec.structs.replace(second, role="buffer")),
    }
    for told, segments in changes.items():
        with pytest.raises(CorruptError, match=told):
            decode(encode(msgspec.structs.replace(manifest, segments=segments)))
    swapped = (msgspec.structs.replace(first, global_shape=(), global_offset=()), second)
    with pytest.raises(CorruptError, match="listed twice"):
        decode(encode(msgspec.structs.replace(manifest, segments=swapped)))


def test_a_tensor_cut_in_too_many_dimensions_is_refused() -> None:
    whole = (2,) * (SPLIT_DIMS_MAX + 1)
    boxes = [(offset, (1,) * len(whole)) for offset in product((0, 1), repeat=len(whole))]
    with pytest.raises(CorruptError, match="cut in 5 dimensions"):
        decode(encode(sharded(whole, boxes)))
    assert decode(encode(sharded(whole[1:], [(offset[1:], shape[1:]) for offset, shape in boxes[: 2**SPLIT_DIMS_MAX]])))


# -- parts of several ranks -------------------------------------------------------------------------------------------


def in_parts(manifest: Manifest, owners: list[int]) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest in parts, and the bytes of the parts; `owners` has the rank of each chunk.

    A segment belongs to the rank of its file's last chunk; every part has all aliases.
    """
    owned = list(zip(manifest.chunks, owners, strict=True))
    parts: dict[str, bytes] = {}
    for rank in sorted(set(owners)):
        chunks = [chunk for chunk, owner in owned if owner == rank]
        mine = sorted({chunk.file for chunk in chunks}, reverse=True)  # in another order
        last = {chunk.file: owner for chunk, owner in owned}
        segments = [segment for segment in manifest.segments if last[segment.file] == rank]
        part = Part(
            rank,
            tuple(manifest.files[index] for index in mine),
            tuple(msgspec.structs.replace(chunk, file=mine.index(chunk.file)) for chunk in chunks),
            tuple(msgspec.structs.replace(segment, file=mine.index(segment.file)) for segment in segments),
            manifest.aliases,
        )
        parts[part_name(rank)] = bytes(encode_part(part))
    records = tuple(digest_of(name, raw) for name, raw in parts.items())
    return msgspec.structs.replace(manifest, chunks=(), segments=(), aliases={}, parts=records), parts


def reader_of(parts: Mapping[str, bytes]) -> Callable[[DigestedFile], bytes]:
    """Reads the parts of a manifest from memory."""
    return lambda record: parts[record.name]


@given(manifests(), st.data())
def test_parts_are_merged_to_the_whole(manifest: Manifest, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(manifest.chunks), max_size=len(manifest.chunks)))
    head, parts = in_parts(manifest, owners)
    raw = bytes(encode(head))
    merged = decode(raw, reader_of(parts))
    assert msgspec.structs.replace(merged, parts=()) == manifest
    assert decode_summary(raw).nbytes == manifest.nbytes
    with pytest.raises(CorruptError, match="parts, and no part is read"):
        decode(raw)


OWNERS = [index % 3 for index in range(len(EXAMPLE.chunks))]


def test_a_part_that_is_not_the_recorded_one_is_refused() -> None:
    head, parts = in_parts(EXAMPLE, OWNERS)
    raw = bytes(encode(head))
    for name in parts:
        for damaged in (parts[name][:-1], parts[name] + b"x", parts[name].replace(b"float32", b"float64"), b""):
            if damaged != parts[name]:
                with pytest.raises(CorruptError, match=f"{name} is not the part"):
                    decode(raw, reader_of({**parts, name: damaged}))


def with_part(edit: Callable[[Part], Part]) -> None:
    """Decode the example in parts; the part of rank 1 is changed, and its digest recorded after the change."""
    head, parts = in_parts(EXAMPLE, OWNERS)
    parts[part_name(1)] = bytes(encode_part(edit(decode_part(parts[part_name(1)], head.parts[1]))))
    head = msgspec.structs.replace(head, parts=tuple(digest_of(name, raw) for name, raw in parts.items()))
    decode(bytes(encode(head)), reader_of(parts))


def test_parts_that_are_not_consistent_are_refused() -> None:
    with_part(lambda part: part)
    replace = msgspec.structs.replace
    other = FileRecord("other.safetensors", 4096, 4096)
    edits: dict[str, Callable[[Part], Part]] = {
        "says it is the part of rank 2": lambda part: replace(part, rank=2),
        "rank 1 has another file": lambda part: replace(part, files=(*part.files, other)),
        "rank 1 has a row of no file": lambda part: replace(
            part, chunks=(replace(part.chunks[0], file=len(part.files)), *part.chunks[1:])
        ),
        "has another name for an alias": lambda part: replace(part, aliases={"head.weight": "a.bias"}),
        "do not cover": lambda part: replace(part, chunks=part.chunks[:-1]),
        "at .* does not follow": lambda part: replace(part, chunks=(*part.chunks, part.chunks[0])),
    }
    for told, edit in edits.items():
        with pytest.raises(CorruptError, match=told):
            with_part(edit)


@pytest.mark.parametrize("name", ["manifest.json", "manifest-1.json", "manifest-000001.json", "../manifest-00001.json"])
def test_a_part_of_another_name_is_never_read(name: str) -> None:
    head, _ = in_parts(EXAMPLE, OWNERS)
    head = msgspec.structs.replace(head, parts=(msgspec.structs.replace(head.parts[0], name=name),))
    with pytest.raises(CorruptError, match="cannot be a part's name"):
        decode(bytes(encode(head)), lambda record: pytest.fail("it was read"))


def test_a_manifest_with_parts_and_rows_is_refused() -> None:
    head, parts = in_parts(EXAMPLE, OWNERS)
    for rows in ({"chunks": EXAMPLE.chunks}, {"segments": EXAMPLE.segments}, {"aliases": EXAMPLE.aliases}):
        with pytest.raises(CorruptError, match="it has parts, and"):
            decode(bytes(encode(msgspec.structs.replace(head, **rows))), lambda record: parts[record.name])


# -- known blocks -----------------------------------------------------------------------------------------------------


@given(manifests(), planned(SMALL_SHAPES), st.data())
def test_known_hashes_are_of_the_same_offset_and_length(
    manifest: Manifest, drawn: tuple[Layout, list[tuple[int, int]], int, int], data: st.DataObject
) -> None:
    """The plan may be of the same tensors or of others."""
    same = data.draw(st.booleans())
    plan = manifest.geometry(manifest.chunks) if same else plan_of(*drawn)
    there = data.draw(st.sets(st.sampled_from([file.name for file in manifest.files])))
    expected = {}
    recorded = manifest.geometry(manifest.chunks)
    for block, checksum in zip(recorded.blocks, block_checksums(manifest.chunks), strict=True):
        expected[recorded.files[block.file_index].name, block.file_offset, block.nbytes] = checksum
    known = known_hashes(plan, manifest, there)
    for block, hash_ in zip(plan.blocks, known, strict=True):
        name = plan.files[block.file_index].name
        right = expected.get((name, block.file_offset, block.nbytes)) if name in there else None
        assert hash_ == right
    assert not same or there != {file.name for file in manifest.files} or None not in known


# -- names for errors and status --------------------------------------------------------------------------------------


@given(planned(ANY_SHAPES))
def test_the_layers_of_a_chunk(arguments: tuple[Layout, list[tuple[int, int]], int, int]) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    segments = segment_records(layout)
    for chunk, layers in zip(plan.chunks, chunk_layers(plan, layout), strict=True):
        inside = [s.layer for s in segments if holds(s, chunk.file_index, chunk.offset, chunk.nbytes)]
        assert list(layers) == list(dict.fromkeys(inside))


def holds(segment: SegmentRecord, file: int, offset: int, nbytes: int) -> bool:
    """Whether a range of a file holds a byte of a segment."""
    first, last = max(segment.offset, offset), min(segment.offset + segment.nbytes, offset + nbytes) - 1
    return segment.file == file and first <= last


@given(manifests(), st.data())
def test_affected_names_the_tensors_of_a_range(manifest: Manifest, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from(manifest.geometry(manifest.chunks).blocks))
    told = affected(manifest.segments, block.file_index, block.file_offset, block.nbytes)
    inside = [s.name for s in manifest.segments if holds(s, block.file_index, block.file_offset, block.nbytes)]
    if not inside:
        assert told == "the header"
    elif len(inside) <= 4:
        assert told == ", ".join(inside)
    else:
        assert told == f"{', '.join(inside[:4])} and {len(inside) - 4} tensors more"
