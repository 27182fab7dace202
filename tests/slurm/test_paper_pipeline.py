"""The paper's pipeline in small, every stage for real, one after the other in this process."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_jobs import training

from ifvit.cli import main

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SAMPLING = {"num_steps": 2, "guidance_scale": 1.5}
PROTOCOL = {
    "name": "small",
    "num_samples": 4,
    "clip": "scenes/clip",
    "paper_prefix": "",
    "scenes": True,
    "sampling": SAMPLING,
}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Jobs take over these signals for good."""
    before = [signal.getsignal(number) for number in _SIGNALS]
    yield
    for number, handler in zip(_SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
def test_a_sweep_becomes_the_papers_sheet(
    images: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # count-objects draws its own figure into ./runs
    home, reference = str(tmp_path / "run"), str(tmp_path / "reference.npz")
    axes = [
        {
            "early": {"seed": 1},
            "intermediate": {"backbone.num_image_blocks": 1, "backbone.num_text_blocks": 1},
        }
    ]
    recipe = {**training(home, shards), "max_steps": 2, "checkpoint_every": 1, "axes": axes}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(recipe))
    measure = {"weights": home, "shards": shards, "reference": reference, "protocol": PROTOCOL}
    pipeline = {
        "run": home,
        "sweep": str(sweep),
        "references": [
            {
                "output": reference,
                "images": str(images / "train2014"),
                "image_size": 64,
                "protocol": PROTOCOL,
            }
        ],
        "evaluate": [
            {**measure, "steps": "all", "num_tasks": 2},
            {**measure, "guidance_scales": [3.0]},
        ],
        "count_objects": [
            {
                "runs": [home],
                "detector": "scenes",
                "prompts": "scenes",
                "num_images": 2,
                "sampling": SAMPLING,
            }
        ],
        "attention": [{"runs": [home], "shards": shards, "num_prompts": 2, "sampling": SAMPLING}],
        "paper": {"runs": [home], "output": str(tmp_path / "paper")},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    flags = ["--executor", "debug", "--cluster.folder", str(tmp_path / "jobs")]
    main(["submit", "pipeline", "--config", str(path), *flags])
    page = (tmp_path / "paper" / "paper.html").read_text()
    made = {file.stem for file in (tmp_path / "paper").glob("*.png")}
    assert made == {"figure3", "figure4", "figure5", "figure8"}
    assert "Figure 6: no study" in page
    assert "Concat, intermediate" in page
