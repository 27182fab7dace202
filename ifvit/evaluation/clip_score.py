"""CLIP Score: how well images agree with their captions (Hessel et al. 2021).

Shapes: N images, E feature width, unit length.
"""

import numpy as np
from numpy.typing import NDArray

from ifvit.evaluation.frechet import Features
from ifvit.evaluation.metrics import Estimate, estimate_mean

PAPER_SCALE = 2.5


def clip_score(image_features: Features, text_features: Features) -> Estimate:
    """Mean raw cosine of image i and caption i, (N, E) each."""
    return estimate_mean(_cosines(image_features, text_features))


def clip_score_paper(image_features: Features, prefixed_text_features: Features) -> Estimate:
    """Mean of 2.5 max(cos, 0), captions embedded behind the prefix; the scale of the paper."""
    cosines = _cosines(image_features, prefixed_text_features)
    return estimate_mean(PAPER_SCALE * np.maximum(cosines, 0.0))


def _cosines(image_features: Features, text_features: Features) -> NDArray[np.float64]:
    product: NDArray[np.float64] = (image_features.astype(np.float64) * text_features).sum(axis=1)
    return product
