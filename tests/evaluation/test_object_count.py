"""Object counts from prompts to rows, on a real run whose images are replaced by known ones."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_counts import made_row

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig, ObjectCountConfig, ProtocolConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.object_count import (
    CountedImage,
    CountPrompt,
    ObjectCountRow,
    differences,
    read_count_prompts,
)
from ifvit.images import encode_png
from ifvit.sampling.config import SamplingConfig
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.drawings import COLOURS, KINDS, Scene, render_scene

PROMPTS = read_count_prompts("scenes")
LIST = [
    CountPrompt(prompt="two clocks, one above the other", object="clock", count=2),
    CountPrompt(prompt="a dozen eggs", object="egg", count=12),
]


@pytest.fixture
def counting(run: str) -> EvaluateConfig:
    return EvaluateConfig(
        weights=run,
        protocol=ProtocolConfig(
            name="counts",
            num_samples=30,
            sampling=SamplingConfig(num_steps=2, batch_size=30),
            object_count=ObjectCountConfig(prompts="scenes", detector="scenes"),
        ),
        device="cpu",
    )


def with_counting(config: EvaluateConfig, **changes: object) -> EvaluateConfig:
    counting = dataclasses.replace(config.protocol.object_count, **changes)
    protocol = dataclasses.replace(config.protocol, object_count=counting)
    return dataclasses.replace(config, protocol=protocol)


def images(*counts: tuple[str, int, int]) -> list[CountedImage]:
    return [
        CountedImage(file="a.png", prompt="p", object=name, asked=asked, counted=counted)
        for name, asked, counted in counts
    ]


def plant_images(folder: Path) -> None:
    """The first image of a prompt shows what it asks for, the second one object more."""
    rng = np.random.default_rng(0)
    for position in range(2 * len(PROMPTS)):
        group = parse_caption(PROMPTS[position % len(PROMPTS)].prompt).first
        more = dataclasses.replace(group, count=group.count + position // len(PROMPTS))
        image = render_scene(Scene(first=more), rng).image
        (folder / f"{position:05d}.png").write_bytes(encode_png(image))


def test_the_papers_prompts_are_four_objects_by_five_counts() -> None:
    prompts = read_count_prompts("paper")
    assert [(one.object, one.count) for one in prompts] == [
        (name, count) for name in ("bus", "sheep", "person", "apple") for count in range(1, 6)
    ]
    texts = [one.prompt for one in prompts]
    assert texts[0::5] == ["a bus", "a sheep", "a person", "an apple"]
    assert texts[4::5] == ["five buses", "five sheep", "five people", "five apples"]


def test_prompts_of_scenes_ask_for_what_their_captions_say() -> None:
    scenes = [parse_caption(one.prompt) for one in PROMPTS]
    assert [(one.object, one.count) for one in PROMPTS] == [
        (scene.first.kind, scene.first.count) for scene in scenes
    ]
    assert not any(scene.second for scene in scenes)
    seen = {(scene.first.kind, scene.first.colour) for scene in scenes}
    assert seen == {(kind, colour) for kind in KINDS for colour in COLOURS}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.jsonl", "\n\n".join(json.dumps(vars(one)) for one in LIST)),
        ("list.csv", '\ufeffcount,object,prompt\n2,clock,"two clocks, one above the other"\n'
                     "12,egg,a dozen eggs\n"),
        ("windows.jsonl", "\ufeff" + "\r\n".join(json.dumps(vars(one)) for one in LIST)),
    ],
)  # fmt: skip
def test_a_list_of_prompts_is_the_same_in_every_format(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert read_count_prompts(str(tmp_path / name)) == LIST


def test_rare_characters_inside_a_prompt_do_not_end_its_line(tmp_path: Path) -> None:
    prompt = CountPrompt(prompt="two\u2028clocks\x85or\x0cmore", object="clock", count=2)
    for name, text in (
        ("a.jsonl", json.dumps(vars(prompt), ensure_ascii=False)),
        ("a.csv", f"prompt,object,count\n{prompt.prompt},clock,2\n"),
    ):
        (tmp_path / name).write_text(text)
        assert read_count_prompts(str(tmp_path / name)) == [prompt]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.jsonl", '{"prompt": "a cat", "object": "cat"}', "item 1: count"),
        ("a.jsonl", '{"prompt": "a cat", "object": "cat", "count": 1.5}', "item 1: count"),
        ("a.jsonl", '{"prompt": "a", "object": 3, "count": 1}', "item 1: object"),
        (
            "a.jsonl",
            '{"prompt": "a", "object": "b", "count": 17}',
            "count is 17; it must",
        ),
        (
            "a.jsonl",
            '{"prompt": "a\\nb", "object": "b", "count": 1}',
            "must be one line of text",
        ),
        ("a.jsonl", '{"prompt": "a", "object": " ", "count": 1}', "must be one line of text"),
        ("a.jsonl", "a cat", r"a\.jsonl, line 1: Invalid JSON"),
        ("a.jsonl", "", "prompts of 0 objects"),
        ("a.csv", "prompt,object,count\na cat,cat,1,2\n", "item 1: null"),
        ("a.csv", "prompt,object,count\na cat,cat\n", "item 1: count"),
        ("a.csv", "prompt,object,count\na,b," + "9" * 5000 + "\n", "item 1: count"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1"),
        ("a.jsonl", '["a", "b", 1]', r"a\.jsonl, line 1"),
        ("a.txt", "a cat\n", r"give paper, scenes or a \.jsonl or \.csv file"),
    ],
)
def test_a_mistake_in_a_list_of_prompts_is_named(
    name: str, text: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        read_count_prompts(str(tmp_path / name))


def test_scores_are_equations_9_and_10_of_every_group() -> None:
    buses = images(("bus", 2, 2), ("bus", 2, 5), ("bus", 1, 1), ("bus", 1, 1))
    cats = images(("cat", 2, 0), ("cat", 2, 1))
    row = dataclasses.replace(made_row(), images=tuple(buses + cats))
    expected = {
        (None, None): (1.0, 0.5),
        ("bus", None): (0.75, 0.75),
        ("cat", None): (1.5, 0.0),
        (None, 1): (0.0, 1.0),
        (None, 2): (1.5, 0.25),
        ("bus", 1): (0.0, 1.0),
        ("bus", 2): (1.5, 0.5),
        ("cat", 2): (1.5, 0.0),
    }
    for group, (error, match) in expected.items():
        score = row.score(*group)
        assert score is not None
        assert (score.average_error.value, score.match_ratio.value) == (error, match)
        assert score.average_error.low <= score.average_error.value
    assert row.score("cat", 1) is None
    assert row.group_sizes == {("bus", 2): 2, ("bus", 1): 2, ("cat", 2): 2}


def test_known_images_give_known_counts_and_are_kept(counting: EvaluateConfig, run: str) -> None:
    evaluate(counting)
    folder = Path(run, "evaluation/counts/w2/step_00000007")
    plant_images(folder)
    Path(f"{folder}.json").unlink()
    (row,) = evaluate(counting)
    assert isinstance(row, ObjectCountRow)
    assert [(one.object, one.asked) for one in row.images[:15]] == [
        (one.object, one.count) for one in PROMPTS
    ]
    assert [one.counted - one.asked for one in row.images] == [0] * 15 + [1] * 15
    for group in [(None, None), *row.group_sizes]:
        score = row.score(*group)
        assert score is not None
        assert (score.average_error.value, score.match_ratio.value) == (0.5, 0.5)
    assert storage.read_sealed(ObjectCountRow, f"{folder}.json") == row
    assert (row.step, row.weights) == (7, run)
    assert row.protocol.num_images == 2
    assert row.protocol.sampling == counting.protocol.sampling.settings

    (folder / "00003.png").unlink()
    assert evaluate(counting) == [row], "the row is current, so nothing is generated"
    assert not (folder / "00003.png").exists()


def test_more_samples_keep_the_first_ones_and_tasks_generate_partitions(
    counting: EvaluateConfig, run: str
) -> None:
    evaluate(counting)
    folder = Path(run, "evaluation/counts/w2/step_00000007")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    protocol = dataclasses.replace(counting.protocol, num_samples=45)
    more = dataclasses.replace(counting, protocol=protocol)
    assert evaluate(dataclasses.replace(more, num_tasks=2)) == []
    assert len(list(folder.glob("0*.png"))) == 38
    (row,) = evaluate(more)
    assert isinstance(row, ObjectCountRow)
    assert (len(row.images), row.protocol.num_images) == (45, 3)
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.png")}.items()


def test_wrong_settings_are_refused_before_anything_is_generated(
    counting: EvaluateConfig, run: str
) -> None:
    with pytest.raises(UserError, match="num_samples 30: give a multiple of the 20 prompts"):
        evaluate(with_counting(counting, prompts="paper"))
    enough = dataclasses.replace(counting.protocol, num_samples=40)
    with pytest.raises(UserError, match='detector scenes knows no "bus"'):
        evaluate(with_counting(dataclasses.replace(counting, protocol=enough), prompts="paper"))
    assert not Path(run, "evaluation").exists()
    for changes, named in (
        ({"detector": "facebook/detr-resnet-50", "threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": 0.5}, "the detector scenes gives no scores"),
    ):
        with pytest.raises(ValueError, match=named):
            with_counting(counting, **changes)


def test_images_of_other_prompts_are_not_overwritten(
    counting: EvaluateConfig, tmp_path: Path
) -> None:
    evaluate(counting)
    (tmp_path / "mine.csv").write_text("prompt,object,count\none red circle,circle,1\n")
    with pytest.raises(UserError, match="samples of another prompts_sha256"):
        evaluate(with_counting(counting, prompts=str(tmp_path / "mine.csv")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: {}, []),
        (lambda row: {"num_images": 3}, ["num_images"]),
        (lambda row: {"sampling": row.sampling | {"seed": 5}}, ["seed"]),
        (lambda row: {"rule": dataclasses.replace(row.rule, threshold=0.1)}, ["threshold"]),
    ],
)
def test_protocols_name_their_differences(
    change: Callable[..., dict[str, object]], named: list[str]
) -> None:
    protocol = made_row().protocol
    assert differences(protocol, dataclasses.replace(protocol, **change(protocol))) == named


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    url = str(tmp_path / "row.json")
    storage.write_sealed(url, made_row())
    assert storage.read_sealed(ObjectCountRow, url) == made_row()
    Path(url).write_text('{"weights": "x", "protocol": {}}')
    with pytest.raises(UserError, match=r"row\.json: damaged"):
        storage.read_sealed(ObjectCountRow, url)
