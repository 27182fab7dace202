"""Small datasets and a quick recipe, which the tests of this folder share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, small_recipe, write_dataset

from ifvit import connections
from ifvit.training.config import TrainConfig
from ifvit.training.train import train


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the small dataset."""
    return write_dataset(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another dataset of the same shapes."""
    return write_dataset(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small dataset with one NaN in image 7."""
    samples = make_samples(21, context_shape=CONTEXT_SHAPE)
    broken = samples[7].moments.copy()
    broken[0, 0, 0] = np.nan
    samples[7] = replace(samples[7], moments=broken)
    folder = tmp_path_factory.mktemp("damaged")
    write_shards(folder, samples, (12, 9))
    return str(folder)


@pytest.fixture(scope="session")
def featured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """21 samples with flips and features (4, 6), a grid of 2 x 2."""
    folder = tmp_path_factory.mktemp("featured")
    samples = make_samples(21, context_shape=CONTEXT_SHAPE, flipped=True, feature_shape=(4, 6))
    write_shards(folder, samples, (12, 9))
    return str(folder)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """21 samples of the classes cat and dog."""
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder, make_samples(21, labelled=True), (12, 9))
    return str(folder)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the same summation order everywhere


@pytest.fixture
def recipe(shards: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a recipe of 8 quick steps; keyword arguments override its fields."""

    def build(run: str = "run", **fields: object) -> TrainConfig:
        return small_recipe(str(tmp_path / run), **{"shards": shards, **fields})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The quick recipe, trained in one go; tests compare with its losses and do not change it."""
    torch.set_num_threads(1)
    config = small_recipe(str(tmp_path_factory.mktemp("whole") / "run"), shards)
    train(config)
    return config


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run directory on a local disk and in a store."""
    return (
        str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_bucket")
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that hang end after two seconds, and the client library does not retry."""
    config = {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 1}}
    monkeypatch.setattr(connections, "_S3_OPTIONS", {"config_kwargs": config})
    monkeypatch.setattr(connections, "STALL_SECONDS", 2.0)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
