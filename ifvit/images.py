"""Images as files, as uint8 pixels and as model input in [-1, 1]; all stages convert through here.

Shapes: B batch, H height, W width.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Suffixes of the files that count as images in a folder."""
_GRID_GAP = 2


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """Square pixels (H, W, 3) uint8, and the width and height of the original file."""

    pixels: Pixels
    width: int
    height: int


def read_square(file: Path | BinaryIO, image_size: int) -> DecodedImage:
    """Read an image file as RGB, crop the centre square and resize it to `image_size`.

    The rotation in EXIF data is ignored, as in U-ViT. Raises the error of PIL for a file that is
    absent, truncated or not an image, and OSError for an image of more than 8 bits.
    """
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):  # PIL would clip these to white
            raise OSError(f"mode {opened.mode} has more than 8 bits; convert it to 8 bits")
        image = opened.convert("RGB")
    square = resize(center_crop(image), image_size)
    return DecodedImage(pixels=np.asarray(square), width=image.width, height=image.height)


def center_crop(image: Image.Image) -> Image.Image:
    """Crop the largest centred square; the larger margin is right or below, as in U-ViT."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """Resize a square image by LANCZOS; an image of that size is returned unchanged."""
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS)


def to_model_range(pixels: Pixels, device: str = "cpu") -> Tensor:
    """Pixels (B, H, W, 3) => x / 127.5 - 1, float32 (B, 3, H, W) in [-1, 1] on `device`."""
    moved = torch.from_numpy(pixels).to(device)
    return moved.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Pixels:
    """Images (B, 3, H, W) in [-1, 1] => the nearest pixels (B, H, W, 3), uint8."""
    scaled = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    array: Pixels = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return array


def encode_png(image: Pixels | Image.Image) -> bytes:
    """Encode a picture or pixels (H, W, 3) as PNG."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """Decode the content of an image file to pixels (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def make_grid(images: Pixels, columns: int) -> Image.Image:
    """Arrange images (N, H, W, 3) row by row on white; the last row may be shorter."""
    num_images, height, width, channels = images.shape
    rows = -(-num_images // columns)
    row_step, column_step = height + _GRID_GAP, width + _GRID_GAP
    size = (rows * row_step - _GRID_GAP, columns * column_step - _GRID_GAP, channels)
    canvas = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * row_step, index % columns * column_step
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
