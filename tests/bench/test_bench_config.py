"""Impossible numbers in the flags of the benchmarks are one-line errors."""

from collections.abc import Callable

import pytest

from ifvit.bench.config import (
    BenchCheckpointConfig,
    BenchGenerateConfig,
    BenchLoaderConfig,
    BenchTrainConfig,
)
from ifvit.errors import UserError


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: BenchTrainConfig(steps=0), "steps is 0; it must be at least 1"),
        (lambda: BenchGenerateConfig(rounds=-1), "rounds is -1; it must be at least 1"),
        (lambda: BenchLoaderConfig(num_samples=0), "num_samples is 0; it must be at least 1"),
        (lambda: BenchLoaderConfig(num_samples=9), "num_samples is 9; .* batch_size 256"),
        (lambda: BenchCheckpointConfig(every=0), "every is 0; it must be at least 1"),
        (lambda: BenchCheckpointConfig(num_steps=30), "num_steps 30 must be a multiple of .* 20"),
    ],
)
def test_impossible_numbers_are_named(build: Callable[[], object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build()
