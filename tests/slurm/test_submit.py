"""From a recipe to a job, as far as it goes without a cluster."""

import json
import os
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from ifvit.cli import main
from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.models.config import PRESETS
from ifvit.training.config import TrainConfig
from slurm.config import (
    ClusterConfig,
    PipelineConfig,
    SubmitSweepConfig,
    SubmitTrainConfig,
    sbatch_parameters,
)
from slurm.jobs import PACKAGES, ROOT, VerbJob, load_job, read_records, take_snapshot
from slurm.pipeline import submit_pipeline
from slurm.submit import Submission, expand_axes, submit_sweep, submit_train

CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
TRAIN = str(ROOT / "configs" / "train" / "coco256_early.yaml")
SWEEP = str(ROOT / "configs" / "sweep" / "coco256_paper.yaml")


def script(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `ifvit submit … --dry_run` prints."""
    main(["submit", *argv, "--dry_run"])
    return capsys.readouterr().out


def test_dry_run_prints_the_script_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(
        [
            *("train", "--config", TRAIN, "--run", str(tmp_path / "run")),
            *("--cluster.folder", str(tmp_path / "jobs"), "--cluster.partition", "gpu"),
            *("--cluster.nodes", "2", "--cluster.gpus_per_node", "8"),
            *("--cluster.cpus_per_task", "6", "--cluster.mem_gb_per_task", "32"),
            *("--cluster.environment", '{NCCL_DEBUG: "WARN, now"}'),
            *("--cluster.setup", "[module load cuda]", "--cluster.sbatch", "{reservation: tue}"),
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
    assert re.search(r"\nsrun .*--cpus-per-task=6 .*submitit.core._submit", commands)
    assert re.search(r"python -m slurm.supervise \S+ \$\?\n$", commands)
    assert list(tmp_path.iterdir()) == []


def test_encode_is_an_array_of_single_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(ROOT / "configs" / "data" / "coco2014_train.yaml")
    argv = ["encode", "--config", data, "--num_tasks", "16", "--output", str(tmp_path)]
    text = script([*argv, "--cluster.nodes", "2", "--cluster.gpus_per_node", "8"], capsys)
    for option in ("--array=0-15%16", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"):
        assert f"#SBATCH {option}\n" in text


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_shipped_clusters_make_scripts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "srun" in script(["train", "--config", TRAIN, "--cluster", str(file)], capsys)


def test_a_container_reaches_srun() -> None:
    cluster = ClusterConfig(container_image="ifvit.sqsh", container_mounts="/data:/data")
    arguments = sbatch_parameters(cluster, "x", Path("/jobs"), Path("/code"))["srun_args"]
    assert {"--container-image=ifvit.sqsh", "--container-mounts=/data:/data"} < set(arguments)


def test_a_sweep_is_the_product_of_its_axes() -> None:
    argv = ["--config", SWEEP, "--run", "runs/paper", "--shards", "data"]
    recipes = expand_axes(read_config(SubmitSweepConfig, argv, prog="sweep"))
    assert len({recipe.run for recipe in recipes}) == len(recipes) == 18
    early, intermediate = recipes[0], recipes[-1]
    assert early.run == "runs/paper/concat_early-seed1234"
    assert (early.backbone.conditioning, early.backbone.num_image_blocks) == ("concat", 0)
    assert intermediate.backbone.conditioning == "cross_attention"
    assert (intermediate.backbone.num_image_blocks, intermediate.backbone.num_text_blocks) == (4, 1)
    same = {"run": "", "seed": 0, "backbone": None}
    assert replace(early, **same) == replace(intermediate, **same)


def test_the_papers_pipeline_waits_for_what_it_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = script(["pipeline", "--recipe", "paper", "--cluster", CLUSTERS[0].stem], capsys)
    plan = []
    for job in text.split("#!/bin/bash")[1:]:
        options = dict(re.findall(r"#SBATCH --([\w-]+)='?(.*?)'?\n", job))
        size = int(options.get("array", "0-0%1").split("-")[1].split("%")[0]) + 1
        plan.append((options["job-name"].removeprefix("ifvit-"), size, waits(options)))
    data = {"afterok": Counter(encode=24)}
    measured = [
        ("evaluate", 4, {"afterok": Counter(train=1, reference=1)}),
        ("evaluate", 1, {"afterok": Counter(evaluate=4)}),
    ]
    analysed = data | {"afterany": Counter(train=18)}
    everything = Counter(train=18, evaluate=2 * 18, count=1, attention=1)
    assert plan == [
        ("encode", 16, {}),
        ("encode", 8, {}),
        ("train", 18, data),
        ("reference", 1, {}),
        *(2 * 18 * measured),
        ("count", 1, analysed),
        ("attention", 1, analysed),
        ("paper", 1, data | {"afterany": everything}),
    ]


def waits(options: dict[str, str]) -> dict[str, Counter[str]]:
    """`afterok:<train_0>:<train_1>` => afterok, two of train."""
    conditions = [c.split(":") for c in options.get("dependency", "").split(",") if c]
    return {how: Counter(re.sub(r"<|_\d+>", "", i) for i in ids) for how, *ids in conditions}


def test_the_folder_of_a_sweep_stands_for_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[VerbJob] = []

    def remember(self: Submission, jobs: list[VerbJob], *waits: list[str]) -> list[str]:
        submitted.extend(jobs)
        return [job.verb for job in jobs]

    monkeypatch.setattr(Submission, "add", remember)
    sweep = tmp_path / "sweep.yaml"
    base = yaml.safe_load(Path(SWEEP).read_text())
    axes = [{"seed1": {"seed": 1}, "seed2": {"seed": 2}}]
    sweep.write_text(yaml.safe_dump({**base, "run": "runs/s", "axes": axes}))
    pipeline = {
        "run": "runs/s",
        "sweep": str(sweep),
        "evaluate": [{"weights": "runs/s", "shards": "held_out"}],
        "count_objects": [{"runs": ["runs/other", "runs/s"], "detector": "scenes"}],
        "attention": [{"runs": ["runs/s"], "shards": "held_out"}],
        "paper": {"runs": ["runs/s"]},
    }
    submit_pipeline(
        read_config(PipelineConfig, ["--config", json.dumps(pipeline), "--dry_run=true"], prog="p")
    )
    runs = ["runs/s/seed1", "runs/s/seed2"]
    by_verb = {job.verb: job for job in submitted}
    assert [job.config.weights for job in submitted if job.verb == "evaluate"] == runs
    assert by_verb["count"].config.runs == ["runs/other", *runs]
    assert by_verb["attention"].config.runs == by_verb["paper"].config.runs == runs
    for job in by_verb.values():
        module, name = job.function.split(":")
        assert callable(getattr(import_module(module), name))


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a made `sbatch` keeps scripts, as 1.sh, 2.sh …; it refuses the one after `room`."""
    folder = tmp_path / "queue"
    folder.mkdir()
    (folder / "room").write_text("100")
    commands = {
        "srun": "",
        "sbatch": f"""
            cd {folder}
            number=$(($(ls *.sh 2>/dev/null | wc -l) + 1))
            [ $number -le $(cat room) ] || {{ echo 'sbatch: error: no such nodes' >&2; exit 1; }}
            cp "$1" $number.sh
            echo Submitted batch job $number""",
        "scancel": f"echo $* >{folder}/cancelled",
    }
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("reason", ["sbatch: .*no such nodes", "Not a directory"])
def test_a_pipeline_is_submitted_whole_or_not_at_all(
    reason: str, queue: Path, tmp_path: Path
) -> None:
    if reason.startswith("sbatch"):
        (queue / "room").write_text("2")
    else:
        (tmp_path / "b").write_text("where the second job was to be recorded")
    recipe = TrainConfig(run=str(tmp_path / "a"), shards="s", backbone=PRESETS["tiny"])
    config = PipelineConfig(
        run=str(tmp_path / "run"),
        train=[replace(recipe, run=str(tmp_path / name)) for name in "abc"],
        cluster=ClusterConfig(folder=str(tmp_path / "jobs")),
    )
    with pytest.raises((UserError, NotADirectoryError), match=reason):
        submit_pipeline(config)
    assert (queue / "cancelled").read_text().split() == ["1", "2"]


def test_a_run_of_a_sweep_knows_its_own_jobs_alone(queue: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "sweep")
    recipe = TrainConfig(run=home, shards="s", backbone=PRESETS["tiny"])
    axes = ({"early": {"seed": 1}, "late": {"seed": 2}},)
    cluster = ClusterConfig(folder=str(tmp_path / "jobs"))
    submit_sweep(SubmitSweepConfig(**vars(recipe), axes=axes, cluster=cluster))
    [record], [early] = read_records(home), read_records(f"{home}/early")
    assert [job.job_id for job in record.jobs] == ["1_0", "1_1"]
    assert [job.job_id for job in early.jobs] == ["1_0"]


@pytest.mark.parametrize("field", ["backbone.breadth", "sede"])
def test_an_axis_over_an_unknown_field_is_refused(field: str) -> None:
    argv = ["--config", TRAIN, "--axes", json.dumps([{"a": {field: 1}}])]
    config = read_config(SubmitSweepConfig, argv, prog="sweep")
    with pytest.raises(UserError, match=field):
        expand_axes(config)


def test_a_job_runs_the_snapshot_even_where_a_checkout_lies(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path)
    setup = sbatch_parameters(ClusterConfig(), "x", tmp_path, code)["setup"]
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


def test_equal_code_has_one_snapshot_and_edited_code_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        (tmp_path / "checkout" / package).mkdir(parents=True)
    module = tmp_path / "checkout" / "slurm" / "jobs.py"
    module.write_text("first")
    monkeypatch.setattr("slurm.jobs.ROOT", tmp_path / "checkout")
    first = take_snapshot(tmp_path / "code")
    assert take_snapshot(tmp_path / "code") == first
    module.write_text("second")
    second = take_snapshot(tmp_path / "code")
    assert (first / "slurm" / "jobs.py").read_text() == "first"
    assert (second / "slurm" / "jobs.py").read_text() == "second"
    assert sorted((tmp_path / "code").iterdir()) == sorted([first, second])


def test_without_slurm_the_remedy_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    argv = ["--config", str(recipe), "--cluster.folder", str(tmp_path / "jobs")]
    with pytest.raises(UserError, match="--executor local"):
        submit_train(read_config(SubmitTrainConfig, argv, prog="submit"))


def test_the_local_executor_runs_the_snapshot_here(recipe: Path, tmp_path: Path) -> None:
    main(
        [
            *("submit", "train", "--config", str(recipe), "--max_steps", "2"),
            *("--executor", "local", "--cluster.folder", str(tmp_path / "jobs")),
        ]
    )
    run = str(tmp_path / "run")
    [record] = read_records(run)
    [job] = record.jobs
    assert load_job(Path(record.folder), job.job_id).run == run
    assert sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    logs = sorted(Path(record.folder).glob("*_log.out"))
    assert len(logs) == 1
