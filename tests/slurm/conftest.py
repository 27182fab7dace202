"""A small dataset and a recipe for jobs."""

from pathlib import Path

import pytest
import yaml
from small_jobs import NUM_IMAGES, encoding, training

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.scenes.image_sets import render_scene_set


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 48 captioned scenes in COCO's layout."""
    folder = tmp_path_factory.mktemp("images")
    render_scene_set(str(folder), "train2014", NUM_IMAGES)
    return folder


@pytest.fixture(scope="session")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the encoded scenes."""
    output = str(tmp_path_factory.mktemp("shards"))
    encode(EncodeConfig(**encoding(images, output)))  # type: ignore[arg-type]
    return output


@pytest.fixture
def recipe(shards: str, tmp_path: Path) -> Path:
    """YAML file of a run in `tmp_path`/run."""
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(training(str(tmp_path / "run"), shards)))
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The wall time of everything that SLURM ran."""
    reports = terminalreporter.getreports("passed")
    jobs = [r for r in reports if r.when == "call" and "test_jobs_on_slurm" in r.nodeid]
    if jobs:
        terminalreporter.section("wall time of jobs on SLURM")
    for report in jobs:
        seconds = dict(report.user_properties).get("seconds", report.duration)
        terminalreporter.line(f"{seconds:6.0f} s  {report.nodeid.partition('::')[2]}")
