"""Scenes: one or two groups of coloured shapes, where the objects lie, and the picture of them.

`image_sets` renders whole sets with `render_sampled_scene`; evaluation and tests render one scene.
"""

import io
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Relation = Literal["left of", "above"]

IMAGE_SIZE = 64
MAX_COUNT = 5
MAX_OBJECTS = 6
KINDS = ("circle", "square", "triangle")
RELATIONS: tuple[Relation, ...] = ("left of", "above")

# The vectors (RGB) from a light background to any two of these colours form an angle of at least
# 35 degrees. score.py tells colours apart by this direction, because blur does not change it.
COLOURS = {
    "red": (220, 30, 40),
    "yellow": (250, 200, 0),
    "green": (40, 160, 70),
    "blue": (30, 110, 230),
    "purple": (150, 40, 200),
}

# Objects lie on a loose grid, at most one in a cell of 16 pixels. A model of a million parameters
# learns such positions within minutes, so that a short training shows how it learns captions.
_CELL = 16
_JITTER = 0.7
_SIZES = (12.0, 13.0)
_GAP = 1.5
_SINGLE_SHARE = 0.6
PROPORTIONS = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.12, 1.0)}
"""Width and height relative to `size`; with these the three kinds look equally large."""
SMALLEST_AREA = 0.5 * math.prod(PROPORTIONS["triangle"]) * _SIZES[0] ** 2
"""Area of the smallest triangle in square pixels."""
_CIRCLE_CORNERS = 48
_SUPERSAMPLING = 4
_BACKGROUND = (228, 250)


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` objects that share one colour and one kind."""

    count: int
    colour: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`first` RELATION `second`; a scene of one group has neither relation nor second.

    "right of" and "below" are stored as "left of" and "above" with the groups exchanged, so equal
    scenes compare equal.
    """

    first: Group
    relation: Relation | None = None
    second: Group | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """One group or two, first before second."""
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclass(frozen=True, kw_only=True)
class PlacedObject:
    """One object of a group; its box is centred at (x, y) in pixels, y pointing down."""

    colour: str
    kind: str
    x: float
    y: float
    size: float

    @property
    def extent(self) -> tuple[float, float]:
        """(width, height) of the bounding box in pixels."""
        width, height = PROPORTIONS[self.kind]
        return (self.size * width, self.size * height)

    @property
    def outline(self) -> list[tuple[float, float]]:
        """Corners of the shape as a polygon; a circle has 48."""
        width, height = self.extent
        left, right = self.x - width / 2, self.x + width / 2
        top, bottom = self.y - height / 2, self.y + height / 2
        if self.kind == "square":
            return [(left, top), (right, top), (right, bottom), (left, bottom)]
        if self.kind == "triangle":
            return [(self.x, top), (right, bottom), (left, bottom)]
        angles = (2 * math.pi * i / _CIRCLE_CORNERS for i in range(_CIRCLE_CORNERS))
        radius = width / 2
        return [(self.x + radius * math.cos(a), self.y + radius * math.sin(a)) for a in angles]


@dataclass(frozen=True, kw_only=True)
class RenderedScene:
    """A scene, the positions of its objects, and its picture (64, 64, 3) uint8."""

    scene: Scene
    objects: tuple[PlacedObject, ...]
    image: NDArray[np.uint8]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene of one group or, with probability 0.4, of two groups of different colours."""
    first_colour, second_colour = rng.permutation(list(COLOURS))[:2].tolist()
    first_kind, second_kind = rng.choice(KINDS, 2).tolist()
    count = int(rng.integers(1, MAX_COUNT + 1))
    first = Group(count=count, colour=first_colour, kind=first_kind)
    if rng.random() < _SINGLE_SHARE:
        return Scene(first=first)
    other = int(rng.integers(1, min(MAX_COUNT, MAX_OBJECTS - count) + 1))
    second = Group(count=other, colour=second_colour, kind=second_kind)
    if rng.random() < 0.5:
        first, second = second, first
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    return Scene(first=first, relation=relation, second=second)


def sample_objects(scene: Scene, rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    """Sample positions, by rejection, until boxes are 1.5 px or more apart and the relation clear.

    Two groups lie in two halves of the image, and the line between their centres deviates by less
    than 27 degrees from the axis of the relation.
    """
    while True:
        objects = _sample_positions(scene, rng)
        if _is_clear(scene, objects):
            return objects


def _sample_positions(scene: Scene, rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    size = rng.uniform(*_SIZES)
    return tuple(
        PlacedObject(
            colour=group.colour,
            kind=group.kind,
            x=(column + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER),
            y=(row + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER),
            size=size,
        )
        for group, cells in zip(scene.groups, _cells(scene), strict=True)
        for column, row in rng.permutation(cells)[: group.count].tolist()
    )


def _cells(scene: Scene) -> list[list[tuple[int, int]]]:
    """(column, row) of the cells that each group may take: all, or one half of the image."""
    side = IMAGE_SIZE // _CELL
    cells = [(column, row) for column in range(side) for row in range(side)]
    if scene.relation is None:
        return [cells]
    axis = 0 if scene.relation == "left of" else 1
    before = [cell for cell in cells if cell[axis] < side // 2]
    after = [cell for cell in cells if cell[axis] >= side // 2]
    return [before, after]


def _is_clear(scene: Scene, objects: tuple[PlacedObject, ...]) -> bool:
    """Whether all boxes are apart and the centres of two groups show their relation."""
    for one, other in itertools.combinations(objects, 2):
        (width, height), (other_width, other_height) = one.extent, other.extent
        free_x = abs(one.x - other.x) - (width + other_width) / 2
        free_y = abs(one.y - other.y) - (height + other_height) / 2
        if max(free_x, free_y) < _GAP:
            return False
    if scene.second is None:
        return True
    centres = np.array([(placed.x, placed.y) for placed in objects])
    num_first = scene.first.count
    dx, dy = np.abs(centres[num_first:].mean(axis=0) - centres[:num_first].mean(axis=0))
    along, across = (dx, dy) if scene.relation == "left of" else (dy, dx)
    return bool(across < 0.5 * along)


def render_sampled_scene(seed: int, image_id: int) -> RenderedScene:
    """Sample and render scene number `image_id` of the endless series `seed`."""
    rng = np.random.default_rng((seed, image_id))
    return render_scene(sample_scene(rng), rng)


def render_scene(scene: Scene, rng: np.random.Generator) -> RenderedScene:
    """Render one image of `scene`; `rng` chooses positions, size and the background's shade."""
    objects = sample_objects(scene, rng)
    shade = int(rng.integers(_BACKGROUND[0], _BACKGROUND[1] + 1))
    side = IMAGE_SIZE * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(canvas)
    for placed in objects:
        corners = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in placed.outline]
        pen.polygon(corners, fill=COLOURS[placed.colour])
    image = np.asarray(canvas.reduce(_SUPERSAMPLING))
    return RenderedScene(scene=scene, objects=objects, image=image)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Encode an image (H, W, 3) uint8 as JPEG, quality 95, without chroma subsampling (4:4:4)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
