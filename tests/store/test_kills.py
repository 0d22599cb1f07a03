"""Real kills: SIGKILL of a training on real file systems, at every operation and at random moments.

`kills` has the checks, `trainee` is the killed program, and `kill_campaign.py` is the long form.  The tests at the end
show that the checks detect damage.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kills import BACKENDS, IN_MEMORY, LINES, VOLUMES, Figures, Lost, Ordeal, Server, serving
from volumes import volume

# The kills on each file system: 400 in a run of the tests.
KILLS_MIN = 100

RANDOM_COUNT = 15


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("kind", VOLUMES)
def test_a_training_survives_kills_everywhere(server: Server, kind: str) -> None:
    """Half of the file systems are tested with a second save in flight; the campaign tests both on each."""
    figures = Figures()
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    with volume(kind, VOLUMES[kind]) as root:
        ordeal = Ordeal(server, root, kind, random.Random(seed), figures)
        ordeal.suffer([list(VOLUMES).index(kind) % 2 == 0], RANDOM_COUNT)
    assert figures.kill_count >= KILLS_MIN
    missed = LINES - {phase for _, phase in figures.phases}
    assert not missed, f"nothing was killed at {missed}"
    assert figures.backends.keys() == set(BACKENDS), "not every backend was in use"
    assert figures.torn_count or kind in IN_MEMORY, "no save was killed between its first byte and its last"
    assert figures.random_in_flight_count, "no kill at a random moment has hit a save"
    assert figures.recycled_count, "no save has recycled anything"


def test_a_training_with_linked_files_survives_kills_everywhere(server: Server) -> None:
    """One file system here; the campaign with --split tests all."""
    figures = Figures()
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    with volume("ext4", VOLUMES["ext4"]) as root:
        Ordeal(server, root, "ext4", random.Random(seed), figures, split=True).suffer([True], RANDOM_COUNT)
    missed = LINES | {"B2a", "L1"}
    missed -= {phase for _, phase in figures.phases}
    assert figures.kill_count >= KILLS_MIN and not missed, f"nothing was killed at {missed}"
    assert figures.linked_count, "no file was linked"


# -- what the checks detect ---------------------------------------------------------------------------------------


class Damage:
    """Damage that a faulty engine might leave after its second step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.step = directory / "step-00000004"

    def flipped_bit(self) -> None:
        path = self.step / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def lost_step(self) -> None:
        shutil.rmtree(self.step)

    def wrong_step(self) -> None:
        self.step.rename(self.directory / "step-00000005")

    def file_too_many(self) -> None:
        (self.step / "old.safetensors").touch()

    def no_manifest(self) -> None:
        (self.step / "manifest.json").unlink()

    def many_spares(self) -> None:
        for number in range(100, 120):
            (self.directory / ".engine/spare" / f"{number:08d}").mkdir()

    def many_partials(self) -> None:
        for number in range(100, 103):
            (self.directory / f"step-{number:08d}.partial").mkdir()

    def touched_sentinel(self) -> None:
        (self.directory.parent / "sentinel").touch()

    def file_beside(self) -> None:
        (self.directory.parent / "beside").touch()


DAMAGES = {name: damage for name, damage in vars(Damage).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_kill_campaign_detects_damage(server: Server, tmp_path: Path, name: str) -> None:
    damage: Callable[[Damage], None] = DAMAGES[name]
    ordeal = Ordeal(server, tmp_path, "any", random.Random(0), Figures())
    ordeal.end()
    damage(Damage(tmp_path / "run"))
    with pytest.raises(Lost):
        ordeal.look()


def test_the_kill_campaign_detects_a_failed_run(server: Server, tmp_path: Path) -> None:
    """The next run finds the newest step damaged, and passes over it."""
    ordeal = Ordeal(server, tmp_path, "any", random.Random(0), Figures())
    ordeal.end()
    Damage(tmp_path / "run").flipped_bit()
    with pytest.raises(Lost, match="CorruptError"):
        ordeal.end()
