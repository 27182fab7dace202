"""`World` understands the variables of every launcher."""

import os

import pytest

from ifvit.distributed import World, first_host

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
