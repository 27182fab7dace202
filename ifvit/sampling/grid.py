"""Images side by side in one picture."""

import numpy as np
from PIL import Image

from ifvit.images import Pixels

_GAP = 2


def make_grid(images: Pixels, columns: int) -> Image.Image:
    """Images (N, H, W, 3) => one picture, row by row, on white; the last row may be short."""
    num_images, height, width, channels = images.shape
    rows = -(-num_images // columns)
    size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels)
    canvas = np.full(size, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = index // columns * (height + _GAP)
        left = index % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
