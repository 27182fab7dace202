"""Image files => square pixels => what the autoencoder reads. Shapes: B batch, H, W image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """Square pixels uint8 (H, W, 3) and the width and height of the file they came from."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def read_square(path: Path, image_size: int) -> DecodedImage:
    """Read an image file as RGB, crop its centre square and resize that to `image_size`.

    Raises whatever PIL raises for a file that is missing, cut short or no image.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    square = resize(center_crop(image), image_size)
    return DecodedImage(pixels=np.asarray(square), width=image.width, height=image.height)


def center_crop(image: Image.Image) -> Image.Image:
    """The largest centred square; an odd margin loses the extra pixel right or below (U-ViT)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """Square image => (image_size, image_size) by LANCZOS; unchanged when it has that size."""
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS)


def to_model_range(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) => float32 (B, 3, H, W) in [-1, 1], x / 127.5 - 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
