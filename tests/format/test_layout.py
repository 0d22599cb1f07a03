"""Layout: the locations of tensors in the arena and in files, which the stock safetensors library reads."""

from __future__ import annotations

import json
import math
import pathlib
import random
import struct
import tempfile

import pytest
import safetensors
import safetensors.torch
import torch
from dtypes import TORCH_DTYPES
from hypothesis import given
from hypothesis import strategies as st
from strategies import ANY_SHAPES, SMALL_SHAPES, specs

import engine.format.layout
from engine.errors import ArenaError
from engine.format.layout import (
    ARENA_ALIGNMENT,
    DTYPES,
    FILE_STEMS,
    HEADER_ALIGNMENT,
    REGION_ALIGNMENT,
    TensorSpec,
    align_up,
    lay_out,
    model_index,
)

# torch says once per process that complex32 is experimental; only its bytes are compared here.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def spec(name: str, dtype: str = "float32", shape: tuple[int, ...] = (1,), role: str = "model") -> TensorSpec:
    return TensorSpec(name, dtype, shape, role, "")


def load(content: bytes) -> dict[str, torch.Tensor]:
    """The result of `safetensors.torch.load_file`; its `load` of bytes lacks the newest dtypes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return safetensors.torch.load_file(file.name)


def read_header(header: bytes) -> dict[str, dict[str, object]]:
    """The table of a safetensors header: a length, then JSON."""
    (length,) = struct.unpack_from("<Q", header)
    assert 8 + length == len(header)
    table: dict[str, dict[str, object]] = json.loads(header[8:])
    return table


@given(specs(ANY_SHAPES))
def test_every_segment_has_the_size_of_its_tensor(table: list[TensorSpec]) -> None:
    layout = lay_out(table)
    assert sorted(segment[:8] for segment in layout.segments) == sorted(map(tuple, table))
    for segment in layout.segments:
        assert segment.nbytes == math.prod(segment.shape) * getattr(torch, segment.dtype).itemsize
        stem = FILE_STEMS[segment.role]
        owner = f"-{segment.optimizer}" if segment.optimizer and stem == "optimizer" else ""
        assert layout.files[segment.file_index].name == f"{stem}{owner}.safetensors"


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
        assert described.pop("__metadata__") == {"format": "pt"}
        members = [segment for segment in layout.segments if segment.file_index == index]
        assert list(described) == [segment.name for segment in members]
        for segment in members:
            start = segment.file_offset - len(file.header)
            assert described[segment.name]["data_offsets"] == [start, start + segment.nbytes]


@given(specs(ANY_SHAPES))
def test_the_layout_is_deterministic_and_keeps_roles_contiguous(table: list[TensorSpec]) -> None:
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
        loaded = load(file.header + body)
        members = [segment for segment in layout.segments if segment.file_index == index]
        assert set(loaded) == {segment.name for segment in members}
        for segment in members:
            start = segment.file_offset - len(file.header)
            tensor = loaded[segment.name]
            if DTYPES[segment.dtype].components == 2:
                tensor = torch.view_as_complex(tensor)
            # The library has no shape () for two numbers in one element.
            shape = segment.shape or ((1,) if DTYPES[segment.dtype].packed > 1 else ())
            assert (tensor.dtype, tensor.shape) == (getattr(torch, segment.dtype), shape)
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == body[start : start + segment.nbytes]


def test_safe_open_reads_a_file_with_every_dtype_and_the_aliases(tmp_path: pathlib.Path) -> None:
    table = [spec(name, name, (3, 2)) for name in TORCH_DTYPES]
    layout = lay_out(table, {"tied": "float32", "elsewhere": "absent"})
    (file,) = layout.files
    path = tmp_path / file.name
    path.write_bytes(file.header + bytes(file.nbytes - len(file.header)))
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "tied": "float32"}
        assert sorted(opened.keys()) == sorted(TORCH_DTYPES)
        for name, dtype in TORCH_DTYPES.items():
            assert opened.get_tensor(name).shape[:2] == (3, 2)
            assert opened.get_tensor(name).nbytes == 6 * dtype.itemsize
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt"):
        pass


def test_no_tensors_make_an_empty_model_file() -> None:
    layout = lay_out([])
    assert layout.arena_bytes == 0 and [file.name for file in layout.files] == ["model.safetensors"]
    assert safetensors.torch.load(layout.files[0].header) == {}


def test_each_optimizer_has_its_own_file() -> None:
    owners = ["", "discriminator", "generator-2"]
    layout = lay_out([TensorSpec(f"{name}.m", "float32", (2,), "optimizer", "", name) for name in owners])
    assert [file.name for file in layout.files] == [
        "optimizer-discriminator.safetensors",
        "optimizer-generator-2.safetensors",
        "optimizer.safetensors",
    ]


MODEL_BYTES_MAX = st.sampled_from([1, 16, 100, 4096, 2**40])


@given(specs(SMALL_SHAPES), MODEL_BYTES_MAX)
def test_a_model_is_cut_between_tensors(table: list[TensorSpec], bytes_max: int) -> None:
    whole, layout = lay_out(table), lay_out(table, model_file_bytes_max=bytes_max)
    assert [segment.name for segment in layout.segments] == [segment.name for segment in whole.segments]
    assert [segment.arena_offset for segment in layout.segments] == [s.arena_offset for s in whole.segments]
    for index, file in enumerate(layout.files):
        sizes = [segment.nbytes for segment in layout.segments if segment.file_index == index]
        if file.name.startswith("model-"):
            assert sizes and (sum(sizes) <= bytes_max or sum(size > 0 for size in sizes) == 1)
        assert set(load(file.header + bytes(file.nbytes - len(file.header)))) == {
            segment.name for segment in layout.segments if segment.file_index == index
        }
    count = sum(file.name.startswith("model-") for file in layout.files)
    names = [file.name for file in layout.files if file.name.startswith("model")]
    assert names in (
        [],
        ["model.safetensors"],
        [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)],
    )
    assert count != 1


@given(specs(SMALL_SHAPES), MODEL_BYTES_MAX)
def test_the_index_names_the_file_of_every_tensor_of_the_model(table: list[TensorSpec], bytes_max: int) -> None:
    layout = lay_out(table, model_file_bytes_max=bytes_max)
    content = model_index(layout)
    assert (content is None) == (not any(file.name.startswith("model-") for file in layout.files))
    if content is not None:
        model = [segment for segment in layout.segments if segment.role in ("model", "buffer")]
        assert json.loads(content) == {
            "metadata": {"total_size": sum(segment.nbytes for segment in model)},
            "weight_map": {segment.name: layout.files[segment.file_index].name for segment in model},
        }


@given(specs(SMALL_SHAPES), st.randoms(use_true_random=False))
def test_untrained_tensors_of_the_model_have_files_of_their_own(table: list[TensorSpec], chance: random.Random) -> None:
    untrained = {spec.name for spec in table if spec.role in ("model", "buffer") and chance.random() < 0.5}
    layout = lay_out(table, untrained=untrained, split_untrained=True)
    files: dict[int, set[tuple[bool, str]]] = {}
    for segment in layout.segments:
        kind = segment.name in untrained, segment.role if segment.name in untrained else FILE_STEMS[segment.role]
        files.setdefault(segment.file_index, set()).add(kind)
    assert all(len(kinds) == 1 for kinds in files.values()), "one kind a file"
    assert len({min(kinds) for kinds in files.values() if min(kinds)[0]}) == sum(f.is_untrained for f in layout.files)
    for index, kinds in files.items():
        assert layout.files[index].is_untrained == min(kinds)[0]
    pages: dict[int, set[bool]] = {}
    for segment in filter(lambda segment: segment.nbytes, layout.segments):
        for offset in (segment.arena_offset, segment.arena_offset + segment.nbytes - 1):
            pages.setdefault(offset // REGION_ALIGNMENT, set()).add(layout.files[segment.file_index].is_untrained)
    assert all(len(kinds) == 1 for kinds in pages.values()), "no huge page holds both"
    model = [file for file in layout.files if file.name.startswith("model")]
    count = len(model)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert [file.name for file in model] == (["model.safetensors"] if count == 1 else names)


def test_shards_have_no_index_of_whole_tensors() -> None:
    table = [TensorSpec(name, "float32", (1,), "model", "", "", (2,), (0,)) for name in "ab"]
    assert model_index(lay_out(table, model_file_bytes_max=1)) is None


def test_dtypes_are_those_of_torch() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize == getattr(torch, name).itemsize


@pytest.mark.parametrize("length", [0, 1, 3500, 4070, 4071, 4072, 4073, 4074, 4075, 4076, 9000])
def test_the_header_is_padded_to_the_next_page_only(length: int) -> None:
    header = lay_out([spec("n" * length)]).files[0].header
    text = header[8:].rstrip(b" ")
    assert len(header) == align_up(8 + len(text), HEADER_ALIGNMENT)


@given(st.integers(0, 2**70), st.integers(1, 2**40))
def test_align_up_is_the_smallest_multiple_not_below(value: int, alignment: int) -> None:
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0 and aligned - alignment < value <= aligned


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([spec("w"), spec("w", role="optimizer")], "two tensors are called 'w'"),
        ([spec("__metadata__")], "cannot be called '__metadata__'"),
        ([TensorSpec("w", "float32", (), "optimizer", "", "Gen")], "optimizer cannot be called 'Gen'"),
        ([TensorSpec("w", "float32", (), "optimizer", "", "a/b")], "optimizer cannot be called 'a/b'"),
        ([TensorSpec("w", "float32", (), "optimizer", "", "a" * 65)], "optimizer cannot be called 'a+'"),
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
