"""What a job runs, from which copy of the code, and what a run directory knows of its jobs."""

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.helpers import TorchDistributedEnvironment

from ifvit import storage
from ifvit.errors import EXIT_PREEMPTED, UserError
from slurm.config import ClusterConfig

PACKAGES = ("ifvit", "data_pipeline", "slurm")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Revision:
    """What a snapshot was taken of; both empty where the code is not a git checkout."""

    commit: str
    diff: str
    """What the files differ from the commit, as `git diff` prints it; new files are not in it."""


def take_snapshot(folder: Path) -> Path:
    """Copy the packages, as they lie on disk, to FOLDER/HASH, unless they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new_", dir=folder) as new:
        copy = Path(new, "code")
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                ROOT / package, copy / package, ignore=ignored, copy_function=_copy_read_only
            )
        target = folder / _hash(copy)
        try:
            copy.rename(target)
        except OSError:
            if not target.is_dir():  # if it is, somebody has submitted the same code before
                raise
    return target


def read_revision() -> Revision:
    """Commit and changes of the checkout that the packages lie in."""
    return Revision(commit=_git("rev-parse", "HEAD").strip(), diff=_git("diff", "HEAD"))


def _copy_read_only(source: str, target: str) -> None:
    """Several submissions share the file, so nobody shall edit it in passing."""
    shutil.copyfile(source, target)
    Path(target).chmod(0o444)


def _hash(folder: Path) -> str:
    """Of all names and contents, short enough for a path."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One job of a submission."""

    job_id: str
    """`123`, or `123_4` in an array."""
    verb: str
    run: str
    """Folder in which its progress shows: a run, or a dataset."""


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord:
    """One call of `ifvit submit`; enough to find its jobs from another machine, days later."""

    submitted: str
    """UTC, ISO 8601."""
    command: list[str]
    """What was typed."""
    commit: str
    """Commit of the code; empty when it was no git checkout."""
    folder: str
    """Shared folder with the code, job files and logs; its name is the submission's."""
    executor: str
    jobs: list[JobRecord]


def write_record(home: str, record: SubmissionRecord, diff: str) -> None:
    """Write, or write again with more jobs, a submission into the run directory `home`."""
    name = storage.join(home, "jobs", record.folder.rsplit("/", 1)[-1])
    storage.write_json(f"{name}.json", asdict(record))
    if diff:
        storage.write_bytes(f"{name}.diff", diff.encode())


def read_records(home: str) -> list[SubmissionRecord]:
    """All submissions of a run directory, oldest first; raises UserError when there are none."""
    names = storage.list_names(storage.join(home, "jobs"))
    files = [storage.join(home, "jobs", name) for name in names if name.endswith(".json")]
    if not files:
        raise UserError(f"{home}/jobs: no jobs; give the run that `ifvit submit` was given")
    return [_parse(storage.read_json(file)) for file in files]


def _parse(fields: dict[str, object]) -> SubmissionRecord:
    jobs = [JobRecord(**job) for job in fields.pop("jobs")]  # type: ignore[attr-defined]
    return SubmissionRecord(jobs=jobs, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class VerbJob:
    """Calls a verb in every task; ends with exit code 75 when it is told to stop.

    No checkpoint is named in it: SLURM starts the very same job again, and the verb finds what it
    has done before.
    """

    verb: str
    function: str
    """`module:name`, called with `config`."""
    config: Any
    run: str
    """Folder whose growing content shows the job's progress: a run or a dataset."""
    cluster: ClusterConfig
    last_weights: Mapping[str, str] = field(default_factory=dict)
    """Run => folder of the weights that it ends with, of runs that may have failed."""

    def __call__(self) -> None:
        """Run the verb; a user's mistake is one line and exit code 2, as on the command line."""
        # In place of submitit's handlers, which stop and requeue on rank 0 alone.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, _stop)
        if JobEnvironment().num_tasks > 1:
            # SLURM hands on what was set where the job was submitted, perhaps another job's ranks.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        module, name = self.function.split(":")
        try:
            getattr(import_module(module), name)(self._without_failed_runs())
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)

    def _without_failed_runs(self) -> Any:
        """The recipe without the runs that lack their last weights, each of which is named."""
        failed = [run for run, url in self.last_weights.items() if not storage.list_names(url)]
        if not failed:
            return self.config
        sys.stdout.write(f"left out, since training did not end: {', '.join(failed)}\n")
        there = [run for run in self.config.runs if run not in failed]
        if not there:
            raise UserError(f"{self.run}: none of the runs was trained to its end")
        return replace(self.config, runs=there)

    def progress(self) -> str:
        """A text that changes whenever something more has been finished for good."""
        latest = storage.join(self.run, "checkpoints", "latest")
        if self.verb == "train":
            return storage.read_bytes(latest).decode() if storage.exists(latest) else ""
        if self.verb == "encode":
            return str(len(storage.list_names(storage.join(self.run, "completed"))))
        folders = {self.run, *getattr(self.config, "runs", ())}
        return str(sum(storage.count_files(folder) for folder in folders))


def load_job(folder: Path, job_id: str) -> VerbJob:
    """The job that was submitted under this id with its files in `folder`."""
    pickled = JobPaths(folder, job_id).submitted_pickle
    job = DelayedSubmission.load(pickled).function
    assert isinstance(job, VerbJob)
    return job


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(EXIT_PREEMPTED)
