"""Image files become the same pixels as in U-ViT's preparation."""

import contextlib
import io
import struct
import warnings
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from ifvit.image_rules import ImageRules
from ifvit.images import (
    FORMATS,
    ImageError,
    ImageSizeError,
    center_crop,
    decode_png,
    encode_png,
    make_grid,
    open_image,
    read_square,
    resize,
    to_model_range,
    to_pixels,
)


def sample_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(10, 7), (7, 10), (9, 6), (5, 5)])
def test_crop_equals_the_reference_with_floor_division(width: int, height: int) -> None:
    pixels = np.asarray(sample_image(width, height))
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    expected = pixels[top : top + side, left : left + side]
    np.testing.assert_array_equal(np.asarray(center_crop(sample_image(width, height))), expected)


def test_resize_is_lanczos_and_leaves_equal_sizes_alone() -> None:
    image = sample_image(16, 16)
    assert resize(image, 16) is image
    expected = image.resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(resize(image, 8)), np.asarray(expected))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n%%EOF\n"


def encoded(file_format: str) -> bytes:
    buffer = io.BytesIO()
    sample_image(12, 9).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_listed_format_is_read(file_format: str) -> None:
    assert open_image(encoded(file_format)).size == (12, 9)


@pytest.mark.parametrize(
    "data", [EPS, encoded("TIFF"), encoded("PPM"), encoded("ICO"), b"", b"<html>"]
)
def test_other_formats_are_refused_by_content(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^not an image of a known format \(JPEG, PNG"):
        open_image(data)


def bomb(width: int, height: int) -> bytes:
    """PNG of a few bytes whose header claims an area."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(10_001, 10_000), (14_000, 14_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header_alone(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageSizeError, match=f"{size[0]} x {size[1]} pixels .* 100 megapixels"):
            open_image(bomb(*size))


def test_the_limits_of_pixels_and_bytes_are_raised_by_one_argument() -> None:
    data = encoded("BMP") + bytes(1000)
    assert open_image(data, max_megapixels=400e-6).size == (12, 9)
    with pytest.raises(ImageSizeError, match="12 x 9 pixels"):
        open_image(encoded("BMP"), max_megapixels=107e-6)
    with pytest.raises(ImageSizeError, match=r"bytes are more than 432"):
        open_image(data, max_megapixels=108e-6)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_damage_to_an_image_is_an_image_error_or_an_image(file_format: str) -> None:
    generator = np.random.default_rng(0)
    data = np.frombuffer(encoded(file_format), np.uint8)
    for _ in range(300):
        damaged = data[: generator.integers(len(data) // 2, len(data) + 1)].copy()
        positions = generator.integers(0, len(damaged), 3)
        damaged[positions] = generator.integers(0, 256, 3)
        with contextlib.suppress(ImageError):
            open_image(damaged.tobytes(), max_megapixels=1)


def test_pixels_map_to_minus_one_and_one_exactly() -> None:
    pixels = np.array([0, 255, 51], dtype=np.uint8).reshape(1, 1, 1, 3)
    images = to_model_range(pixels)
    assert images.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(images.flatten(), [-1.0, 1.0, -0.6], atol=1e-7)


def test_a_truncated_jpeg_is_an_error() -> None:
    with pytest.raises(ImageError, match="truncated"):
        read_square(encoded("JPEG")[:-40], 8, ImageRules())


def test_pixels_survive_model_range_and_png() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_pixels(to_model_range(pixels)), pixels)
    np.testing.assert_array_equal(decode_png(encode_png(pixels[0])), pixels[0])


def test_a_grid_keeps_order_and_leaves_missing_cells_white() -> None:
    images = np.stack([np.full((4, 6, 3), shade, np.uint8) for shade in (10, 20, 30)])
    grid = decode_png(encode_png(make_grid(images, columns=2)))
    assert grid.shape == (4 + 2 + 4, 6 + 2 + 6, 3)
    assert [grid[0, 0, 0], grid[0, 8, 0], grid[6, 0, 0], grid[6, 8, 0]] == [10, 20, 30, 255]
