"""What a study asks, of whom, and in what order."""

import re
from collections import Counter
from pathlib import Path

import pytest
from made_study import image_data, make_study, plain_png, write_samples
from scipy.stats import chisquare

from ifvit.errors import UserError
from ifvit.rating.config import CreateConfig
from ifvit.rating.create import create
from ifvit.rating.study import read_study, write_study


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_study(study)
    assert read_study(str(study.folder)) == study
    assert [item.number for item in study.items] == list(range(4 + 2 * 2))


def test_images_are_those_of_the_models_under_names_that_tell_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    data = image_data(study)
    assert set(data) == study.image_files
    for item in study.items:
        for blind, name in item.images.items():
            assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
            folder = tmp_path / study.names[blind] / item.kind
            assert data[name] == plain_png(f"{folder}/{item.position:05d}.png")
            assert b"tEXt" not in data[name]


def test_blind_names_do_not_follow_the_order_of_the_models(tmp_path: Path) -> None:
    orders = {
        tuple(model.blind for model in make_study(tmp_path / str(seed), seed=seed).models)
        for seed in range(4)
    }
    assert len(orders) > 1


def test_a_rater_is_asked_everything_once_and_some_twice(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=20, repeat_share=0.2)
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


def test_each_rater_has_an_order(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=20)
    orders = {tuple(task.item.number for task in study.tasks(rater)) for rater in range(5)}
    assert len(orders) == 5


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    studies = [
        make_study(tmp_path / str(seed), num_preference=20, repeat_share=0.0, seed=seed)
        for seed in (1, 2)
    ]
    orders = [[task.item.position for task in study.tasks(rater=1)] for study in studies]
    assert orders[0] != orders[1]


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    path = study.folder / "study.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match=r"study\.json: version 2, this ifvit reads 1"):
        read_study(str(study.folder))


def test_every_model_stands_at_every_place_equally_often(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=20)
    shown = [
        tuple(study.names[blind] for blind in task.shown)
        for rater in range(100)
        for task in study.tasks(rater)
        if task.item.kind == "preference"
    ]
    assert chisquare(list(Counter(shown).values())).pvalue > 0.01
    assert len(Counter(shown)) == 6


def test_no_repeats_when_none_are_wanted(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=3, repeat_share=0.0)
    assert all(task.repetition == 0 for task in study.tasks(rater=1))


def test_some_prompts_can_be_chosen(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=20, num_counting=1)
    counting = [item for item in study.items if item.kind == "counting"]
    assert len({item.position for item in counting}) == 1
    assert [study.names[blind] for item in counting for blind in item.images] == [
        "early",
        "intermediate",
    ]


def test_only_prompts_of_all_models_are_asked_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_samples(tmp_path / "more", ["a", "b", "c"], 0)
    less = write_samples(tmp_path / "less", ["a", "x"], 1)
    create(CreateConfig(study=str(tmp_path / "study"), preference={"more": more, "less": less}))
    assert "preference: 1 of 4 prompts are drawn by all models" in capsys.readouterr().out
    assert [item.prompt for item in read_study(str(tmp_path / "study")).items] == ["a"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    study = str(tmp_path / "study")
    good = write_samples(tmp_path / "good", ["a"], 0)
    other = write_samples(tmp_path / "other", ["b"], 1)
    noise = write_samples(tmp_path / "noise", ["a"], 1, seed=2)
    broken = write_samples(tmp_path / "broken", ["a"], 1)
    (tmp_path / "broken" / "00000.png").write_bytes(b"no image")
    mistakes = {
        "nowhere/samples.jsonl: no such file": {"preference": {"a": good, "b": "nowhere"}},
        "a, b have no prompt": {"preference": {"a": good, "b": other}},
        "of the same seed": {"preference": {"a": good, "b": noise}},
        "00000.png: not an image": {"preference": {"a": good, "b": broken}},
        "num_preference 2: there are only 1": {
            "preference": {"a": good, "b": good},
            "num_preference": 2,
        },
        "`a` is none of the prompts `paper`": {"counting": {"a": good}},
    }
    for message, settings in mistakes.items():
        with pytest.raises(UserError, match=message):
            create(CreateConfig(study=study, **settings))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="local folder"):
        create(CreateConfig(study="s3://bucket/study", preference={"a": good, "b": good}))
    with pytest.raises(UserError, match="make a study with ifvit rate create"):
        read_study(study)
    create(CreateConfig(study=study, preference={"a": good, "b": good}))
    with pytest.raises(UserError, match="holds a study already"):
        create(CreateConfig(study=study, preference={"a": good, "b": good}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preference": {"alone": "x"}},
        {"preference": dict.fromkeys("abcdefg", "x")},
        {"counting": {"a": "x"}, "repeat_share": 0.6},
        {"counting": {"a": "x"}, "raters": 0},
    ],
)
def test_settings_that_make_no_study_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"give|needs|must lie|less than"):
        CreateConfig(study="study", **settings)  # type: ignore[arg-type]
