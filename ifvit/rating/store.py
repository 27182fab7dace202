"""Raters and their answers in an SQLite file of the study.

`create` adds raters, `server` adds answers, `results` reads them. Answers are never changed or
deleted, and each answer is on disk before the rater sees the next question.
"""

import json
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_FILE = "study.sqlite"
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
            folder / _FILE, timeout=30, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def create(cls, folder: Path) -> "Store":
        """Make a store without raters; delete the file of an interrupted `rate create` first."""
        for leftover in folder.glob(f"{_FILE}*"):
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
