"""The answers of a study in SQLite: only ever added to, durable before the rater is thanked."""

import json
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_FILE = "study.sqlite"
_BUSY_S = 30.0
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
-- A changed answer is a new row; the old ones stay as its history.
CREATE VIEW current_answer AS SELECT * FROM answer AS this WHERE NOT EXISTS (
    SELECT 1 FROM answer AS later WHERE later.rater = this.rater AND later.item = this.item
    AND later.repetition = this.repetition AND later.id > this.id
);
"""


@dataclass(frozen=True, kw_only=True)
class Rater:
    """A person; `code` is the secret in the link."""

    id: int
    code: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a rater said to one task.

    `value` is the number counted, or the blind names from best to worst; None where
    `skip_reason` says why there is none. `answered_at` is UTC, ISO 8601, filled by the store.
    """

    rater: int
    item: int
    repetition: int
    shown: tuple[str, ...]
    value: int | tuple[str, ...] | None
    skip_reason: str | None
    answered_at: str = ""


class Store:
    """study.sqlite in a study's folder; one object serves any number of threads.

    Every statement commits by itself, so a process that is killed loses nothing that a method has
    returned from.
    """

    def __init__(self, folder: Path) -> None:
        # Sharing is safe: SQLite serialises the calls, and no transaction spans two of them.
        self._connection = sqlite3.connect(
            folder / _FILE, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def create(cls, folder: Path) -> "Store":
        """A store without raters, in place of an older one."""
        for leftover in folder.glob(f"{_FILE}*"):
            leftover.unlink()
        store = cls(folder)
        store._connection.execute("PRAGMA journal_mode = WAL")
        store._connection.executescript(_SCHEMA)
        store._connection.execute("INSERT INTO admin VALUES (?)", (secrets.token_urlsafe(24),))
        return store

    def close(self) -> None:
        """Leave the file whole, without a journal beside it."""
        self._connection.close()

    def add_raters(self, number: int) -> None:
        """Make new raters with codes that nobody guesses (128 random bits)."""
        codes = [(secrets.token_urlsafe(16),) for _ in range(number)]
        self._connection.executemany("INSERT INTO rater (code) VALUES (?)", codes)

    def raters(self) -> list[Rater]:
        """All raters by id."""
        rows = self._connection.execute("SELECT id, code FROM rater ORDER BY id").fetchall()
        return [Rater(id=number, code=code) for number, code in rows]

    def rater_of(self, code: str) -> int | None:
        """The id of the rater with this code."""
        rows = self._connection.execute("SELECT id FROM rater WHERE code = ?", (code,)).fetchall()
        return rows[0][0] if rows else None

    def admin_token(self) -> str:
        """The secret in the admin's link."""
        return str(self._connection.execute("SELECT token FROM admin").fetchall()[0][0])

    def add(self, answer: Answer) -> None:
        """Record an answer; it takes the place of an earlier one to the same task."""
        value = None if answer.value is None else json.dumps(answer.value)
        self._connection.execute(
            "INSERT INTO answer (rater, item, repetition, shown, value, skip_reason, answered_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                answer.rater,
                answer.item,
                answer.repetition,
                json.dumps(answer.shown),
                value,
                answer.skip_reason,
                datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )

    def num_written(self) -> int:
        """Answers ever recorded, changed ones included."""
        rows = self._connection.execute("SELECT count(*) FROM answer").fetchall()
        return int(rows[0][0])

    def answers(self, rater: int | None = None) -> list[Answer]:
        """The current answers of one rater or of all, oldest first."""
        rows = self._connection.execute(
            "SELECT rater, item, repetition, shown, value, skip_reason, answered_at"
            f" FROM current_answer {'' if rater is None else 'WHERE rater = ?'} ORDER BY id",
            () if rater is None else (rater,),
        ).fetchall()
        return [
            Answer(
                rater=row[0],
                item=row[1],
                repetition=row[2],
                shown=tuple(json.loads(row[3])),
                value=_read_value(row[4]),
                skip_reason=row[5],
                answered_at=row[6],
            )
            for row in rows
        ]


def _read_value(text: str | None) -> int | tuple[str, ...] | None:
    value = None if text is None else json.loads(text)
    return tuple(value) if isinstance(value, list) else value
