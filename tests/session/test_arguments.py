"""Arguments of the wrong type: each is refused by the engine's own error, which names the thing, the value, the remedy.

A caller meets these before anything else, with a model in the place of an arena or a step in the place of a pattern.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import engine
from engine.session.request import NAME_CHARS_MAX
from engine.state.select import Selection
from engine.store.retention import decode_rule, encode_rule

Call = Callable[[engine.Engine, engine.Arena], object]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[engine.Engine, engine.Arena]]:
    """An Engine with step 1, and its arena."""
    monkeypatch.chdir(tmp_path)
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        arena = engine.Arena.wrap({"a": torch.ones(3)})
        eng.checkpoint(arena, step=1).result()
        yield eng, arena


UNTYPED: Any = engine  # no checker warns a newcomer
MODEL: Any = nn.Linear(2, 2)
FIVE: Any = 5
OF_A_STEP = ["info", "extra", "metrics", "load", "verify", "rollback", "delete"]
TRUE: Any = torch.tensor(True)
HALF: Any = torch.tensor(0.5)
UNKNOWN: Any = torch.zeros((), dtype=torch.int64, device="meta")
LONG = "x" * (NAME_CHARS_MAX + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda eng, _: eng.checkpoint(MODEL), r"arena is a torch.*Linear; .*Arena\.adopt"),
        (lambda eng, _: eng.restore(None), r"arena is a builtins\.NoneType; .*Arena\.adopt"),
        (lambda eng, arena: engine.checkpoint(eng, arena), r"the directory is Arena\(.*; it must be a path"),
        (lambda eng, _: eng.load(select=5), "select is 5; it must be a pattern"),
        (lambda eng, arena: eng.restore(arena, select=5), "select is 5; it must be a pattern"),
        (lambda eng, _: eng.wait("x"), "timeout is 'x'; it must be a number of seconds"),
        (lambda eng, _: eng.wait(float("nan")), "timeout is nan"),
        (lambda eng, arena: eng.checkpoint(arena).result("x"), "timeout is 'x'"),
        (lambda eng, arena: eng.checkpoint(arena).exception(True), "timeout is True"),
        (lambda eng, arena: eng.checkpoint(arena).wait_staged(float("nan")), "timeout is nan"),
        (lambda eng, arena: eng.restore(arena, "1"), "step is '1'; it must be an integer"),
        *((lambda eng, _, name=name: getattr(eng, name)("1"), "step is '1'; it must be an") for name in OF_A_STEP),
        *((lambda eng, _, name=name: getattr(eng, name)(True), "step is True") for name in OF_A_STEP),
        (lambda eng, arena: eng.checkpoint(arena, TRUE), r"step is tensor\(True\); it must be an integer"),
        (lambda eng, arena: eng.checkpoint(arena, np.True_), r"step is (np\.)?True_?; it must be an integer"),
        (lambda eng, arena: eng.checkpoint(arena, HALF), r"step is tensor\(0\.5000\); it must be an integer"),
        (lambda eng, _: eng.info(UNKNOWN), r"step is tensor\(.*meta.*\); it must be an integer"),
        (lambda eng, arena: eng.checkpoint(arena, np.int64(-1)), "step is -1; it must be at least 0"),
        (lambda eng, _: eng.rollback(None), "step is None; it must be an integer"),
        (lambda eng, _: eng.delete(None), "step is None; it must be an integer"),
        (lambda eng, _: eng.delete([1]), r"step is \[1\]; it must be an integer"),
        (lambda eng, arena: eng.checkpoint(arena, tag=""), "tag is ''; it must be printable text of 1 to"),
        (lambda eng, arena: eng.checkpoint(arena, tag=LONG), "tag is 'x+'... of 256 characters; it must be"),
        (lambda eng, arena: eng.checkpoint(arena, tag=5), "tag is 5; it must be printable text"),
        (lambda eng, arena: eng.checkpoint(arena, metrics={"": 1}), "metrics has '' as a name; it must be printable"),
        (lambda eng, arena: eng.checkpoint(arena, metrics={LONG: 1}), "metrics has 'x+'... of 256 characters as a"),
        (lambda eng, arena: eng.checkpoint(arena, metrics={1: 1}), "metrics has 1 as a name; it must be printable"),
        (lambda eng, arena: eng.checkpoint(arena, metrics={"a": "x"}), "metrics has 'a': 'x'; it must map names to"),
        (
            lambda eng, arena: eng.checkpoint(arena, metrics={"a": "3"}),
            r"'a': '3'; it must .* numbers: pass float\('3'\)$",
        ),
        (
            lambda eng, arena: eng.checkpoint(arena, metrics={"a": True}),
            r"'a': True; it .* numbers: pass float\(True\)$",
        ),
        (
            lambda eng, arena: eng.checkpoint(arena, metrics={"a": TRUE}),
            r"'a': tensor.*; it .* numbers: pass \.item\(\)$",
        ),
        (lambda eng, arena: eng.checkpoint(arena, metrics={"a": None}), "'a': None; it must map names to numbers$"),
        (lambda eng, arena: eng.checkpoint(arena, metrics=0), "metrics is 0; it must map names to numbers"),
        (lambda eng, arena: eng.checkpoint(arena, files=[]), r"files is \[\]; it must map names to bytes or paths"),
        (lambda *_: engine.open(FIVE), "the directory is 5; it must be a path"),
        (lambda *_: UNTYPED.Engine("nowhere", kep=2), r"Engine\(\) has no keyword 'kep'; did you mean keep\?"),
        (
            lambda *_: UNTYPED.Engine("nowhere", zz=2),
            r"Engine\(\) has no keyword 'zz'; it takes keep, retention, options,",
        ),
        (lambda *_: UNTYPED.Engine("nowhere", options=FIVE), r"options is 5; it must be an engine\.Options"),
        (lambda *_: UNTYPED.probe(".", bakend="auto"), r"engine\.probe\(\) has no keyword .*did you mean backend\?"),
        (lambda *_: UNTYPED.open(".", blok_bytes=1), r"engine\.open\(\) has no keyword .*did you mean block_bytes\?"),
        (
            lambda _, arena: engine.checkpoint(arena, "nowhere", etra={}),
            r"engine\.checkpoint\(\) has no keyword 'etra'; did you mean extra\?",
        ),
        (
            lambda _, arena: engine.checkpoint(arena, "nowhere", keep=2),
            r"engine\.checkpoint\(\) has no keyword 'keep', which is one of Engine; .*Engine\(directory, keep=\.\.\.\)",
        ),
        (lambda *_: engine.Engine("nowhere", retention=FIVE), "retention is 5; it must be an engine.Retention"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_a_remedy(
    saved: tuple[engine.Engine, engine.Arena], call: Call, message: str
) -> None:
    eng, arena = saved
    eng.wait()
    with pytest.raises(engine.ArgumentError, match=message):
        call(eng, arena)
    assert not Path("nowhere").exists()
    eng.wait()
    assert 1 in eng.steps() and not arena.torn, "a refused call changed something"


def test_a_name_of_the_greatest_length_is_listed(saved: tuple[engine.Engine, engine.Arena]) -> None:
    eng, arena = saved
    name = "\N{SNOWMAN}" * NAME_CHARS_MAX
    eng.checkpoint(arena, step=2, tag=name, metrics={name: 1}).result()
    assert eng.info(2).tag == name and eng.metrics(2) == {name: 1}


@pytest.mark.parametrize("timeout", [-1, -1e300, 0, 5, 1e300, 10**400, float("inf")])
def test_any_number_is_a_timeout(saved: tuple[engine.Engine, engine.Arena], timeout: float) -> None:
    eng, arena = saved
    save = eng.checkpoint(arena)
    save.result()
    assert save.result(timeout).step == 2 and save.exception(timeout) is None and save.wait_staged(timeout)
    assert eng.wait(timeout)


def test_the_directory_of_a_checkpoint_is_no_run(tmp_path: Path) -> None:
    """Opened as a run it would hold no checkpoint, and a training would begin anew without a word."""
    with engine.Engine(tmp_path, staging_bytes=1 << 20, block_bytes=64 << 10) as eng:
        eng.checkpoint(engine.Arena.wrap({"w": torch.zeros(1)}), step=3).result()
    step = tmp_path / "step-00000003"
    before = sorted(os.listdir(step))
    for opening in (engine.Engine, engine.open):
        with pytest.raises(engine.ArgumentError, match=f"one checkpoint; open the run that it is in: '{tmp_path}'"):
            opening(step)
    assert sorted(os.listdir(step)) == before


@pytest.mark.parametrize(
    "integer", [np.int64, np.uint16, np.array, torch.tensor], ids=["int64", "uint16", "0-d", "tensor"]
)
def test_a_step_or_a_count_may_be_any_integer(tmp_path: Path, integer: Callable[[int], Any]) -> None:
    """The counter of a training is often a number of numpy, or a tensor, as in an optimizer's state."""
    options = engine.Options(staging_bytes=integer(8192), block_bytes=integer(4096), max_async=integer(1))
    assert options == engine.Options(staging_bytes=8192, block_bytes=4096, max_async=1)
    arena = engine.Arena.wrap({"a": torch.ones(3)})
    with engine.Engine(tmp_path, keep=integer(3), options=options) as eng:
        for step in (1, 2, 3):
            info = eng.checkpoint(arena, integer(step), chunk_count=integer(1)).result()
            assert (type(info.step), info.step) == (int, step)
        assert eng.restore(arena, integer(2)).step == 2 and eng.info(integer(2)).step == 2
        assert eng.load(integer(1)) and eng.verify(integer(1)) == ()
        assert eng.rollback(integer(2)) == [3] and eng.steps() == [1, 2]
        eng.delete(integer(1))
        assert eng.steps() == [2] and eng.retention == engine.Retention(3)


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_a_rule_holds_plain_integers(integer: Callable[[int], Any]) -> None:
    rule = engine.Retention(integer(1), integer(5), ("loss", "min", integer(2)))
    assert rule.best is not None and [type(each) for each in (rule.last, rule.every, rule.best[2])] == [int] * 3
    assert decode_rule(encode_rule(rule)) == rule == engine.Retention(1, 5, ("loss", "min", 2))


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("encoder.layer.0*", "near are encoder.layers.0, encoder.layers.0.bias, encoder.layers.0.weight"),
        (["tied.wieght"], "near are tied.weight, head.weight"),
        (["zzz", "ended.bias"], "near are head.bias"),
        ("zzz*", "it has encoder.layers.0.weight, encoder.layers.0.bias, head.weight, head.bias and 1 tensors more"),
    ],
)
def test_a_selection_that_matches_nothing_is_told_near_names(tmp_path: Path, select: Any, said: str) -> None:
    model = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}), "head": nn.Linear(2, 2)}
    )
    model["tied"] = nn.Module()
    model["tied"].weight = model["head"].weight
    arena = engine.Arena.adopt(model)
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096) as eng:
        eng.checkpoint(arena).result()
        for read, error in ((eng.load, engine.ArgumentError), (partial(eng.restore, arena), engine.MismatchError)):
            with pytest.raises(error) as caught:
                read(select=select)
            message = f"select={select!r} matches no tensor of step 0; {said}"
            assert str(caught.value).removesuffix("; nothing was changed") == message
    assert "it has no tensor" in Selection("a").suggest([], [])


