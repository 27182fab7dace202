"""Which words and tokens are regulated, with the shipped tokenizer."""

import pytest

from ifvit.errors import UserError
from ifvit.models.clip import load_token_spans
from ifvit.sampling.regulation import Span, find_targets
from ifvit.scenes.captions import parse_caption, write_captions


def words(caption: str) -> list[Span]:
    """One token per word, as a tokenizer without pieces would have it; first and last special."""
    spans, start = [(0, 0)], 0
    for word in caption.split():
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return [*spans, (0, 0)]


def targets_of(caption: str, phrase: str | None = None) -> list[str]:
    found = find_targets([caption], phrase, words)
    return [caption.split()[position - 1] for position in found.positions[0].tolist()]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two red circles left of a Blue square", "two circles square"),
        ("a picture of one circle in red", "one circle"),
        ("five green triangles and nothing else", "five triangles"),
        ("a man riding a wave on top of a surfboard", "man wave surfboard"),
        ("an old brick building with 3 parked cars", "brick building 3 cars"),
        ("a drawing with two squares in red under three circles in blue",
         "two squares three circles"),
    ],
)  # fmt: skip
def test_nouns_and_numerals_are_targets_by_default(caption: str, expected: str) -> None:
    assert " ".join(targets_of(caption)) == expected


def test_every_caption_of_a_scene_has_its_counts_and_kinds_as_targets() -> None:
    scene = parse_caption("three blue squares left of two red circles")
    for caption in write_captions(scene):
        assert len(targets_of(caption)) == 4


def test_a_phrase_names_the_targets_and_repeats_a_word_to_mean_its_next_occurrence() -> None:
    caption = "two cats and two dogs"
    assert targets_of(caption, "dogs") == ["dogs"]
    assert find_targets([caption], "two cats", words).positions.tolist() == [[1, 2]]
    assert find_targets([caption], "two two dogs", words).positions.tolist() == [[1, 4, 5]]


def test_a_word_that_the_prompt_does_not_hold_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r'"bird" is not in the prompt "a cat"'):
        find_targets(["a cat"], "cat bird", words)


def test_captions_with_fewer_targets_are_padded() -> None:
    found = find_targets(["a cat", "of the", "a cat and two dogs"], None, words)
    assert found.present.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert found.positions.tolist() == [[2, 0, 0], [0, 0, 0], [2, 4, 5]]


def test_words_are_found_among_the_tokens_of_clip_pieces_included() -> None:
    token_spans = load_token_spans("scenes/clip", 16)
    found = find_targets(["two  Red circles", "two pineapples"], "two", token_spans)
    assert found.positions.tolist() == [[1], [1]]
    pieces = find_targets(["one pineapple"], "pineapple", token_spans).positions[0].tolist()
    assert len(pieces) > 1
    assert pieces == list(range(2, 2 + len(pieces)))
