"""What a task sees when its verb begins."""

import os

import pytest

from slurm.config import ClusterConfig
from slurm.jobs import VerbJob

SEEN = {}


def look_around(names: list[str]) -> None:
    """A verb that notes its environment."""
    SEEN.update({name: os.environ.get(name) for name in names})


def test_a_task_knows_its_rank_and_keeps_all_gpus_of_its_node_in_sight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever stood in the environment when the job was submitted.

    With one GPU in sight but LOCAL_RANK 3, DeepSpeed would ask for a fourth one.
    """
    wanted = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }
    for name in wanted.keys() | {"MASTER_ADDR", "LOCAL_WORLD_SIZE"}:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_PORT", "20000")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in {"JOB_ID": "7", "NTASKS": "4", "GLOBALID": "3", "LOCALID": "3"}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    function = f"{__name__}:{look_around.__name__}"
    VerbJob(verb="train", function=function, config=[*wanted], run="", cluster=ClusterConfig())()
    assert wanted == SEEN
