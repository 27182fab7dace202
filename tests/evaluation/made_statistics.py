"""Statistics of features that fit into memory, and the Fréchet distance between two of them."""

import numpy as np

from ifvit.evaluation.metrics import FeatureStatistics, estimate_frechet

statistics = FeatureStatistics.of


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    return estimate_frechet(np.stack([first.mean, first.mean]), first, second).value
