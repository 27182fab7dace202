"""Answers are added, never changed."""

import re
import sqlite3
from pathlib import Path

import pytest

from ifvit.rating.store import Answer, Store


def answer(value: int | tuple[str, ...] | None, skip_reason: str | None = None) -> Answer:
    return Answer(
        rater=1, item=3, repetition=0, shown=("M1", "M2"), value=value, skip_reason=skip_reason
    )


def test_the_newest_answer_counts_and_the_others_are_kept(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.add_raters(1)
    store.add(answer(("M2", "M1")))
    store.add(answer(None, "other"))
    store.add(answer(4))
    (current,) = store.answers(rater=1)
    assert (current.value, current.shown, current.skip_reason) == (4, ("M1", "M2"), None)
    assert store.answers() == [current]
    assert store.answers(rater=2) == []
    assert store.num_written() == 3
    store.close()
    history = sqlite3.connect(tmp_path / "study.sqlite").execute("SELECT value FROM answer")
    assert history.fetchall() == [('["M2", "M1"]',), (None,), ("4",)]


def test_an_answer_is_on_disk_when_it_is_recorded(tmp_path: Path) -> None:
    Store.create(tmp_path).close()
    store = Store(tmp_path)
    settings = [
        store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "busy_timeout")
    ]
    store.close()
    # FULL: the journal is synced before a commit returns. Another process may write meanwhile.
    assert settings == ["wal", 2, 30_000]


def test_a_store_begun_before_is_begun_anew(tmp_path: Path) -> None:
    for _ in range(2):  # a study that was interrupted while it was made
        store = Store.create(tmp_path)
        assert store.raters() == []
        store.add_raters(1)
        store.close()


def test_a_ranking_comes_back_as_it_went(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.add_raters(1)
    store.add(answer(("M2", "M1")))
    (found,) = store.answers()
    assert found.value == ("M2", "M1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.answered_at)
    store.close()


def test_an_answer_is_a_value_or_a_skip_of_a_known_rater(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    with pytest.raises(sqlite3.IntegrityError):
        store.add(answer(4))  # there is no rater 1
    store.add_raters(1)
    for wrong in (answer(None), answer(4, "other")):
        with pytest.raises(sqlite3.IntegrityError):
            store.add(wrong)
    store.close()


def test_codes_are_long_and_never_the_same(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.add_raters(3)
    store.add_raters(2)
    raters = store.raters()
    assert [rater.id for rater in raters] == [1, 2, 3, 4, 5]
    codes = {rater.code for rater in raters} | {store.admin_token()}
    assert len(codes) == 6
    assert all(len(code) >= 22 for code in codes)  # 128 bits in base 64
    assert store.rater_of(raters[2].code) == 3
    assert store.rater_of("guess") is None
    store.close()
