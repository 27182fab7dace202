"""The raters and their answers: the file study.sqlite of a rating study.

`create` adds raters, `server` adds answers, `results` reads them. The file has one current answer
per rater and question; a changed answer replaces the earlier one. It holds all secrets of a study
and is readable by its owner only. It may come from a stranger: it is opened only when its tables
are exactly those of this module, and every row is sealed. Imports no torch.
"""

import hashlib
import os
import re
import secrets
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ifvit import storage
from ifvit.errors import UserError
from ifvit.rating.study import MAX_COUNT, SKIP_REASONS, BlindName, Study, Task, check_extent
from ifvit.records import (
    NonNegativeInt,
    PositiveInt,
    Rule,
    dump_rows,
    parse_sealed,
    record,
    shorten,
)

_DATABASE = "study.sqlite"
_TABLES = {
    "admin": "CREATE TABLE admin (content TEXT NOT NULL)",
    "rater": "CREATE TABLE rater (id INTEGER PRIMARY KEY, content TEXT NOT NULL)",
    "answer": "CREATE TABLE answer (rater INTEGER NOT NULL REFERENCES rater, item INTEGER NOT NULL,"
    " repetition INTEGER NOT NULL, content TEXT NOT NULL, PRIMARY KEY (rater, item, repetition))"
    " WITHOUT ROWID",
}
_MAX_BYTES = 1 << 28
"""Largest database that is opened; an answer takes about 400 bytes."""
_MAX_ROW_BYTES = 1 << 16
_STATEMENT_SECONDS = 30.0
_RELOAD_SECONDS = 1.0
_DISK_ERRORS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00)?", re.ASCII)
_Row = TypeVar("_Row")


@record
class Admin:
    """The person who sees the results; `token` is the secret in the admin's link."""

    token: str


@record
class Rater:
    """A person who rates; `code` is the secret in the rater's link."""

    id: PositiveInt
    code: str


