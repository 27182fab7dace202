"""Scores from pixels: right on right images, wrong on wrong ones, tolerant of blur and noise."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ifvit.scenes.drawings import COLOURS, KINDS, Group, Scene, render_sampled_scene, render_scene
from ifvit.scenes.score import SceneScore, find_objects, score_image

Pixels = NDArray[np.uint8]
DRAWN = [render_sampled_scene(seed=31, image_id=number) for number in range(200)]
PAIRS = [drawn for drawn in DRAWN if drawn.scene.second is not None]


def blur(image: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def is_all_right(score: SceneScore) -> bool:
    return score.count and score.colour and score.kind and score.relation is not False


def share_right(change: Callable[[Pixels], Pixels]) -> float:
    scores = [score_image(change(drawn.image), drawn.scene) for drawn in DRAWN]
    return sum(map(is_all_right, scores)) / len(scores)


def test_every_drawn_image_is_right_in_all_respects() -> None:
    assert share_right(lambda image: image) == 1.0


def test_relation_is_scored_just_where_there_is_one() -> None:
    for drawn in DRAWN[:40]:
        score = score_image(drawn.image, drawn.scene)
        assert score.relation is (None if drawn.scene.second is None else True)


@pytest.mark.parametrize("radius", [0.7, 1.0])
def test_blur_hardly_changes_the_score(radius: float) -> None:
    assert share_right(lambda image: blur(image, radius)) >= 0.95


def test_noise_hardly_changes_the_score() -> None:
    noise = np.random.default_rng(0).normal(0, 15, (64, 64, 3))
    noisy = share_right(lambda image: (image + noise).clip(0, 255).astype(np.uint8))
    assert noisy >= 0.95


def test_a_wrong_count_is_seen() -> None:
    for drawn in DRAWN[:60]:
        other = 1 + drawn.scene.first.count % 5
        wrong = replace(drawn.scene, first=replace(drawn.scene.first, count=other))
        score = score_image(drawn.image, wrong)
        assert not score.count
        assert score.colour
        assert score.kind


def test_a_wrong_colour_is_seen() -> None:
    for drawn in DRAWN[:60]:
        unused = set(COLOURS) - {group.colour for group in drawn.scene.groups}
        group = replace(drawn.scene.first, colour=min(unused))
        score = score_image(drawn.image, replace(drawn.scene, first=group))
        assert not score.colour
        assert not score.count


def test_a_wrong_kind_is_seen() -> None:
    for drawn in DRAWN[:60]:
        kind = KINDS[KINDS.index(drawn.scene.first.kind) - 1]
        group = replace(drawn.scene.first, kind=kind)
        score = score_image(drawn.image, replace(drawn.scene, first=group))
        assert not score.kind
        assert score.colour


def test_a_wrong_relation_is_seen() -> None:
    for drawn in PAIRS[:40]:
        second = drawn.scene.second
        assert second is not None
        mirrored = replace(drawn.scene, first=second, second=drawn.scene.first)
        assert score_image(drawn.image, mirrored).relation is False
        turned = "above" if drawn.scene.relation == "left of" else "left of"
        assert score_image(drawn.image, replace(drawn.scene, relation=turned)).relation is False


def test_an_empty_image_has_nothing_right() -> None:
    blank = np.full((64, 64, 3), 240, dtype=np.uint8)
    assert find_objects(blank) == ()
    score = score_image(blank, PAIRS[0].scene)
    assert score == SceneScore(count=False, colour=False, kind=False, relation=False)


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
    drawn = render_scene(scene, np.random.default_rng(4))
    (found,) = find_objects(drawn.image)
    assert (found.colour, found.kind) == ("green", "square")
    assert abs(found.x - drawn.objects[0].x) < 0.5
    assert abs(found.y - drawn.objects[0].y) < 0.5
    assert abs(found.area / drawn.objects[0].area - 1) < 0.1
