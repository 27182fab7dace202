"""What the verb `scenes` may be told; free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Draw captioned scenes of simple shapes, in COCO's own layout, with their truth."""

    folder: str
    """Folder that receives SPLIT/ and annotations/."""
    split: Literal["train2014", "val2014", "train2017", "val2017"] = "train2014"
    """Name of the set; sets of different names share no image."""
    num_images: int = 5000
    """Images to draw, five captions each."""
    seed: int = 0
    """The same seed draws the same files."""
