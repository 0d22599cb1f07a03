"""Layout: where tensors go in the arena and in files, and files that the stock safetensors library reads."""

from __future__ import annotations

import json
import math
import pathlib
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ANY_SHAPES, SMALL_SHAPES, specs

import engine.format.layout
from engine.errors import ArenaError
from engine.format.layout import ARENA_ALIGNMENT, DTYPES, FILES, HEADER_ALIGNMENT, TensorSpec, align_up, lay_out

# torch says once per process that complex32 is experimental; only its bytes are compared here.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def spec(name: str, dtype: str = "float32", shape: tuple[int, ...] = (1,), role: str = "model") -> TensorSpec:
    return TensorSpec(name, dtype, shape, role, "")


def read_header(header: bytes) -> dict[str, dict[str, object]]:
    """The table of a safetensors header, by the format's own words: a length, then JSON."""
    (length,) = struct.unpack_from("<Q", header)
    assert 8 + length == len(header)
    table: dict[str, dict[str, object]] = json.loads(header[8:])
    return table


@given(specs(ANY_SHAPES))
def test_every_tensor_gets_a_place_of_its_own_size(table: list[TensorSpec]) -> None:
    layout = lay_out(table)
    assert sorted(segment[:5] for segment in layout.segments) == sorted(map(tuple, table))
    for segment in layout.segments:
        assert segment.nbytes == math.prod(segment.shape) * getattr(torch, segment.dtype).itemsize
        assert layout.files[segment.file_index].name == FILES[segment.role]


@given(specs(ANY_SHAPES))
def test_arena_offsets_are_aligned_and_padding_is_less_than_the_alignment(table: list[TensorSpec]) -> None:
    layout = lay_out(table)
    end = 0
    for segment in layout.segments:
        assert segment.arena_offset % ARENA_ALIGNMENT == 0
        assert 0 <= segment.arena_offset - end < ARENA_ALIGNMENT
        end = segment.arena_offset + segment.nbytes
    assert layout.arena_bytes % ARENA_ALIGNMENT == 0 and 0 <= layout.arena_bytes - end < ARENA_ALIGNMENT


@given(specs(ANY_SHAPES))
def test_files_are_packed_without_holes_and_every_tensor_is_aligned(table: list[TensorSpec]) -> None:
    layout = lay_out(table)
    ends = [len(file.header) for file in layout.files]
    assert all(end % HEADER_ALIGNMENT == 0 for end in ends)
    for segment in layout.segments:
        assert segment.file_offset == ends[segment.file_index]
        assert segment.file_offset % DTYPES[segment.dtype].itemsize == 0
        ends[segment.file_index] += segment.nbytes
    assert ends == [file.nbytes for file in layout.files]


@given(specs(ANY_SHAPES))
def test_headers_say_where_the_tensors_are(table: list[TensorSpec]) -> None:
    layout = lay_out(table)
    for index, file in enumerate(layout.files):
        described = read_header(file.header)
        members = [segment for segment in layout.segments if segment.file_index == index]
        assert list(described) == [segment.name for segment in members]
        for segment in members:
            start = segment.file_offset - len(file.header)
            assert described[segment.name]["data_offsets"] == [start, start + segment.nbytes]


@given(specs(ANY_SHAPES))
def test_the_layout_is_deterministic_and_groups_what_is_staged_together(table: list[TensorSpec]) -> None:
    layout = lay_out(iter(table))
    assert layout == lay_out(table)
    keys = [(segment.file_index, -DTYPES[segment.dtype].itemsize, segment.role) for segment in layout.segments]
    groups = list(dict.fromkeys(keys))
    assert keys == [key for group in groups for key in keys if key == group], "each group is one run"
    assert [key[:2] for key in groups] == sorted(key[:2] for key in groups), "largest elements first"


