"""`World` understands the variables of every launcher."""

import os

import pytest
import torch

from ifvit.distributed import World, choose_device, first_host
from ifvit.errors import UserError

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in os.environ if name.startswith("SLURM_")]
    for name in (*names, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test exports
        monkeypatch.delenv(name)


def test_a_process_without_launcher_is_alone() -> None:
    assert World.from_environment() == World(rank=0, size=1, local_rank=0)


def test_torchruns_variables_win_over_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(rank=3, size=4, local_rank=3)


def test_a_task_of_srun_finds_its_world_and_tells_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(rank=5, size=8, local_rank=1)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    assert World.from_environment() == World(rank=5, size=8, local_rank=1)


def test_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, STEP[name])
    assert World.from_environment() == World(rank=0, size=1, local_rank=0)


@pytest.mark.parametrize(
    ("device", "visible", "local_rank", "chosen"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 8, 5, "cuda:5"),
        ("cuda", 8, 7, "cuda:7"),
        ("cuda", 1, 5, "cuda:0"),  # the launcher shows each process its own GPU only
        ("cuda:2", 8, 5, "cuda:2"),
        ("cpu", 8, 5, "cpu"),
    ],
)
def test_every_process_of_a_node_uses_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: int, local_rank: int, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert choose_device(device) == chosen


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device cuda: torch sees no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("rack[3,5-6]-n[01-04]", "rack3-n01"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
