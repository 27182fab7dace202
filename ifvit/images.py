"""Image files => square pixels <=> model range <=> PNG. Shapes: B batch, H, W image."""

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
_GRID_GAP = 2
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of files that count as images in a folder."""


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """Square pixels uint8 (H, W, 3) and the width and height of the file they came from."""

    pixels: Pixels
    width: int
    height: int


def read_square(file: Path | BinaryIO, image_size: int) -> DecodedImage:
    """Read an image file as RGB, crop its centre square and resize that to `image_size`.

    A rotation in its EXIF data is not applied (as in U-ViT). Raises whatever PIL raises for a file
    that is missing, cut short or no image, and OSError for one of more than 8 bits.
    """
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):  # of which PIL would make white
            raise OSError(f"mode {opened.mode} has more than 8 bits; convert it to 8")
        image = opened.convert("RGB")
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


def to_model_range(pixels: Pixels, device: str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) => float32 (B, 3, H, W) in [-1, 1] on `device`, x / 127.5 - 1."""
    moved = torch.from_numpy(pixels).to(device)
    return moved.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Pixels:
    """Images (B, 3, H, W) in [-1, 1] => uint8 (B, H, W, 3), rounded to the nearest."""
    scaled = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    array: Pixels = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return array


def encode_png(image: Pixels | Image.Image) -> bytes:
    """A picture or pixels (H, W, 3) as the content of a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """The content of an image file as pixels (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def make_grid(images: Pixels, columns: int) -> Image.Image:
    """Images (N, H, W, 3) => one picture, row by row, on white; the last row may be short."""
    num_images, height, width, channels = images.shape
    rows = -(-num_images // columns)
    size = (
        rows * (height + _GRID_GAP) - _GRID_GAP,
        columns * (width + _GRID_GAP) - _GRID_GAP,
        channels,
    )
    canvas = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = index // columns * (height + _GRID_GAP)
        left = index % columns * (width + _GRID_GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
