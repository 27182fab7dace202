"""A row of object counts without image files."""

from ifvit.evaluation.detectors import CountingRule
from ifvit.evaluation.object_count import (
    CountedImage,
    ObjectCountProtocol,
    ObjectCountRow,
    read_count_prompts,
)
from ifvit.sampling.config import SamplingConfig


def made_row(errors: tuple[int, ...] = (0, 1)) -> ObjectCountRow:
    """Row with one image of each of the paper's prompts for each error, the excess of objects."""
    images = [
        CountedImage(
            file=f"{number:05d}.png",
            prompt=one.prompt,
            object=one.object,
            asked=one.count,
            counted=one.count + error,
        )
        for number, error in enumerate(errors)
        for one in read_count_prompts("paper")
    ]
    return ObjectCountRow(
        weights="run",
        weights_sha256="0" * 64,
        step=2000,
        ema_decay=0.99,
        protocol=ObjectCountProtocol(
            prompts_sha256="1" * 64,
            num_images=len(errors),
            sampling=SamplingConfig(solver="ddim").settings,
            rule=CountingRule(detector="d", detector_sha256="2" * 64, threshold=0.9, max_boxes=16),
        ),
        images=tuple(images),
    )
