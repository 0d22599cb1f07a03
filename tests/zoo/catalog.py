"""The list of trainings: each is a function that trains as a user's script does, and asks a `Run` for its steps.

Theory of operation.  A module of trainings imports only torch at its top, and the packages that a training needs inside
it.  So the list can be read without them, and `make test` runs those that need torch alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from life import Run

# Modules of trainings, in the order of the table.
MODULES = (
    "torch_optimizers",
    "torch_schedulers",
    "torch_models",
    "torch_loops",
    "torch_ranks",
    "hugging_face",
    "lightning_loops",
    "timm_models",
    "timm_optimizers",
    "other_optimizers",
)


class Training(NamedTuple):
    """One training.

    Attributes:
        name: its row in the table; trainings with equal text before a colon share one.
        train: the script.
        needs: packages besides torch that it imports.
        note: what its user has to do, for the table.
        refused: a pattern of the error that refuses it; "" for a training that has to resume bit-identically.
        rank_count: how many processes take part.
    """

    name: str
    train: Callable[[Run], None]
    needs: tuple[str, ...]
    note: str
    refused: str
    rank_count: int


CATALOG: dict[str, Training] = {}


def training(
    name: str, *needs: str, note: str = "", refused: str = "", rank_count: int = 1
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Put the function that follows into the catalog."""

    def put(train: Callable[[Run], None]) -> Callable[[Run], None]:
        assert name not in CATALOG, name
        CATALOG[name] = Training(name, train, needs, note, refused, rank_count)
        return train

    return put


def load_catalog() -> dict[str, Training]:
    """All trainings, by name."""
    for module in MODULES:
        importlib.import_module(module)
    return CATALOG
