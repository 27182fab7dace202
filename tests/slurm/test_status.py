"""`ifvit submit status` and `logs`, with recorded answers of SLURM."""

import json
from pathlib import Path

import pytest

from ifvit.errors import UserError
from slurm.config import LogsConfig
from slurm.progress import describe_progress
from slurm.records import JobRecord, SubmissionRecord, read_records, write_record
from slurm.status import collect, find_log, parse_slurm, table

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
