"""Prompts that ask for a number of objects: the paper's, those of scenes, a user's list."""

import json
from pathlib import Path

import pytest
from ifvit.evaluation.object_prompts import CountPrompt, read_count_prompts

from ifvit.errors import UserError
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.drawings import COLOURS, KINDS

LIST = [
    CountPrompt(prompt="two clocks, one above the other", object="clock", count=2),
    CountPrompt(prompt="a dozen eggs", object="egg", count=12),
]


def test_the_papers_prompts_are_four_objects_by_five_counts() -> None:
    prompts = read_count_prompts("paper")
    assert [(one.object, one.count) for one in prompts] == [
        (name, count) for name in ("bus", "sheep", "person", "apple") for count in range(1, 6)
    ]
    texts = [one.prompt for one in prompts]
    assert texts[0::5] == ["a bus", "a sheep", "a person", "an apple"]
    assert texts[4::5] == ["five buses", "five sheep", "five people", "five apples"]


def test_prompts_of_scenes_say_what_their_captions_say() -> None:
    prompts = read_count_prompts("scenes")
    scenes = [parse_caption(one.prompt) for one in prompts]
    assert [(one.object, one.count) for one in prompts] == [
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
        ("list.yaml", "- {prompt: 'two clocks, one above the other', object: clock, count: 2}\n"
                      "- prompt: a dozen eggs\n  object: egg\n  count: 12\n"),
    ],
)  # fmt: skip
def test_a_list_is_the_same_in_every_format(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_count_prompts(str(tmp_path / name)) == LIST


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.jsonl", '{"prompt": "a cat", "object": "cat"}', "item 1 needs prompt, object and"),
        ("a.jsonl", '{"prompt": "a cat", "object": "cat", "count": 1, "n": 2}', "item 1 needs"),
        ("a.jsonl", '{"prompt": "a cat", "object": "cat", "count": 1.5}', "item 1 needs"),
        ("a.jsonl", '{"prompt": "a", "object": "b", "count": 17}', "count 17 is not between 1"),
        ("a.jsonl", '{"prompt": "a\\nb", "object": "b", "count": 1}', "one line of text each"),
        ("a.jsonl", '{"prompt": "a", "object": " ", "count": 1}', "one line of text each"),
        ("a.jsonl", "a cat", "not readable as jsonl"),
        ("a.csv", "prompt,object,count\na cat,cat,1,2\n", "item 1 needs"),
        ("a.csv", "prompt,object,count\na cat,cat\n", "item 1 needs"),
        ("a.yaml", "- prompt: a cat\n  object: 3\n  count: 1\n", "item 1 needs"),
        ("a.yaml", "prompt: a cat\n", "not a list"),
        ("a.yaml", "[", "not readable as yaml"),
        ("a.yaml", "[]", "no prompts in it"),
        ("a.txt", "a cat\n", "that ends in .jsonl, .csv"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_list_is_named(name: str, text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        read_count_prompts(str(tmp_path / name))
