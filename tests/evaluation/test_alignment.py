"""CLIP Score and retrieval on features whose answers are known."""

import numpy as np
import pytest

from ifvit.evaluation.estimates import estimate_mean, estimate_share
from ifvit.evaluation.metrics import clip_score, clip_score_paper, retrieval_accuracy

CAPTIONS = [f"caption {index % 40}" for index in range(200)]
RNG = np.random.default_rng(0)
DIRECTIONS = np.linalg.qr(RNG.normal(size=(64, 64)))[0].astype(np.float32)
TEXTS = DIRECTIONS[np.arange(200) % 40]


def test_clip_score_is_the_mean_cosine_and_the_papers_clips_and_scales_it() -> None:
    texts = np.array([[1.0, 0.0], [1.0, 0.0]])
    images = np.array([[0.6, 0.8], [-0.6, 0.8]])
    assert clip_score(images, texts).value == pytest.approx(0.0)
    assert clip_score_paper(images, texts).value == pytest.approx(2.5 * 0.6 / 2)


def test_images_that_equal_their_caption_are_all_retrieved() -> None:
    found = retrieval_accuracy(TEXTS, TEXTS, CAPTIONS)
    assert found is not None
    assert found.value == 1.0
    assert found.standard_error > 0


def test_random_images_are_retrieved_by_chance() -> None:
    images = RNG.normal(size=(2000, 64)).astype(np.float32)
    captions = [f"caption {index % 40}" for index in range(2000)]
    texts = DIRECTIONS[np.arange(2000) % 40]
    found = retrieval_accuracy(images, texts, captions)
    assert found == retrieval_accuracy(images, texts, captions)
    assert found is not None
    assert found.value == pytest.approx(1 / 16, abs=4 * found.standard_error)


def test_images_of_other_captions_are_never_retrieved() -> None:
    # Each image equals caption k + 1: it loses when k + 1 is drawn, else all tie at 0: a miss too.
    found = retrieval_accuracy(DIRECTIONS[(np.arange(200) + 1) % 40], TEXTS, CAPTIONS)
    assert found is not None
    assert found.value < 0.2


def test_a_tie_is_a_miss() -> None:
    found = retrieval_accuracy(np.zeros_like(TEXTS), TEXTS, CAPTIONS)
    assert found is not None
    assert found.value == 0


def test_fifteen_other_captions_are_drawn_each_at_most_once() -> None:
    # One of 16 others is better than the right one, so 15 draws leave it out once in 16 times.
    kind = np.arange(1700) % 17
    basis = np.eye(17, dtype=np.float32)
    images = basis[kind] + 2 * basis[(kind + 1) % 17]
    found = retrieval_accuracy(images, basis[kind], [str(number) for number in kind])
    assert found is not None
    assert found.value == pytest.approx(1 / 16, abs=4 * found.standard_error)


def test_the_right_caption_is_no_distractor_of_its_own() -> None:
    sixteen = CAPTIONS[:16]
    found = retrieval_accuracy(TEXTS[:16], TEXTS[:16], sixteen)
    assert found is not None
    assert found.value == 1.0


def test_too_few_captions_give_no_accuracy_rather_than_an_easier_one() -> None:
    assert retrieval_accuracy(TEXTS[:15], TEXTS[:15], CAPTIONS[:15]) is None


def test_standard_errors_are_those_of_the_mean_and_of_a_share() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert estimate_mean(values).standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    hits = np.arange(98) < 49
    assert estimate_share(hits).standard_error == pytest.approx(np.sqrt(0.25 / 98))
    assert estimate_share(np.ones(10, bool)).standard_error > 0.05
