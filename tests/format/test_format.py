"""The disk format, checked by a reader that was written from docs/format.md alone.

Theory of operation.  `Reader` uses json, hashlib, struct, numpy and xxhash, and nothing of the engine.  Opening a
checkpoint with it checks every rule of the page; the tests then compare its result with the saved values.  The tables
and the worked example are read from the page, so the page cannot differ from the code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from disk import same
from dtypes import TORCH_DTYPES
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
from engine.format.layout import TensorSpec, lay_out, model_index
from engine.format.manifest import (
    FORMAT,
    READER,
    VERSION,
    ChunkRecord,
    FileRecord,
    Manifest,
    Part,
    digest_of,
    encode,
    encode_part,
    part_name,
    segment_records,
)

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")
ROLES = ("model", "buffer", "optimizer", "grad")
FIELDS = {
    "body": "format version min_reader step checkpoint_id created_ns block_bytes files chunks segments aliases "
    "optimizers extra metrics tag user_files parts modules wrappers",
    "part": "rank files chunks segments aliases",
    "file": "name nbytes header_bytes",
    "chunk": "file index offset nbytes layers checksums",
    "digested": "name nbytes sha256",
}
INDEX = "model.safetensors.index.json"
CUTS = [(4096, 4096), (4096, 12288), (12288, 4096), (8192, 20480), (1 << 20, 64 << 20)]  # block_bytes, chunk_bytes


def fenced(language: str) -> str:
    """The page's one code block of a language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    [text] = found
    return text


