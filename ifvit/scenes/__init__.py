"""Rendered scenes with captions, and the settings of the verb `scenes`."""

from typing import Literal

from ifvit.records import NonNegativeInt, PositiveInt, record


@record
class ScenesConfig:
    """Render a set of simple scenes with captions in COCO's layout, or in class folders."""

    folder: str
    """Output folder, which receives SPLIT/ and annotations/."""
    split: Literal["train2014", "val2014", "train2017", "val2017"] = "train2014"
    """Name of the set; two splits share no image."""
    num_images: PositiveInt = 5000
    """Number of images to render."""
    classes: bool = False
    """Render scenes of one group into 75 class folders, such as two_red_circles."""
    seed: NonNegativeInt = 0
    """Seed of the set; equal arguments give equal files."""
