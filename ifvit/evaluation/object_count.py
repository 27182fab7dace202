"""Object counting (arXiv 2403.16530, section 4.2): does a prompt for three apples show three?

Prompts, rows and scores. `measure` lets a detector count; `rating` asks people to count the same
prompts; `studies` plots the rows. Imports no torch.
"""

import csv
import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate, estimate_mean, estimate_share
from ifvit.evaluation.rows import Settings, read_stored_rows
from ifvit.records import (
    Fraction,
    NonNegativeInt,
    PlainName,
    PositiveInt,
    Rule,
    Sha256,
    decode_lines,
    decode_text,
    parse_json,
    parse_value,
    record,
)
from ifvit.scenes.captions import NUMBER_WORDS, write_captions
from ifvit.scenes.drawings import COLOURS, KINDS, MAX_COUNT, Group, Scene

MAX_ASKED = 16
"""GenEval counts at most 16 boxes of a class, so no prompt may ask for more."""
_MAX_OBJECTS = 200
"""Different objects in a set of prompts; each is a plot of the report."""

Line = Annotated[
    str, Rule("one line of text", lambda value: value.strip() and not {*"\r\n"} & {*value.strip()})
]
AskedCount = Annotated[int, Rule(f"from 1 to {MAX_ASKED}", lambda value: 1 <= value <= MAX_ASKED)]

_PAPER_OBJECTS = {
    "bus": ("a bus", "buses"),
    "sheep": ("a sheep", "sheep"),
    "person": ("a person", "people"),
    "apple": ("an apple", "apples"),
}
"""One object and its plural: the four kinds of plural of the paper's section 4.2."""


@record
class CountPrompt:
    """A prompt, the object that the detector counts, and how many there should be."""

    prompt: Line
    object: Line
    count: AskedCount


@record
class CountingRule:
    """How objects are counted; None where pixels are analysed exactly.

    `detector_sha256` is the hash of the detector's weights. Boxes with a score above `threshold`
    count, up to `max_boxes`.
    """

    detector: str
    detector_sha256: Sha256 | None = None
    threshold: Fraction | None = None
    max_boxes: PositiveInt | None = None


@record
class ObjectCountProtocol:
    """What was sampled and how it was counted; only rows of equal protocols compare.

    `prompts_sha256` is the hash of prompts, objects and counts in order, `num_images` the number
    of images per prompt, `sampling` the `SamplingConfig.settings`.
    """

    prompts_sha256: Sha256
    num_images: PositiveInt
    sampling: Settings
    rule: CountingRule


@record
class CountedImage:
    """An image, how many objects its prompt asks for, and how many the detector counted."""

    file: PlainName
    prompt: Line
    object: Line
    asked: AskedCount
    counted: NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class CountScore:
    """Eq. 9 and 10 of the paper over some images.

    `average_error` is the mean of |counted - asked|, `match_ratio` the share of images where both
    are equal.
    """

    average_error: Estimate
    match_ratio: Estimate


@record
class ObjectCountRow:
    """Object counts of one checkpoint under one protocol."""

    weights: str
    weights_sha256: Sha256
    step: NonNegativeInt
    ema_decay: Fraction | None
    protocol: ObjectCountProtocol
    images: tuple[CountedImage, ...]

    def __post_init__(self) -> None:
        """Raise UserError unless each object and asked count has the two images of a score."""
        if min(self.group_sizes.values(), default=0) < 2:
            raise UserError("images has fewer than two of an object and asked count")

    @property
    def group_sizes(self) -> dict[tuple[str, int], int]:
        """Number of images of each pair of an object and an asked count."""
        return Counter((image.object, image.asked) for image in self.images)

    def score(self, object: str | None = None, asked: int | None = None) -> CountScore | None:
        """The score of an object, of an asked count, of both or of all; None without images."""
        errors = np.array(
            [
                abs(image.counted - image.asked)
                for image in self.images
                if object in (None, image.object) and asked in (None, image.asked)
            ]
        )
        if not errors.size:
            return None
        error = estimate_mean(errors.astype(np.float64))
        return CountScore(average_error=error, match_ratio=estimate_share(errors == 0))

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
    prompts = _read_prompts(source)
    num_objects = len({asked.object for asked in prompts})
    if not 1 <= num_objects <= _MAX_OBJECTS:
        raise UserError(
            f"{source}: prompts of {num_objects} objects; write prompt, object and count of each, "
            f"for 1 to {_MAX_OBJECTS} objects"
        )
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


def _read_prompts(source: str) -> list[CountPrompt]:
    """The prompts of a file; its ending names the format."""
    if not source.endswith((".csv", ".jsonl")):
        raise UserError(f"prompts {source}: give paper, scenes or a .jsonl or .csv file")
    data = storage.read_bytes(source)
    if source.endswith(".jsonl"):
        found: list[Any] = [
            parse_json(dict[str, Any], line, f"{source}, line {number}")
            for number, line in enumerate(decode_lines(data, source), 1)
            if line.strip()
        ]
    else:  # a CSV file has text only
        text = io.StringIO(decode_text(data, source), newline="")
        try:
            table = list(csv.DictReader(text, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{source}: not readable ({error}); write prompt, object and count"
            ) from None
        found = [{**row, "count": _parse_count(row.get("count"))} for row in table]
    return [
        parse_value(
            CountPrompt,
            {key: cell.strip() if isinstance(cell, str) else cell for key, cell in item.items()},
            f"{source}, item {number}",
        )
        for number, item in enumerate(found, 1)
    ]


def _parse_count(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() and len(text) < 9 else text


def differences(first: ObjectCountProtocol, second: ObjectCountProtocol) -> list[str]:
    """Names of the fields that make counts of two protocols incomparable; empty: comparable."""
    one, other = (
        {**protocol["sampling"], **protocol["rule"], **protocol}
        for protocol in (asdict(first), asdict(second))
    )
    names = one.keys() - {"sampling", "rule"}
    return sorted(name for name in names if one[name] != other.get(name))


def read_object_counts(folder: str) -> list[ObjectCountRow]:
    """All rows of object counts below RUN/evaluation, the newest step last."""
    rows = [
        parse_value(ObjectCountRow, stored, url)
        for url, stored in read_stored_rows(folder).items()
        if "images" in stored
    ]
    return sorted(rows, key=lambda row: row.step)
