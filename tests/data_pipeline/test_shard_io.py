"""Background threads of the encode job: they overlap with the encoders, and report errors."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.encoders import Encoders
from data_pipeline.shard_io import BATCHES_QUEUED, write_shard
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shard names of the batches that the encoders have processed so far."""
    names: list[str] = []
    original = Encoders.encode

    def record(encoders: Encoders, batch: Any) -> Any:
        names.append(batch.shard)
        return original(encoders, batch)

    monkeypatch.setattr(Encoders, "encode", record)
    return names


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def test_encoders_continue_while_a_shard_is_finished(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    second_is_written = threading.Event()

    def finish_slowly(folder: str, name: str, samples: Any) -> Any:
        entry = write_shard(folder, name, samples)
        if name == "shard-00001":
            second_is_written.set()
        elif name == "shard-00000":  # like a long upload
            assert second_is_written.wait(timeout=30)
        return entry

    monkeypatch.setattr("data_pipeline.shard_io.write_shard", finish_slowly)
    encode(config)
    assert len(encoded) == 2 + 2 + 1
    assert len(ShardReader(config.output)) == 10


def test_encoders_wait_for_a_slow_writer(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    counts = []

    def start_late(folder: str, name: str, samples: Any) -> Any:
        wait_until(lambda: len(encoded) > BATCHES_QUEUED)
        threading.Event().wait(0.1)  # time for one batch too many
        counts.append(len(encoded))
        return write_shard(folder, name, samples)

    monkeypatch.setattr("data_pipeline.shard_io.write_shard", start_late)
    encode(replace(config, samples_per_shard=10, batch_size=1))
    assert counts == [BATCHES_QUEUED + 1]


def test_a_failing_writer_ends_the_job_with_its_error(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    def fail(*_: Any) -> Any:
        wait_until(lambda: len(encoded) > BATCHES_QUEUED)
        threading.Event().wait(0.1)  # the encoders now wait for room in the queue
        raise UserError("the disk is full")

    monkeypatch.setattr("data_pipeline.shard_io.write_shard", fail)
    with pytest.raises(UserError, match="the disk is full"):
        encode(replace(config, samples_per_shard=10, batch_size=1))
    assert len(encoded) <= BATCHES_QUEUED + 2
    assert not list(Path(config.output).glob("completed/*"))


def test_failing_encoders_leave_no_partial_shard(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Encoders.encode

    def fail_in_second(encoders: Encoders, batch: Any) -> Any:
        if batch.shard == "shard-00001" and batch.is_last:
            raise RuntimeError("out of memory")
        return original(encoders, batch)

    monkeypatch.setattr(Encoders, "encode", fail_in_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(config)
    left = sorted(path.name for path in Path(config.output).rglob("*") if path.is_file())
    assert left == ["shard-00000.index.npz", "shard-00000.json", "shard-00000.tar"]
