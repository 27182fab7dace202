"""The files of a rating study: its questions (study.json), and raters and answers (study.sqlite).

`create` writes the questions and adds raters, `server` adds answers, `results` reads both. Answers
are never changed or deleted, and each one is on disk before the rater sees the next question.
Imports no torch.
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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


_DATABASE = "study.sqlite"
_SCHEMA = """
CREATE TABLE admin (token TEXT NOT NULL);
CREATE TABLE rater (id INTEGER PRIMARY KEY, code TEXT NOT NULL UNIQUE);
CREATE TABLE answer (
    id INTEGER PRIMARY KEY,
    rater INTEGER NOT NULL REFERENCES rater,
    item INTEGER NOT NULL,
    repetition INTEGER NOT NULL,
    shown TEXT NOT NULL,
    value TEXT,
    skip_reason TEXT,
    answered_at TEXT NOT NULL,
    CHECK ((value IS NULL) <> (skip_reason IS NULL))
);
CREATE INDEX answer_to ON answer (rater, item, repetition);
-- A changed answer is a new row; the old rows stay as its history.
CREATE VIEW current_answer AS SELECT * FROM answer AS this WHERE NOT EXISTS (
    SELECT 1 FROM answer AS later WHERE later.rater = this.rater AND later.item = this.item
    AND later.repetition = this.repetition AND later.id > this.id
);
"""


@dataclass(frozen=True, kw_only=True)
class Rater:
    """A person who rates; `code` is the secret in the rater's link."""

    id: int
    code: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A rater's answer to one task."""

    rater: int
    item: int
    repetition: int
    shown: tuple[str, ...]
    value: int | tuple[str, ...] | None
    """The count, or the blind model names from best to worst; None when the task was skipped."""
    skip_reason: str | None
    answered_at: str = ""
    """UTC in ISO 8601; the store fills it in."""


class Store:
    """The file study.sqlite of a study. Several threads may share one object.

    Every statement is its own transaction and is synced to disk: what a method has written when it
    returns survives a kill of the process.
    """

    def __init__(self, folder: Path) -> None:
        # SQLite serialises calls from several threads; no transaction spans two calls.
        self._connection = sqlite3.connect(
            folder / _DATABASE, timeout=30, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def create(cls, folder: Path) -> "Store":
        """Make a store without raters; delete the file of an interrupted `rate create` first."""
        for leftover in folder.glob(f"{_DATABASE}*"):
            leftover.unlink()
        store = cls(folder)
        store._connection.execute("PRAGMA journal_mode = WAL")
        store._connection.executescript(_SCHEMA)
        store._connection.execute("INSERT INTO admin VALUES (?)", (secrets.token_urlsafe(24),))
        return store

    def close(self) -> None:
        """Merge the journal into the file and close it."""
        self._connection.close()

    def add_raters(self, number: int) -> None:
        """Add raters with random codes of 128 bits."""
        codes = [(secrets.token_urlsafe(16),) for _ in range(number)]
        self._connection.executemany("INSERT INTO rater (code) VALUES (?)", codes)

    def raters(self) -> list[Rater]:
        """List all raters by id."""
        rows = self._connection.execute("SELECT id, code FROM rater ORDER BY id").fetchall()
        return [Rater(**dict(row)) for row in rows]

    def find_rater(self, code: str) -> int | None:
        """Return the id of the rater with this code, or None."""
        rows = self._connection.execute("SELECT id FROM rater WHERE code = ?", (code,)).fetchall()
        return rows[0][0] if rows else None

    def admin_token(self) -> str:
        """Return the secret in the admin's link."""
        return str(self._connection.execute("SELECT token FROM admin").fetchall()[0][0])

    def add(self, answer: Answer) -> None:
        """Store an answer; `answers` returns it in place of earlier answers to the same task."""
        value = None if answer.value is None else json.dumps(answer.value)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        shown = json.dumps(answer.shown)
        self._connection.execute(
            "INSERT INTO answer (rater, item, repetition, shown, value, skip_reason, answered_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (answer.rater, answer.item, answer.repetition, shown, value, answer.skip_reason, now),
        )

    def num_written(self) -> int:
        """Count all stored answers, including those that were replaced."""
        rows = self._connection.execute("SELECT count(*) FROM answer").fetchall()
        return int(rows[0][0])

    def answers(self, rater: int | None = None) -> list[Answer]:
        """List the current answers of one rater, or of all raters, oldest first."""
        rows = self._connection.execute(
            "SELECT rater, item, repetition, shown, value, skip_reason, answered_at"
            " FROM current_answer WHERE ? IS NULL OR rater = ? ORDER BY id",
            (rater, rater),
        ).fetchall()
        return [
            Answer(**{**row, "shown": tuple(json.loads(row["shown"])), "value": _value(row)})
            for row in map(dict, rows)
        ]


def _value(row: dict[str, Any]) -> int | tuple[str, ...] | None:
    value = None if row["value"] is None else json.loads(row["value"])
    return tuple(value) if isinstance(value, list) else value
