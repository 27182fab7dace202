"""A study: its questions, and who sees which of them in what order. Imports no torch."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ifvit import storage
from ifvit.errors import UserError

Kind = Literal["preference", "counting"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which a rater meets them."""

_VERSION = 1
_FILE = "study.json"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and where its images came from; `blind` is the only name outside of results."""

    blind: str
    name: str
    preference: str | None
    counting: str | None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `images` are file names by the models' blind names: one when counting.

    `prompt` and `position` say which samples these are. `object` and `count` are what the prompt
    asked for when counting, else None.
    """

    number: int
    kind: Kind
    prompt: str
    position: int
    images: dict[str, str]
    object: str | None = None
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """An item as one rater sees it: `shown` are blind names from the first place to the last.

    `repetition` is 1 where the rater has seen the item before, else 0.
    """

    item: Item
    repetition: int
    shown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What study.json holds; `items[n].number` is n."""

    folder: Path
    seed: int
    repeat_share: float
    models: tuple[Model, ...]
    items: tuple[Item, ...]

    @property
    def names(self) -> dict[str, str]:
        """Blind name => name."""
        return {model.blind: model.name for model in self.models}

    @property
    def image_files(self) -> frozenset[str]:
        """Names of all image files, the only ones that are ever served."""
        return frozenset(name for item in self.items for name in item.images.values())

    def tasks(self, rater: int) -> list[Task]:
        """All that `rater` is asked, in order: a function of seed and rater and nothing else.

        Each kind of item is a block in random order. Repeats come from the first half of a block
        and return half a block later.
        """
        return [task for kind in KINDS for task in self._block(kind, rater)]

    def _block(self, kind: Kind, rater: int) -> list[Task]:
        numbers = [item.number for item in self.items if item.kind == kind]
        order = shuffled(numbers, self.seed, rater, "items")
        half = len(order) // 2
        num_repeats = round(self.repeat_share * len(order))
        if self.repeat_share > 0:
            num_repeats = max(num_repeats, 1)
        repeated = shuffled(range(half), self.seed, rater, kind, "repeats")[:num_repeats]
        places = [(place, 0, number) for place, number in enumerate(order)]
        places += [(place + half, 1, order[place]) for place in repeated]
        return [
            self._task(self.items[number], repetition, rater)
            for _, repetition, number in sorted(places)
        ]

    def _task(self, item: Item, repetition: int, rater: int) -> Task:
        shown = shuffled(item.images, self.seed, rater, item.number, repetition)
        return Task(item=item, repetition=repetition, shown=tuple(shown))


def shuffled(values: Iterable[_T], *who: object) -> list[_T]:
    """The values in a random order that depends on them and on `who` alone.

    Sorted by hash rather than drawn through ifvit.rng, which imports torch: the web server
    does without.
    """
    return sorted(values, key=lambda value: hashlib.sha256(repr((*who, value)).encode()).digest())


def write_study(study: Study) -> None:
    """Write study.json."""
    content = {"version": _VERSION} | asdict(study)
    del content["folder"]
    storage.write_json(str(study.folder / _FILE), content)


def read_study(folder: str) -> Study:
    """Read study.json. Raises UserError when there is none, or it is of another version."""
    url = storage.join(folder, _FILE)
    if not study_exists(folder):
        raise UserError(f"{url}: no such file; make a study with ifvit rate create {folder}")
    stored: dict[str, Any] = storage.read_json(url)
    version = stored.pop("version", None)
    if version != _VERSION:
        raise UserError(f"{url}: version {version}, this ifvit reads {_VERSION}; create it again")
    return Study(
        folder=Path(folder),
        seed=stored["seed"],
        repeat_share=stored["repeat_share"],
        models=tuple(Model(**model) for model in stored["models"]),
        items=tuple(Item(**item) for item in stored["items"]),
    )


def study_exists(folder: str) -> bool:
    """Whether a finished study is there."""
    return storage.exists(storage.join(folder, _FILE))
