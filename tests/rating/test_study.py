"""The questions of a study, and their order for each rater."""

from collections import Counter
from pathlib import Path

import pytest
from made_study import make_study
from scipy.stats import chisquare

from ifvit.errors import UserError
from ifvit.rating.study import Study, read_study, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Rankings on 20 prompts and counts of two models on two prompts; a fifth is repeated."""
    return make_study(tmp_path_factory.mktemp("study"), num_preference=20, repeat_share=0.2)


def test_a_study_is_read_as_it_was_written(study: Study) -> None:
    write_study(study)
    assert read_study(str(study.folder)) == study
    assert [item.number for item in study.items] == list(range(20 + 2 * 2))


def test_a_rater_sees_every_question_once_and_some_twice(study: Study) -> None:
    tasks = study.tasks(rater=1)
    assert tasks == study.tasks(rater=1)
    first = [task.item.number for task in tasks if task.repetition == 0]
    assert sorted(first) == list(range(24))
    kinds = [task.item.kind for task in tasks]
    assert kinds == ["preference"] * 24 + ["counting"] * 5
    places = {(task.item.number, task.repetition): place for place, task in enumerate(tasks)}
    again = [number for number, repetition in places if repetition == 1]
    assert len(again) == 4 + 1
    for number in again[:4]:
        assert places[number, 1] - places[number, 0] >= 10


def test_each_rater_has_another_order(study: Study) -> None:
    orders = {tuple(task.item.number for task in study.tasks(rater)) for rater in range(5)}
    assert len(orders) == 5


def test_every_model_is_at_every_place_equally_often(study: Study) -> None:
    shown = Counter(
        tuple(study.names[blind] for blind in task.shown)
        for rater in range(100)
        for task in study.tasks(rater)
        if task.item.kind == "preference"
    )
    assert chisquare(list(shown.values())).pvalue > 0.01
    assert len(shown) == 6


def test_another_seed_gives_other_orders_and_blind_names(tmp_path: Path) -> None:
    studies = [
        make_study(tmp_path / str(seed), num_preference=5, repeat_share=0.0, seed=seed)
        for seed in range(4)
    ]
    assert len({tuple(task.item.position for task in s.tasks(rater=1)) for s in studies}) > 1
    assert len({tuple(model.blind for model in s.models) for s in studies}) > 1
    assert all(task.repetition == 0 for s in studies for task in s.tasks(rater=1))


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    path = study.folder / "study.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match=r"study\.json: version 2, expected 1"):
        read_study(str(study.folder))
