"""A task runs its verb from a snapshot of the code, and saved work counts as progress."""

import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ifvit.verbs import VERBS, Verb
from slurm.config import ClusterConfig
from slurm.jobs import PACKAGES, ROOT, VerbJob, write_snapshot
from slurm.submit import sbatch_parameters

SEEN: list[dict[str, str | None] | list[str]] = []


@dataclass(frozen=True)
class Variables:
    names: list[str]


def see_variables(config: Variables) -> None:
    """Record the environment; a stand-in for a verb."""
    SEEN.append({name: os.environ.get(name) for name in config.names})


def build_job(verb: str, config: Any = None, run: Path = Path(), **fields: Any) -> VerbJob:
    return VerbJob(verb=verb, config=config, run=str(run), cluster=ClusterConfig(), **fields)


@pytest.fixture
def call(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Any], None], VerbJob, int], None]:
    """Return a function that runs a job as the last task of a node, with its verb replaced."""

    def call(function: Callable[[Any], None], job: VerbJob, num_tasks: int) -> None:
        verb = Verb(config="", function=f"{__name__}:{function.__name__}")
        monkeypatch.setitem(VERBS, job.verb, verb)
        last = str(num_tasks - 1)
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        variables = {"JOB_ID": "7", "NTASKS": str(num_tasks), "GLOBALID": last, "LOCALID": last}
        for name, value in variables.items():
            monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
        SEEN.clear()
        job()

    return call


def test_a_task_knows_its_rank_and_sees_all_gpus_of_its_node(
    call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of the submitting shell do not matter.

    With one visible GPU and LOCAL_RANK 3, DeepSpeed would ask for a fourth one.
    """
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    for name in wanted.keys() | {"MASTER_ADDR", "LOCAL_WORLD_SIZE"}:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_PORT", "20000")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    call(see_variables, build_job("train", Variables([*wanted])), num_tasks=4)
    assert [wanted] == SEEN


@pytest.mark.parametrize(
    ("verb", "made"),
    [
        ("train", "run/checkpoints/latest"),
        ("encode", "run/completed/shard-00001.json"),
        ("evaluate", "run/evaluation/small/w2/step_00000010/00001.png"),
        ("study run", "run/checkpoints/latest"),
        ("study run", "run/evaluation/small/w2/step_00000010/00001.png"),
        ("study run", "run/analysis/attention/step_00000010.json"),
    ],
)
def test_all_saved_work_is_progress(verb: str, made: str, tmp_path: Path) -> None:
    job = build_job(verb, run=tmp_path / "run")
    before = job.progress()
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text("step_00000010")
    assert job.progress() != before


@pytest.mark.parametrize("made", ["lease/000001.beat", "metrics.jsonl", "tensorboard/events.1"])
def test_what_every_start_of_a_run_writes_is_no_progress(made: str, tmp_path: Path) -> None:
    job = build_job("study run", run=tmp_path)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("1")
    assert job.progress() == ""


def test_a_job_runs_the_snapshot_although_its_working_directory_is_a_checkout(
    tmp_path: Path,
) -> None:
    code = write_snapshot(tmp_path)
    setup = sbatch_parameters(build_job("train"), tmp_path, code, "")["setup"]
    python = shlex.quote(ClusterConfig().python)
    program = f"{python} -m slurm.supervise {tmp_path}/nowhere 1"
    ran = subprocess.run(
        ["bash", "-c", "\n".join([*setup, program])],
        env={"SLURM_JOB_ID": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f'File "{code}/slurm/supervise.py"' in ran.stderr  # of the traceback
    assert str(ROOT / "slurm") not in ran.stderr


def test_nobody_else_can_change_the_code_of_jobs(tmp_path: Path) -> None:
    umask = os.umask(0o002)
    try:
        code = write_snapshot(tmp_path / "code")
    finally:
        os.umask(umask)
    assert not any(path.stat().st_mode & 0o022 for path in (code.parent, code, *code.rglob("*")))


def test_equal_code_has_one_snapshot_and_edited_code_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        (tmp_path / "checkout" / package).mkdir(parents=True)
    module = tmp_path / "checkout" / "slurm" / "jobs.py"
    module.write_text("first")
    monkeypatch.setattr("slurm.jobs.ROOT", tmp_path / "checkout")
    first = write_snapshot(tmp_path / "code")
    assert write_snapshot(tmp_path / "code") == first
    module.write_text("second")
    second = write_snapshot(tmp_path / "code")
    assert (first / "slurm" / "jobs.py").read_text() == "first"
    assert (second / "slurm" / "jobs.py").read_text() == "second"
    assert sorted((tmp_path / "code").iterdir()) == sorted([first, second])
