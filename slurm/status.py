"""`ifvit submit status | logs | cancel`: from the run directory to its jobs."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import cast

import yaml
from submitit.core.utils import JobPaths
from submitit.slurm.slurm import SlurmInfoWatcher

from ifvit import storage
from ifvit.errors import UserError
from slurm.config import CancelConfig, LogsConfig, StatusConfig
from slurm.jobs import JobRecord, SubmissionRecord, read_records
from slurm.supervise import TASK_START


def describe_progress(verb: str, run: str) -> str:
    """One short line for people; empty for verbs that leave no trace on the way."""
    if verb == "train":
        return _describe_training(run)
    if verb == "encode":
        done = len(storage.list_names(storage.join(run, "completed")))
        return f"{done} shards"
    return ""


def _describe_training(run: str) -> str:
    row = _last_row(run)
    if row is None:
        return "no step yet"
    recipe = yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml")))
    step, total = int(row["step"]), int(recipe["max_steps"])
    seconds = (total - step) * recipe["global_batch_size"] / row["samples_per_s"]
    latest = storage.join(run, "checkpoints", "latest")
    checkpoint = storage.read_bytes(latest).decode().strip() if storage.exists(latest) else "none"
    return (
        f"step {step}/{total}, {row['samples_per_s']:.1f} samples/s, "
        f"{timedelta(seconds=round(seconds))} left, checkpoint {checkpoint}"
    )


def _last_row(run: str) -> dict[str, float] | None:
    """The newest row of metrics.jsonl; None before the first."""
    url = storage.join(run, "metrics.jsonl")
    lines = storage.read_bytes(url).decode().splitlines() if storage.exists(url) else []
    whole = [line for line in lines[-2:] if line.endswith("}")]  # the last may be half written
    return cast(dict[str, float], json.loads(whole[-1])) if whole else None


ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("NODE_FAIL", "PREEMPTED", "REVOKED", "UNKNOWN"),
)
"""States of jobs that are over; one that is requeued stands in the queue, whose word counts."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """One line of the table."""

    job_id: str
    verb: str
    state: str
    """As SLURM says it; UNKNOWN for a job that it does not know any more."""
    nodes: str
    requeues: int
    run: str
    progress: str
    """Step, speed, time left and newest checkpoint of a run; shards of a dataset."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state.startswith(ENDED)


def status(config: StatusConfig) -> None:
    """Print the state of all jobs of a run; with `follow` until the last has ended."""
    while True:
        statuses = collect(config.run)
        rows = [asdict(status) for status in statuses]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n" if config.json else table(statuses))
        sys.stdout.flush()
        if not config.follow or all(status.has_ended for status in statuses):
            return
        time.sleep(config.every)


def collect(home: str) -> list[JobStatus]:
    """The state of every job that was submitted for `home`, oldest first."""
    submissions = [record for record in read_records(home) if record.executor == "slurm"]
    jobs = [(record, job) for record in submissions for job in record.jobs]
    known = ask_slurm([job.job_id for _, job in jobs]) if jobs else {}
    places = {(job.verb, job.run) for _, job in jobs}
    progress = {place: describe_progress(*place) for place in places}
    return [
        JobStatus(
            job_id=job.job_id,
            verb=job.verb,
            state=known.get(job.job_id, {}).get("State", "UNKNOWN"),
            nodes=known.get(job.job_id, {}).get("NodeList", ""),
            requeues=_count_requeues(record, job),
            run=job.run,
            progress=progress[job.verb, job.run],
        )
        for record, job in jobs
    ]


def ask_slurm(job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """State and NodeList of each job that SLURM knows. Raises UserError where it cannot be asked.

    Without accounting, jobs that are over are not known.
    """
    arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    try:
        ended = _run("sacct", "-X", "--parsable2", "-o", "JobID,State,NodeList", "-j", arrays)
        # For jobs that are not over, since sacct may say REQUEUED of one that runs again.
        queued = _run("squeue", "-h", "-r", "-o", "%i|%T|%N", "-j", arrays)
    except FileNotFoundError as error:
        raise UserError(
            f"no `{error.filename}` on this machine; ask on a login node of the cluster"
        ) from None
    if queued.returncode and "Invalid job id" not in queued.stderr:  # as it says of one long over
        raise UserError(f"squeue: {' '.join(queued.stderr.split())}")
    return parse_slurm(ended.stdout, queued.stdout)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def parse_slurm(ended: str, queued: str) -> dict[str, dict[str, str]]:
    """`JobID|State|NodeList` lines by job id; `7_[2-3]`, which wait together, become two."""
    return SlurmInfoWatcher().read_info(ended) | SlurmInfoWatcher().read_info(
        f"JobID|State|NodeList\n{queued}"
    )


def table(statuses: Sequence[JobStatus]) -> str:
    """The statuses as aligned text with a heading."""
    rows = [[str(value) for value in vars(status).values()] for status in statuses]
    rows.insert(0, [field.name for field in fields(JobStatus)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def logs(config: LogsConfig) -> None:
    """Print the end of a task's log. Raises UserError when there is none yet."""
    path = find_log(config)
    follow = ["-F"] if config.follow else []
    sys.stdout.write(f"==> {path} <==\n")
    sys.stdout.flush()
    # Its reader may leave early.
    subprocess.run(["tail", "-n", str(config.lines), *follow, str(path)], check=False)


def find_log(config: LogsConfig) -> Path:
    """The log of the job that was asked for, or of the newest job that has one."""
    for record in reversed(read_records(config.run)):
        for job in reversed(record.jobs):
            path = JobPaths(record.folder, job.job_id, config.task).stdout
            if config.job in (None, job.job_id) and path.exists():
                return path
    raise UserError(f"{config.run}: no log of job {config.job or 'any'} yet; is it still waiting?")


def cancel(config: CancelConfig) -> None:
    """Cancel what has not ended; raises UserError where there is no SLURM."""
    jobs = [status.job_id for status in collect(config.run) if not status.has_ended]
    if jobs:
        subprocess.run(["scancel", *jobs], check=True)
    sys.stdout.write(f"cancelled: {' '.join(jobs) or 'nothing was left'}\n")


def _count_requeues(record: SubmissionRecord, job: JobRecord) -> int:
    """From the log of task 0, to which every start adds its first line."""
    path = JobPaths(record.folder, job.job_id).stdout
    starts = path.read_text(errors="replace").count(TASK_START) if path.exists() else 0
    return max(0, starts - 1)
