"""A job is requeued or stopped after its tasks have ended; SLURM's answers are recorded."""

from pathlib import Path

import pytest
from small_jobs import Command
from submitit.core.utils import DelayedSubmission

from ifvit.errors import EXIT_PREEMPTED, EXIT_STORE, UserError
from slurm.config import ClusterConfig
from slurm.jobs import VerbJob
from slurm.supervise import Start, find_bad_nodes, read_starts, reason_to_stop, supervise

CRASH = 1
BEGIN = "submitit INFO - Starting with JobEnvironment(job_id=7, hostname={}, node=0(2))\n"


def build_starts(*progress: str, exit_code: int = CRASH) -> list[Start]:
    return [
        Start(ended=0.0, exit_code=exit_code, nodes="n[1-2]", progress=text, bad_nodes=())
        for text in progress
    ]


@pytest.mark.parametrize("exit_code", [CRASH, EXIT_PREEMPTED, EXIT_STORE])
@pytest.mark.parametrize(
    ("progress", "stops"),
    [
        (["", "", ""], True),
        (["", ""], False),
        (["step_10"], False),
        (["", "", "step_10"], False),
        (["step_10", "step_10", "step_10"], False),
        (["step_10", "step_10", "step_10", "step_10"], True),
        (["step_10", "step_10", "step_10", "step_20"], False),
    ],
)
def test_a_job_stops_after_three_starts_without_progress(
    progress: list[str], stops: bool, exit_code: int
) -> None:
    reason = reason_to_stop(build_starts(*progress, exit_code=exit_code), max_stalled=3)
    assert (reason is not None) == stops


def test_a_job_stops_after_a_mistake_in_its_recipe() -> None:
    assert reason_to_stop(build_starts("step_10", exit_code=2), max_stalled=3)


def test_a_broken_node_is_found_in_the_log_of_the_last_start(tmp_path: Path) -> None:
    broken, fine = "CUDA error: uncorrectable ECC error encountered\n", "loss=0.7\n"
    logs = {
        "7_0_log.out": BEGIN.format("n1") + broken + BEGIN.format("n3") + fine,
        "7_1_log.out": BEGIN.format("n2") + fine + BEGIN.format("n4.cluster.org") + broken,
        "8_0_log.out": BEGIN.format("n5") + broken,
    }
    for name, text in logs.items():
        (tmp_path / name).write_text(text)
    assert find_bad_nodes(tmp_path, "7") == ("n4",)


@pytest.fixture
def job(tmp_path: Path, command: Command, handlers: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of job 7; `scontrol` shows the file `state` and writes its calls to `calls`."""
    job = VerbJob(
        verb="train",
        config=None,
        run=str(tmp_path / "run"),
        cluster=ClusterConfig(max_stalled_starts=3, exclude="n9"),
    )
    DelayedSubmission(job).dump(tmp_path / "7_submitted.pkl")
    (tmp_path / "state").write_text("JobId=7 JobState=RUNNING Reason=None")
    show = f'if [ "$1" = show ]; then cat {tmp_path}/state; else echo "$*" >>{tmp_path}/calls; fi'
    command("scontrol", show)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return tmp_path


def read_calls(folder: Path) -> list[str]:
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_a_folder_of_jobs_that_others_can_write_to_is_not_loaded(job: Path) -> None:
    job.chmod(0o777)
    with pytest.raises(UserError, match="other users can write"):
        supervise(job, CRASH)


@pytest.mark.parametrize("rows", [b"[]\n", b'{"ended": 1}\n', b"\xff\n"])
def test_a_damaged_record_of_starts_is_named(rows: bytes, job: Path) -> None:
    (job / "7_starts.jsonl").write_bytes(rows)
    with pytest.raises(UserError, match=r"7_starts\.jsonl, line 1"):
        supervise(job, CRASH)


def test_a_successful_job_is_not_requeued(job: Path) -> None:
    assert supervise(job, 0) == 0
    assert read_calls(job) == []


@pytest.mark.parametrize("exit_code", [EXIT_PREEMPTED, EXIT_STORE, 137, CRASH])
def test_a_preempted_or_crashed_job_is_requeued(exit_code: int, job: Path) -> None:
    assert supervise(job, exit_code) == exit_code
    assert read_calls(job) == ["requeue 7"]
    assert [start.exit_code for start in read_starts(job, "7")] == [exit_code]


def test_a_job_that_slurm_ends_is_requeued_only_for_its_time_limit(job: Path) -> None:
    (job / "state").write_text("JobId=7 JobState=COMPLETING Reason=None")
    supervise(job, EXIT_PREEMPTED)
    assert read_calls(job) == []
    (job / "state").write_text("JobId=7 JobState=COMPLETING Reason=TimeLimit")
    supervise(job, 143)
    assert read_calls(job) == ["requeue 7"]


def test_a_broken_node_is_excluded_for_good(job: Path) -> None:
    (job / "7_0_log.out").write_text(BEGIN.format("n1") + "GPU has fallen off the bus\n")
    supervise(job, CRASH)
    latest = job / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_10")
    supervise(job, EXIT_PREEMPTED)
    exclusion = "update JobId=7 ExcNodeList=n9,n1"
    assert read_calls(job) == ["requeue 7", exclusion, "requeue 7", exclusion]


def test_a_crash_loop_stops_with_its_reason(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        supervise(job, CRASH)
    assert read_calls(job) == ["requeue 7", "requeue 7"]
    assert "3 starts in a row saved no new work" in capsys.readouterr().out


def test_a_job_is_requeued_when_its_store_does_not_answer(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(url: str) -> bool:
        raise ConnectionError("no route to the store")

    monkeypatch.setattr("ifvit.storage.exists", fail)
    supervise(job, CRASH)
    assert read_calls(job) == ["requeue 7"]
    assert "no route to the store" in capsys.readouterr().out
