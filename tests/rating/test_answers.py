"""Raters and answers in SQLite, and what strangers and damage do to the file."""

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_study import add, make_study

from ifvit.errors import UserError
from ifvit.rating.answers import Answer, Store, read_answers
from ifvit.rating.study import Study, read_study

VIEW = "CREATE VIEW {} WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT * FROM n"


def answer(value: int | tuple[str, ...] | None, skip_reason: str | None = None) -> Answer:
    return Answer(
        rater=1, item=3, repetition=0, shown=("M1", "M2"), value=value, skip_reason=skip_reason
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with one rater."""
    store = Store.create(tmp_path)
    store.add_raters(1)
    yield store
    store.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with answers of three raters to all preference questions."""
    study = make_study(tmp_path_factory.mktemp("answered"), num_preference=8)
    store = Store(study.folder)
    for rater in store.raters():
        for task in study.tasks(rater.id):
            add(store, task, rater.id, task.shown if task.item.kind == "preference" else 3)
    store.close()
    return study


def test_a_changed_answer_replaces_the_earlier_one(store: Store, tmp_path: Path) -> None:
    for each in (answer(("M2", "M1")), answer(None, "other"), answer(4)):
        store.add(each)
    (current,) = store.answers(rater=1)
    assert (current.value, current.shown, current.skip_reason) == (4, ("M1", "M2"), None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", current.answered_at)
    assert store.answers() == [current] == [store.find(1, 3, 0)]
    assert store.answers(rater=2) == []
    assert store.answered(1) == {(3, 0)}
    rows = sqlite3.connect(tmp_path / "study.sqlite").execute("SELECT count(*) FROM answer")
    assert rows.fetchall() == [(1,)]


def test_an_equal_answer_writes_nothing(store: Store) -> None:
    store.add(answer(("M2", "M1")))
    before = store.change_count()
    for _ in range(1000):
        store.add(answer(("M2", "M1")))
    assert store.change_count() == before
    store.add(answer(("M1", "M2")))
    assert store.change_count() != before


def test_a_ranking_is_read_as_it_was_written(store: Store) -> None:
    store.add(answer(("M2", "M1")))
    (found,) = store.answers()
    assert found.value == ("M2", "M1")


def test_the_store_of_an_interrupted_create_is_replaced(store: Store, tmp_path: Path) -> None:
    again = Store.create(tmp_path)
    assert again.raters() == []
    again.add_raters(1)
    again.add(answer(4))
    with pytest.raises(UserError, match=r"study\.sqlite: has answers, but study\.json is missing"):
        Store.create(tmp_path)
    again.close()


def test_a_file_of_another_program_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE thesis (chapter TEXT)")
    connection.close()
    content = path.read_bytes()
    backup = tmp_path / "study.sqlite.backup"
    backup.write_bytes(b"mine")
    with pytest.raises(UserError, match="not a study's answers"):
        Store.create(tmp_path)
    assert (path.read_bytes(), backup.read_bytes()) == (content, b"mine")


@pytest.mark.parametrize("wrong", [(None, None), (4, "other"), (-1, None), (("../x", "M1"), None)])
def test_an_answer_is_either_a_value_or_a_skip(
    wrong: tuple[int | tuple[str, ...] | None, str | None],
) -> None:
    with pytest.raises(UserError):
        answer(*wrong)


def test_an_answer_of_an_unknown_rater_is_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    with pytest.raises(UserError, match="FOREIGN KEY"):
        store.add(answer(4))
    store.close()


def test_codes_are_long_and_unique(store: Store) -> None:
    store.add_raters(4)
    raters = store.raters()
    assert [rater.id for rater in raters] == [1, 2, 3, 4, 5]
    codes = {rater.code for rater in raters} | {store.admin_token()}
    assert len(codes) == 6
    assert all(len(code) >= 22 for code in codes)  # 128 bits in base 64
    assert store.find_rater(raters[2].code) == 3
    assert store.find_rater("guess") is None


def test_only_the_owner_can_read_the_codes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)
    try:
        store = Store.create(tmp_path)
        store.add_raters(1)
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["study.sqlite", "study.sqlite-shm", "study.sqlite-wal"]
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        store.close()
    finally:
        os.umask(before)
    path = tmp_path / "study.sqlite"
    path.chmod(0o644)
    Store(tmp_path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert "others could read the raters' codes" in capfd.readouterr().err


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("answers"),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "linked wal": lambda path: path.with_name("study.sqlite-wal").symlink_to("/etc/hostname"),
    "pipe as shm": lambda path: os.mkfifo(path.with_name("study.sqlite-shm")),
    "journal": lambda path: path.with_name("study.sqlite-journal").write_bytes(b"x"),
}
STATEMENTS = {
    "endless view": VIEW.format("extra AS"),
    "endless view as a table": "DROP TABLE answer; "
    + VIEW.format("answer (rater, item, repetition, content) AS").replace("*", "i, i, i, i"),
    "trigger": "CREATE TRIGGER t AFTER INSERT ON answer BEGIN DELETE FROM rater; END",
    "virtual table": "CREATE VIRTUAL TABLE t USING fts5(content)",
    "index": "CREATE INDEX i ON answer (content)",
    "no table": "DROP TABLE admin",
    "generated column": "DROP TABLE admin; "
    "CREATE TABLE admin (x TEXT, content TEXT AS (hex(zeroblob(1e9))) NOT NULL)",
    "no admin": "DELETE FROM admin",
    "two admins": "INSERT INTO admin SELECT content FROM admin",
    "admin as bytes": "UPDATE admin SET content = x'ff'",
    "no raters": "PRAGMA foreign_keys = OFF; DELETE FROM rater",
    "other ids": "PRAGMA foreign_keys = OFF; UPDATE rater SET id = id + 10",
    "a number as a row": "UPDATE answer SET content = 7",
    "deep row": f"UPDATE answer SET content = '{100_000 * '['}'",
    "flipped value": """UPDATE answer SET content = replace(content, '"value": 3', '"value": 4')""",
    "swapped rows": "UPDATE answer SET content = (SELECT content FROM answer WHERE rater = 3)",
    "text as a key": "UPDATE answer SET item = 'one' WHERE item = 1",
}


def read_all(folder: Path) -> object:
    """Everything that a command reads of a study, as one comparable value."""
    study = read_study(str(folder))
    store = Store(folder)
    try:
        return study.items, store.raters(), store.admin_token(), read_answers(study, store)
    finally:
        store.close()


def test_a_file_that_cannot_be_written_is_not_called_damaged(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store._writer.execute("PRAGMA query_only = ON")  # as on a read-only disk, also for root
    with pytest.raises(UserError, match=r"readonly database.*; check the disk, or use a copy of"):
        store.add_raters(1)
    store.close()


def copy_study(study: Study, to: Path) -> Path:
    folder = to / "copy"
    shutil.copytree(study.folder, folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_one_line(damage: str, study: Study, tmp_path: Path) -> None:
    folder = copy_study(study, tmp_path)
    DAMAGES[damage](folder / "study.sqlite")
    with pytest.raises(UserError, match=r"study\.sqlite") as error:
        read_all(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", STATEMENTS)
def test_a_database_of_a_stranger_gives_one_line(damage: str, study: Study, tmp_path: Path) -> None:
    folder = copy_study(study, tmp_path)
    connection = sqlite3.connect(folder / "study.sqlite")
    connection.executescript(STATEMENTS[damage])
    connection.close()
    with pytest.raises(UserError, match=r"study\.sqlite") as error:
        read_all(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["study.sqlite", "study.json"])
def test_flipped_bytes_give_the_same_study_or_one_line(
    name: str, study: Study, tmp_path: Path
) -> None:
    expected = read_all(study.folder)
    folder = copy_study(study, tmp_path)
    path = folder / name
    intact = path.read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for _ in range(150):
        data = bytearray(intact)
        for _ in range(rng.choice([1, 1, 1, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            found = read_all(folder)
        except UserError as error:
            num_refused += len(str(error).splitlines())
        else:
            assert found == expected
        for left in folder.glob("study.sqlite-*"):
            left.unlink()
    assert num_refused > 50


def test_a_damaged_journal_of_a_killed_server_loses_no_answer(study: Study, tmp_path: Path) -> None:
    folder = copy_study(study, tmp_path)
    store = Store(folder)
    for rater in store.raters():
        for task in study.tasks(rater.id):
            add(store, task, rater.id, None, "other")
    expected = read_all(folder)
    files = {path: path.read_bytes() for path in folder.glob("study.sqlite*")}
    store.close()
    journal = folder / "study.sqlite-wal"
    rng = random.Random(0)
    for _ in range(30):
        for path, content in files.items():
            path.write_bytes(content)
        data = bytearray(files[journal])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        journal.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        assert read_all(folder) == expected


def test_answers_to_another_study_are_refused(study: Study, tmp_path: Path) -> None:
    other = make_study(tmp_path, num_preference=8, seed=1)
    shutil.copy(study.folder / "study.sqlite", other.folder)
    with pytest.raises(UserError, match=r"restore study\.json and study\.sqlite from one copy"):
        read_all(other.folder)
