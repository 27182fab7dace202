"""Captions say everything about a scene, and the parser reads them back."""

import pytest

from ifvit.errors import UserError
from ifvit.scenes.captions import NUMBER_WORDS, parse_caption, write_captions
from ifvit.scenes.drawings import Group, Scene, render_sampled_scene

SCENES = [render_sampled_scene(seed=21, image_id=number).scene for number in range(500)]


def test_every_caption_is_complete_and_reads_back_as_its_scene() -> None:
    for scene in SCENES:
        captions = write_captions(scene)
        assert len(set(captions)) == 5
        assert [parse_caption(caption) for caption in captions] == [scene] * 5
        for caption in captions:
            words = caption.split()
            for group in scene.groups:
                assert group.colour in words
                assert (group.kind if group.count == 1 else f"{group.kind}s") in words
                assert NUMBER_WORDS[group.count - 1] in words or (group.count == 1 and "a" in words)


@pytest.mark.parametrize(
    "caption",
    [
        "two red circles left of a blue square",
        "a blue square right of two red circles",
        "one blue square right of two red circles",
        "a drawing with one square in blue right of two circles in red",
    ],
)
def test_converse_phrases_mean_the_same_scene(caption: str) -> None:
    circles = Group(count=2, colour="red", kind="circle")
    square = Group(count=1, colour="blue", kind="square")
    assert parse_caption(caption) == Scene(first=circles, relation="left of", second=square)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "two red circle",
        "six red circles",
        "two red circles near a blue square",
        "two red circles left of a blue square and nothing else",
        "one red circle one red circle one red circle",
    ],
)
def test_a_caption_that_follows_no_template_is_a_user_error(caption: str) -> None:
    with pytest.raises(UserError, match="follows no template"):
        parse_caption(caption)
