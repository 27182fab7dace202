"""`ifvit submit status`, `logs` and `cancel` with recorded answers of SLURM."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_training_rows import made_training_row
from small_jobs import Command

from ifvit.errors import UserError
from ifvit.records import dump_rows, dump_sealed
from ifvit.studies.config import RECORD
from slurm.config import CancelConfig, LogsConfig, StatusConfig
from slurm.jobs import TOKEN, JobRecord, SubmissionRecord, mark_of, read_records, write_record
from slurm.status import cancel, describe_progress, find_log, logs, read_statuses, status, table

SECRET = "a" * 64
NAME = f"ifvit-train-{mark_of(SECRET)}"
SACCT = f"""JobID|State|NodeList|JobName
81|CANCELLED by 0|None assigned|{NAME}
80_0|COMPLETED|node1|{NAME}
80_1|REQUEUED|node[1-2]|{NAME}
80_[2-3%2]|PENDING|None assigned|{NAME}
"""
SQUEUE = f"""80_2|PENDING||{NAME}
80_3|PENDING||{NAME}
80_1|RUNNING|node[1-2]|{NAME}
"""
STATES = {
    "80_0": "COMPLETED",
    "80_1": "RUNNING",
    "80_2": "PENDING",
    "80_3": "PENDING",
    "81": "CANCELLED by 0",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run with one submission: an array of four jobs, the second requeued once, and a job."""
    folder, run = tmp_path / "jobs" / "2026-11-21_train_x", tmp_path / "run"
    folder.mkdir(parents=True)
    (folder / TOKEN).write_text(SECRET)
    jobs = tuple(JobRecord(job_id=job_id, verb="train", run=str(run)) for job_id in STATES)
    record = SubmissionRecord(
        submitted="2026-11-21T10:00:00+00:00",
        command=("ifvit", "submit", "train"),
        commit="abc",
        folder=str(folder),
        token=SECRET,
        jobs=jobs,
    )
    write_record(str(run), record, "a diff")
    begin = "Starting with JobEnvironment(job_id=80_1)\n"
    (folder / "80_1_0_log.out").write_text(begin + "first\n" + begin + "second\n")
    return run


@pytest.fixture
def forgetful(command: Command) -> None:
    """SLURM commands that know no job."""
    command("sacct", "echo 'JobID|State|NodeList|JobName'")
    command("squeue", "echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1")
    command("scancel", "exit 1")


def test_a_record_is_read_as_it_was_written(home: Path) -> None:
    [record] = read_records(str(home))
    assert [job.job_id for job in record.jobs] == list(STATES)
    assert [file.suffix for file in sorted((home / "jobs").iterdir())] == [".diff", ".json"]


def test_status_joins_records_slurm_and_logs(home: Path, command: Command) -> None:
    command("sacct", f"cat <<'E'\n{SACCT}E")
    command("squeue", f"cat <<'E'\n{SQUEUE}E")
    statuses = read_statuses(str(home))
    assert {status.job_id: status.state for status in statuses} == STATES
    assert [status.has_ended for status in statuses] == [True, False, False, False, True]
    assert [status.requeues for status in statuses] == [0, 1, 0, 0, 0]
    lines = table(statuses).splitlines()
    assert lines[0].split()[:3] == ["job_id", "verb", "state"]
    assert lines[2].startswith("80_1    train  RUNNING         node[1-2]")


@pytest.mark.usefixtures("forgetful")
def test_jobs_that_slurm_has_forgotten_have_ended(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status(StatusConfig(run=str(home), follow=True))
    cancel(CancelConfig(run=str(home)))
    shown = capfd.readouterr()
    assert shown.out.count("UNKNOWN") == len(STATES)
    assert "no jobs were left" in shown.out
    assert shown.err == ""


@pytest.mark.usefixtures("forgetful")
def test_a_controller_that_is_down_is_one_clear_line(home: Path, command: Command) -> None:
    command("squeue", "echo 'error: Unable to contact' >&2; exit 1")
    with pytest.raises(UserError, match=r"^squeue: error: Unable to contact$"):
        read_statuses(str(home))


def test_more_jobs_than_a_command_can_name_are_one_clear_line(home: Path) -> None:
    [own] = read_records(str(home))
    jobs = tuple(replace(own.jobs[0], job_id=str(10**6 + n)) for n in range(20_000))
    write_record(str(home), replace(own, jobs=jobs), "")
    with pytest.raises(UserError, match="jobs: 20000 are too many to ask SLURM about at once"):
        read_statuses(str(home))


def test_a_reader_of_a_log_may_stop_early(home: Path) -> None:
    log = next(home.parent.glob("jobs/*/80_1_0_log.out"))
    log.write_text("line\n" * 100_000)
    program = f"{sys.executable} -m ifvit submit logs {home} --lines 100000 | head -n 1"
    read = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert read.stderr == ""


def test_progress_of_a_run_has_step_speed_time_and_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert describe_progress("train", run) == "no step yet"
    (tmp_path / "config.yaml").write_text("max_steps: 1000\nglobal_batch_size: 64\n")
    rows = dump_rows(made_training_row(step, samples_per_s=32.0) for step in (100, 200))
    (tmp_path / "metrics.jsonl").write_bytes(rows + b'{"step": 3')
    text = "step 200/1000, 32.0 samples/s, 0:26:40 left, checkpoint none"
    assert describe_progress("train", run) == text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000150\n")
    assert describe_progress("train", run).endswith("checkpoint step_00000150")
    assert describe_progress("study run", run) == describe_progress("train", run)
    (tmp_path / RECORD).touch()
    assert describe_progress("study run", run) == "trained and evaluated"


@pytest.fixture
def stranger(home: Path, tmp_path: Path) -> Path:
    """A run whose record names the jobs and the folder of `home`, with another token."""
    [own] = read_records(str(home))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / TOKEN).write_text("b" * 64)
    (tmp_path / "log" / "80_1_0_log.out").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    for name, folder in (("a", own.folder), ("b", str(tmp_path / "log"))):
        record = replace(own, token="b" * 64, folder=folder)
        (tmp_path / name).mkdir()
        write_record(str(tmp_path / name), record, "")
    return tmp_path


