"""Exact alignment on scenes: do count, colour, kind and relation come out as the caption says?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ifvit.evaluation.metrics import Estimate, estimate_share
from ifvit.images import Pixels
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.score import SceneScore, score_image


@dataclass(frozen=True, kw_only=True)
class ScenesAccuracy:
    """Shares of images that are right; relation among captions that state one, scene = all."""

    count: Estimate
    colour: Estimate
    kind: Estimate
    relation: Estimate | None
    scene: Estimate


def score_scenes(images: Iterable[Pixels], captions: Sequence[str]) -> list[SceneScore]:
    """Score images (H, W, 3) against their captions. Raises UserError for a foreign caption."""
    return [
        score_image(image, parse_caption(caption))
        for image, caption in zip(images, captions, strict=True)
    ]


def scenes_accuracy(scores: Sequence[SceneScore]) -> ScenesAccuracy:
    """The shares over all images."""
    relations = [score.relation for score in scores if score.relation is not None]
    return ScenesAccuracy(
        count=estimate_share(np.array([score.count for score in scores])),
        colour=estimate_share(np.array([score.colour for score in scores])),
        kind=estimate_share(np.array([score.kind for score in scores])),
        relation=estimate_share(np.array(relations)) if relations else None,
        scene=estimate_share(np.array([_all_right(score) for score in scores])),
    )


def _all_right(score: SceneScore) -> bool:
    return score.count and score.colour and score.kind and score.relation is not False
