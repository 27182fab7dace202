"""A small dataset and recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_files import small_recipe, write_dataset

from ifvit.training.config import TrainConfig


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the small dataset."""
    return write_dataset(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the same summation order everywhere


@pytest.fixture
def recipe(shards: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a recipe of 8 quick steps; keyword arguments override its fields."""

    def build(run: str = "run", **fields: object) -> TrainConfig:
        return small_recipe(str(tmp_path / run), **{"shards": shards, **fields})  # type: ignore[arg-type]

    return build
