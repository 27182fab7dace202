"""Jobs of a study wait for what they need; their interruption changes no result."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_jobs import PROTOCOL, SAMPLING, encoding, find_tasks, training, wait_until

from ifvit.cli import main
from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.evaluation.rows import read_training_rows
from ifvit.storage import sha256_of
from ifvit.studies.config import StudyRunConfig
from ifvit.studies.run import run_study
from ifvit.verbs import VERBS, Verb
from slurm.jobs import ROOT, load_job, read_records
from slurm.status import read_statuses

CLUSTER = str(ROOT / "configs" / "cluster" / "virtual.yaml")


def count_waits(options: dict[str, str]) -> dict[str, Counter[str]]:
    """`afterok:<ifvit-encode_0>:<ifvit-encode_1>` => {"afterok": Counter(encode=2)}."""
    conditions = [c.split(":") for c in options.get("dependency", "").split(",") if c]
    return {how: Counter(re.sub(r"<ifvit-|_\d+>", "", i) for i in ids) for how, *ids in conditions}


def plan_jobs(scripts: str) -> list[tuple[str, int, dict[str, Counter[str]]]]:
    """Name, size and dependencies of each array, from the output of a dry run."""
    plan = []
    for job in scripts.split("#!/bin/bash")[1:]:
        options = dict(re.findall(r"#SBATCH --([\w-]+)='?(.*?)'?\n", job))
        size = int(options.get("array", "0-0%1").split("-")[1].split("%")[0]) + 1
        name = options["job-name"][len("ifvit-") : -len("-0123456789ab")]
        plan.append((name, size, count_waits(options)))
    return plan


def test_jobs_of_the_shipped_study_wait_for_what_they_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["submit", "study", "paper", "--cluster", "gpu", "--dry_run"])
    reference = "evaluate-make_reference"
    ready = {"afterok": Counter({"encode": 24, reference: 1})}
    assert plan_jobs(capsys.readouterr().out) == [
        ("encode", 16, {}),
        ("encode", 8, {}),
        (reference, 1, {}),
        ("study-run", 18, ready),
        ("study-report", 1, ready | {"afterany": Counter({"study-run": 18})}),
    ]


def describe_study(folder: Path, images: Path, shards: str) -> dict[str, Any]:
    """Return a study of two arms and one seed; `folder` may move."""
    return {
        "folder": str(folder),
        "encode": [{**encoding(images, shards), "num_tasks": 2}],
        "train": {**training("ignored", shards), "trackers": []},
        "arms": {"early": {}, "late": {"backbone.fusion": "image concat"}},
        "seeds": [1],
        "evaluate": [{"shards": shards, "protocol": PROTOCOL}],
        "attention": {"shards": shards, "num_prompts": 2, "sampling": SAMPLING},
    }


def write_study(study: dict[str, Any], folder: Path) -> list[str]:
    """Words of the command line about the study."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return [str(file), "--cluster.folder", str(folder / "jobs")]


def test_a_run_that_branches_waits_for_its_parent_and_steps_are_measured_first(
    queue: Path, tmp_path: Path
) -> None:
    study = describe_study(tmp_path / "study", tmp_path, str(tmp_path / "shards"))
    study |= {"match": "seconds", "scenes": [{"folder": str(tmp_path)}], "seeds": [1, 2]}
    study["arms"]["branch"] = {"branch": "late/seed{seed}@40"}
    main(["submit", "study", *write_study(study, tmp_path)])
    [record] = read_records(study["folder"])
    found = [load_job(Path(record.folder), job.job_id) for job in record.jobs]
    only = [getattr(job.config, "only", None) for job in found if job.verb != "encode"]
    runs = ["early/seed1", "late/seed1", "early/seed2", "late/seed2"]
    assert only == [None, "plan", *runs, "branch/seed1", "branch/seed2", None]
    assert found[-2].run == f"{tmp_path}/study/branch/seed2"
    scripts = [(queue / f"{number}.sh").read_text() for number in range(1, 7)]
    waits = [re.findall(r"--dependency='?([^'\n]*)", script) for script in scripts]
    data = "afterok:2_0:2_1:3"
    assert waits == [
        [],
        ["afterok:1"],
        [],
        [data],
        [f"{data},afterany:4_0:4_1:4_2:4_3"],
        [f"{data},afterany:4_0:4_1:4_2:4_3:5_0:5_1"],
    ]
    [own] = read_records(f"{tmp_path}/study/early/seed2")
    assert [job.job_id for job in own.jobs] == ["4_2"]


