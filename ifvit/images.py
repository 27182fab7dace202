"""Images as files, as uint8 pixels and as model input in [-1, 1]; all stages convert through here.

Shapes: B batch, H height, W width.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ifvit.errors import UserError
from ifvit.image_rules import FIRST_FRAME, TURNED, ImageRules, find_bits, to_rgb, turn_upright
from ifvit.records import shorten

Pixels = NDArray[np.uint8]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Suffixes of the files that count as images in a folder."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats of Pillow that are decoded, whatever the suffix of the file.

Each has one small decoder whose memory the size in the header bounds. EPS starts Ghostscript. TIFF,
PSD, JPEG 2000 and the rest have large or rarely tested decoders, or states that no header bounds.
"""
MAX_MEGAPIXELS = 100
"""Default limit of an image's area, in millions of pixels."""
BYTES_PER_PIXEL = 4
"""An image file may have this many bytes per pixel that is allowed."""
_BITS = "bits per channel"
"""Key of `image.info`, which keeps what Pillow forgets after decoding."""
_ANIMATED = ("GIF", "PNG", "WEBP")
_GRID_GAP = 2

Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit, which users can raise


class ImageError(UserError):
    """A file is not an image that can be read."""


class ImageSizeError(ImageError):
    """An image has more pixels or bytes than the limit allows."""


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """Square pixels (H, W, 3) uint8, and the width and height of the whole upright image.

    `remarks` say what was changed or left out, apart from the margins.
    """

    pixels: Pixels
    width: int
    height: int
    remarks: tuple[str, ...] = ()


def open_image(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Open and decode the content of an image file of one of FORMATS.

    The header is checked before anything is decoded. A file may have at most 4 bytes per allowed
    pixel. Raises ImageError when it is too large, truncated, or no image of FORMATS.
    """
    max_pixels = int(max_megapixels * 1_000_000)
    if len(data) > BYTES_PER_PIXEL * max_pixels:
        allowed = BYTES_PER_PIXEL * max_pixels
        raise ImageSizeError(f"{len(data):,} bytes are more than {allowed:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= max_pixels:
            image.info[_BITS] = find_bits(image)
            image.load()
            return image
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise all kinds of errors for broken files
        reason = shorten(error) or type(error).__name__
        raise ImageError(f"not a readable image ({reason})") from None
    size = f"{image.width} x {image.height} pixels"
    raise ImageSizeError(f"{size} are more than {max_megapixels:g} megapixels")


def read_square(
    data: bytes, image_size: int, rules: ImageRules, max_megapixels: float = MAX_MEGAPIXELS
) -> DecodedImage:
    """Decode an image file as RGB, crop the centre square and resize it to `image_size`.

    Raises UserError as `open_image` and `to_rgb` do.
    """
    image = open_image(data, max_megapixels)
    bits, remarks = image.info[_BITS], []
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        remarks.append(FIRST_FRAME)
    turned = turn_upright(image) if rules.exif_orientation else None
    if turned is not None:
        image = turned
        remarks.append(TURNED)
    width, height = image.size
    image = center_crop(image)  # first, because every copy of a large image counts
    image, changes = to_rgb(image, rules, bits)
    pixels = np.asarray(resize(image, image_size))
    return DecodedImage(pixels=pixels, width=width, height=height, remarks=(*remarks, *changes))


def center_crop(image: Image.Image) -> Image.Image:
    """Crop the largest centred square; the larger margin is right or below, as in U-ViT."""
    side = min(image.size)
    if image.size == (side, side):
        return image
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
    """Decode the content of an image file to pixels (H, W, 3). Raises ImageError."""
    return np.asarray(open_image(data).convert("RGB"))


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
