"""Jobs on a real cluster: interruptions by SLURM must not change what the jobs compute."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from small_jobs import (
    PATIENCE,
    BrokenNodeJob,
    find_tasks,
    read_losses,
    training,
    wait_for_jobs,
    wait_until,
)

from ifvit import storage
from slurm.config import ClusterConfig, SubmitConfig
from slurm.status import read_statuses
from slurm.submit import Submission

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "configs" / "cluster" / "virtual.yaml")


def submit(verb: str, recipe: dict[str, object], folder: Path, *flags: str) -> str:
    """Call `ifvit submit VERB` for the two virtual nodes; return its output."""
    path = folder / f"{verb}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    cluster = ["--cluster", CLUSTER, "--cluster.folder", str(folder / "jobs")]
    command = [sys.executable, "-m", "ifvit", "submit", verb, *cluster, "--config", str(path)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run that has ended."""

    losses: dict[int, float]
    requeues: int
    log: str
    seconds: float


def train(shards: str, folder: Path, run: str, disturb: Callable[[str], None] | None) -> Run:
    """Train on SLURM into an object store; call `disturb` with the job id at a checkpoint."""
    started = time.monotonic()
    folder.mkdir()
    job_id = submit("train", training(run, shards), folder).split(":")[0]
    latest = storage.join(run, "checkpoints", "latest")
    wait_until(lambda: storage.exists(latest), "a checkpoint")
    if disturb:
        disturb(job_id)
    [status] = wait_for_jobs(run)
    return Run(
        losses=read_losses(run),
        requeues=status.requeues,
        log=next(folder.glob("jobs/*/*_0_log.out")).read_text(),
        seconds=time.monotonic() - started,
    )


def requeue(job_id: str) -> None:
    """Requeue the job, like an administrator or a job of higher priority does."""
    subprocess.run(["scontrol", "requeue", job_id], check=True)


def kill_one_task(job_id: str) -> None:
    """Kill one task, like the kernel does when memory is short."""
    os.kill(find_tasks(job_id)[1], signal.SIGKILL)


def run_out_of_time(job_id: str) -> None:
    """Stop the tasks until SLURM signals that their time is almost over; it also continues them."""
    for task in find_tasks(job_id).values():
        os.kill(task, signal.SIGSTOP)
    set_time_limit(job_id, math.ceil((seconds_run(job_id) + 45) / 60))
    wait_until(lambda: not find_tasks(job_id), "the end of the tasks")
    set_time_limit(job_id, 60)


def seconds_run(job_id: str) -> float:
    shown = subprocess.run(
        ["scontrol", "show", "job", job_id], check=True, capture_output=True, text=True
    )
    started = re.search(r" StartTime=(\S+)", shown.stdout)
    assert started
    return (datetime.now() - datetime.fromisoformat(started[1])).total_seconds()


def set_time_limit(job_id: str, minutes: int) -> None:
    command = ["scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}"]
    subprocess.run(command, check=True)


DISTURBANCES = {
    "none": None,
    "requeue": requeue,
    "kill_one_task": kill_one_task,
    "run_out_of_time": run_out_of_time,
}


@pytest.fixture(scope="module")
def runs(
    shards: str, s3_module_bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Run]]]:
    """All runs at once, because they mostly wait for SLURM."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(len(DISTURBANCES)) as pool:
        yield {
            name: pool.submit(
                train, shards, folder / name, storage.join(s3_module_bucket, name), disturb
            )
            for name, disturb in DISTURBANCES.items()
        }


@pytest.mark.s3
@pytest.mark.parametrize(
    ("disturbance", "exit_code"),
    # `supervise` does not finish in a job that SLURM itself requeues.
    [("none", None), ("requeue", None), ("kill_one_task", 137), ("run_out_of_time", 75)],
)
def test_two_nodes_train_to_the_same_end_after_a_disturbance(
    disturbance: str,
    exit_code: int | None,
    runs: dict[str, Future[Run]],
    record_property: Callable[[str, object], None],
) -> None:
    run = runs[disturbance].result()
    record_property("seconds", run.seconds)
    assert sorted(run.losses) == list(range(1, 241))
    assert (run.requeues >= 1) == (disturbance != "none")
    assert run.losses == pytest.approx(runs["none"].result().losses, rel=1e-6)
    assert exit_code is None or f"ended with exit code {exit_code}" in run.log


def test_status_logs_and_cancel_of_a_waiting_job(shards: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    submit("train", training(run, shards), tmp_path, "--cluster.sbatch", "{begin: now+1hour}")
    wait_until(lambda: read_statuses(run)[0].state == "PENDING", "the job in the queue")
    call = [sys.executable, "-m", "ifvit", "submit"]
    table = subprocess.run(
        [*call, "status", run], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"train +PENDING .* no step yet", table)
    logs = subprocess.run([*call, "logs", run], capture_output=True, text=True, check=False)
    assert (logs.returncode, logs.stderr.count("\n")) == (2, 1)
    subprocess.run([*call, "cancel", run], check=True)
    wait_until(lambda: read_statuses(run)[0].state.startswith("CANCELLED"), "the cancelled job")


def test_a_mistake_in_the_recipe_is_not_repeated(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    submit("train", training(run, str(tmp_path / "nowhere")), tmp_path, "--cluster.nodes", "1")
    wait_until(lambda: read_statuses(run)[0].has_ended, "the failed job")
    [status] = read_statuses(run)
    assert (status.state, status.requeues) == ("FAILED", 0)
    log = next(tmp_path.glob("jobs/*/*_0_log.out")).read_text()
    assert "error: " in log
    assert "is not requeued" in log


def test_a_node_whose_hardware_is_broken_is_avoided(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        cpus_per_task=1,
        mem_gb_per_task=1,
        folder=str(tmp_path / "jobs"),
        setup=(f"export PYTHONPATH=$PYTHONPATH:{Path(__file__).parent}",),
    )
    home = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    job = BrokenNodeJob(verb="evaluate", config=None, run=home, cluster=cluster)
    Submission(SubmitConfig(cluster=cluster), home, "broken").add([job])
    [status] = wait_for_jobs(home)
    assert status.requeues == 1
    nodes = {(tmp_path / "run" / name).read_text() for name in ("first", "then")}
    assert nodes == {"node1", "node2"}


def test_the_batch_script_of_the_guide_trains_on_two_nodes(shards: str, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text()
    [text] = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", guide, re.DOTALL)
    (tmp_path / "train.sbatch").write_text(text)
    run = tmp_path / "run"
    recipe = tmp_path / "train.yaml"
    recipe.write_text(yaml.safe_dump({**training(str(run), shards), "max_steps": 5}))
    subprocess.run(
        [
            *("sbatch", "--wait", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"),
            *("--mem=1500", "train.sbatch", "--config", str(recipe)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
        timeout=PATIENCE,
    )
    [log] = tmp_path.glob("slurm-*.out")
    assert sorted(read_losses(str(run))) == [1, 2, 3, 4, 5], log.read_text()
