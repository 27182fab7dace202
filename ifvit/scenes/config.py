"""What the verb `scenes` may be told; free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Draw scenes of simple shapes, captioned in COCO's own layout, or sorted into classes."""

    folder: str
    """Folder that receives SPLIT/ and annotations/."""
    split: Literal["train2014", "val2014", "train2017", "val2017"] = "train2014"
    """Name of the set; sets of different names share no image."""
    num_images: int = 5000
    """Images to draw, with five captions each, or of one class after the other."""
    classes: bool = False
    """Scenes of one group in folders that are named as their first caption: two_red_circles."""
    seed: int = 0
    """The same seed draws the same files."""
