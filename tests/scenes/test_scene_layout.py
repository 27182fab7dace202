"""Scenes: limits, distances, and relations that hold."""

import itertools

import numpy as np

from ifvit.scenes.drawings import (
    IMAGE_SIZE,
    MAX_COUNT,
    MAX_OBJECTS,
    PlacedObject,
    encode_jpeg,
    render_sampled_scene,
)
from ifvit.scenes.score import find_objects

DRAWN = [render_sampled_scene(seed=11, image_id=number) for number in range(400)]


def gap(one: PlacedObject, other: PlacedObject) -> float:
    """Distance of two bounding boxes along the axis on which they lie further apart."""
    free_x = abs(one.x - other.x) - (one.extent[0] + other.extent[0]) / 2
    free_y = abs(one.y - other.y) - (one.extent[1] + other.extent[1]) / 2
    return max(free_x, free_y)


def test_objects_lie_inside_the_image_and_apart() -> None:
    for drawn in DRAWN:
        corners = np.array([corner for placed in drawn.objects for corner in placed.outline])
        assert corners.min() >= 0
        assert corners.max() <= IMAGE_SIZE
        assert all(gap(*pair) >= 1.5 for pair in itertools.combinations(drawn.objects, 2))


def test_objects_are_those_of_the_scene() -> None:
    for drawn in DRAWN:
        wanted = [
            (group.colour, group.kind) for group in drawn.scene.groups for _ in range(group.count)
        ]
        assert [(placed.colour, placed.kind) for placed in drawn.objects] == wanted
        assert all(1 <= group.count <= MAX_COUNT for group in drawn.scene.groups)
        assert len(wanted) <= MAX_OBJECTS


def test_every_object_of_the_first_group_keeps_the_relation_to_every_other() -> None:
    for drawn in DRAWN:
        first = drawn.objects[: drawn.scene.first.count]
        second = drawn.objects[drawn.scene.first.count :]
        for one, other in itertools.product(first, second):
            axis = 0 if drawn.scene.relation == "left of" else 1
            assert np.max(one.outline, axis=0)[axis] < np.min(other.outline, axis=0)[axis]


def test_about_half_of_the_scenes_have_a_relation_and_all_counts_occur() -> None:
    share = sum(drawn.scene.second is not None for drawn in DRAWN) / len(DRAWN)
    assert 0.42 < share < 0.58
    assert {drawn.scene.first.count for drawn in DRAWN} == set(range(1, MAX_COUNT + 1))


def test_the_same_seed_and_number_draw_the_same_picture() -> None:
    for number in range(20):
        again = render_sampled_scene(seed=11, image_id=number)
        assert again.scene == DRAWN[number].scene
        assert encode_jpeg(again.image) == encode_jpeg(DRAWN[number].image)


def test_another_seed_draws_another_picture() -> None:
    assert render_sampled_scene(seed=12, image_id=0).objects != DRAWN[0].objects


def test_area_of_the_polygons_is_the_area_of_their_pixels() -> None:
    # On average: the tip of a small triangle covers less than half of its pixels.
    num_pixels = sum(found.area for drawn in DRAWN for found in find_objects(drawn.image))
    area = sum(placed.area for drawn in DRAWN for placed in drawn.objects)
    assert abs(area / num_pixels - 1) < 0.05
