"""`ifvit study run` goes from images to the page, continues, and survives the death of runs."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifvit.config import read_config
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.rows import read_training_rows
from ifvit.models.presets import PRESETS
from ifvit.storage import write_sealed
from ifvit.studies.config import RECORD, StudyConfig, StudyRunConfig
from ifvit.studies.processes import Event, Job
from ifvit.studies.recipes import StudyRun, arm_recipes, list_runs
from ifvit.studies.run import Progress, list_study_runs, run_study
from ifvit.studies.stages import describe_stages, is_finished
from ifvit.studies.step_time import find_step_seconds
from ifvit.training.train import train

SAMPLING = {"num_steps": 2, "guidance_scale": 1.5}
PROTOCOL = {
    **{"name": "small", "num_samples": 4, "clip": "scenes/clip", "paper_prefix": ""},
    **{"scenes": True, "sampling": SAMPLING},
}

NO_ANALYSES = {"attention": None, "knockout": None}


def describe_study(data: Path, folder: Path) -> dict[str, Any]:
    """Return a study of two arms and one seed, whose data lies in `data`."""
    shards = str(data / "shards")
    encoding = {
        **{"images": str(data / "images" / "val2014"), "output": shards, "image_size": 64},
        **{"vae": "scenes/vae", "text_encoder": "scenes/clip", "samples_per_shard": 6},
        "captions": str(data / "images" / "annotations" / "captions_val2014.json"),
    }
    fusion = {"fusion": "concat", "width": 24, "num_heads": 2}
    recipe = {
        **{"run": "ignored", "shards": shards, "backbone": {**vars(PRESETS["tiny"]), **fusion}},
        **{"engine": {"backend": "plain"}, "optim": {"warmup_steps": 2}, "max_steps": 8},
        **{"sample_grid": {"every": 0}, "checkpoint_every": 4, "log_every": 1},
        **{"global_batch_size": 4, "micro_batch_size": 4, "num_workers": 1, "trackers": []},
    }
    return {
        "folder": str(folder),
        "scenes": [{"folder": str(data / "images"), "split": "val2014", "num_images": 12}],
        "encode": [encoding],
        "train": recipe,
        "steps": 4,
        "arms": {"early": {}, "pooled": {"backbone.fusion": "adaln"}},
        "seeds": [1],
        "evaluate": [{"shards": shards, "protocol": PROTOCOL}],
        "attention": {"shards": shards, "num_prompts": 2, "sampling": SAMPLING},
        "knockout": {"shards": shards, "num_samples": 2, "num_images": 0},
    }


def read_study(description: dict[str, Any], **changes: Any) -> StudyRunConfig:
    text = yaml.safe_dump({**description, **changes})
    return read_config(StudyRunConfig, ["--config", f"{text}\n"], prog="ifvit study run")


def times(folder: str) -> dict[Path, int]:
    """Files of runs, with their time of writing, without leases, logs and the page."""
    files = [file for file in Path(folder).glob("*/seed*/**/*") if file.is_file()]
    kept = [file for file in files if file.parent.name != "lease" and file.name != "log.txt"]
    return {file: file.stat().st_mtime_ns for file in kept}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study that has been run."""
    description = describe_study(data, tmp_path_factory.mktemp("study"))
    run_study(read_study(description))
    return description


def build_run(config: StudyConfig, name: str) -> StudyRun:
    return {run.name: run for run in list_runs(config)}[name]


@pytest.mark.slow
def test_a_study_goes_from_images_to_rows_and_repeats_nothing(finished: dict[str, Any]) -> None:
    folder = Path(finished["folder"])
    config = read_study(finished)
    for run in list_runs(config):
        assert is_finished(config, run)
        assert [row.step for row in read_training_rows(run.recipe.run)] == [1, 2, 3, 4]
    assert len([*folder.glob("*/seed1/evaluation/small/w1.5/step_00000004.json")]) == 2
    analyses = folder.glob("*/seed1/analysis/knockout/*.json")
    assert {file.parts[-5] for file in analyses} == {"early", "pooled"}
    # No image token of adaLN attends to text.
    assert [file.parts[-5] for file in folder.glob("*/seed1/analysis/attention/*.json")] == [
        "early"
    ]
    before = times(finished["folder"])
    run_study(read_study(finished))
    run_study(read_study(finished, train={**finished["train"], "log_every": 2, "num_workers": 2}))
    assert times(finished["folder"]) == before


