"""Scores of an image against its scene, by exact analysis of the pixels; evaluation calls it.

On a plain background a blurred or anti-aliased pixel lies on the line from the colour of the
background to the colour of the object. Its position on the line is the share of the pixel that the
object covers. The direction of the line, which blur does not change, identifies the colour.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ifvit.scenes.drawings import COLOURS, KINDS, PROPORTIONS, SMALLEST_AREA, Group, Relation, Scene

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
_COVERED = 0.5
# cos 18 degrees; the nearest colours of the palette are 35 degrees apart.
_MIN_COLOUR_AGREEMENT = 0.951
_MIN_AREA = SMALLEST_AREA / 4
_MIN_OVERLAP = 0.7
# Blur rounds corners, so the template of a square is the superellipse x^6 + y^6 <= r^6.
_ROUNDING = 6
_ROUNDED_AREA = 4 * math.gamma(1 + 1 / _ROUNDING) ** 2 / math.gamma(1 + 2 / _ROUNDING)
_TRIANGLE_ASPECT = PROPORTIONS["triangle"][0] / PROPORTIONS["triangle"][1]


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """A connected region of one colour; `kind` is None when it resembles no known shape.

    `x`, `y` are the centre of gravity and `area` the size, in pixels.
    """

    colour: str
    kind: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True, kw_only=True)
class SceneScore:
    """Which aspects of an image agree with its scene.

    `colour`: exactly the wanted colours occur. `kind`: every object of a wanted colour has the
    wanted kind. `count`: every group has the wanted number of objects. `relation`: both groups'
    colours occur and their centres have the wanted relation; None for a scene of one group.
    `empty`: the image shows no object at all.
    """

    count: bool
    colour: bool
    kind: bool
    relation: bool | None
    empty: bool = False

    @property
    def aspects(self) -> dict[str, bool | None]:
        """What is right about the image, by name; whether it is empty is no such aspect."""
        names = ("count", "colour", "kind", "relation")
        return {name: getattr(self, name) for name in names}


def score_image(image: NDArray[np.uint8], scene: Scene) -> SceneScore:
    """Compare an image (H, W, 3) uint8, rendered or generated, with the scene it should show."""
    found = find_objects(image)
    groups = [[one for one in found if one.colour == group.colour] for group in scene.groups]
    pairs = list(zip(scene.groups, groups, strict=True))
    return SceneScore(
        count=all(_count(group, objects) == group.count for group, objects in pairs),
        colour={one.colour for one in found} == {group.colour for group in scene.groups},
        kind=all(_count(group, objects) == len(objects) > 0 for group, objects in pairs),
        relation=scene.relation and all(groups) and _holds(scene.relation, groups),
        empty=not found,
    )


def find_objects(image: NDArray[np.uint8]) -> tuple[FoundObject, ...]:
    """Find the 4-connected regions of one colour that have at least a quarter object's area."""
    pixels = image.astype(np.float64)
    # Median of the brighter half of the pixels: objects are darker and cover less than half.
    brightness = pixels.sum(axis=2)
    background = np.median(pixels[brightness >= np.median(brightness)], axis=0)
    lines = _PALETTE - background
    offsets = pixels - background
    coverage = offsets @ lines.T / (lines**2).sum(axis=1)
    length = np.linalg.norm(offsets, axis=2, keepdims=True) * np.linalg.norm(lines, axis=1)
    agreement = offsets @ lines.T / np.maximum(length, 1e-9)
    nearest = agreement.argmax(axis=2)
    chosen = nearest[..., None]
    is_covered = np.take_along_axis(coverage, chosen, axis=2)[..., 0] >= _COVERED
    agrees = np.take_along_axis(agreement, chosen, axis=2)[..., 0] >= _MIN_COLOUR_AGREEMENT
    is_object = is_covered & agrees
    found = []
    for number, colour in enumerate(COLOURS):
        labels, num_regions = ndimage.label(is_object & (nearest == number))
        regions = [labels == label for label in range(1, num_regions + 1)]
        found += [_describe(region, colour) for region in regions if region.sum() >= _MIN_AREA]
    return tuple(found)


def _describe(mask: NDArray[np.bool_], colour: str) -> FoundObject:
    rows, columns = np.nonzero(mask)
    x, y, area = columns.mean() + 0.5, rows.mean() + 0.5, float(len(rows))
    overlaps = {}
    for name in KINDS:
        template = _template(name, x, y, area, mask.shape)
        overlaps[name] = (mask & template).sum() / (mask | template).sum()
    best = max(overlaps, key=lambda name: overlaps[name])
    kind = best if overlaps[best] >= _MIN_OVERLAP else None
    return FoundObject(colour=colour, kind=kind, x=x, y=y, area=area)


def _template(
    kind: str, x: float, y: float, area: float, shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Pixels (H, W) of the ideal shape with this area and centre of gravity."""
    rows, columns = np.indices(shape) + 0.5
    dx, dy = np.abs(columns - x), rows - y
    inside: NDArray[np.bool_]
    if kind == "circle":
        inside = dx**2 + dy**2 <= area / math.pi
    elif kind == "square":
        radius = math.sqrt(area / _ROUNDED_AREA)
        inside = dx**_ROUNDING + dy**_ROUNDING <= radius**_ROUNDING
    else:
        width = math.sqrt(2 * area * _TRIANGLE_ASPECT)
        height = width / _TRIANGLE_ASPECT
        from_top = dy + height * 2 / 3
        inside = (from_top <= height) & (dx <= from_top / height * width / 2)
    return inside


def _count(group: Group, objects: list[FoundObject]) -> int:
    return sum(one.kind == group.kind for one in objects)


def _holds(relation: Relation, groups: list[list[FoundObject]]) -> bool:
    """Whether the line between the centres lies along the axis of the relation, in its sense."""
    (x1, y1), (x2, y2) = (np.mean([(one.x, one.y) for one in group], axis=0) for group in groups)
    dx, dy = x2 - x1, y2 - y1
    return bool(dx > abs(dy) if relation == "left of" else dy > abs(dx))
