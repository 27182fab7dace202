"""Jobs in processes of their own: what one of them does, does not touch the others."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from ifvit.errors import UserError
from ifvit.studies.processes import Event, Job, JobProcesses


def touch(path: Path) -> None:
    path.touch()


def refuse() -> None:
    sys.stdout.write("working\n")
    raise UserError("a\nmistake")


def wait_for(path: Path) -> None:
    """Tell the process id, and wait for a signal."""
    path.write_text(str(os.getpid()))
    time.sleep(600)


def tell_gpu(folder: Path) -> None:
    """Write the visible GPUs, and wait until two processes have written theirs."""
    (folder / f"gpu{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    while len([*folder.glob("gpu*")]) < 2:
        time.sleep(0.1)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Job]:
    def build(name: str, *call: object, after: str | None = None) -> Job:
        function, *arguments = call
        called = partial(function, *arguments)  # type: ignore[arg-type]
        return Job(name=name, call=called, log=tmp_path / name / "log.txt", after=after)

    return build


def ends(jobs: list[Job], number: int = 2) -> dict[str, str | None]:
    """Names of the jobs in the order in which they end, and their errors."""
    events = JobProcesses(number, []).run(jobs)
    return {event.ended.name: event.error for event in events if event.ended}


def test_a_killed_or_failed_process_stops_no_other(
    build: Callable[..., Job], tmp_path: Path
) -> None:
    jobs = [
        build("killed", signal.raise_signal, signal.SIGKILL),
        build("mistake", refuse),
        build("crash", int, "seven"),
        build("exit", sys.exit, 75),
        build("good", touch, tmp_path / "made"),
    ]
    errors = ends(jobs)
    assert errors["good"] is None
    assert (tmp_path / "made").exists()
    assert errors["killed"] == "killed by SIGKILL"
    assert errors["mistake"] == r"exit code 2, a\nmistake"
    assert "exit code 1, ValueError: invalid literal" in str(errors["crash"])
    assert str(errors["exit"]).startswith("exit code 75")
    assert (tmp_path / "mistake" / "log.txt").read_text().startswith("working\n")


def test_a_job_starts_after_the_one_that_it_needs_and_not_if_that_failed(
    build: Callable[..., Job], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    jobs = [
        build("second", os.rename, made, tmp_path / "moved", after="first"),
        build("third", touch, tmp_path / "never", after="lost"),
        build("first", touch, made),
        build("lost", refuse),
        build("free", touch, tmp_path / "free", after="a run of yesterday"),
    ]
    errors = ends(jobs, number=3)
    assert [*errors].index("first") < [*errors].index("second")
    assert (errors["second"], errors["free"]) == (None, None)
    assert errors["third"] == "not started, because lost failed"
    assert (tmp_path / "moved").exists()
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_each_process_sees_one_gpu(
    build: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes = JobProcesses(None, [])
    assert processes.number == 2
    events = processes.run([build(name, tell_gpu, tmp_path) for name in "ab"])
    assert [event.error for event in events if event.ended] == [None, None]
    assert {file.name for file in tmp_path.glob("gpu*")} == {"gpu3", "gpu5"}


def test_all_processes_end_when_the_iterator_is_closed(
    build: Callable[..., Job], tmp_path: Path
) -> None:
    files = [tmp_path / f"{name}.pid" for name in "ab"]
    jobs = [build(file.stem, wait_for, file) for file in files]
    events = JobProcesses(2, []).run(jobs, seconds=0.1)
    while not all(file.exists() and file.read_text() for file in files):
        assert next(events) == Event(running=jobs)
    events.close()  # type: ignore[attr-defined]
    assert not any(Path("/proc", file.read_text()).exists() for file in files)
