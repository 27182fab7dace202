"""Grids of images."""

import numpy as np

from ifvit.images import decode_png, encode_png
from ifvit.sampling.grid import make_grid


def test_a_grid_keeps_order_and_leaves_missing_cells_white() -> None:
    images = np.stack([np.full((4, 6, 3), shade, np.uint8) for shade in (10, 20, 30)])
    grid = decode_png(encode_png(make_grid(images, columns=2)))
    assert grid.shape == (4 + 2 + 4, 6 + 2 + 6, 3)
    assert [grid[0, 0, 0], grid[0, 8, 0], grid[6, 0, 0], grid[6, 8, 0]] == [10, 20, 30, 255]
