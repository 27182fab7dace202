"""`rate create` turns generated images into a study and prints its links."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_study import make_study, write_samples
from PIL import Image

from ifvit.errors import UserError
from ifvit.images import encode_png
from ifvit.rating.config import CreateConfig
from ifvit.rating.create import create
from ifvit.rating.study import read_study


def test_image_files_have_the_models_pixels_and_reveal_nothing_else(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    data = {path.name: path.read_bytes() for path in (study.folder / "images").iterdir()}
    assert set(data) == study.image_files
    for item in study.items:
        for blind, name in item.images.items():
            assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
            source = tmp_path / study.names[blind] / item.kind / f"{item.position:05d}.png"
            assert data[name] == encode_png(Image.open(source).convert("RGB"))
            assert b"tEXt" not in data[name]


def test_the_number_of_prompts_can_be_chosen(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_preference=20, num_counting=1)
    counting = [item for item in study.items if item.kind == "counting"]
    assert len({item.position for item in counting}) == 1
    assert [study.names[blind] for item in counting for blind in item.images] == [
        "early",
        "intermediate",
    ]


def test_only_prompts_of_all_models_are_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_samples(tmp_path / "more", ["a", "b", "c"], 0)
    less = write_samples(tmp_path / "less", ["a", "x"], 1)
    create(CreateConfig(study=str(tmp_path / "study"), preference={"more": more, "less": less}))
    assert "preference: all models have 1 of 4 prompts" in capsys.readouterr().out
    assert [item.prompt for item in read_study(str(tmp_path / "study")).items] == ["a"]


def test_create_on_an_existing_study_shows_the_links_and_adds_raters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = str(make_study(tmp_path).folder)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"rater 1: http://127\.0\.0\.1:8000/r/\S+ \(0 of \d+ answered\)", lines[0])
    create(CreateConfig(study=study))
    assert capsys.readouterr().out.splitlines() == lines
    create(CreateConfig(study=study, raters=5, url="https://ratings.example.org/"))
    more = capsys.readouterr().out.splitlines()
    assert more[0] == lines[0].replace("http://127.0.0.1:8000", "https://ratings.example.org")
    assert len(more) == len(lines) + 2
    create(CreateConfig(study=study, raters=1))
    assert len(capsys.readouterr().out.splitlines()) == len(more)


def test_an_existing_study_is_never_replaced_by_another(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "good", ["a"], 0)
    config = CreateConfig(study=str(tmp_path / "study"), preference={"a": folder, "b": folder})
    create(config)
    create(config)
    for change in ({"preference": {"a": folder, "c": folder}}, {"seed": 1}):
        with pytest.raises(UserError, match="choose another folder"):
            create(replace(config, **change))


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("no study; give --preference", {}),
        ("nowhere/samples.jsonl: no such file", {"preference": {"a": "good", "b": "nowhere"}}),
        ("a, b have no prompt", {"preference": {"a": "good", "b": "other"}}),
        ("and seed in common", {"preference": {"a": "good", "b": "noise"}}),
        ("seed is one; it must be", {"preference": {"a": "good", "b": "text"}}),
        ("00000.png: not an image", {"preference": {"a": "good", "b": "broken"}}),
        (
            "num_preference is 2, but there are only 1",
            {"preference": {"a": "good", "b": "good"}, "num_preference": 2},
        ),
        ("`a` is not in the prompts `paper`", {"counting": {"a": "good"}}),
        ("local folder", {"study": "s3://bucket/study", "counting": {"a": "good"}}),
    ],
)
def test_a_mistake_is_named(
    message: str, settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(Path("good"), ["a"], 0)
    write_samples(Path("other"), ["b"], 1)
    write_samples(Path("noise"), ["a"], 1, seed=2)
    write_samples(Path("broken"), ["a"], 1)
    write_samples(Path("text"), ["a"], 1, seed="one")
    Path("broken/00000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        create(CreateConfig(**{"study": "study", **settings}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="make a study with ifvit rate create"):
        read_study("study")


@pytest.mark.parametrize(
    "settings",
    [
        {"preference": {"alone": "x"}},
        {"preference": dict.fromkeys("abcdefg", "x")},
        {"counting": {"a": "x"}, "repeat_share": 0.6},
        {"counting": {"a": "x"}, "raters": 0},
        {"counting": {"a": "x"}, "raters": 10_001},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs|it must be from"):
        CreateConfig(study="study", **settings)  # type: ignore[arg-type]
