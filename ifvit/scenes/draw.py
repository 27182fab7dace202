"""Pixels of a scene: anti-aliased shapes on a plain light background."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ifvit.scenes.layout import (
    COLOURS,
    IMAGE_SIZE,
    PlacedObject,
    Scene,
    place_objects,
    random_scene,
)

_SUPERSAMPLING = 4
_BACKGROUND = (228, 250)


@dataclass(frozen=True, kw_only=True)
class DrawnScene:
    """A scene, where its objects lie, and its image (64, 64, 3) uint8."""

    scene: Scene
    objects: tuple[PlacedObject, ...]
    image: NDArray[np.uint8]


def draw_random_scene(seed: int, image_id: int) -> DrawnScene:
    """The scene number `image_id` of the endless series `seed`; the same arguments, the same."""
    rng = np.random.default_rng((seed, image_id))
    return draw_scene(random_scene(rng), rng)


def draw_scene(scene: Scene, rng: np.random.Generator) -> DrawnScene:
    """One image of `scene`; `rng` chooses positions, size and the background's shade."""
    objects = place_objects(scene, rng)
    shade = int(rng.integers(_BACKGROUND[0], _BACKGROUND[1] + 1))
    side = IMAGE_SIZE * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(canvas)
    for placed in objects:
        corners = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in placed.outline]
        pen.polygon(corners, fill=COLOURS[placed.colour])
    image = np.asarray(canvas.reduce(_SUPERSAMPLING))
    return DrawnScene(scene=scene, objects=objects, image=image)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Image (H, W, 3) uint8 => JPEG of quality 95 whose colours have full resolution (4:4:4)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