@pytest.mark.parametrize("reason", ["sbatch: .*no such nodes", "Not a directory"])
def test_a_study_is_submitted_completely_or_not_at_all(
    reason: str, queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason.startswith("sbatch"):
        (queue / "room").write_text("2")
    else:
        (tmp_path / "study").mkdir()
        (tmp_path / "study" / "late").write_text("in the place of a folder")
    study = describe_study(tmp_path / "study", tmp_path, str(tmp_path / "shards"))
    with pytest.raises(SystemExit, match="2"):
        main(["submit", "study", *write_study(study, tmp_path)])
    assert re.search(reason, capsys.readouterr().err)
    assert (queue / "cancelled").read_text().split()[:2] == ["1_0", "1_1"]


SEEN: list[StudyRunConfig] = []


def test_without_slurm_a_study_runs_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = Verb(config="", function=f"{__name__}:see")
    monkeypatch.setitem(VERBS, "study run", verb)
    study = describe_study(tmp_path / "study", tmp_path, str(tmp_path / "shards"))
    main(["submit", "study", *write_study(study, tmp_path), "--executor", "local"])
    [config] = SEEN
    assert (config.folder, config.only) == (study["folder"], None)
    assert not (tmp_path / "jobs").exists()


def see(config: StudyRunConfig) -> None:
    """Stand in for `ifvit study run`."""
    SEEN.append(config)


def requeue(job_id: str) -> None:
    """Requeue the job, like a job of higher priority does."""
    subprocess.run(["scontrol", "requeue", job_id], check=True)


def kill_one_task(job_id: str) -> None:
    """Kill one task, like the kernel does when memory is short."""
    os.kill(find_tasks(job_id)[1], signal.SIGKILL)


def read_bytes(folder: Path) -> dict[str, str]:
    """Hashes of the weights and of the generated images of all runs."""
    files = [*folder.glob("*/seed1/weights/**/*.safetensors"), *folder.glob("*/seed1/**/*.png")]
    return {str(file.relative_to(folder)): sha256_of(file) for file in files}


def read_numbers(folder: Path) -> dict[str, list[float]]:
    """Numbers of the rows of training and of the page's tables, without timings."""
    timings = re.compile(r"second|per_s|it/s|data_wait|memory|mfu", re.IGNORECASE)
    found: dict[str, list[float]] = {}
    for run in folder.glob("*/seed1"):
        for row in read_training_rows(str(run)):
            for key, value in vars(row).items():
                if isinstance(value, int | float) and not timings.search(key):
                    found.setdefault(f"{run.relative_to(folder)} {key}", []).append(value)
    for file in folder.glob("report/*.csv"):
        head, *lines = file.read_text().splitlines()
        kept = [line for line in lines if not timings.search(line)]
        for line in csv.DictReader([head, *kept]):
            for key, cell in line.items():
                if re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", cell) and not timings.search(key):
                    found.setdefault(f"{file.name} {key}", []).append(float(cell))
    return found


@pytest.mark.slurm
def test_a_disturbed_study_on_two_nodes_ends_as_an_undisturbed_one_on_this_machine(
    images: Path, shards: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A task of the first run is killed, the second run is preempted, and the third is refused."""
    started = time.monotonic()
    study = describe_study(tmp_path / "study", images, shards)
    study["arms"]["failing"] = {"backbone.context_width": 63}
    words = write_study(study, tmp_path)
    command = [sys.executable, "-m", "ifvit", "submit", "study", *words, "--cluster", CLUSTER]
    subprocess.run(command, check=True)
    disturb = {"early": kill_one_task, "late": requeue}
    while disturb:
        for status in read_statuses(study["folder"]):
            arm = Path(status.run).parent.name
            if arm in disturb and "checkpoint step_" in status.progress:
                disturb.pop(arm)(status.job_id)
        time.sleep(0.2)
    wait_until(lambda: all(s.has_ended for s in read_statuses(study["folder"])), "all jobs")
    record_property("seconds", time.monotonic() - started)
    statuses = read_statuses(study["folder"])
    assert Counter((status.verb, status.state, status.requeues > 0) for status in statuses) == {
        ("encode", "COMPLETED", False): 2,
        ("study run", "COMPLETED", True): 2,
        ("study run", "FAILED", False): 1,
        ("study report", "COMPLETED", False): 1,
    }
    here = ["--config", words[0], "--folder", str(tmp_path / "here")]
    with pytest.raises(UserError, match="1 of 3 runs failed: failing/seed1"):
        run_study(read_config(StudyRunConfig, here, prog="ifvit study run"))
    assert len(read_bytes(tmp_path / "here")) > 2 * PROTOCOL["num_samples"]
    assert read_bytes(tmp_path / "study") == read_bytes(tmp_path / "here")
    expected = read_numbers(tmp_path / "here")
    assert {name.split()[0] for name in expected} > {"early/seed1", "late/seed1"}
    # Two processes add losses and cosines, in float32, in another order than one does.
    found = read_numbers(tmp_path / "study")
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        least = 1e-6 if ".csv" in name else 0.0  # tables have differences of numbers of this size
        assert found[name] == pytest.approx(numbers, rel=1e-6, abs=least), name
