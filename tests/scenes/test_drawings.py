"""Sampled scenes keep their limits, distances and relations, and repeat for the same seed."""

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

RENDERED = [render_sampled_scene(seed=11, image_id=number) for number in range(400)]


def gap(one: PlacedObject, other: PlacedObject) -> float:
    """Distance of two bounding boxes along the axis on which they lie further apart."""
    free_x = abs(one.x - other.x) - (one.extent[0] + other.extent[0]) / 2
    free_y = abs(one.y - other.y) - (one.extent[1] + other.extent[1]) / 2
    return max(free_x, free_y)


def test_objects_are_those_of_the_scene_inside_the_image_and_apart() -> None:
    for rendered in RENDERED:
        groups, objects = rendered.scene.groups, rendered.objects
        wanted = [(group.colour, group.kind) for group in groups for _ in range(group.count)]
        assert [(placed.colour, placed.kind) for placed in objects] == wanted
        assert all(1 <= group.count <= MAX_COUNT for group in groups)
        assert len(wanted) <= MAX_OBJECTS
        corners = np.array([corner for placed in objects for corner in placed.outline])
        assert corners.min() >= 0
        assert corners.max() <= IMAGE_SIZE
        assert all(gap(*pair) >= 1.5 for pair in itertools.combinations(objects, 2))


def test_every_object_of_the_first_group_keeps_the_relation_to_every_other() -> None:
    for rendered in RENDERED:
        first = rendered.objects[: rendered.scene.first.count]
        second = rendered.objects[rendered.scene.first.count :]
        for one, other in itertools.product(first, second):
            axis = 0 if rendered.scene.relation == "left of" else 1
            assert np.max(one.outline, axis=0)[axis] < np.min(other.outline, axis=0)[axis]


def test_about_half_of_the_scenes_have_a_relation_and_all_counts_occur() -> None:
    pairs = sum(rendered.scene.second is not None for rendered in RENDERED) / len(RENDERED)
    assert 0.42 < pairs < 0.58
    assert {one.scene.first.count for one in RENDERED} == set(range(1, MAX_COUNT + 1))


def test_seed_and_number_decide_the_picture() -> None:
    for number in range(20):
        again = render_sampled_scene(seed=11, image_id=number)
        assert again.scene == RENDERED[number].scene
        assert encode_jpeg(again.image) == encode_jpeg(RENDERED[number].image)
    assert render_sampled_scene(seed=12, image_id=0).objects != RENDERED[0].objects
