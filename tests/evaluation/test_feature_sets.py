"""Features of many images: which are kept, and which are refused."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation.features import FeatureSet, collect_features
from ifvit.images import Pixels

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)


def flatten(images: Tensor) -> Tensor:
    return images.flatten(start_dim=1)


def collect(network: object, images: Pixels, positions: list[int], part: list[int]) -> FeatureSet:
    channel = ProcessGroup(World(rank=0, size=1, local_rank=0))
    batches = np.split(images, [3])
    parts = {"eye": np.array(part)}
    return collect_features({"eye": network}, batches, positions, parts, "cpu", channel)["eye"]  # type: ignore[dict-item]


def test_moments_are_of_all_and_the_part_is_kept_in_its_own_order() -> None:
    positions, part = [6, 0, 5, 1, 4, 2, 3], [4, 0, 6]
    found = collect(flatten, IMAGES[positions], positions, part)
    features = IMAGES.transpose(0, 3, 1, 2).reshape(7, -1) / 127.5 - 1
    np.testing.assert_allclose(found.part, features[part], atol=1e-6)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features.T), atol=1e-6)
    assert found.statistics.num_samples == 7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    def broken(images: Tensor) -> Tensor:
        return flatten(images).index_fill(1, torch.tensor([2]), value)

    with pytest.raises(UserError, match="eye: features are not finite"):
        collect(broken, IMAGES, list(range(7)), [0])
