"""Object counting (arXiv 2403.16530, section 4.2): does a prompt for three apples show three?

Prompts, rows and scores. `measure` lets a detector count; `rating` asks people to count the same
prompts; `studies` plots the rows. Imports no torch.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.estimates import Estimate, estimate_mean, estimate_share
from ifvit.evaluation.rows import find_row_urls
from ifvit.scenes.captions import NUMBER_WORDS, write_captions
from ifvit.scenes.drawings import COLOURS, KINDS, MAX_COUNT, Group, Scene

MAX_ASKED = 16
"""GenEval counts at most 16 boxes of a class, so no prompt may ask for more."""

_PAPER_OBJECTS = {
    "bus": ("a bus", "buses"),
    "sheep": ("a sheep", "sheep"),
    "person": ("a person", "people"),
    "apple": ("an apple", "apples"),
}
"""One object and its plural: the four kinds of plural of the paper's section 4.1."""


@dataclass(frozen=True, kw_only=True)
class CountPrompt:
    """A prompt, the object that the detector counts, and how many there should be."""

    prompt: str
    object: str
    count: int


@dataclass(frozen=True, kw_only=True)
class CountingRule:
    """How objects are counted; None where pixels are analysed exactly.

    `detector_sha256` is the hash of the detector's weights. Boxes with a score above `threshold`
    count, up to `max_boxes`.
    """

    detector: str
    detector_sha256: str | None = None
    threshold: float | None = None
    max_boxes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectCountProtocol:
    """What was sampled and how it was counted; only rows of equal protocols compare.

    `prompts_sha256` is the hash of prompts, objects and counts in order, `num_images` the number
    of images per prompt, `sampling` the `SamplingConfig.settings`.
    """

    prompts_sha256: str
    num_images: int
    sampling: dict[str, Any]
    rule: CountingRule


@dataclass(frozen=True, kw_only=True)
class CountedImage:
    """An image, how many objects its prompt asks for, and how many the detector counted."""

    file: str
    prompt: str
    object: str
    asked: int
    counted: int


@dataclass(frozen=True, kw_only=True)
class CountScore:
    """Eq. 9 and 10 of the paper over the images of one object and one asked count.

    None stands for all objects, or for all asked counts.
    `average_error` is the mean of |counted - asked|, `match_ratio` the share of images where both
    are equal.
    """

    object: str | None
    asked: int | None
    average_error: Estimate
    match_ratio: Estimate


@dataclass(frozen=True, kw_only=True)
class ObjectCountRow:
    """Object counts of one checkpoint under one protocol.

    `backbone` is its configuration, which tells early from intermediate fusion. `scores` holds one
    score of all images, one per object, one per asked count and one per pair of both.
    """

    weights: str
    weights_sha256: str
    step: int
    ema_decay: float | None
    backbone: dict[str, Any]
    protocol: ObjectCountProtocol
    scores: tuple[CountScore, ...]
    images: tuple[CountedImage, ...]

    def score(self, object: str | None = None, asked: int | None = None) -> CountScore | None:
        """The score of an object, of an asked count, of both or of all; None without images."""
        return next(
            (one for one in self.scores if (one.object, one.asked) == (object, asked)), None
        )

    @property
    def objects(self) -> list[str]:
        """Names of the objects, in the order of the prompts."""
        return list(dict.fromkeys(image.object for image in self.images))

    @property
    def asked_counts(self) -> list[int]:
        """The asked counts, from the smallest."""
        return sorted({image.asked for image in self.images})


def read_count_prompts(source: str) -> list[CountPrompt]:
    """The prompts of `paper` or `scenes`, or of a .jsonl or .csv file (local or s3://).

    Raises UserError naming the first item that is not a prompt, an object and a count of 1 to 16.
    """
    if source == "paper":
        return _paper_prompts()
    if source == "scenes":
        return _scene_prompts()
    prompts = [_check_item(source, number, item) for number, item in enumerate(_parse(source), 1)]
    if not prompts:
        raise UserError(f"{source}: no prompts in it; write prompt, object and count of each")
    return prompts


