"""Raters and answers in SQLite."""

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifvit.rating.study import Answer, Store


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


def test_the_newest_answer_counts_and_the_older_ones_are_kept(store: Store, tmp_path: Path) -> None:
    for each in (answer(("M2", "M1")), answer(None, "other"), answer(4)):
        store.add(each)
    (current,) = store.answers(rater=1)
    assert (current.value, current.shown, current.skip_reason) == (4, ("M1", "M2"), None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", current.answered_at)
    assert store.answers() == [current]
    assert store.answers(rater=2) == []
    assert store.num_written() == 3
    history = sqlite3.connect(tmp_path / "study.sqlite").execute("SELECT value FROM answer")
    assert history.fetchall() == [('["M2", "M1"]',), (None,), ("4",)]


def test_a_ranking_is_read_as_it_was_written(store: Store) -> None:
    store.add(answer(("M2", "M1")))
    (found,) = store.answers()
    assert found.value == ("M2", "M1")


def test_creating_a_store_again_replaces_it(store: Store, tmp_path: Path) -> None:
    again = Store.create(tmp_path)  # `rate create` was interrupted
    assert again.raters() == []
    again.close()


@pytest.mark.parametrize("wrong", [answer(None), answer(4, "other")])
def test_an_answer_is_either_a_value_or_a_skip(wrong: Answer, store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.add(wrong)


def test_an_answer_of_an_unknown_rater_is_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    with pytest.raises(sqlite3.IntegrityError):
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
