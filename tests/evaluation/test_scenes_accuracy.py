"""Shares of right scenes from scores that are known."""

import pytest

from ifvit.evaluation.measure import scenes_accuracy
from ifvit.scenes.score import SceneScore

SCORES = [
    SceneScore(count=True, colour=True, kind=True, relation=None),
    SceneScore(count=True, colour=True, kind=True, relation=True),
    SceneScore(count=True, colour=True, kind=True, relation=False),
    SceneScore(count=True, colour=True, kind=False, relation=None),
    SceneScore(count=True, colour=False, kind=True, relation=True),
    SceneScore(count=False, colour=True, kind=True, relation=True),
    SceneScore(count=True, colour=False, kind=False, relation=None),
    SceneScore(count=True, colour=True, kind=False, relation=None),
]


def test_every_share_counts_what_it_is_named_after() -> None:
    found = scenes_accuracy(SCORES)
    assert found.count.value == pytest.approx(7 / 8)
    assert found.colour.value == pytest.approx(6 / 8)
    assert found.kind.value == pytest.approx(5 / 8)
    assert found.relation is not None
    assert (found.relation.value, found.relation.num_samples) == (pytest.approx(3 / 4), 4)
    assert (found.scene.value, found.scene.num_samples) == (pytest.approx(2 / 8), 8)


def test_captions_without_a_relation_have_no_share_of_it() -> None:
    assert scenes_accuracy(SCORES[:1]).relation is None
