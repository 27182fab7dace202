"""The background half of the encode job: it overlaps, it is bounded, and it fails loudly."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.encoders import Encoders
from data_pipeline.shard_io import write_shard
from data_pipeline.writer import BATCHES_QUEUED
from ifvit.errors import UserError
from ifvit.shards import ShardReader


def count_encoded(
    monkeypatch: pytest.MonkeyPatch, tell: Callable[[list[str]], object] = len
) -> list[str]:
    """Unit names of the batches that the models have seen; `tell` hears of each new one."""
    seen: list[str] = []
    original = Encoders.encode

    def record(encoders: Encoders, batch: Any) -> Any:
        seen.append(batch.shard)
        tell(seen)
        return original(encoders, batch)

    monkeypatch.setattr(Encoders, "encode", record)
    return seen


def test_models_go_on_beside_a_shard_that_is_being_finished(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_encoded(monkeypatch)
    second_began = threading.Event()

    def finish_slowly(folder: Path, name: str, samples: Any) -> Any:
        entry = write_shard(folder, name, samples)
        if name == "shard-00001":
            second_began.set()
        elif name == "shard-00000":  # stands for a long upload
            assert second_began.wait(timeout=30)
        return entry

    monkeypatch.setattr("data_pipeline.writer.write_shard", finish_slowly)
    encode(config)
    assert len(seen) == 2 + 2 + 1
    assert len(ShardReader(config.output)) == 10


def test_models_wait_for_a_writer_that_does_not_keep_up(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = threading.Event()
    seen = count_encoded(monkeypatch, lambda seen: len(seen) > BATCHES_QUEUED and is_full.set())
    counts = []

    def start_late(folder: Path, name: str, samples: Any) -> Any:
        is_full.wait(timeout=30)
        threading.Event().wait(0.1)  # time for one batch too many
        counts.append(len(seen))
        return write_shard(folder, name, samples)

    monkeypatch.setattr("data_pipeline.writer.write_shard", start_late)
    encode(replace(config, samples_per_shard=10, batch_size=1))
    assert counts == [BATCHES_QUEUED + 1]


def test_a_writer_that_fails_ends_the_job_with_its_error(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = threading.Event()
    seen = count_encoded(monkeypatch, lambda seen: len(seen) > BATCHES_QUEUED and is_full.set())

    def fail(*_: Any) -> Any:
        assert is_full.wait(timeout=30)
        threading.Event().wait(0.1)  # time to wait for room for one batch too many
        raise UserError("the disk is full")

    monkeypatch.setattr("data_pipeline.writer.write_shard", fail)
    with pytest.raises(UserError, match="the disk is full"):
        encode(replace(config, samples_per_shard=10, batch_size=1))
    assert len(seen) <= BATCHES_QUEUED + 2
    assert not list(Path(config.output).glob("completed/*"))


def test_models_that_fail_leave_no_half_shard(
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