def dtype_table() -> dict[str, tuple[str, str, int]]:
    """The page's table of dtypes: code, change of the shape in the header, element size."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`(?:, with (.*?))? \| (\d+) \|$", PAGE, re.MULTILINE)
    return {dtype: (code, shape, int(size)) for dtype, code, shape, size in rows}


DTYPES = dtype_table()


def header_shape(dtype: str, shape: list[int]) -> list[int]:
    """The shape in the header of a tensor of this one."""
    if DTYPES[dtype][1] == "a last dimension of 2":
        return [*shape, 2]
    if DTYPES[dtype][1] == "the last dimension doubled":
        return [*shape[:-1], 2 * shape[-1]] if shape else [2]
    assert DTYPES[dtype][1] == ""
    return shape


class Stored(NamedTuple):
    """One tensor as it is on disk."""

    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    content: bytes


class Reader:
    """A checkpoint, opened by the rules of the page.  Every `assert` is one of them."""

    def __init__(self, path: Path) -> None:
        assert re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir() and not path.is_symlink()
        self.body = self.read_manifest((path / "manifest.json").read_bytes())
        assert path.name == f"step-{self.body['step']:08d}"
        self.contents = [(path / file["name"]).read_bytes() for file in self.body["files"]]
        self.check_files()
        self.check_digested(path)
        self.merge_parts(path)
        self.check_chunks()
        self.tensors = self.read_segments()
        self.check_shards()
        names = ["manifest.json", *(row["name"] for key in ("files", "parts", "user_files") for row in self.body[key])]
        assert sorted(entry.name for entry in path.iterdir()) == sorted([*names, *self.check_index(path)])
        for index in range(len(self.contents)):
            self.check_header(index)

    @staticmethod
    def read_envelope(raw: bytes) -> dict[str, Any]:
        assert raw[:11] == b'{"sha256":"' and raw[75:84] == b'","body":' and raw[-2:] == b"}\n"
        assert raw.count(b"\n") == 1 and len(raw) <= 2**30
        assert hashlib.sha256(raw[84:-2]).hexdigest() == raw[11:75].decode()
        body: dict[str, Any] = json.loads(raw)["body"]
        assert body == json.loads(raw[84:-2])
        return body

    def read_manifest(self, raw: bytes) -> dict[str, Any]:
        body = self.read_envelope(raw)
        assert list(body) == FIELDS["body"].split()
        assert (body["format"], body["version"], body["min_reader"]) == ("engine.checkpoint", 1, 1)
        assert 0 <= body["step"] < 2**63 and re.fullmatch("[0-9a-f]{32}", body["checkpoint_id"])
        assert 4096 <= body["block_bytes"] <= 2**30 and body["block_bytes"] % 4096 == 0
        return body

    def check_files(self) -> None:
        assert len({file["name"] for file in self.body["files"]}) == len(self.body["files"]) >= 1
        for file, content in zip(self.body["files"], self.contents, strict=True):
            assert list(file) == FIELDS["file"].split()
            assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,99}\.safetensors", file["name"])
            assert file["nbytes"] == len(content) and file["header_bytes"] % 4096 == 0 < file["header_bytes"]

    def check_digested(self, path: Path) -> None:
        for row in (*self.body["user_files"], *self.body["parts"]):
            content = (path / row["name"]).read_bytes()
            assert list(row) == FIELDS["digested"].split() and row["nbytes"] == len(content)
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", row["name"]) for row in self.body["user_files"])
        assert all(re.fullmatch(r"manifest-[0-9]{5}\.json", row["name"]) for row in self.body["parts"])

    def merge_parts(self, path: Path) -> None:
        if not self.body["parts"]:
            return
        assert (self.body["chunks"], self.body["segments"], self.body["aliases"]) == ([], [], {})
        for row in self.body["parts"]:
            part = self.read_envelope((path / row["name"]).read_bytes())
            assert list(part) == FIELDS["part"].split() and row["name"] == f"manifest-{part['rank']:05d}.json"
            places = [self.body["files"].index(file) for file in part["files"]]
            self.body["chunks"] += [{**chunk, "file": places[chunk["file"]]} for chunk in part["chunks"]]
            self.body["segments"] += [[*segment[:5], places[segment[5]], *segment[6:]] for segment in part["segments"]]
            self.body["aliases"].update(part["aliases"])
        self.body["chunks"].sort(key=lambda chunk: (chunk["file"], chunk["offset"]))
        self.body["segments"].sort(key=lambda segment: segment[5:8])

    def check_index(self, path: Path) -> list[str]:
        model = [row for row in self.body["segments"] if row[3] in ("model", "buffer")]
        if len({row[5] for row in model}) < 2 or any(row[8] for row in model):
            return []
        assert json.loads((path / INDEX).read_bytes()) == {
            "metadata": {"total_size": sum(row[7] for row in model)},
            "weight_map": {row[0]: self.body["files"][row[5]]["name"] for row in model},
        }
        return [INDEX]

    def check_shards(self) -> None:
        shards: dict[str, list[Any]] = {}
        for row in self.body["segments"]:
            if row[8]:
                shards.setdefault(row[0], []).append(row)
        for rows in shards.values():
            whole = rows[0][8]
            assert len({(row[1], row[3], *row[8]) for row in rows}) == 1 and len({row[5] for row in rows}) == len(rows)
            covered = np.zeros(whole, dtype=int)
            for _, _, shape, _, _, _, _, _, _, offset in rows:
                assert len(shape) == len(whole) == len(offset)
                assert all(at >= 0 and at + size <= of for at, size, of in zip(offset, shape, whole, strict=True))
                covered[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))] += 1
            assert (covered == 1).all()

    def check_chunks(self) -> None:
        ends = [0] * len(self.contents)
        counts = [0] * len(self.contents)
        for before, chunk in zip([{"file": 0}, *self.body["chunks"]], self.body["chunks"], strict=False):
            assert list(chunk) == FIELDS["chunk"].split() and chunk["file"] >= before["file"]
            index, start = chunk["file"], chunk["offset"]
            assert (start, chunk["index"]) == (ends[index], counts[index]) and chunk["nbytes"] > 0
            ends[index], counts[index] = start + chunk["nbytes"], counts[index] + 1
            content = self.contents[index]
            assert ends[index] % 4096 == 0 or ends[index] == len(content)
            offsets = range(start, ends[index], self.body["block_bytes"])
            assert all(offset % 4096 == 0 for offset in offsets)
            blocks = [content[at : min(at + self.body["block_bytes"], ends[index])] for at in offsets]
            assert chunk["checksums"] == [xxhash.xxh3_128_hexdigest(block) for block in blocks]
            assert chunk["layers"] == self.layers_between(index, start, ends[index])
        assert ends == [len(content) for content in self.contents]

    def layers_between(self, file: int, start: int, end: int) -> list[str]:
        rows = [s for s in self.body["segments"] if s[5] == file and s[7] and s[6] < end and s[6] + s[7] > start]
        return list(dict.fromkeys(row[4] for row in rows))

    def read_segments(self) -> dict[str, Stored]:
        ends = [file["header_bytes"] for file in self.body["files"]]
        tensors: dict[str, Stored] = {}
        for name, dtype, shape, role, layer, file, offset, nbytes, global_shape, global_offset in self.body["segments"]:
            size = DTYPES[dtype][2]
            assert nbytes == math.prod(shape) * size and offset == ends[file] and offset % size == 0
            pattern = {"model": r"(-\d{5}-of-\d{5})?", "optimizer": "(-[a-z0-9-]{1,64})?"}
            stem = "model" if role in ("model", "buffer") else "optimizer"
            assert re.fullmatch(rf"{stem}{pattern[stem]}\.safetensors", self.body["files"][file]["name"])
            ends[file] += nbytes
            key = name + "".join(f"@{at}" for at in global_offset)
            assert key not in tensors and (global_shape or name not in tensors)
            tensors[key] = Stored(dtype, tuple(shape), role, layer, self.contents[file][offset : offset + nbytes])
        assert ends == [len(content) for content in self.contents]
        names = {row[0] for row in self.body["segments"]}
        assert all(name not in names and stored in names for name, stored in self.body["aliases"].items())
        return tensors

    def check_header(self, file: int) -> None:
        content = self.contents[file]
        [length] = struct.unpack("<Q", content[:8])
        assert 8 + length == self.body["files"][file]["header_bytes"] and length <= 100_000_000
        text = content[8 : 8 + length].decode()
        table = json.loads(text)
        assert text.rstrip(" ").endswith("}")
        rows = [row for row in self.body["segments"] if row[5] == file]
        aliases = {alias: name for alias, name in self.body["aliases"].items() if name in {row[0] for row in rows}}
        assert next(iter(table)) == "__metadata__" and table.pop("__metadata__") == {**aliases, "format": "pt"}
        assert list(table) == [row[0] for row in rows]
        for name, dtype, shape, _, _, _, offset, nbytes, _, _ in rows:
            start = offset - 8 - length
            wanted = {"dtype": DTYPES[dtype][0], "shape": header_shape(dtype, shape)}
            assert table[name] == {**wanted, "data_offsets": [start, start + nbytes]}
        order = [(-DTYPES[row[1]][2], ROLES.index(row[3])) for row in rows]
        assert order == sorted(order)


def decode(value: Any) -> Any:
    """An encoded value, by the page's table."""
    if not isinstance(value, dict):
        return [decode(member) for member in value] if isinstance(value, list) else value
    [(tag, payload)] = value.items()
    simple: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
        "bytes": base64.b64decode,
        "tuple": lambda members: tuple(map(decode, members)),
        "set": lambda members: set(map(decode, members)),
        "frozenset": lambda members: frozenset(map(decode, members)),
        "tensor": lambda row: (row[0], row[1], base64.b64decode(row[2])),
    }
    if tag in simple:
        return simple[tag](payload)
    pairs = {decode(key): decode(member) for key, member in payload}
    return {"dict": dict, "ordered_dict": OrderedDict, "counter": Counter}[tag](pairs)


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row-major order."""
    content: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def check_against(reader: Reader, tensors: dict[str, Tensor]) -> None:
    """Every stored tensor and alias equals the one in memory."""
    assert {*reader.tensors, *reader.body["aliases"]} == set(tensors)
    for name, tensor in tensors.items():
        stored = reader.tensors[reader.body["aliases"].get(name, name)]
        assert (stored.dtype, stored.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        assert stored.content == raw_bytes(tensor), name


def every_dtype() -> dict[str, Tensor]:
    """Tensors of random bytes, with strides, without elements, without dimensions."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "turned": torch.randn(9, 5, 7).permute(2, 0, 1)}
    for index, dtype in enumerate(TORCH_DTYPES):
        size = DTYPES[dtype][2]
        raw = torch.randint(0, 2, ((201 + 13 * index) * size,), dtype=torch.uint8, generator=generator)
        tensors[f"layer.{index}.ä"] = raw.view(getattr(torch, dtype))
    return tensors


