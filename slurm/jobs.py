"""Jobs that run a verb, snapshots of the code that they run, and records of submitted jobs.

`submit` writes all of them, `supervise` and `status` read them. On the nodes, submitit calls a
`VerbJob` in every task.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.helpers import TorchDistributedEnvironment

from ifvit import storage
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.records import Rule, Sha256, path_inside, printable, record
from ifvit.verbs import VERBS, load
from slurm.config import ClusterConfig, JobId, Line

PACKAGES = ("ifvit", "data_pipeline", "slurm")
ROOT = Path(__file__).parent.parent


@record
class VerbJob:
    """Runs a verb in every task of a job.

    The job names no checkpoint: SLURM starts the same job again after a requeue, and the verb
    finds and continues its own unfinished work.
    """

    verb: str
    """Name in `ifvit.verbs.VERBS`."""
    config: Any
    """Configuration of the verb."""
    run: Line
    """Run or dataset folder that shows the progress of the job."""
    cluster: ClusterConfig

    @property
    def name(self) -> str:
        """Name of the job in SLURM's queue."""
        return re.sub(r"\W+", "-", f"ifvit-{self.verb}")

    def __call__(self) -> None:
        """Run the verb. Exit codes: that of a UserError, 75 when the job was told to stop."""
        # These replace submitit's handlers, which stop and requeue only on rank 0.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, _stop)
        if JobEnvironment().num_tasks > 1:
            # SLURM passes on the variables of the shell, which may hold the ranks of another job.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            load(VERBS[self.verb].function)(self.config)
        except UserError as error:
            sys.stderr.write(f"error: {printable(str(error))}\n")
            sys.exit(error.exit_code)

    def progress(self) -> str:
        """Return a string that changes whenever the job has saved more work."""
        if self.verb == "encode":
            return str(len(storage.list_names(storage.join(self.run, "completed"))))
        step = latest_checkpoint(self.run)
        if self.verb == "train":
            return step
        folders = [self.run]
        if self.verb == "study run":  # other files of the run are written at every start
            folders = [storage.join(self.run, name) for name in ("evaluation", "analysis")]
        names = [url.rpartition("/")[2] for each in folders for url in storage.walk_files(each)]
        num_files = sum(not name.startswith(".") for name in names)  # a hidden file is unfinished
        return f"{step} {num_files}" if num_files else step


def latest_checkpoint(run: str) -> str:
    """Name of the newest complete checkpoint of a training run; "" if there is none."""
    url = storage.join(run, "checkpoints", "latest")
    return storage.read_bytes(url).decode(errors="replace").strip() if storage.exists(url) else ""


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(EXIT_PREEMPTED)


def load_job(folder: Path, job_id: str) -> VerbJob:
    """Load the submitted job with this id; its files are in `folder`.

    The job is a pickle, which is code: only the sbatch script of `folder` may call this function.
    Raises UserError unless the folder belongs to this user and only this user can write there.
    """
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: other users can write to this folder of jobs; submit again")
    job = DelayedSubmission.load(JobPaths(folder, job_id).submitted_pickle).function
    assert isinstance(job, VerbJob)
    return job


def write_snapshot(folder: Path) -> Path:
    """Copy the packages to FOLDER/HASH and return that path; equal code is copied only once."""
    folder.mkdir(0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new_", dir=folder) as new:
        copy = Path(new, "code")
        ignored = shutil.ignore_patterns("__pycache__")
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package, ignore=ignored)
        for path in (copy, *copy.rglob("*")):
            # Whatever the umask: nobody else may change the code, and several submissions share it.
            path.chmod(0o755 if path.is_dir() else 0o444)
        target = folder / _hash(copy)
        try:
            copy.rename(target)
        except OSError:
            if not target.is_dir():  # an existing target holds the same code
                raise
    return target


def _hash(folder: Path) -> str:
    """Return 16 digits of the hash of all file names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def run_git(*arguments: str) -> str:
    """Return git's output for the checkout of this code; empty without git or a checkout."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


@record
class JobRecord:
    """One job of a submission."""

    job_id: JobId
    """`123`, or `123_4` in an array."""
    verb: Annotated[str, Rule("a verb", VERBS.__contains__)]
    run: Line
    """Run or dataset folder that shows the progress of the job."""


@record
class SubmissionRecord:
    """One call of `ifvit submit`; it makes the jobs known to later calls on other machines.

    A run folder may come from a stranger, whose record names any job and any folder. Therefore the
    folder holds the record's token, and the job's name in SLURM ends with the hash of the token.
    """

    submitted: Line
    """UTC in ISO 8601."""
    command: tuple[str, ...]
    commit: Line
    """Commit of the code; empty when the code is not in a git checkout."""
    folder: Line
    """Folder with the job files and logs; its name is the name of the submission."""
    token: Sha256
    """Random secret of this submission."""
    jobs: tuple[JobRecord, ...]

    @property
    def owns_folder(self) -> bool:
        """Whether `folder` is here, belongs to this user, and was made by this submission."""
        try:
            path = path_inside(Path(self.folder), TOKEN)
            is_mine = path.is_file() and path.parent.stat().st_uid == os.getuid()
            return is_mine and path.read_bytes() == self.token.encode()
        except (OSError, UserError):
            return False

    def log(self, job_id: str, task: int = 0) -> Path | None:
        """Path of a task's log in the folder of this submission; None if there is none here."""
        if not self.owns_folder:
            return None
        path = path_inside(Path(self.folder), JobPaths(self.folder, job_id, task).stdout.name)
        return path if path.is_file() else None


TOKEN = "token"
"""File of a folder of jobs that holds the token of its submission."""


def mark_of(token: str) -> str:
    """End of the names of a submission's jobs in SLURM, which everybody may see."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def write_record(home: str, submission: SubmissionRecord, diff: str) -> None:
    """Write or replace the record of a submission, and the uncommitted changes of the code."""
    name = storage.join(home, "jobs", submission.folder.rsplit("/", 1)[-1])
    storage.write_sealed(f"{name}.json", submission)
    if diff:
        storage.write_bytes(f"{name}.diff", diff.encode())


def read_records(home: str) -> list[SubmissionRecord]:
    """Read all submissions of a run folder, oldest first. Raises UserError when there are none."""
    folder = storage.join(home, "jobs")
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    if not names:
        raise UserError(f"{folder}: no jobs; give the run that was given to `ifvit submit`")
    return [storage.read_sealed(SubmissionRecord, storage.join(folder, name)) for name in names]
