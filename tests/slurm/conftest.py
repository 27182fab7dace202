"""A small dataset, a recipe, and scripts in place of the commands of SLURM."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_jobs import NUM_IMAGES, Command, encoding, training

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


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that replaces a command of SLURM by a shell script."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def queue(tmp_path: Path, command: Command) -> Path:
    """Folder in which `sbatch` stores scripts 1.sh, 2.sh, …; it rejects more than `room`."""
    folder = tmp_path / "queue"
    folder.mkdir()
    (folder / "room").write_text("100")
    command("srun", "")
    command("scancel", f"echo $* >{folder}/cancelled")
    command(
        "sbatch",
        f"""
        cd {folder}
        number=$(($(ls *.sh 2>/dev/null | wc -l) + 1))
        [ $number -le $(cat room) ] || {{ echo 'sbatch: error: no such nodes' >&2; exit 1; }}
        cp "$1" $number.sh
        echo Submitted batch job $number""",
    )
    return folder


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the signal handlers that a job replaces."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the wall time of the tests that ran jobs on SLURM."""
    reports = terminalreporter.getreports("passed")
    jobs = [r for r in reports if r.when == "call" and "test_jobs_on_slurm" in r.nodeid]
    if jobs:
        terminalreporter.section("wall time of jobs on SLURM")
    for report in jobs:
        seconds = dict(report.user_properties).get("seconds", report.duration)
        terminalreporter.line(f"{seconds:6.0f} s  {report.nodeid.partition('::')[2]}")