@given(specs(SMALL_SHAPES), st.binary(min_size=1, max_size=61))
def test_the_stock_library_reads_every_tensor(table: list[TensorSpec], pattern: bytes) -> None:
    layout = lay_out(table)
    for index, file in enumerate(layout.files):
        body = (pattern * (file.nbytes // len(pattern) + 1))[: file.nbytes - len(file.header)]
        loaded = safetensors.torch.load(file.header + body)
        members = [segment for segment in layout.segments if segment.file_index == index]
        assert set(loaded) == {segment.name for segment in members}
        for segment in members:
            start = segment.file_offset - len(file.header)
            tensor = loaded[segment.name]
            if DTYPES[segment.dtype].components == 2:
                tensor = torch.view_as_complex(tensor)
            assert (tensor.dtype, tensor.shape) == (getattr(torch, segment.dtype), segment.shape)
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == body[start : start + segment.nbytes]


def test_safe_open_reads_a_file_with_every_dtype_and_the_aliases(tmp_path: pathlib.Path) -> None:
    table = [spec(name, name, (3, 2)) for name in DTYPES]
    layout = lay_out(table, {"tied": "float32", "elsewhere": "absent"})
    (file,) = layout.files
    path = tmp_path / file.name
    path.write_bytes(file.header + bytes(file.nbytes - len(file.header)))
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"tied": "float32"}
        assert sorted(opened.keys()) == sorted(DTYPES)
        for name, dtype in DTYPES.items():
            assert opened.get_tensor(name).shape[:2] == (3, 2)
            assert opened.get_tensor(name).nbytes == 6 * dtype.itemsize
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt"):
        pass


def test_no_tensors_are_still_a_file() -> None:
    layout = lay_out([])
    assert layout.arena_bytes == 0 and [file.name for file in layout.files] == ["model.safetensors"]
    assert safetensors.torch.load(layout.files[0].header) == {}


def test_dtypes_are_those_of_torch() -> None:
    for name, dtype in DTYPES.items():
        assert dtype.itemsize == getattr(torch, name).itemsize


@pytest.mark.parametrize("length", [0, 1, 3500, 4070, 4071, 4072, 4073, 4074, 4075, 4076, 9000])
def test_the_header_is_padded_to_the_next_page_only(length: int) -> None:
    header = lay_out([spec("n" * length)]).files[0].header
    text = header[8:].rstrip(b" ")
    assert len(header) == align_up(8 + len(text), HEADER_ALIGNMENT)


@given(st.integers(0, 2**70), st.integers(1, 2**40))
def test_align_up_is_the_least_multiple_that_is_enough(value: int, alignment: int) -> None:
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0 and aligned - alignment < value <= aligned


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([spec("w"), spec("w", role="optimizer")], "two tensors are called 'w'"),
        ([spec("__metadata__")], "cannot be called '__metadata__'"),
        ([spec("a\nb")], r"cannot be called 'a\\nb'"),
        ([spec("\ud800")], r"cannot be called '\\ud800'"),
        ([spec("w", "qint8")], "'w' has dtype qint8"),
        ([spec("w", role="weights")], "'w' has role 'weights'; roles are model, buffer, optimizer, grad"),
        ([spec("w", shape=(2, -1))], r"'w' has a negative dimension in \(2, -1\)"),
    ],
)
def test_refusals_name_the_tensor(table: list[TensorSpec], message: str) -> None:
    with pytest.raises(ArenaError, match=message):
        lay_out(table)


def test_a_header_longer_than_safetensors_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit itself would take 100 MB of names; one page less one byte shows the comparison.
    fitting = len(lay_out([spec("w")]).files[0].header) - 8
    monkeypatch.setattr(engine.format.layout, "HEADER_BYTES_MAX", fitting)
    assert lay_out([spec("w")]).files
    monkeypatch.setattr(engine.format.layout, "HEADER_BYTES_MAX", fitting - 1)
    with pytest.raises(ArenaError, match=f"1 tensors need a header of {fitting} bytes"):
        lay_out([spec("w")])
