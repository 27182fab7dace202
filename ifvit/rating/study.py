"""The content of a rating study: models, questions, and their order for each rater.

`create` writes it, `server` and `results` read it. Imports no torch.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ifvit import storage
from ifvit.errors import UserError

Kind = Literal["preference", "counting"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of questions in the order in which a rater sees them."""

CANNOT_TELL = "cannot tell"
"""Reason to skip a counting question; it has its own button on the page."""
SKIP_REASONS: dict[Kind, tuple[str, ...]] = {
    "preference": ("too close to call", "text is unclear", "images do not load", "other"),
    "counting": ("object is unclear", "image does not load", "other"),
}

_VERSION = 1
_FILE = "study.json"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and the folders of its images. Raters see only the name `blind`."""

    blind: str
    name: str
    preference: str | None
    """Folder of the samples that are ranked."""
    counting: str | None
    """Folder of the samples in which objects are counted."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `prompt` and `position` identify the samples that it shows."""

    number: int
    kind: Kind
    prompt: str
    position: int
    images: dict[str, str]
    """Blind model name => image file. A counting question has one image."""
    object: str | None = None
    """Object that the prompt of a counting question asks for."""
    count: int | None = None
    """Number of objects that the prompt of a counting question asks for."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """An item as it is shown to one rater."""

    item: Item
    repetition: int
    """1 when the rater has seen the item before, else 0."""
    shown: tuple[str, ...]
    """Blind model names in the order of their images on the page."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of study.json; the item `items[n]` has the number n."""

    folder: Path
    seed: int
    repeat_share: float
    models: tuple[Model, ...]
    items: tuple[Item, ...]

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
    """Write study.json."""
    content = {"version": _VERSION} | asdict(study)
    del content["folder"]
    storage.write_json(str(study.folder / _FILE), content)


def read_study(folder: str) -> Study:
    """Read study.json. Raises UserError when it is missing or has another version."""
    url = storage.join(folder, _FILE)
    if not study_exists(folder):
        raise UserError(f"{url}: no such file; make a study with ifvit rate create {folder}")
    stored: dict[str, Any] = storage.read_json(url)
    version = stored.pop("version", None)
    if version != _VERSION:
        raise UserError(f"{url}: version {version}, expected {_VERSION}; create the study again")
    models = tuple(Model(**model) for model in stored.pop("models"))
    items = tuple(Item(**item) for item in stored.pop("items"))
    return Study(folder=Path(folder), models=models, items=items, **stored)


def study_exists(folder: str) -> bool:
    """Return whether `folder` holds a complete study; study.json is written last."""
    return storage.exists(storage.join(folder, _FILE))