def _paper_prompts() -> list[CountPrompt]:
    """4 objects x 5 counts. The paper gives the words only, so no sentence surrounds them."""
    return [
        CountPrompt(prompt=one if count == 1 else f"{word} {many}", object=name, count=count)
        for name, (one, many) in _PAPER_OBJECTS.items()
        for count, word in enumerate(NUMBER_WORDS, 1)
    ]


def _scene_prompts() -> list[CountPrompt]:
    """3 kinds x 5 counts as captions of scenes; every kind occurs in every colour."""
    colours = list(COLOURS)
    groups = [
        Group(count=count, colour=colours[(shift + count) % len(colours)], kind=kind)
        for shift, kind in enumerate(KINDS)
        for count in range(1, MAX_COUNT + 1)
    ]
    return [
        CountPrompt(
            prompt=write_captions(Scene(first=group))[0], object=group.kind, count=group.count
        )
        for group in groups
    ]


def _parse(source: str) -> list[Any]:
    """The items of a file; its ending names the format."""
    try:
        text = storage.read_bytes(source).decode("utf-8-sig")
        if source.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if source.endswith(".csv"):
            return list(csv.DictReader(text.splitlines(), strict=True))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(
            f"{source}: not readable ({error}); write prompt, object and count"
        ) from None
    raise UserError(f"prompts {source}: give paper, scenes or a file that ends in .jsonl or .csv")


def _check_item(source: str, number: int, item: Any) -> CountPrompt:
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


def score_counts(images: Sequence[CountedImage]) -> tuple[CountScore, ...]:
    """Score all images, each object, each asked count and each pair; each needs two images."""
    objects = list(dict.fromkeys(image.object for image in images))
    counts = sorted({image.asked for image in images})
    asked_pairs = {(image.object, image.asked) for image in images}
    groups: list[tuple[str | None, int | None]] = [
        (None, None),
        *((name, None) for name in objects),
        *((None, count) for count in counts),
        *((name, count) for name in objects for count in counts if (name, count) in asked_pairs),
    ]
    return tuple(_score(images, name, count) for name, count in groups)


def _score(images: Sequence[CountedImage], name: str | None, asked: int | None) -> CountScore:
    errors = np.array(
        [
            abs(image.counted - image.asked)
            for image in images
            if name in (None, image.object) and asked in (None, image.asked)
        ]
    )
    return CountScore(
        object=name,
        asked=asked,
        average_error=estimate_mean(errors.astype(np.float64)),
        match_ratio=estimate_share(errors == 0),
    )


def differences(first: ObjectCountProtocol, second: ObjectCountProtocol) -> list[str]:
    """Names of the fields that make counts of two protocols incomparable; empty: comparable."""
    one, other = (
        {**protocol["sampling"], **protocol["rule"], **protocol}
        for protocol in (asdict(first), asdict(second))
    )
    names = one.keys() - {"sampling", "rule"}
    return sorted(name for name in names if one[name] != other.get(name))


def write_object_count(url: str, row: ObjectCountRow) -> None:
    """Write the row as JSON."""
    storage.write_json(url, asdict(row))


def read_object_count(url: str) -> ObjectCountRow:
    """Read a row that `write_object_count` wrote. Raises UserError if the file is not one."""
    stored: dict[str, Any] = storage.read_json(url)
    try:
        rule = CountingRule(**stored["protocol"]["rule"])
        parts = {
            "protocol": ObjectCountProtocol(**{**stored["protocol"], "rule": rule}),
            "scores": tuple(map(_read_score, stored["scores"])),
            "images": tuple(CountedImage(**image) for image in stored["images"]),
        }
        return ObjectCountRow(**{**stored, **parts})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{url}: not a row of object counts ({error}); delete it and evaluate again"
        ) from None


def read_object_counts(folder: str) -> list[ObjectCountRow]:
    """All rows of object counts below RUN/evaluation, the newest step last."""
    urls = [url for url in find_row_urls(folder) if "scores" in storage.read_json(url)]
    return sorted(map(read_object_count, urls), key=lambda row: row.step)


def _read_score(stored: dict[str, Any]) -> CountScore:
    estimates = {key: Estimate(**stored[key]) for key in ("average_error", "match_ratio")}
    return CountScore(**{**stored, **estimates})
