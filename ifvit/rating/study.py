"""The questions of a rating study (study.json), and their order for each rater.

`create` writes the questions; `server` and `results` read them. Raters and answers are in
`answers`. Imports no torch.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from ifvit import storage
from ifvit.errors import UserError
from ifvit.rating.config import RepeatShare
from ifvit.records import NonNegativeInt, Rule, path_inside, record

Kind = Literal["preference", "counting"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of questions in the order in which a rater sees them."""

CANNOT_TELL = "cannot tell"
"""Reason to skip a counting question; it has its own button on the page."""
SKIP_REASONS: dict[Kind, tuple[str, ...]] = {
    "preference": ("too close to call", "text is unclear", "images do not load", "other"),
    "counting": ("object is unclear", "image does not load", "other", CANNOT_TELL),
}
MAX_COUNT = 99
"""Largest answer to a counting question."""

BlindName = Annotated[str, Rule("M and a number", re.compile(r"M[1-9][0-9]?").fullmatch)]
ImageName = Annotated[
    str, Rule("32 hexadecimal digits and .png", re.compile(r"[0-9a-f]{32}\.png").fullmatch)
]
_FILE = "study.json"
_MAX_TASKS = 1_000_000
_T = TypeVar("_T")


@record
class Model:
    """A model and the folders of its images. Raters see only the name `blind`."""

    blind: BlindName
    name: str
    preference: str | None
    """Folder of the samples that are ranked."""
    counting: str | None
    """Folder of the samples in which objects are counted."""


@record
class Item:
    """One question. `prompt` and `position` identify the samples that it shows."""

    number: NonNegativeInt
    kind: Kind
    prompt: str
    position: int
    images: dict[BlindName, ImageName]
    """Blind model name => image file. A counting question has one image."""
    object: str | None = None
    """Object that the prompt of a counting question asks for."""
    count: int | None = None
    """Number of objects that the prompt of a counting question asks for."""

    def __post_init__(self) -> None:
        facts = {self.count is not None, self.object is not None, len(self.images) == 1}
        if facts != {self.kind == "counting"}:
            raise UserError(f"question {self.number}: object, count or images do not fit its kind")


@dataclass(frozen=True, kw_only=True)
class Task:
    """An item as it is shown to one rater."""

    item: Item
    repetition: int
    """1 when the rater has seen the item before, else 0."""
    shown: tuple[str, ...]
    """Blind model names in the order of their images on the page."""


@record
class _Questions:
    """The content of study.json; the item `items[n]` has the number n."""

    version: Literal[2] = 2
    seed: int
    repeat_share: RepeatShare
    models: tuple[Model, ...]
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        """Raise UserError unless each item shows exactly the images of the models it concerns."""
        for names in ([m.blind for m in self.models], [m.name for m in self.models]):
            if len(set(names)) < len(names):
                raise UserError("models: a name occurs twice")
        for number, item in enumerate(self.items):
            models = {model.blind for model in self.models if getattr(model, item.kind)}
            shown = item.images.keys()
            is_right = shown == models if item.kind == "preference" else shown <= models
            if item.number != number or not is_right:
                raise UserError(f"items.{number}: wrong number, or images of other models")


@dataclass(frozen=True, kw_only=True)
class Study(_Questions):
    """The questions of the study in a folder."""

    folder: Path

    @property
    def names(self) -> dict[str, str]:
        """Blind model name => model name."""
        return {model.blind: model.name for model in self.models}

    @property
    def image_files(self) -> frozenset[str]:
        """Names of all image files."""
        return frozenset(name for item in self.items for name in item.images.values())

    def tasks(self, rater: int) -> list[Task]:
        """List all tasks of a rater in order. They depend only on the seed and the rater's id.

        The items of each kind are in a random order. The repeated items are sampled from the first
        half of that order; each repeat follows half the order later.
        """
        return [task for kind in KINDS for task in self._tasks_of_kind(kind, rater)]

    def _tasks_of_kind(self, kind: Kind, rater: int) -> list[Task]:
        numbers = [item.number for item in self.items if item.kind == kind]
        order = shuffled(numbers, self.seed, rater, "items")
        half = len(order) // 2
        num_repeats = round(self.repeat_share * len(order))
        if self.repeat_share > 0:
            num_repeats = max(num_repeats, 1)
        repeated = shuffled(range(half), self.seed, rater, kind, "repeats")[:num_repeats]
        # (place, repetition, item): sorted, each repeat follows the item at the same place.
        places = [(place, 0, number) for place, number in enumerate(order)]
        places += [(place + half, 1, order[place]) for place in repeated]
        tasks = []
        for _, repetition, number in sorted(places):
            item = self.items[number]
            shown = shuffled(item.images, self.seed, rater, number, repetition)
            tasks.append(Task(item=item, repetition=repetition, shown=tuple(shown)))
        return tasks


def shuffled(values: Iterable[_T], *key: object) -> list[_T]:
    """Return the values in a pseudorandom order that depends only on the values and `key`.

    The values are sorted by SHA-256 hashes, because `ifvit.rng` imports torch, which the web
    server does not need.
    """
    return sorted(values, key=lambda value: hashlib.sha256(repr((*key, value)).encode()).digest())


def write_study(study: Study) -> None:
    questions = {key: value for key, value in asdict(study).items() if key != "folder"}
    storage.write_sealed(str(study.folder / _FILE), questions)


def read_study(folder: str) -> Study:
    """Read study.json. Raises UserError when it is missing or damaged."""
    url = storage.join(folder, _FILE)
    if not study_exists(folder):
        raise UserError(f"{url}: no such file; make a study with ifvit rate create {folder}")
    return Study(folder=Path(folder), **vars(storage.read_sealed(_Questions, url)))


def study_exists(folder: str) -> bool:
    """Return whether `folder` holds a complete study; study.json is written last."""
    return storage.exists(storage.join(folder, _FILE))


def check_extent(study: Study, num_raters: int) -> None:
    """Raise UserError for more tasks than a report can check in about a minute."""
    if num_raters * len(study.items) > _MAX_TASKS:
        raise UserError(
            f"{study.folder}: {num_raters} raters of {len(study.items)} questions are more than "
            f"{_MAX_TASKS:,} tasks; split the study"
        )


def check_images(study: Study) -> None:
    """Raise UserError unless all images lie in the study's folder and have the hashes they name."""
    for name in study.image_files:
        path = path_inside(study.folder, f"images/{name}")
        if image_name(storage.read_bytes(str(path))) != name:
            raise UserError(f"{path}: damaged; restore it from a copy of the study")


def image_name(data: bytes) -> str:
    """Name of the file of an image: a part of the hash of its content."""
    return f"{hashlib.sha256(data).hexdigest()[:32]}.png"