@pytest.mark.slow
def test_only_what_is_added_to_a_study_is_done(
    finished: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    guided = {**PROTOCOL, "name": "guided"}
    added = [*finished["evaluate"], {**finished["evaluate"][0], "protocol": guided}]
    arms = {**finished["arms"], "broken": {"backbone.context_width": 63}}
    before = times(finished["folder"])
    with pytest.raises(UserError, match=r"1 of 3 runs failed: broken/seed1; .*same command again"):
        run_study(read_study(finished, evaluate=added, arms=arms, **NO_ANALYSES))
    after = times(finished["folder"])
    changed = {file for file, time in before.items() if after[file] != time}
    assert {file.name for file in changed} <= {RECORD, "config.yaml", "metrics.jsonl"}
    rows = {file for file in after.keys() - before.keys() if file.parent.parent.name == "guided"}
    assert {file.parts[-6] for file in rows if file.suffix == ".json"} == {"early", "pooled"}
    [line] = [line for line in capfd.readouterr().err.splitlines() if "broken" in line]
    assert "context_width" in line
    assert "broken/seed1/log.txt" in line


@pytest.mark.slow
def test_runs_of_train_and_evaluate_are_taken_over(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    config = read_study({**finished, "folder": str(tmp_path / "study")}, **NO_ANALYSES)
    config = replace(config, arms={"early": {}}, only="early/seed1")
    [run] = list_runs(config)
    train(run.recipe)
    [settings] = config.evaluate
    evaluate(EvaluateConfig(**vars(settings), weights=run.recipe.run))
    before = times(config.folder)
    run_study(config)
    made = times(config.folder)
    assert [file.name for file in made.keys() - before.keys()] == [RECORD]
    images = {file for file in before if file.suffix in (".png", ".safetensors")}
    assert all(made[file] == before[file] for file in images)
    other = replace(config, fields={"optim.learning_rate": 1e-3})
    with pytest.raises(UserError, match=r"early/seed1: started with optim.learning_rate: 0.0002"):
        run_study(other)


def test_a_run_is_finished_only_with_its_own_recipe_and_evaluations(tmp_path: Path) -> None:
    config = read_study(describe_study(tmp_path, tmp_path / "study"))
    run = build_run(config, "early/seed1")
    assert not is_finished(config, run)
    write_sealed(f"{run.recipe.run}/{RECORD}", describe_stages(config, run))
    assert is_finished(config, run)
    moved = replace(run.recipe, run=run.recipe.run, log_every=7, keep_checkpoints=9)
    assert is_finished(config, replace(run, recipe=moved))
    assert not is_finished(config, replace(run, recipe=replace(moved, max_steps=9)))
    assert not is_finished(replace(config, evaluate=[]), run)
    assert is_finished(replace(config, seeds=(1, 2)), run)


@pytest.mark.slow
def test_sigterm_ends_all_runs_and_keeps_their_work(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    description = {**finished, "folder": str(tmp_path / "study"), "steps": 100_000}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(description))
    command = [sys.executable, "-m", "ifvit", "study", "run", str(file), "--processes", "2"]
    rows = tmp_path / "study" / "early" / "seed1" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while not (rows.exists() and rows.stat().st_size) and time.monotonic() < end:
            time.sleep(0.1)
        with pytest.raises(UserError, match=rf"{tmp_path}/study: in use by process {process.pid}"):
            run_study(read_study(description))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_PREEMPTED
    saved = (tmp_path / "study" / "early" / "seed1" / "checkpoints" / "latest").read_text()
    assert saved.startswith("step_")
    size = rows.stat().st_size
    time.sleep(1)
    assert rows.stat().st_size == size


def test_the_time_left_is_that_of_the_remaining_operations(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = read_study(describe_study(tmp_path, tmp_path / "study"), seeds=[1, 2], **NO_ANALYSES)
    runs = list_runs(config)
    with Progress(config, runs, runs[1:]) as progress:
        progress._started -= 60.0  # a minute ago
        for run in runs[1:]:
            job = Job(name=run.name, call=print, log=tmp_path / "log.txt")
            progress.show(Event(running=[], ended=job, error="lost" if run.seed == 2 else None))
    lines = capfd.readouterr().err.splitlines()
    assert "2/4 runs" in lines[0]
    assert "0:00:00 left" in lines[-1]
    assert f"early/seed2 failed: lost; see {tmp_path}/log.txt" in lines[1]


def test_steps_of_new_arms_are_measured_beside_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_study(describe_study(tmp_path, tmp_path / "study"), match="seconds")
    recipes = arm_recipes(config)
    first = find_step_seconds(config.folder, {"early": recipes["early"]}, "early")
    measured = {"early": 2 * first["early"], "pooled": 1.0}  # now the machine is half as fast
    monkeypatch.setattr("ifvit.studies.step_time.measure_steps", lambda arms: measured)
    both = find_step_seconds(config.folder, recipes, "early")
    assert both == {"early": first["early"], "pooled": pytest.approx(0.5)}
    lengths = {run.arm: run.recipe.max_steps for run in list_study_runs(config)}
    assert lengths == {"early": 4, "pooled": max(1, round(4 * first["early"] / 0.5))}


def test_an_arm_may_branch_from_the_runs_of_another(tmp_path: Path) -> None:
    description = describe_study(tmp_path, tmp_path / "study") | {"seeds": [1, 2]}
    arms = {"early": {}, "late": {"branch": "early/seed{seed}@2"}, "far": {"branch": "/x/y@9"}}
    runs = {run.name: run for run in list_runs(read_study(description, arms=arms))}
    assert runs["late/seed2"].recipe.branch == f"{tmp_path}/study/early/seed2@2"
    assert {name: run.after for name, run in runs.items() if run.after} == {
        "late/seed1": "early/seed1",
        "late/seed2": "early/seed2",
    }
    assert runs["far/seed1"].recipe.branch == "/x/y@9"
    arms["early"] = {"branch": f"{tmp_path}/study/late/seed{{seed}}@2"}
    with pytest.raises(UserError, match="branches from itself"):
        list_runs(read_study(description, arms=arms))


def test_a_name_of_a_run_that_the_study_lacks_is_one_clear_line(tmp_path: Path) -> None:
    config = read_study(describe_study(tmp_path, tmp_path / "study"), only="late/seed1")
    with pytest.raises(UserError, match=r"only: no run late/seed1; runs are early/seed1, pooled"):
        run_study(config)


@pytest.mark.parametrize("field", ["run", "seed"])
def test_an_arm_cannot_set_what_the_study_sets(field: str, tmp_path: Path) -> None:
    arms = {"early": {}, "late": {field: 3}}
    with pytest.raises(UserError, match=f"arms: late: the study sets {field} of every run"):
        list_runs(read_study(describe_study(tmp_path, tmp_path / "study"), arms=arms))


def test_an_arm_whose_name_is_a_number_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arms: the key 1 is no text; put it in quotes"):
        read_study(describe_study(tmp_path, tmp_path / "study"), arms={1: {}})