def test_jobs_of_another_submission_are_not_cancelled_and_their_logs_not_read(
    stranger: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    command("sacct", f"cat <<'E'\n{SACCT}E")
    command("squeue", f"cat <<'E'\n{SQUEUE}E")
    command("scancel", f"touch {stranger}/cancelled")
    statuses = read_statuses(str(stranger / "a"))
    assert {(status.state, status.nodes, status.progress) for status in statuses} == {
        ("FOREIGN", "", "")
    }
    cancel(CancelConfig(run=str(stranger / "a")))
    assert not (stranger / "cancelled").exists()
    assert "no jobs were left" in capfd.readouterr().out
    with pytest.raises(UserError, match="no log"):
        find_log(LogsConfig(run=str(stranger / "a")))
    with pytest.raises(UserError, match="does not lead inside"):
        find_log(LogsConfig(run=str(stranger / "b")))


def test_own_jobs_are_cancelled(home: Path, command: Command, tmp_path: Path) -> None:
    command("sacct", f"cat <<'E'\n{SACCT}E")
    command("squeue", f"cat <<'E'\n{SQUEUE}E")
    command("scancel", f"echo $* >{tmp_path}/cancelled")
    cancel(CancelConfig(run=str(home)))
    assert (tmp_path / "cancelled").read_text().split() == ["80_1", "80_2", "80_3"]


def test_a_job_that_ends_before_it_is_cancelled_is_one_clear_line(
    home: Path, command: Command
) -> None:
    command("sacct", f"cat <<'E'\n{SACCT}E")
    command("squeue", f"cat <<'E'\n{SQUEUE}E")
    command("scancel", "echo 'error: Invalid job id' >&2; exit 1")
    with pytest.raises(UserError, match=r"^scancel: error: Invalid job id.*; see ifvit submit"):
        cancel(CancelConfig(run=str(home)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("jobs", [{"job_id": "--user=me", "verb": "train", "run": "x"}]),
        ("jobs", [{"job_id": "1", "verb": "rm", "run": "x"}]),
        ("jobs", [{"job_id": "1", "verb": "train", "run": "\x1b[2J"}]),
        ("jobs", "1"),
        ("folder", None),
        ("token", "b"),
    ],
)
def test_a_record_of_jobs_with_a_bad_field_is_one_clear_line(
    field: str, value: object, home: Path
) -> None:
    [path] = (home / "jobs").glob("*.json")
    stored = {**json.loads(path.read_text()), field: value}
    path.write_bytes(dump_sealed(stored))
    with pytest.raises(UserError, match=rf"{path}: .*{field}"):
        read_records(str(home))
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        read_records(str(home))


def test_a_log_cannot_command_the_terminal(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = next(home.parent.glob("jobs/*/80_1_0_log.out"))
    log.write_bytes(b"\x1b[2Jloss 1\r\tloss 2\n\xff\n")
    logs(LogsConfig(run=str(home)))
    assert capfd.readouterr().out.splitlines()[1:] == [r"\x1b[2Jloss 1", "        loss 2", "\ufffd"]


@pytest.mark.parametrize(
    "recipe", ["", "[1]", "max_steps: .inf", "max_steps: 0\nglobal_batch_size: 1", "a: !!python/x"]
)
def test_a_damaged_recipe_of_a_run_is_shown_in_its_line(
    recipe: str, home: Path, command: Command
) -> None:
    command("sacct", f"cat <<'E'\n{SACCT}E")
    command("squeue", f"cat <<'E'\n{SQUEUE}E")
    (home / "metrics.jsonl").write_bytes(dump_rows([made_training_row(1)]))
    (home / "config.yaml").write_text(recipe)
    assert {status.progress[:12] for status in read_statuses(str(home))} == {str(home)[:12]}


def test_logs_are_those_of_the_newest_job_with_a_log(home: Path) -> None:
    assert find_log(LogsConfig(run=str(home))).name == "80_1_0_log.out"
    with pytest.raises(UserError, match="no log of job 81 yet"):
        find_log(LogsConfig(run=str(home), job="81"))


def test_a_folder_without_jobs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no jobs; give the run"):
        read_statuses(str(tmp_path))
