"""Prompts that ask for a number of objects: the paper's, those of scenes, or a user's list."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from ifvit import storage
from ifvit.errors import UserError
from ifvit.scenes.captions import NUMBER_WORDS, write_captions
from ifvit.scenes.drawings import COLOURS, KINDS, MAX_COUNT, Group, Scene

MAX_ASKED = 16
"""GenEval counts no more boxes of a class, so no prompt may ask for more."""

# One of it, and its plural: the four kinds of plural of arXiv 2403.16530, section 4.1.
_PAPER_OBJECTS = {
    "bus": ("a bus", "buses"),
    "sheep": ("a sheep", "sheep"),
    "person": ("a person", "people"),
    "apple": ("an apple", "apples"),
}


@dataclass(frozen=True, kw_only=True)
class CountPrompt:
    """`prompt` is drawn, `object` is what the detector counts, `count` how many there should be."""

    prompt: str
    object: str
    count: int


def read_count_prompts(source: str) -> list[CountPrompt]:
    """`paper`, `scenes`, or the items of a .jsonl, .csv or .yaml file (local or s3://).

    Raises UserError naming the first item that is not a prompt, an object and a count of 1 to 16.
    """
    if source == "paper":
        return _paper_prompts()
    if source == "scenes":
        return _scene_prompts()
    prompts = [_check(source, number, item) for number, item in enumerate(_parse(source), 1)]
    if not prompts:
        raise UserError(f"{source}: no prompts in it; write prompt, object and count of each")
    return prompts


def _paper_prompts() -> list[CountPrompt]:
    """4 objects x 5 counts. The paper names the words; that nothing stands around them is ours."""
    return [
        CountPrompt(
            prompt=one if count == 1 else f"{word} {many}",
            object=name,
            count=count,
        )
        for name, (one, many) in _PAPER_OBJECTS.items()
        for count, word in enumerate(NUMBER_WORDS, 1)
    ]


def _scene_prompts() -> list[CountPrompt]:
    """3 kinds x 5 counts in a caption of the training set; every kind occurs in every colour."""
    colours = list(COLOURS)
    return [
        CountPrompt(
            prompt=write_captions(
                Scene(
                    first=Group(
                        count=count, colour=colours[(shift + count) % len(colours)], kind=kind
                    )
                )
            )[0],
            object=kind,
            count=count,
        )
        for shift, kind in enumerate(KINDS)
        for count in range(1, MAX_COUNT + 1)
    ]


def _parse(source: str) -> list[Any]:
    """The items of the file, as its ending says."""
    suffix = source.rpartition(".")[2]
    if suffix not in _PARSERS:
        endings = ", ".join(f".{name}" for name in _PARSERS)
        raise UserError(f"prompts {source}: give paper, scenes or a file that ends in {endings}")
    try:
        items = _PARSERS[suffix](storage.read_bytes(source).decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: not readable as {suffix} ({reason})") from None
    if not isinstance(items, list):
        raise UserError(f"{source}: not a list; start every item with `- prompt:`")
    return items


_PARSERS: dict[str, Callable[[str], Any]] = {
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
    "csv": lambda text: list(csv.DictReader(text.splitlines(), strict=True)),
    "yaml": yaml.safe_load,
    "yml": yaml.safe_load,
}


def _check(source: str, number: int, item: Any) -> CountPrompt:
    try:
        given = CountPrompt(**item)
        prompt, name = given.prompt.strip(), given.object.strip()
        count = int(str(given.count))  # a CSV file has text only
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{source}: item {number} needs prompt, object and count only") from None
    if len(prompt.splitlines()) != 1 or not name:
        raise UserError(f"{source}: item {number}: prompt and object must be one line of text each")
    if not 1 <= count <= MAX_ASKED:
        raise UserError(f"{source}: item {number}: count {count} is not between 1 and {MAX_ASKED}")
    return CountPrompt(prompt=prompt, object=name, count=count)