@record
class Answer:
    """A rater's answer to one task."""

    rater: PositiveInt
    item: NonNegativeInt
    repetition: NonNegativeInt
    shown: tuple[BlindName, ...]
    value: NonNegativeInt | tuple[BlindName, ...] | None
    """The count, or the blind model names from best to worst; None when the task was skipped."""
    skip_reason: str | None
    answered_at: Annotated[str, Rule("a time", _TIME.fullmatch)] = ""
    """UTC in ISO 8601 with microseconds; the store fills it in."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.skip_reason is None):
            raise UserError("an answer has either a value or a skip_reason")

    def fits(self, task: Task) -> bool:
        """Whether the page of the task admits this answer."""
        kind = task.item.kind
        if self.shown != task.shown:
            return False
        if self.skip_reason is not None:
            return self.skip_reason in SKIP_REASONS[kind]
        if isinstance(self.value, tuple):
            return kind == "preference" and sorted(self.value) == sorted(self.shown)
        return kind == "counting" and self.value in range(MAX_COUNT + 1)


class _Database:
    """A connection to the file. Several threads share it, one statement at a time.

    Every statement is its own transaction, is synced to disk, and has a deadline.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._deadline = 0.0
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_STATEMENT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        self._connection.set_progress_handler(
            lambda: int(time.monotonic() > self._deadline), 10_000
        )
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW_BYTES)
        # A view, trigger or virtual table of a stranger would run its own SQL in our statements.
        self.execute("PRAGMA trusted_schema = OFF")
        self.execute("PRAGMA cell_size_check = ON")
        self.execute("PRAGMA foreign_keys = ON")
        self.execute("PRAGMA synchronous = FULL")
        # Each write reaches the file itself, because SQLite drops a damaged journal in silence.
        self.execute("PRAGMA wal_autocheckpoint = 1")

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows. Raises UserError naming the file."""
        with self._lock:
            self._deadline = time.monotonic() + _STATEMENT_SECONDS
            try:
                return self._connection.execute(statement, parameters).fetchall()
            except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError) as error:
                remedy = "restore it from a copy"
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS:
                    remedy = "check the disk, or use a copy of the folder that you may write to"
                problem = f"{self._path}: cannot be used ({shorten(error)}); {remedy}"
                raise UserError(problem) from None

    def close(self) -> None:
        self._connection.close()

    def check(self) -> None:
        """Raise UserError unless the file is intact and has our tables and nothing else."""
        found = self.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
        expected = {("table", name, name, statement) for name, statement in _TABLES.items()}
        if len(found) != len(expected) or set(found) != expected:
            raise UserError(f"{self._path}: not a study's answers of this version; restore it")
        ((verdict,),) = self.execute("PRAGMA integrity_check(1)")
        if verdict != "ok":
            raise UserError(f"{self._path}: damaged ({shorten(verdict)}); restore it from a copy")


class Store:
    """The file study.sqlite of a study. Several threads may share one object.

    What a method has written when it returns survives a kill of the process. All methods raise
    UserError for a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _DATABASE
        _check_files(self._path)
        self._raters: dict[bytes, int] = {}
        """Hash of a rater's code => id. The time of a look-up says nothing about the code."""
        self._loaded_at = -_RELOAD_SECONDS
        # Two connections, so that pages do not wait for a disk's sync.
        self._writer = _Database(self._path)
        self._writer.check()
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._reader = _Database(self._path)

    @classmethod
    def create(cls, folder: Path) -> "Store":
        """Make a store without raters in place of the one of an interrupted `rate create`.

        Raises UserError when the folder holds another file of that name, or answers.
        """
        path = folder / _DATABASE
        if path.exists():
            with closing(cls(folder)) as leftover:
                if leftover.answers():
                    raise UserError(f"{path}: has answers, but study.json is missing; restore it")
            for file in _files(path):
                file.unlink(missing_ok=True)
        with storage.write_file(str(path)) as temporary:
            temporary.chmod(0o600)
            admin = Admin(token=secrets.token_urlsafe(24))
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.executescript(";".join(_TABLES.values()))
                connection.execute("INSERT INTO admin VALUES (?)", (_dump(admin),))
        return cls(folder)

    def close(self) -> None:
        """Merge the journal into the file and close it."""
        self._reader.close()
        self._writer.close()

    def add_raters(self, number: int) -> None:
        """Add raters with random codes of 128 bits."""
        first = 1 + max((rater.id for rater in self.raters()), default=0)
        for id_ in range(first, first + number):
            rater = Rater(id=id_, code=secrets.token_urlsafe(16))
            self._writer.execute("INSERT INTO rater VALUES (?, ?)", (id_, _dump(rater)))

    def raters(self) -> list[Rater]:
        rows = self._reader.execute("SELECT id, CAST(content AS TEXT) FROM rater ORDER BY id")
        return [self._parse(Rater, content, "rater", id=id_) for id_, content in rows]

    def find_rater(self, code: str) -> int | None:
        """Return the id of the rater with this code, or None; a new rater is found in a second."""
        key = _hash_code(code)
        if key not in self._raters and time.monotonic() > self._loaded_at + _RELOAD_SECONDS:
            self._raters = {_hash_code(rater.code): rater.id for rater in self.raters()}
            self._loaded_at = time.monotonic()
        return self._raters.get(key)

    def admin_token(self) -> str:
        rows = self._reader.execute("SELECT CAST(content AS TEXT) FROM admin")
        if len(rows) != 1:
            raise UserError(f"{self._path}: damaged, {len(rows)} admins; restore it from a copy")
        return self._parse(Admin, rows[0][0], "admin").token

    def add(self, answer: Answer) -> None:
        """Store an answer in place of an earlier one to the same task; an equal one is kept."""
        earlier = self.find(answer.rater, answer.item, answer.repetition)
        if earlier is not None and replace(earlier, answered_at="") == answer:
            return
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        content = _dump(replace(answer, answered_at=now))
        self._writer.execute(
            "INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?)",
            (answer.rater, answer.item, answer.repetition, content),
        )

    def find(self, rater: int, item: int, repetition: int) -> Answer | None:
        found = self._select("rater = ? AND item = ? AND repetition = ?", rater, item, repetition)
        return found[0] if found else None

    def answered(self, rater: int) -> set[tuple[int, int]]:
        """Item and repetition of the tasks that this rater has answered."""
        rows = self._reader.execute("SELECT item, repetition FROM answer WHERE rater = ?", (rater,))
        return {(item, repetition) for item, repetition in rows}

    def answers(self, rater: int | None = None) -> list[Answer]:
        """List the current answers of one rater, or of all raters, oldest first."""
        found = self._select("? IS NULL OR rater = ?", rater, rater)
        return sorted(found, key=lambda each: each.answered_at)

    def change_count(self) -> int:
        """Return a number that changes with each write of this or another process."""
        ((count,),) = self._reader.execute("PRAGMA data_version")
        return int(count)

    def _select(self, condition: str, *parameters: int | None) -> list[Answer]:
        rows = self._reader.execute(
            "SELECT rater, item, repetition, CAST(content AS TEXT) FROM answer"
            f" WHERE {condition} ORDER BY rater, item, repetition",
            parameters,
        )
        return [
            self._parse(Answer, content, "answer", rater=rater, item=item, repetition=repetition)
            for rater, item, repetition, content in rows
        ]

    def _parse(self, cls: type[_Row], content: str, table: str, **keys: int) -> _Row:
        """Parse the content of a row, which must agree with the keys of the row."""
        where = shorten(f"{self._path}, {table} {list(keys.values())}", 300)
        row = parse_sealed(cls, content, where)
        if any(getattr(row, name) != key for name, key in keys.items()):
            raise UserError(f"{where}: damaged, has other keys; restore the file from a copy")
        return row


