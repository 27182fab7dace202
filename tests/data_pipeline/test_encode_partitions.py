"""Partitions: many processes without communication make the dataset of one process."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, hashes, undisturbed_hashes

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import Partition, encode, find_partition
from ifvit.distributed import World
from ifvit.errors import UserError

ALONE = World(rank=0, size=1, local_rank=0)


@pytest.fixture
def five_shards(config: EncodeConfig) -> EncodeConfig:
    return replace(config, samples_per_shard=2)


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_successive_tasks_make_the_dataset_of_one(
    five_shards: EncodeConfig, num_tasks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = undisturbed_hashes(five_shards)
    config = replace(five_shards, num_tasks=num_tasks)
    for task in range(num_tasks)[::-1]:
        manifest = encode(replace(config, task=task))
        done = len(list(Path(config.output).glob("completed/*.json")))
        assert (manifest is None) == (done < 5)
        assert (f"{5 - done} of 5 shards are missing" in capsys.readouterr().out) == (done < 5)
    assert hashes(config) == expected


def test_simultaneous_tasks_make_the_dataset_of_one(five_shards: EncodeConfig) -> None:
    expected = undisturbed_hashes(five_shards)
    context = multiprocessing.get_context("fork")
    configs = [replace(five_shards, num_tasks=3, task=task) for task in range(3)]
    tasks = [context.Process(target=encode, args=(config,)) for config in configs]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert hashes(five_shards) == expected


def test_a_rerun_may_use_another_number_of_tasks(five_shards: EncodeConfig) -> None:
    encode(replace(five_shards, num_tasks=2, task=1))
    encode(replace(five_shards, num_tasks=3, task=0))
    encode(five_shards)
    assert hashes(five_shards) == undisturbed_hashes(five_shards)


def test_two_recipes_in_one_output_are_an_error_of_the_last_task(config: EncodeConfig) -> None:
    encode(replace(config, num_tasks=2, task=0, dtype="float32"))
    with pytest.raises(UserError, match="dtype is float32 there, float16 now"):
        encode(replace(config, num_tasks=2, task=1))


def test_a_damaged_marker_of_another_task_counts_as_missing(config: EncodeConfig) -> None:
    encode(replace(config, num_tasks=2, task=0))
    Path(config.output, "completed", "shard-00000.json").write_text("{}")
    assert encode(replace(config, num_tasks=2, task=1)) is None
    finish(replace(config, num_tasks=2, task=0))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_partitions_are_disjoint_and_complete(size: int) -> None:
    items = list(range(13))
    parts = [Partition(number=number, size=size).of(items) for number in range(size)]
    assert sorted(item for part in parts for item in part) == items


def test_partitions_come_from_the_slurm_array_and_the_processes_of_each_task(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ID": 7, "MIN": 1, "STEP": 2, "COUNT": 4}.items():  # --array=1-7:2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert find_partition(config, ALONE) == Partition(number=3, size=4)
    world = World(rank=1, size=8, local_rank=1)
    assert find_partition(config, world) == Partition(number=25, size=32)
    assert find_partition(replace(config, num_tasks=9), ALONE) == Partition(number=3, size=9)
    alone = find_partition(replace(config, num_tasks=2, task=0), ALONE)
    assert alone == Partition(number=0, size=2)


def test_an_unknown_or_too_large_task_is_an_error(config: EncodeConfig) -> None:
    with pytest.raises(UserError, match="num_tasks is 2, but task is not set"):
        find_partition(replace(config, num_tasks=2), ALONE)
    with pytest.raises(UserError, match="task is 2 of 2; it must be 0 to 1"):
        find_partition(replace(config, num_tasks=2, task=2), ALONE)
