"""Scores accept right images, reject wrong ones, and tolerate blur and noise."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ifvit.scenes.drawings import COLOURS, KINDS, Group, Scene, render_sampled_scene, render_scene
from ifvit.scenes.score import SceneScore, find_objects, score_image

Pixels = NDArray[np.uint8]
RENDERED = [render_sampled_scene(seed=31, image_id=number) for number in range(200)]
PAIRS = [rendered for rendered in RENDERED if rendered.scene.second is not None]


def blur(image: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def is_all_right(score: SceneScore) -> bool:
    return score.count and score.colour and score.kind and score.relation is not False


def share_right(change: Callable[[Pixels], Pixels]) -> float:
    scores = [score_image(change(rendered.image), rendered.scene) for rendered in RENDERED]
    return sum(map(is_all_right, scores)) / len(scores)


def test_every_drawn_image_is_right_in_all_respects() -> None:
    assert share_right(lambda image: image) == 1.0


def test_relation_is_scored_just_where_there_is_one() -> None:
    for rendered in RENDERED[:40]:
        score = score_image(rendered.image, rendered.scene)
        assert score.relation is (None if rendered.scene.second is None else True)


@pytest.mark.parametrize("radius", [0.7, 1.0])
def test_blur_hardly_changes_the_score(radius: float) -> None:
    assert share_right(lambda image: blur(image, radius)) >= 0.95


def test_noise_hardly_changes_the_score() -> None:
    noise = np.random.default_rng(0).normal(0, 15, (64, 64, 3))
    noisy = share_right(lambda image: (image + noise).clip(0, 255).astype(np.uint8))
    assert noisy >= 0.95


def test_a_wrong_count_colour_or_kind_is_seen() -> None:
    for rendered in RENDERED[:60]:
        scene, first = rendered.scene, rendered.scene.first
        unused = min(set(COLOURS) - {group.colour for group in scene.groups})
        wrong_count = replace(first, count=1 + first.count % 5)
        wrong_kind = replace(first, kind=KINDS[KINDS.index(first.kind) - 1])
        score = score_image(rendered.image, replace(scene, first=wrong_count))
        assert (score.count, score.colour, score.kind) == (False, True, True)
        score = score_image(rendered.image, replace(scene, first=replace(first, colour=unused)))
        assert (score.count, score.colour) == (False, False)
        score = score_image(rendered.image, replace(scene, first=wrong_kind))
        assert (score.colour, score.kind) == (True, False)


def test_a_wrong_relation_is_seen() -> None:
    for rendered in PAIRS[:40]:
        second = rendered.scene.second
        assert second is not None
        exchanged = replace(rendered.scene, first=second, second=rendered.scene.first)
        assert score_image(rendered.image, exchanged).relation is False
        turned = "above" if rendered.scene.relation == "left of" else "left of"
        assert (
            score_image(rendered.image, replace(rendered.scene, relation=turned)).relation is False
        )


def test_an_empty_image_has_nothing_right() -> None:
    blank = np.full((64, 64, 3), 240, dtype=np.uint8)
    assert find_objects(blank) == ()
    score = score_image(blank, PAIRS[0].scene)
    assert score == SceneScore(count=False, colour=False, kind=False, relation=False, empty=True)


def test_specks_are_not_objects_but_touching_objects_are_one() -> None:
    image = np.full((64, 64, 3), 240, dtype=np.uint8)
    image[10:14, 10:14] = COLOURS["red"]
    assert find_objects(image) == ()
    image[20:32, 20:32] = COLOURS["red"]
    image[32:44, 20:32] = COLOURS["red"]
    (merged,) = find_objects(image)
    assert merged.area == 24 * 12


def test_found_objects_lie_where_they_were_drawn() -> None:
    scene = Scene(first=Group(count=1, colour="green", kind="square"))
    rendered = render_scene(scene, np.random.default_rng(4))
    (found,) = find_objects(rendered.image)
    assert (found.colour, found.kind) == ("green", "square")
    (square,) = rendered.objects
    assert abs(found.x - square.x) < 0.5
    assert abs(found.y - square.y) < 0.5
    x, y = np.array(square.outline).T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # the shoelace formula
    assert abs(found.area / area - 1) < 0.1