def read_answers(study: Study, store: Store) -> list[Answer]:
    """List all current answers, oldest first. Raises UserError for those of another study."""
    raters = {rater.id for rater in store.raters()}
    check_extent(study, len(raters))
    answers = store.answers()
    tasks = {
        (rater, task.item.number, task.repetition): task
        for rater in raters & {answer.rater for answer in answers}
        for task in study.tasks(rater)
    }
    for answer in answers:
        task = tasks.get((answer.rater, answer.item, answer.repetition))
        if task is None or not answer.fits(task):
            raise UserError(
                f"{study.folder}: rater {answer.rater} has an answer to question {answer.item} "
                "that this study does not admit; restore study.json and study.sqlite from one copy"
            )
    return answers


def _check_files(path: Path) -> None:
    """Raise UserError unless the database and its journals are regular files of this study.

    SQLite would follow links, and a journal of a stranger can make it write or delete other files.
    Files that others can read are restricted to their owner, and the user is told.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; restore it from a copy of the study")
    *parts, journal = _files(path)
    if os.path.lexists(journal):
        raise UserError(f"{journal}: no study has this file; delete it if you did not put it there")
    for file in parts:
        if not os.path.lexists(file):
            continue
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{file}: not a regular file; restore it from a copy of the study")
        if status.st_size > _MAX_BYTES:
            raise UserError(f"{file}: {status.st_size} bytes, more than the allowed {_MAX_BYTES}")
        if status.st_mode & 0o077:
            try:
                file.chmod(0o600)
            except PermissionError:
                raise UserError(
                    f"{file}: others can read it; its owner must run chmod 600"
                ) from None
            sys.stderr.write(f"{file}: others could read the raters' codes; its mode is now 0600\n")


def _files(path: Path) -> list[Path]:
    """Return the database and the files that SQLite keeps beside it, the rollback journal last."""
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _dump(row: Admin | Rater | Answer) -> str:
    return dump_rows([row]).decode().rstrip()


def _hash_code(code: str) -> bytes:
    return hashlib.sha256(code.encode(errors="replace")).digest()
