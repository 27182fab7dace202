"""Recipes become jobs, without a cluster."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ifvit.cli import main
from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from slurm.config import SubmitConfig, SubmitTrainConfig
from slurm.jobs import ROOT
from slurm.submit import _evaluation_home, submit_train

CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
TRAIN = str(ROOT / "configs" / "train" / "coco256_early.yaml")


def dry_run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the scripts that `ifvit submit … --dry_run` prints."""
    main(["submit", *argv, "--dry_run"])
    return capsys.readouterr().out


@pytest.mark.parametrize("weights", ["run", "run/weights/step_00000002", "run/weights/step_2/ema"])
def test_the_jobs_of_an_evaluation_are_recorded_in_the_run(weights: str) -> None:
    recipe = EvaluateConfig(weights=f"/data/weights/{weights}", shards="shards")
    assert _evaluation_home(recipe) == "/data/weights/run"


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dry_run(
        [
            *("train", "--config", TRAIN, "--run", str(tmp_path / "run")),
            *("--cluster.folder", str(tmp_path / "jobs"), "--cluster.partition", "gpu"),
            *("--cluster.nodes", "2", "--cluster.gpus_per_node", "8"),
            *("--cluster.cpus_per_task", "6", "--cluster.mem_gb_per_task", "32"),
            *("--cluster.environment", '{NCCL_DEBUG: "WARN, now"}'),
            *("--cluster.setup", "[module load cuda]", "--cluster.sbatch", "{reservation: tue}"),
            *("--cluster.container_image", "ifvit.sqsh", "--cluster.container_mounts", "/a:/b"),
        ],
        capsys,
    )
    for option in (
        "--partition=gpu",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--mem=262144M",
        "--time=60",
        "--signal=USR2@120",
        "--requeue",
        "--reservation=tue",
    ):
        assert f"#SBATCH {option}\n" in text
    commands = text[text.index("# setup") :]
    assert "module load cuda\n" in commands
    assert "export NCCL_DEBUG='WARN, now'\n" in commands
    container = "--container-image=ifvit.sqsh --container-mounts=/a:/b"
    assert re.search(rf"\nsrun .*--cpus-per-task=6 .*{container} .*submitit.core._submit", commands)
    assert re.search(r"python -m slurm.supervise \S+ \$\?\n$", commands)
    assert list(tmp_path.iterdir()) == []


def test_encode_is_an_array_of_single_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(ROOT / "configs" / "data" / "coco2014_train.yaml")
    argv = ["encode", "--config", data, "--num_tasks", "16", "--output", str(tmp_path)]
    text = dry_run([*argv, "--cluster.nodes", "2", "--cluster.gpus_per_node", "8"], capsys)
    for option in ("--array=0-15%16", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"):
        assert f"#SBATCH {option}\n" in text


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_shipped_clusters_make_scripts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "srun" in dry_run(["train", "--config", TRAIN, "--cluster", str(file)], capsys)


def test_without_slurm_the_remedy_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    argv = ["--config", str(recipe), "--cluster.folder", str(tmp_path / "jobs")]
    with pytest.raises(UserError, match="--executor local"):
        submit_train(read_config(SubmitTrainConfig, argv, prog="submit"))


def test_without_slurm_a_job_can_run_in_this_process(recipe: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    flags = ("--executor", "local", "--cluster.folder", str(jobs))
    main(["submit", "train", "--config", str(recipe), "--max_steps", "2", *flags])
    assert sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert not jobs.exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("environment", {"A=1; touch x #": "1"}),
        ("environment", {"A": "1\n#SBATCH --uid=0"}),
        ("environment", {"A": "\0"}),
        ("sbatch", {"qos": "high\nrm -rf x"}),
        ("sbatch", {"qos=high\nrm": "x"}),
        ("sbatch", {"job-name": "other"}),
        ("partition", "gpu\ntouch x"),
        ("partition", "gpu --wrap='touch x'"),
        ("account", "a\t--uid=0"),
        ("exclude", "n1'"),
        ("sbatch", {"qos": "high --wrap=x"}),
        ("folder", "jobs' --wrap='x"),
        ("folder", "jobs\ntouch x"),
        ("container_image", "image\x1b[31m"),
    ],
)
def test_no_value_of_a_cluster_ends_its_line_of_the_script(flag: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"cluster.{flag}"):
        read_config(SubmitConfig, ["--cluster", json.dumps({flag: value})], prog="ifvit submit")


def test_a_run_whose_name_has_a_line_end_is_refused_before_jobs_are_submitted(
    queue: Path, tmp_path: Path
) -> None:
    argv = ["--config", TRAIN, "--cluster.folder", str(tmp_path / "jobs")]
    config = read_config(SubmitTrainConfig, argv, prog="submit")
    with pytest.raises(UserError, match="run"):
        submit_train(replace(config, run=f"{tmp_path}/x\ny"))
    assert not list(queue.glob("*.sh"))
