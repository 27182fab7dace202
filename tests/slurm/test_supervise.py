"""What happens to a job after its tasks have ended, with recorded words of SLURM."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission

from ifvit.errors import EXIT_PREEMPTED
from ifvit.studies.config import ReportConfig
from slurm.config import ClusterConfig
from slurm.jobs import VerbJob
from slurm.supervise import Start, find_bad_nodes, read_starts, reason_to_stop, supervise

CRASH = 1
BEGIN = "submitit INFO - Starting with JobEnvironment(job_id=7, hostname={}, node=0(2))\n"


def starts(*progress: str, exit_code: int = CRASH) -> list[Start]:
    """One start for each progress that stood at its end."""
    return [
        Start(ended=0.0, exit_code=exit_code, nodes="n[1-2]", progress=text, bad_nodes=())
        for text in progress
    ]


@pytest.mark.parametrize("exit_code", [CRASH, EXIT_PREEMPTED])
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
def test_a_job_is_given_up_after_three_starts_without_progress(
    progress: list[str], stops: bool, exit_code: int
) -> None:
    reason = reason_to_stop(starts(*progress, exit_code=exit_code), max_stalled=3)
    assert (reason is not None) == stops


def test_a_refused_recipe_is_given_up_at_once() -> None:
    assert reason_to_stop(starts("step_10", exit_code=2), max_stalled=3)


def test_a_broken_node_is_named_by_the_log_of_the_last_start(tmp_path: Path) -> None:
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
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Job 7 in `tmp_path`, and an `scontrol` that shows the file `state` and notes its calls."""
    run = tmp_path / "run"
    job = VerbJob(
        verb="train",
        function="none:none",
        config=None,
        run=str(run),
        cluster=ClusterConfig(max_stalled_starts=3, exclude="n9"),
    )
    DelayedSubmission(job).dump(tmp_path / "7_submitted.pkl")
    (tmp_path / "state").write_text("JobId=7 JobState=RUNNING Reason=None")
    scontrol = tmp_path / "scontrol"
    note, show = f'echo "$*" >>{tmp_path}/calls', f"cat {tmp_path}/state"
    scontrol.write_text(f'#!/bin/sh\n{note}\nif [ "$1" = show ]; then {show}; fi\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return tmp_path


def calls(folder: Path) -> list[str]:
    """What `scontrol` was asked to do."""
    asked = folder / "calls"
    lines = asked.read_text().splitlines() if asked.exists() else []
    return [line for line in lines if not line.startswith("show")]


def test_success_is_the_end(slurm_says: Path) -> None:
    assert supervise(slurm_says, 0) == 0
    assert calls(slurm_says) == []


@pytest.mark.parametrize("exit_code", [EXIT_PREEMPTED, 137, CRASH])
def test_a_saved_or_crashed_job_is_requeued(exit_code: int, slurm_says: Path) -> None:
    assert supervise(slurm_says, exit_code) == exit_code
    assert calls(slurm_says) == ["requeue 7"]
    assert [start.exit_code for start in read_starts(slurm_says, "7")] == [exit_code]


def test_a_job_that_slurm_ends_is_requeued_only_for_its_time_limit(slurm_says: Path) -> None:
    (slurm_says / "state").write_text("JobId=7 JobState=COMPLETING Reason=None")
    supervise(slurm_says, EXIT_PREEMPTED)
    assert calls(slurm_says) == []
    (slurm_says / "state").write_text("JobId=7 JobState=COMPLETING Reason=TimeLimit")
    supervise(slurm_says, 143)
    assert calls(slurm_says) == ["requeue 7"]


def test_a_broken_node_is_excluded_for_good(slurm_says: Path) -> None:
    (slurm_says / "7_0_log.out").write_text(BEGIN.format("n1") + "GPU has fallen off the bus\n")
    supervise(slurm_says, CRASH)
    latest = slurm_says / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_10")
    supervise(slurm_says, EXIT_PREEMPTED)
    exclusion = "update JobId=7 ExcNodeList=n9,n1"
    assert calls(slurm_says) == ["requeue 7", exclusion, "requeue 7", exclusion]


def job_of(verb: str, run: Path, **recipe: object) -> VerbJob:
    return VerbJob(
        verb=verb,
        function="none:none",
        config=SimpleNamespace(**recipe),
        run=str(run),
        cluster=ClusterConfig(),
    )


@pytest.mark.parametrize(
    ("verb", "made"),
    [
        ("train", "run/checkpoints/latest"),
        ("encode", "run/completed/shard-00001.json"),
        ("evaluate", "run/evaluation/small/w2/step_00000010/00001.png"),
        ("count", "other/evaluation/object_count/step_00000010/00001.png"),
    ],
)
def test_whatever_a_job_finishes_is_progress(verb: str, made: str, tmp_path: Path) -> None:
    job = job_of(verb, tmp_path / "run", runs=[str(tmp_path / "other")])
    before = job.progress()
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text("step_00000010")
    assert job.progress() != before


def test_a_job_about_several_runs_leaves_out_those_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[ReportConfig] = []
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("slurm.jobs.JobEnvironment", lambda: SimpleNamespace(num_tasks=1))
    monkeypatch.setattr("json.dump", seen.append)  # what the job calls
    runs = [str(tmp_path / name) for name in ("trained", "failed", "elsewhere")]
    job = VerbJob(
        verb="count",
        function="json:dump",
        config=ReportConfig(runs=runs),
        run=str(tmp_path),
        cluster=ClusterConfig(),
        last_weights={run: f"{run}/weights/step_00000002" for run in runs[:2]},
    )
    for step in ("trained/weights/step_00000002", "failed/weights/step_00000001"):
        (tmp_path / step / "ema").mkdir(parents=True)
    job()
    assert [config.runs for config in seen] == [[runs[0], runs[2]]]
    assert capsys.readouterr().out == f"left out, since training did not end: {runs[1]}\n"
    with pytest.raises(SystemExit, match="2"):
        replace(job, config=ReportConfig(runs=runs[1:2]))()


def test_a_crash_loop_stops_with_its_reason(
    slurm_says: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        supervise(slurm_says, CRASH)
    assert calls(slurm_says) == ["requeue 7", "requeue 7"]
    assert "3 starts in a row saved nothing new" in capsys.readouterr().out


def test_a_store_that_is_down_is_no_progress(
    slurm_says: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(url: str) -> bool:
        raise ConnectionError("no route to the store")

    monkeypatch.setattr("ifvit.storage.exists", fail)
    supervise(slurm_says, CRASH)
    assert calls(slurm_says) == ["requeue 7"]
    assert "no route to the store" in capsys.readouterr().out
