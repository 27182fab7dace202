"""The questions of a study, and their order for each rater."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_study import make_study
from scipy.stats import chisquare

from ifvit.errors import UserError
from ifvit.rating.study import Study, check_extent, check_images, read_study, write_study
from ifvit.records import dump_sealed


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


def write_questions(study: Study, content: dict[str, Any]) -> None:
    """Write questions that a stranger has changed and sealed again."""
    del content["seal"]
    (study.folder / "study.json").write_bytes(dump_sealed(content))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("version", lambda content: content.update(version=1)),
        ("repeat_share", lambda content: content.update(repeat_share=0.9)),
        ("seed", lambda content: content.update(seed="x")),
        ("items.0", lambda content: content["items"].reverse()),
        ("items.0", lambda content: content["items"][0].update(number=7)),
        ("items.0", lambda content: content["items"][0].update(count=2)),
        ("items.0", lambda content: content["items"][0]["images"].popitem()),
        (
            "items.0: .*images.*it must be",
            lambda content: content["items"][0]["images"].update(M1="../x.png"),
        ),
        (
            "items.0: .*images.*it must be",
            lambda content: content["items"][0]["images"].update(x="x.png"),
        ),
        ("models", lambda content: content["models"].append(content["models"][0])),
        ("models.0: blind", lambda content: content["models"][0].update(blind="<b>")),
        ("models", lambda content: content.pop("models")),
    ],
)
def test_questions_that_contradict_each_other_are_refused(
    key: str, change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    study = make_study(tmp_path)
    content = json.loads((study.folder / "study.json").read_text())
    change(content)
    write_questions(study, content)
    with pytest.raises(UserError, match=rf"study\.json: .*{key}"):
        read_study(str(study.folder))


def test_a_flipped_digit_in_the_questions_is_noticed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    path = study.folder / "study.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"study\.json: damaged"):
        read_study(str(study.folder))


def test_a_study_of_too_many_tasks_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    check_extent(study, 10_000)
    with pytest.raises(UserError, match="split the study"):
        check_extent(study, 1_000_000)


def link_out(path: Path, outside: Path) -> None:
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


@pytest.mark.parametrize(
    "damage",
    [
        link_out,
        lambda path, outside: path.write_bytes(path.read_bytes()[:-1]),
        lambda path, outside: path.unlink(),
        lambda path, outside: (path.unlink(), path.mkdir()),
        lambda path, outside: (path.unlink(), os.mkfifo(path)),
    ],
)
def test_only_intact_images_of_the_study_are_served(
    damage: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    study = make_study(tmp_path)
    check_images(study)
    name = min(study.image_files)
    damage(study.folder / "images" / name, tmp_path / "secret.png")
    with pytest.raises(UserError, match=name):
        check_images(study)
