"""30,000 samples are measured without holding more than their features."""

import tracemalloc

import numpy as np
import torch
from torch import Tensor

from ifvit.distributed import ProcessGroup, World
from ifvit.evaluation.estimates import estimate_mean
from ifvit.evaluation.features import collect_features
from ifvit.evaluation.metrics import estimate_frechet

COUNT, WIDTH, BATCH = 30_000, 128, 500
FEATURE_BYTES = COUNT * WIDTH * 4


def test_memory_is_that_of_the_features() -> None:
    def network(images: Tensor) -> Tensor:
        return torch.randn(len(images), WIDTH)

    torch.manual_seed(0)
    channel = ProcessGroup(World(rank=0, size=1, local_rank=0))
    batches = (np.zeros((BATCH, 8, 8, 3), np.uint8) for _ in range(COUNT // BATCH))
    tracemalloc.start()
    found = collect_features(
        {"clip": network}, batches, range(COUNT), {"clip": np.arange(COUNT)}, "cpu", channel
    )["clip"]
    distance = estimate_frechet(found.part, found.statistics, found.statistics)
    score = estimate_mean(found.part[:, 0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.part.shape == (COUNT, WIDTH)
    assert distance.num_samples == score.num_samples == COUNT
    # The features twice, while they are put in order, and what the bootstrap draws at a time.
    assert peak < 2 * FEATURE_BYTES + 40e6
