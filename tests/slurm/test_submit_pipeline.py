"""Jobs of a pipeline wait for what they need, and a small pipeline runs from end to end."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from small_jobs import COUNTING, PROTOCOL, SAMPLING, training

from ifvit.cli import main
from ifvit.verbs import VERBS
from slurm.jobs import load_job, read_records


def count_waits(options: dict[str, str]) -> dict[str, Counter[str]]:
    """`afterok:<ifvit-train_0>:<ifvit-train_1>` => {"afterok": Counter(train=2)}."""
    conditions = [c.split(":") for c in options.get("dependency", "").split(",") if c]
    return {how: Counter(re.sub(r"<ifvit-|_\d+>", "", i) for i in ids) for how, *ids in conditions}


def test_jobs_of_the_shipped_pipeline_wait_for_what_they_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["submit", "pipeline", "--recipe", "paper", "--cluster", "gpu", "--dry_run"])
    plan = []
    for job in capsys.readouterr().out.split("#!/bin/bash")[1:]:
        options = dict(re.findall(r"#SBATCH --([\w-]+)='?(.*?)'?\n", job))
        size = int(options.get("array", "0-0%1").split("-")[1].split("%")[0]) + 1
        plan.append(
            (options["job-name"][len("ifvit-") : -len("-0123456789ab")], size, count_waits(options))
        )
    data = {"afterok": Counter(encode=24)}
    reference = "evaluate-make_reference"
    ready = {"afterok": Counter({"train": 1, reference: 1})}
    evaluated = [("evaluate", 4, ready), ("evaluate", 1, {"afterok": Counter(evaluate=4)})]
    counted = [("evaluate", 1, ready)]
    analysed = data | {"afterany": Counter(train=18)}
    everything = Counter({"train": 18, "evaluate": 3 * 18, "analyze-attention": 1})
    assert plan == [
        ("encode", 16, {}),
        ("encode", 8, {}),
        ("train", 18, data),
        (reference, 1, {}),
        *(2 * 18 * evaluated),
        *(18 * counted),
        ("analyze-attention", 1, analysed),
        ("report-paper", 1, data | {"afterany": everything}),
    ]


def build_pipeline(images: Path, shards: str, folder: Path) -> dict[str, object]:
    """Return the recipe of a pipeline with two runs, and write the file of its sweep."""
    home, reference = str(folder / "run"), str(folder / "reference.npz")
    axes = [
        {
            "early": {"seed": 1},
            "intermediate": {
                "backbone.fusion": "image concat image",
                "backbone.num_text_blocks": 1,
            },
        }
    ]
    recipe = {**training(home, shards), "max_steps": 2, "checkpoint_every": 2, "axes": axes}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    measure = {"weights": home, "shards": shards, "reference": reference, "protocol": PROTOCOL}
    real_images = {"images": str(images / "train2014"), "image_size": 64}
    attention = {"shards": shards, "num_prompts": 2, "sampling": SAMPLING}
    return {
        "run": home,
        "sweep": str(folder / "sweep.yaml"),
        "references": [{"output": reference, **real_images, "protocol": PROTOCOL}],
        "evaluate": [
            {**measure, "steps": "all", "num_tasks": 2},
            {**measure, "guidance_scales": [3.0]},
            {"weights": home, "protocol": COUNTING},
        ],
        "attention": [{"runs": [home], **attention}],
        "paper": {"runs": [home], "output": str(folder / "paper")},
    }


def submit(pipeline: dict[str, object], folder: Path, *flags: str) -> None:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    jobs = str(folder / "jobs")
    main(["submit", "pipeline", "--config", str(path), "--cluster.folder", jobs, *flags])


def test_the_folder_of_a_sweep_stands_for_its_runs(queue: Path, tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path, "shards", tmp_path)
    submit(pipeline, tmp_path)
    home = str(pipeline["run"])
    [record] = read_records(home)
    jobs = [load_job(Path(record.folder), known.job_id) for known in record.jobs]
    runs = [f"{home}/early", f"{home}/intermediate"]
    assert {job.config.weights for job in jobs if job.verb == "evaluate"} == set(runs)
    assert [job.config.runs for job in jobs if hasattr(job.config, "runs")] == 2 * [runs]
    assert {job.verb for job in jobs} < set(VERBS)


@pytest.mark.slow
def test_a_sweep_becomes_the_papers_page(images: Path, shards: str, tmp_path: Path) -> None:
    """Every stage runs, one after the other, in this process."""
    submit(build_pipeline(images, shards, tmp_path), tmp_path, "--executor", "local")
    page = (tmp_path / "paper" / "paper.html").read_text()
    made = {file.stem for file in (tmp_path / "paper").glob("*.png")}
    assert made == {"figure3", "figure4", "figure5", "figure8"}
    assert "Figure 6: no study" in page
    assert "Concat, intermediate" in page
