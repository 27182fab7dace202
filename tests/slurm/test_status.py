"""`ifvit submit status` and `logs`, with recorded answers of SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ifvit.errors import UserError
from slurm.config import CancelConfig, LogsConfig, StatusConfig
from slurm.jobs import JobRecord, SubmissionRecord, read_records, write_record
from slurm.status import cancel, collect, describe_progress, find_log, parse_slurm, status, table

PATIENCE = 1e9
"""Seconds between looks; a second look would never come."""
SACCT = """JobID|State|NodeList
81|CANCELLED by 0|None assigned
80_0|COMPLETED|node1
80_1|REQUEUED|node[1-2]
80_[2-3%2]|PENDING|None assigned
"""
SQUEUE = """80_2|PENDING|
80_3|PENDING|
80_1|RUNNING|node[1-2]
"""


def test_states_are_those_of_each_job_now() -> None:
    states = {job_id: info["State"] for job_id, info in parse_slurm(SACCT, SQUEUE).items()}
    assert states == {
        "81": "CANCELLED by 0",
        "80_0": "COMPLETED",
        "80_1": "RUNNING",
        "80_2": "PENDING",
        "80_3": "PENDING",
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run with one submission: an array of two and a job of a third task."""
    folder = tmp_path / "jobs" / "2026-11-21_train_x"
    folder.mkdir(parents=True)
    run = tmp_path / "run"
    jobs = [JobRecord(job_id=i, verb="train", run=str(run)) for i in ("80_0", "80_1", "81")]
    record = SubmissionRecord(
        submitted="2026-11-21T10:00:00+00:00",
        command=["ifvit", "submit", "train"],
        commit="abc",
        folder=str(folder),
        executor="slurm",
        jobs=jobs,
    )
    write_record(str(run), record, "a diff")
    begin = "Starting with JobEnvironment(job_id=80_1)\n"
    (folder / "80_1_0_log.out").write_text(begin + "first\n" + begin + "second\n")
    return run


def test_a_record_comes_back_whole(home: Path) -> None:
    [record] = read_records(str(home))
    assert [job.job_id for job in record.jobs] == ["80_0", "80_1", "81"]
    assert [file.suffix for file in sorted((home / "jobs").iterdir())] == [".diff", ".json"]


def test_status_joins_records_slurm_logs_and_metrics(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.status.ask_slurm", lambda ids: parse_slurm(SACCT, SQUEUE))
    statuses = {status.job_id: status for status in collect(str(home))}
    assert [status.has_ended for status in statuses.values()] == [True, False, True]
    assert [status.requeues for status in statuses.values()] == [0, 1, 0]
    lines = table(list(statuses.values())).splitlines()
    assert lines[0].split()[:3] == ["job_id", "verb", "state"]
    assert lines[2].startswith("80_1    train  RUNNING         node[1-2]")


@pytest.fixture
def slurm_says(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose jobs SLURM knows no more; the folder of `sacct`, `squeue` and `scancel`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder, "sacct", "echo 'JobID|State|NodeList'")
    write_command(folder, "squeue", "echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1")
    write_command(folder, "scancel", "exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def write_command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_jobs_that_slurm_has_forgotten_are_over(
    slurm_says: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status(StatusConfig(run=str(home), follow=True, every=PATIENCE))
    cancel(CancelConfig(run=str(home)))
    shown = capfd.readouterr()
    assert shown.out.count("UNKNOWN") == 3
    assert "nothing was left" in shown.out
    assert shown.err == ""


def test_a_controller_that_is_down_is_one_clear_line(slurm_says: Path, home: Path) -> None:
    write_command(slurm_says, "squeue", "echo 'error: Unable to contact' >&2; exit 1")
    with pytest.raises(UserError, match=r"^squeue: error: Unable to contact$"):
        collect(str(home))


def test_a_run_without_jobs_on_slurm_does_not_ask_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SubmissionRecord(
        submitted="", command=[], commit="", folder="/f", executor="local", jobs=[]
    )
    write_record(str(tmp_path), record, "")
    monkeypatch.setenv("PATH", "")
    assert collect(str(tmp_path)) == []


def test_a_log_may_be_read_only_in_part(home: Path) -> None:
    log = next(home.parent.glob("jobs/*/80_1_0_log.out"))
    log.write_text("line\n" * 100_000)
    program = f"ifvit submit logs {home} --lines 100000 | head -n 1"
    read = subprocess.run(
        ["bash", "-c", program],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert read.stderr == ""


def test_progress_of_a_run_tells_step_speed_time_and_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert describe_progress("train", run) == "no step yet"
    (tmp_path / "config.yaml").write_text("max_steps: 1000\nglobal_batch_size: 64\n")
    rows = [json.dumps({"step": step, "samples_per_s": 32.0}) for step in (100, 200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 3')
    text = "step 200/1000, 32.0 samples/s, 0:26:40 left, checkpoint none"
    assert describe_progress("train", run) == text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000150\n")
    assert describe_progress("train", run).endswith("checkpoint step_00000150")


def test_logs_are_of_the_newest_job_that_has_one(home: Path) -> None:
    assert find_log(LogsConfig(run=str(home))).name == "80_1_0_log.out"
    with pytest.raises(UserError, match="no log of job 81 yet"):
        find_log(LogsConfig(run=str(home), job="81"))


def test_a_folder_without_jobs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no jobs; give the run that `ifvit submit` was given"):
        collect(str(tmp_path))
