"""Image files become the same pixels as in U-ViT's preparation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ifvit.images import (
    center_crop,
    decode_png,
    encode_png,
    make_grid,
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


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode in {"L", "CMYK"} else "image.png")
    sample_image(12, 9).convert(mode).save(path)
    decoded = read_square(path, 4)
    assert decoded.pixels.shape == (4, 4, 3)
    assert (decoded.width, decoded.height) == (12, 9)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused_and_not_clipped_to_white(
    tmp_path: Path, dtype: type[np.generic]
) -> None:
    path = tmp_path / "image.tiff"
    Image.fromarray(np.arange(256).reshape(16, 16).astype(dtype)).save(path)
    with pytest.raises(OSError, match="more than 8 bits"):
        read_square(path, 8)


def test_pixels_map_to_minus_one_and_one_exactly() -> None:
    pixels = np.array([0, 255, 51], dtype=np.uint8).reshape(1, 1, 1, 3)
    images = to_model_range(pixels)
    assert images.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(images.flatten(), [-1.0, 1.0, -0.6], atol=1e-7)


def test_a_truncated_jpeg_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    sample_image(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(OSError, match="truncated"):
        read_square(path, 8)


def test_pixels_survive_model_range_and_png() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_pixels(to_model_range(pixels)), pixels)
    np.testing.assert_array_equal(decode_png(encode_png(pixels[0])), pixels[0])


def test_a_grid_keeps_order_and_leaves_missing_cells_white() -> None:
    images = np.stack([np.full((4, 6, 3), shade, np.uint8) for shade in (10, 20, 30)])
    grid = decode_png(encode_png(make_grid(images, columns=2)))
    assert grid.shape == (4 + 2 + 4, 6 + 2 + 6, 3)
    assert [grid[0, 0, 0], grid[0, 8, 0], grid[6, 0, 0], grid[6, 8, 0]] == [10, 20, 30, 255]