class Tied(nn.Module):
    """Two names for one weight, and module buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(("block_bytes", "chunk_bytes"), CUTS)
def test_every_rule_holds_for_every_dtype(tmp_path: Path, block_bytes: int, chunk_bytes: int) -> None:
    tensors = every_dtype()
    with engine.Engine(tmp_path, staging_bytes=2 * block_bytes, block_bytes=block_bytes) as eng:
        info = eng.checkpoint(engine.Arena.wrap(tensors), step=12, chunk_bytes=chunk_bytes).result()
    reader = Reader(Path(info.path))
    check_against(reader, tensors)
    assert reader.body["checkpoint_id"] == info.checkpoint_id
    as_numpy = np.frombuffer(reader.tensors["turned"].content, "<f4").reshape(7, 9, 5)
    assert np.array_equal(as_numpy, tensors["turned"].numpy())


@pytest.mark.parametrize(("block_bytes", "chunk_bytes"), CUTS)
def test_every_rule_holds_for_a_training(tmp_path: Path, block_bytes: int, chunk_bytes: int) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, staging_bytes=2 * block_bytes, block_bytes=block_bytes) as eng:
        info = eng.checkpoint(arena, step=10**9, chunk_bytes=chunk_bytes).result()
    reader = Reader(Path(info.path))
    check_against(reader, arena.state_dict())
    assert {name: entry.role for name, entry in reader.tensors.items() if entry.layer == "norm"} == {
        **{f"norm.{key}": "model" for key in ("weight", "bias")},
        **{f"norm.{key}": "buffer" for key in ("running_mean", "running_var", "num_batches_tracked")},
        **{
            f"optimizer.norm.{p}.{k}": "optimizer"
            for p in ("weight", "bias")
            for k in ("step", "exp_avg", "exp_avg_sq")
        },
    }
    assert reader.body["aliases"] == {"head.weight": "embed.weight"}
    assert list(reader.body["optimizers"]) == [""]
    options = decode(reader.body["optimizers"][""])
    assert set(options) == {"param_groups", "state", "absent", "class"} and options["class"] == "AdamW"
    assert options["param_groups"][0]["lr"] == 0.25
    assert options["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    assert options["absent"] == []


def test_every_rule_holds_for_several_files_optimizers_and_ranks(tmp_path: Path) -> None:
    """A model cut into files and two optimizers, each file written by its own rank."""
    path = tmp_path / "step-00000005"
    path.mkdir()
    owners = [("w.1", "model", ""), ("w\n2", "model", ""), ("m", "optimizer", "gen"), ("n", "optimizer", "")]
    layout = lay_out([TensorSpec(name, "float32", (5,), role, "w", owner) for name, role, owner in owners], None, 20)
    content = {segment.name: bytes([index]) * 20 for index, segment in enumerate(layout.segments)}
    files, parts = [], []
    for index, (name, nbytes, header, _) in enumerate(layout.files):
        segments = tuple(row for row in segment_records(layout) if row.file == index)
        raw = header + b"".join(content[row.name] for row in segments)
        (path / name).write_bytes(raw)
        files.append(FileRecord(name, nbytes, len(header)))
        chunk = ChunkRecord(0, 0, 0, nbytes, ("w",), tuple(map(xxhash.xxh3_128_hexdigest, (raw[:4096], raw[4096:]))))
        rows = tuple(msgspec.structs.replace(row, file=0) for row in segments)
        part = bytes(encode_part(Part(index, (files[-1],), (chunk,), rows, {})))
        (path / part_name(index)).write_bytes(part)
        parts.append(digest_of(part_name(index), part))
        assert set(load_file(path / name)) == {row.name for row in segments}
    (path / INDEX).write_bytes(model_index(layout) or b"")
    first = (FORMAT, VERSION, READER, 5, "0" * 32, 0, 4096)
    head = Manifest(*first, tuple(files), (), (), {}, {}, None, parts=tuple(parts))
    (path / "manifest.json").write_bytes(encode(head))
    reader = Reader(path)
    assert {name: stored.content for name, stored in reader.tensors.items()} == content
    assert [file.name for file in files] == [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("optimizer-gen.safetensors", "optimizer.safetensors"),
    ]


def test_no_tensors_make_an_empty_model_file(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        info = eng.checkpoint(engine.Arena.wrap({})).result()
    reader = Reader(Path(info.path))
    assert reader.tensors == {} and [file["name"] for file in reader.body["files"]] == ["model.safetensors"]


def test_momentum_before_the_first_step_is_absent_and_zero(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    arena = engine.Arena.adopt(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        info = eng.checkpoint(arena).result()
        assert set(eng.load()) == {"weight", "bias"}
    reader = Reader(Path(info.path))
    absent = decode(reader.body["optimizers"][""])["absent"]
    assert sorted(absent) == ["optimizer.bias.momentum_buffer", "optimizer.weight.momentum_buffer"]
    assert not any(any(reader.tensors[name].content) for name in absent)


def test_encoded_values_follow_the_table(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "plain": [None, True, False, 0, -(2**53), 2**53, 1.0, -0.0, 1e300, 5e-324, "ä\n"],
        "tagged": (2**53 + 1, -(2**200), b"hi", {1, 2}, frozenset({(1, "a")}), {3: {None: 4}, (1, b"k"): 5}),
        "dicts": [OrderedDict(b=1, a=2), Counter("aab")],
        "floats": [math.inf, -math.inf, math.nan],  # compared by repr below: nan equals nothing
        "tensor": torch.arange(6, dtype=torch.int16).reshape(2, 3),
    }
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        info = eng.checkpoint(engine.Arena.wrap({}), extra=extra).result()
    body = Reader(Path(info.path)).body
    assert body["optimizers"] == {}
    decoded = decode(body["extra"])
    dtype, shape, content = decoded.pop("tensor")
    assert (dtype, shape, content) == ("int16", [2, 3], raw_bytes(extra.pop("tensor")))
    assert repr(decoded) == repr(extra), "a value, its type or the order of keys differs from the saved one"


def test_the_documented_commands_verify_a_manifest(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        info = eng.checkpoint(engine.Arena.wrap({"a": torch.ones(3)})).result()
    printed = subprocess.run(["sh", "-ec", fenced("sh")], cwd=info.path, check=True, capture_output=True, text=True)
    computed, recorded = printed.stdout.split()
    assert computed == recorded and len(computed) == 64


def example_file() -> bytes:
    """The bytes of the page's hexdump, with its starred lines filled in."""
    content = b""
    line = b""
    for text in fenced("hexdump").splitlines():
        if text == "*":
            continue
        offset = int(text[:8], 16)
        content += line * ((offset - len(content)) // 16)  # a star stands for repetitions of the line before it
        line = bytes.fromhex(text[8:].split("|")[0])
        content += line
        assert len(content) == offset + len(line)
    return content


def test_the_worked_example_is_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-00000100"
    path.mkdir()
    (path / "model.safetensors").write_bytes(example_file())
    (path / "manifest.json").write_text(fenced("json"), encoding="utf-8")
    tensors = {
        "layers.0.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "layers.0.mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
    }
    reader = Reader(path)
    check_against(reader, tensors)
    assert decode(reader.body["extra"]) == {"epoch": 3} and len(reader.body["chunks"][0]["checksums"]) == 2
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        loaded = eng.load(step=100)
        assert loaded.keys() == tensors.keys() and all(same(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("offset", [0, 300, 4095, 4096, 4130])
def test_the_reader_sees_a_flipped_bit(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "step-00000100"
    path.mkdir()
    content = bytearray(example_file())
    content[offset] ^= 1
    (path / "model.safetensors").write_bytes(content)
    (path / "manifest.json").write_text(fenced("json"), encoding="utf-8")
    with pytest.raises(AssertionError):
        Reader(path)


def test_names_that_are_not_of_checkpoints_are_ignored(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        info = eng.checkpoint(engine.Arena.wrap({"a": torch.ones(3)}), step=7).result()
    for name in ("step-7", "step-000000008", "step-00000009.damaged", "step-0000000a", "notes"):
        shutil.copytree(info.path, tmp_path / name)
    (tmp_path / "step-00000011").symlink_to(info.path)
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        assert eng.steps() == [7]