@pytest.mark.parametrize("given", [(), (MODEL,), (MODEL, None), ({"a": torch.ones(1)},), (1, MODEL)])
def test_what_only_the_engine_makes_says_how_it_is_made(given: tuple[Any, ...]) -> None:
    with pytest.raises(
        engine.UsageError, match=r"made by Arena\.adopt\(model, optimizer\), or by Arena\.wrap\(tensors\)"
    ):
        UNTYPED.Arena(*given)
    if given != (MODEL, None):
        with pytest.raises(engine.UsageError, match=r"a Save is made by Engine\.checkpoint\(arena\)"):
            UNTYPED.Save(*given)


def test_completion_offers_what_callers_need(saved: tuple[engine.Engine, engine.Arena]) -> None:
    eng, arena = saved
    save = eng.checkpoint(arena)
    save.result()
    for value, wanted, internal in [
        (arena, {"adopt", "wrap", "state_dict", "nbytes"}, {"hold", "fence", "restored", "mark_torn"}),
        (save, {"result", "wait_staged", "chunks", "stats", "add_done_callback"}, {"set_result", "end", "resolve"}),
    ]:
        offered = set(dir(value))
        assert wanted <= offered and not offered & internal and not any(name.startswith("_") for name in offered)
        assert all(hasattr(value, name) for name in offered)
