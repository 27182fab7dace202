"""metrics.jsonl is read whole, up to its unfinished line, or refused in one line."""

import random
from pathlib import Path

import pytest
from made_training_rows import made_training_row

from ifvit.errors import UserError
from ifvit.evaluation.rows import TRAINING_FILE, read_training_rows
from ifvit.records import MAX_BYTES, dump_rows

ROWS = [made_training_row(step, loss=None if step == 20 else 0.5) for step in (10, 20, 30)]


def test_rows_come_back_and_an_unfinished_one_is_left_out(tmp_path: Path) -> None:
    assert read_training_rows(str(tmp_path)) == []
    (tmp_path / TRAINING_FILE).write_bytes(dump_rows(ROWS) + b'{"step": 4')
    assert read_training_rows(str(tmp_path)) == ROWS
    assert read_training_rows(str(tmp_path), newest=1) == ROWS[-1:]


@pytest.mark.parametrize(
    "row",
    [
        b"3",
        b"[" * 100_000,
        b'{"step": 10, "loss": 0.5}',
        dump_rows([{"step": 10}]).strip(),
        dump_rows([{**vars(ROWS[0]), "loss": "low"}]).strip(),
        dump_rows([{**vars(ROWS[0]), "seconds": -1.0}]).strip(),
        dump_rows([{**vars(ROWS[0]), "step": 10**30}]).strip(),
        b"\xff\xfe",
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, row: bytes) -> None:
    (tmp_path / TRAINING_FILE).write_bytes(dump_rows(ROWS[:1]) + row + b"\n")
    with pytest.raises(UserError, match=rf"{TRAINING_FILE}, line 2") as error:
        read_training_rows(str(tmp_path))
    assert str(error.value).isprintable()


def test_rows_whose_steps_do_not_rise_are_refused(tmp_path: Path) -> None:
    (tmp_path / TRAINING_FILE).write_bytes(2 * dump_rows(ROWS))
    with pytest.raises(UserError, match=rf"{TRAINING_FILE}: step 10 follows step 30"):
        read_training_rows(str(tmp_path))


def test_flipped_bytes_of_rows_never_change_them(tmp_path: Path) -> None:
    chance, data = random.Random(0), dump_rows(ROWS)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / TRAINING_FILE).write_bytes(flipped)
        try:
            found = read_training_rows(str(tmp_path))
        except UserError:
            continue
        assert found in (ROWS, ROWS[:2])  # a changed line end leaves the last row unfinished


def test_the_log_of_a_run_that_logs_every_step_can_be_continued(tmp_path: Path) -> None:
    filling = b" " * MAX_BYTES + b"\n"  # as long as 300,000 rows
    (tmp_path / TRAINING_FILE).write_bytes(filling + dump_rows([made_training_row(1)]))
    assert [row.step for row in read_training_rows(str(tmp_path))] == [1]
