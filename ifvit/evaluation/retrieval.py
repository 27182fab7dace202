"""Retrieval accuracy: does the image find its own caption among 16?

Shapes: N images, E feature width, unit length.
"""

from collections.abc import Sequence

import numpy as np

from ifvit.evaluation.frechet import Features
from ifvit.evaluation.metrics import Estimate, estimate_share

NUM_CAPTIONS = 16
_SEED = 0


def retrieval_accuracy(
    image_features: Features, text_features: Features, captions: Sequence[str]
) -> Estimate | None:
    """Share of images (N, E) closer to their caption (N, E) than to 15 other captions.

    The distractors are captions of other samples, all different from each other and from the
    right one, drawn by a fixed seed so that checkpoints face the same choices. Chance is 1 / 16;
    a tie counts as a miss. None when there are fewer than 16 different captions.
    """
    _, distinct, kind = np.unique(np.asarray(captions), return_index=True, return_inverse=True)
    if len(distinct) < NUM_CAPTIONS:
        return None
    rng = np.random.default_rng(_SEED)
    hits = np.empty(len(captions), dtype=np.bool_)
    for sample, image in enumerate(image_features):
        # Numbers below len - 1, those from the right caption on moved up by one, never name it.
        drawn = rng.choice(len(distinct) - 1, NUM_CAPTIONS - 1, replace=False)
        distractors = distinct[drawn + (drawn >= kind[sample])]
        hits[sample] = image @ text_features[sample] > (text_features[distractors] @ image).max()
    return estimate_share(hits)
