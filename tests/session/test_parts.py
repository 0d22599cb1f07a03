"""Parts of a checkpoint: any layer alone, into an arena, a module or a dict, and the chunks of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same
from torch import nn

import engine
from engine.session.reading import Reading

BLOCK_BYTES = 4096
LAYERS, WIDTH = 6, 64  # 16 KiB of weights a layer


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.embed.weight
        self.scale = Scale()


class Scale(nn.Module):
    value = 1.0

    def get_extra_state(self) -> float:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def adopt() -> tuple[Tied, engine.Arena]:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, engine.Arena.adopt(model, optimizer)


@pytest.fixture(params=["Engine", "Run"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Reading, dict[str, torch.Tensor]]]:
    model, arena = adopt()
    model.scale.value = 3.0
    with engine.Engine(tmp_path, block_bytes=BLOCK_BYTES, staging_bytes=8 * BLOCK_BYTES, chunk_bytes=8192) as eng:
        eng.checkpoint(arena, 7).result()
        want = {name: tensor.clone() for name, tensor in arena.state_dict().items()}
        if request.param == "Engine":
            yield eng, want
    if request.param == "Run":
        with engine.open(tmp_path, block_bytes=BLOCK_BYTES, staging_bytes=8 * BLOCK_BYTES) as run:
            yield run, want


def differing(names: Any, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in names if not same(got[name], want[name])]


@pytest.mark.parametrize(
    ("select", "picks"),
    [
        ("layers.3", lambda name: "layers.3." in name),
        ("layers.[12].*", lambda name: "layers.1." in name or "layers.2." in name),
        ("*.bias", lambda name: name.endswith(".bias")),
        (["embed", "layers.0"], lambda name: "embed." in name or "layers.0." in name or name == "head.weight"),
        ("head", lambda name: "head." in name or "embed.weight" in name),
    ],
)
def test_a_part_is_restored_alone_and_only_its_blocks_are_read(
    saved: tuple[Reading, dict[str, torch.Tensor]], select: Any, picks: Callable[[str], bool]
) -> None:
    reading, want = saved
    loaded = reading.load(select=select)
    assert loaded and differing(loaded, loaded, want) == [] and all(map(picks, loaded))

    model, _ = adopt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "scale._extra_state"}
    info = reading.restore(model, select=select)
    now = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    picked = {name for name in before if picks(name)}
    assert differing(picked, now, want) == [] and differing(before.keys() - picked, now, before) == []
    assert model.scale.value == 1.0

    other, arena = adopt()
    before = {name: tensor.clone() for name, tensor in arena.state_dict().items()}
    of_arena = reading.restore(arena, select=select)
    state = arena.state_dict()
    changed = {name for name in state if not same(state[name], before[name])}
    assert changed <= {name for name in state if picks(name)} and differing(changed, state, want) == []
    assert other.scale.value == 1.0

    tensors = {name: torch.full_like(tensor, -1) for name, tensor in want.items()}
    of_dict = reading.restore(tensors, select=select)
    chosen = set(loaded)
    assert differing(chosen, tensors, want) == []
    assert all(bool((tensors[name] == -1).all()) for name in tensors.keys() - chosen)
    assert of_dict.step == 7 and not of_dict.unexpected

    whole_bytes = reading.restore(arena).nbytes_read
    stored = {name: tensor.nbytes for name, tensor in want.items() if name not in arena.aliases}
    manifest_bytes = (Path(info.path) / "manifest.json").stat().st_size
    for each, names in ((info, picked), (of_arena, changed), (of_dict, chosen)):
        names = {arena.aliases.get(name, name) for name in names}
        data = sum(stored[name] for name in names)
        assert data <= each.nbytes_read - manifest_bytes <= data + 2 * BLOCK_BYTES * len(names)
        assert each.nbytes_read < whole_bytes


def test_a_whole_model_is_restored_into_a_module_without_its_optimizer(
    saved: tuple[Reading, dict[str, torch.Tensor]],
) -> None:
    reading, want = saved
    model = Tied()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    info = reading.restore(model, 7)
    assert info.step == 7 and pointers == [parameter.data_ptr() for parameter in model.parameters()]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "scale._extra_state"}
    assert differing(state, state, want) == [] and model.scale.value == 3.0
    with pytest.raises(engine.MismatchError, match=r"layers\.0\.weight"):
        reading.restore(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])}), select="layers.0")
    part = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))})
    info = reading.restore(part, strict=False)
    assert "embed.weight" in info.unexpected and same(part.get_parameter("layers.1.bias"), want["layers.1.bias"])


def test_a_dict_is_filled_and_what_it_does_not_name_is_not_read(
    saved: tuple[Reading, dict[str, torch.Tensor]],
) -> None:
    reading, want = saved
    strided = torch.zeros(WIDTH, 2 * WIDTH)[:, ::2]
    tensors = {"layers.3.weight": strided, "optimizer.layers.3.bias.exp_avg": torch.zeros(WIDTH)}
    info = reading.restore(tensors)
    assert differing(tensors, tensors, want) == [] and info.unexpected == () and info.nbytes_read < 200_000

    model = Tied()
    state = {name: each for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
    reading.restore(state, strict=True)  # a tied weight under both of its names
    assert differing(state, state, want) == [] and same(model.head.weight.detach(), want["head.weight"])
    apart = {"head.weight": torch.zeros(WIDTH, WIDTH), "embed.weight": torch.zeros(WIDTH, WIDTH)}
    reading.restore(apart)
    assert differing(apart, apart, want) == []
    for name in apart:
        reading.restore({name: apart[name].zero_()})
        assert same(apart[name], want[name])


def test_a_dict_that_does_not_fit_is_refused(saved: tuple[Reading, dict[str, torch.Tensor]]) -> None:
    reading, want = saved
    tensors = {
        "layers.3.weight": torch.zeros(WIDTH, WIDTH),
        "layers.4.weight": torch.zeros(3),
        "layers.5.bias": torch.zeros(WIDTH, dtype=torch.float16),
        "layers.9.weight": torch.zeros(3),
    }
    with pytest.raises(engine.MismatchError, match="nothing was changed") as caught:
        reading.restore(tensors)
    for part in ("layers.9.weight: not in the checkpoint", "layers.4.weight: float32", "layers.5.bias: float32"):
        assert part in str(caught.value)
    assert not tensors["layers.3.weight"].any()
    reading.restore(tensors, select="layers.3")
    assert same(tensors["layers.3.weight"], want["layers.3.weight"])
    info = reading.restore(tensors, strict=False)
    assert (info.missing, set(info.mismatched)) == (("layers.9.weight",), {"layers.4.weight", "layers.5.bias"})
    with pytest.raises(engine.MismatchError, match="or none that the dict has"):
        reading.restore(tensors, select="embed")
    with pytest.raises(engine.ArgumentError, match=r"has no tensors to fill; load\(select="):
        reading.restore({})
    with pytest.raises(engine.ArgumentError, match=r"'a' is mapped to a builtins\.int"):
        reading.restore({"a": 1})  # type: ignore[dict-item]


def test_a_module_whose_arena_is_being_saved_is_restored_after_the_staging(tmp_path: Path) -> None:
    model, arena = adopt()
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(arena, 0).result()
        want = {name: tensor.clone() for name, tensor in arena.state_dict().items()}
        for parameter in model.parameters():
            parameter.data.add_(1)
        save = eng.checkpoint(arena, 1, snapshot="lazy")
        eng.restore(model, 0)
        save.result()
        assert same(model.embed.weight.detach(), want["embed.weight"])
        assert same(eng.load(1)["embed.weight"], want["embed.weight"] + 1)


def test_chunks_map_to_layers_and_layers_to_chunks(tmp_path: Path) -> None:
    _, arena = adopt()
    with engine.Engine(tmp_path, block_bytes=BLOCK_BYTES, chunk_bytes=8192) as eng:
        save = eng.checkpoint(arena, 7)
        save.result()
        everything = save.chunks()
        assert everything == eng.chunks() == engine.open(tmp_path).chunks(7)
        assert {layer for chunk in everything for layer in chunk.layers} == {s.layer for s in arena.segments}
        for layer in (*(f"layers.{index}" for index in range(LAYERS)), "layers", "head", ""):
            want = []
            for chunk in everything:
                held = [
                    segment
                    for segment in arena.segments
                    if arena.layout.files[segment.file_index].name == chunk.file
                    and segment.file_offset < chunk.offset + chunk.nbytes
                    and segment.file_offset + segment.nbytes > chunk.offset
                ]
                if not layer or any(f"{segment.layer}.".startswith(f"{layer}.") for segment in held):
                    want.append(chunk)
            assert save.chunks(layer=layer) == eng.chunks(layer=layer) == want and want
            assert save.chunks(layer) == eng.chunks(7, layer) == want
        some = {"layers.1", "layers.2"}
        assert save.chunks("layers.[12]") == [chunk for chunk in everything if some & {*chunk.layers}]
        assert save.chunks("*") == [chunk for chunk in everything if chunk.layers != ("",)]
        assert eng.chunks(layer="lay*") == eng.chunks(layer="layers")
        for chunks in (save.chunks, eng.chunks):
            with pytest.raises(engine.ArgumentError, match=r"no chunk holds a layer 'layer\.3'; near are layers\.3"):
                chunks(layer="layer.3")
            with pytest.raises(engine.ArgumentError, match=r"layer is 3; it must be the path of a module or a pattern"):
                chunks(layer=3)  # type: ignore[arg-type]
        with pytest.raises(engine.ArgumentError, match=r"a layer is given as layer='layers\.3'"):
            eng.chunks("layers.3")  # type: ignore[arg-type]
