"""`ifvit submit status | logs | cancel`: shows or cancels the jobs of a run folder."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

from submitit.slurm.slurm import SlurmInfoWatcher

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import read_training_rows
from ifvit.records import PositiveInt, parse_value, parse_yaml, printable, record, shorten
from ifvit.studies.config import RECORD
from slurm.config import CancelConfig, LogsConfig, StatusConfig
from slurm.jobs import JobRecord, SubmissionRecord, latest_checkpoint, mark_of, read_records
from slurm.supervise import TASK_START

_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("NODE_FAIL", "PREEMPTED", "REVOKED", "UNKNOWN", "FOREIGN"),
)
"""States of ended jobs. A requeued job has not ended: its state comes from squeue."""
_MAX_ARGUMENT = 100_000
"""Characters of one argument of a command; Linux allows 131,071 bytes."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """One line of the table."""

    job_id: str
    verb: str
    state: str
    """State in SLURM's words; UNKNOWN for a job that SLURM has forgotten, FOREIGN for a job of this
    id that the record's submission did not submit."""
    nodes: str
    requeues: int
    run: str
    progress: str

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended and is not requeued."""
        return self.state.startswith(_ENDED)


def status(config: StatusConfig) -> None:
    """Print the state of all jobs of a run, with `follow` until all have ended."""
    while True:
        statuses = read_statuses(config.run)
        rows = [asdict(status) for status in statuses]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n" if config.json else table(statuses))
        sys.stdout.flush()
        if not config.follow or all(status.has_ended for status in statuses):
            return
        time.sleep(10)


def logs(config: LogsConfig) -> None:
    """Print the end of a task's log. Raises UserError when there is no log yet."""
    path = find_log(config)
    sys.stdout.write(f"==> {printable(str(path))} <==\n")
    follow = ["-F"] if config.follow else []
    command = ["tail", "-n", str(config.lines), *follow, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as tail:
        assert tail.stdout is not None
        try:
            for line in tail.stdout:
                sys.stdout.write(printable(line.rstrip("\n").expandtabs()) + "\n")
                sys.stdout.flush()
        finally:
            tail.terminate()


def find_log(config: LogsConfig) -> Path:
    """Return the log of the given job, or of the newest job that has one here."""
    for submission in reversed(read_records(config.run)):
        for job in reversed(submission.jobs):
            path = submission.log(job.job_id, config.task)
            if path and config.job in (None, job.job_id):
                return path
    raise UserError(
        f"{config.run}: no log of job {config.job or 'any'} yet in a folder of this submission; "
        "see ifvit submit status"
    )


def cancel(config: CancelConfig) -> None:
    """Cancel all jobs that have not ended. Raises UserError when SLURM does not do so."""
    jobs = [status.job_id for status in read_statuses(config.run) if not status.has_ended]
    if jobs:
        ended = _run("scancel", *jobs)
        if ended.returncode:
            raise UserError(f"scancel: {shorten(ended.stderr, 300)}; see ifvit submit status")
    sys.stdout.write(f"cancelled: {' '.join(jobs) or 'no jobs were left'}\n")


def read_statuses(home: str) -> list[JobStatus]:
    """Return the state of every job that was submitted for `home`, oldest first."""
    jobs = [(submission, job) for submission in read_records(home) for job in submission.jobs]
    known = ask_slurm([job.job_id for _, job in jobs])
    return [_read_status(submission, job, known.get(job.job_id)) for submission, job in jobs]


def _read_status(
    submission: SubmissionRecord, job: JobRecord, known: dict[str, str] | None
) -> JobStatus:
    """State of one job; of a job that is not ours, nothing is shown and no file is read."""
    if known is None:
        known, is_ours = {"State": "UNKNOWN", "NodeList": ""}, submission.owns_folder
    elif not (is_ours := known["JobName"].endswith(mark_of(submission.token))):
        known = {"State": "FOREIGN", "NodeList": ""}
    try:
        progress = describe_progress(job.verb, job.run) if is_ours else ""
    except UserError as error:
        progress = shorten(error)
    return JobStatus(
        job_id=job.job_id,
        verb=job.verb,
        state=known["State"],
        nodes=known["NodeList"],
        requeues=_count_requeues(submission, job),
        run=job.run,
        progress=progress,
    )


def _count_requeues(submission: SubmissionRecord, job: JobRecord) -> int:
    """Return the number of starts in the log of task 0, except the first."""
    path = submission.log(job.job_id)
    if path is None:
        return 0
    with path.open(errors="replace") as log:  # which may be larger than the memory
        return max(0, sum(TASK_START in line for line in log) - 1)


def ask_slurm(job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return State, NodeList and JobName of each job that SLURM knows.

    A job array `7_[2-3]` stands for the jobs `7_2` and `7_3`. Without SLURM's accounting, ended
    jobs are not known. Raises UserError when SLURM does not answer.
    """
    arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    if len(arrays) > _MAX_ARGUMENT:
        raise UserError(f"jobs: {len(job_ids)} are too many to ask SLURM about at once")
    columns = "JobID,State,NodeList,JobName"
    try:
        ended = _run("sacct", "-X", "--parsable2", "-o", columns, "-j", arrays)
        # sacct may report REQUEUED for a job that runs again, so squeue decides for live jobs.
        queued = _run("squeue", "-h", "-r", "-o", "%i|%T|%N|%j", "-j", arrays)
    except FileNotFoundError as error:
        raise UserError(
            f"no `{error.filename}` on this machine; ask on a login node of the cluster"
        ) from None
    if queued.returncode and "Invalid job id" not in queued.stderr:  # the answer for an old job
        raise UserError(f"squeue: {' '.join(queued.stderr.split())}")
    states: dict[str, dict[str, str]] = SlurmInfoWatcher().read_info(ended.stdout)
    return states | SlurmInfoWatcher().read_info(f"{columns.replace(',', '|')}\n{queued.stdout}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(statuses: Sequence[JobStatus]) -> str:
    """Return a table as text with aligned columns."""
    rows = [[printable(str(value)) for value in vars(status).values()] for status in statuses]
    rows.insert(0, [field.name for field in fields(JobStatus)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


@record
class _Length:
    """The fields of a training recipe that say how long the run is."""

    max_steps: PositiveInt
    global_batch_size: PositiveInt


def describe_progress(verb: str, run: str) -> str:
    """Describe the progress of a training run or an encoding in one line; "" for other verbs."""
    if verb == "encode":
        return f"{len(storage.list_names(storage.join(run, 'completed')))} shards"
    if verb == "study run" and storage.exists(storage.join(run, RECORD)):
        return "trained and evaluated"
    if verb not in ("train", "study run"):
        return ""
    rows = read_training_rows(run, newest=1)
    if not rows:
        return "no step yet"
    row = rows[-1]
    url = storage.join(run, "config.yaml")
    recipe = parse_yaml(storage.read_bytes(url), url)
    length = parse_value(_Length, recipe, url, ignore_unknown=True)
    seconds = (length.max_steps - row.step) * length.global_batch_size / row.samples_per_s
    checkpoint = shorten(latest_checkpoint(run) or "none")
    return (
        f"step {row.step}/{length.max_steps}, {row.samples_per_s:.1f} samples/s, "
        f"{timedelta(seconds=round(min(seconds, 1e9)))} left, checkpoint {checkpoint}"
    )
