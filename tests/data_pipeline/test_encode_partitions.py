"""Work shared by many processes that never talk: the same dataset as one makes alone."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoded_files import hashes

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import Partition, encode, find_partition
from data_pipeline.encoders import DecodedBatch, EncodedBatch, Encoders
from ifvit.distributed import World
from ifvit.errors import UserError

ALONE = World(rank=0, size=1, local_rank=0)


@pytest.fixture
def alone(config: EncodeConfig) -> dict[str, str]:
    """The files that one process makes, in shards of two images."""
    config = replace(config, samples_per_shard=2, output=config.output + "_alone")
    encode(config)
    return hashes(config)


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_tasks_one_after_another_make_the_dataset_of_one(
    config: EncodeConfig, alone: dict[str, str], num_tasks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, samples_per_shard=2, num_tasks=num_tasks)
    for task in range(num_tasks)[::-1]:
        made = encode(replace(config, task=task))
        done = len(list(Path(config.output).glob("completed/*.json")))
        assert (made is None) == (done < 5)
        assert (f"{5 - done} of 5 shards are missing" in capsys.readouterr().out) == (done < 5)
    assert hashes(config) == alone


def test_tasks_at_the_same_time_make_the_dataset_of_one(
    config: EncodeConfig, alone: dict[str, str]
) -> None:
    config = replace(config, samples_per_shard=2, num_tasks=3)
    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=encode, args=(replace(config, task=k),)) for k in range(3)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert hashes(config) == alone


def test_a_rerun_may_share_differently(config: EncodeConfig, alone: dict[str, str]) -> None:
    config = replace(config, samples_per_shard=2)
    encode(replace(config, num_tasks=2, task=1))
    encode(replace(config, num_tasks=3, task=0))
    encode(config)
    assert hashes(config) == alone


def test_two_recipes_in_one_output_are_refused_by_whoever_finishes(config: EncodeConfig) -> None:
    encode(replace(config, num_tasks=2, task=0, dtype="float32"))
    with pytest.raises(UserError, match="dtype is float32 there, float16 now"):
        encode(replace(config, num_tasks=2, task=1))


def test_a_damaged_marker_of_another_task_counts_as_missing(config: EncodeConfig) -> None:
    encode(replace(config, num_tasks=2, task=0))
    marker = Path(config.output, "completed", "shard-00000.json")
    marker.write_text("{}")
    assert encode(replace(config, num_tasks=2, task=1)) is None
    assert encode(replace(config, num_tasks=2, task=0)) is not None


@pytest.mark.parametrize("total", [1, 2, 3, 8])
def test_partitions_are_disjoint_and_complete(total: int) -> None:
    units = list(range(13))
    parts = [Partition(number=number, size=total).of(units) for number in range(total)]
    assert sorted(unit for part in parts for unit in part) == units


def test_tasks_come_from_the_slurm_array_times_the_processes_of_each(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ID": 7, "MIN": 1, "STEP": 2, "COUNT": 4}.items():  # --array=1-7:2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert find_partition(config, ALONE) == Partition(number=3, size=4)
    world = World(rank=1, size=8, local_rank=1)
    assert find_partition(config, world) == Partition(number=25, size=32)
    assert find_partition(replace(config, num_tasks=9), ALONE) == Partition(number=3, size=9)
    assert find_partition(replace(config, num_tasks=2, task=0), ALONE) == Partition(
        number=0, size=2
    )


def test_a_task_without_its_place_is_refused(config: EncodeConfig) -> None:
    with pytest.raises(UserError, match="num_tasks is 2, but task is not set"):
        find_partition(replace(config, num_tasks=2), ALONE)
    with pytest.raises(UserError, match="task is 2 of 2; it must be 0 to 1"):
        find_partition(replace(config, num_tasks=2, task=2), ALONE)


def test_the_number_of_cpu_threads_has_no_say(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    original = Encoders.encode

    def record(encoders: Encoders, batch: DecodedBatch) -> EncodedBatch:
        used.add(torch.get_num_threads())
        return original(encoders, batch)

    monkeypatch.setattr(Encoders, "encode", record)
    torch.set_num_threads(2)  # as torchrun would not: it allows each process one
    encode(config)
    assert used == {1}
    assert torch.get_num_threads() == 2
