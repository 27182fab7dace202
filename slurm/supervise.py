"""Decides after the tasks of a job whether the job is requeued.

    python -m slurm.supervise FOLDER EXIT_CODE

is the last line of every sbatch script. Exit code 0 means that the work is done, 2 that the user
made a mistake. After any other exit code (75 for preemption and the time limit, 74 for a failed
object store, others for a crash) the job is requeued, unless several starts in a row saved no work.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise, takewhile
from pathlib import Path

from submitit.core.utils import JobPaths

from ifvit import storage
from ifvit.errors import EXIT_PREEMPTED, EXIT_STORE, UserError
from ifvit.records import NonNegativeFloat, dump_rows, printable, record
from slurm.jobs import VerbJob, load_job

HARDWARE_FAILURE = re.compile(
    r"uncorrectable ECC error|fallen off the bus|Unable to determine the device handle"
    r"|all CUDA-capable devices are busy or unavailable|no CUDA-capable device is detected"
    r"|Stale file handle"
)
"""Messages in the log of a task whose node has broken hardware."""
_LOG_BYTES = 1 << 20
"""Bytes at the end of a log that are searched; a log may be larger than the memory."""
TASK_START = "Starting with JobEnvironment("
"""The first line that submitit writes into a task's log at every start."""


@record
class Start:
    """The end of one start of a job; a line of FOLDER/JOBID_starts.jsonl."""

    ended: NonNegativeFloat
    """Seconds since the epoch."""
    exit_code: int
    nodes: str
    progress: str
    """`VerbJob.progress` at the end."""
    bad_nodes: tuple[str, ...]


def supervise(folder: Path, exit_code: int) -> int:
    """Requeue the job of this script, or print why not; return the exit code of the script."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends SIGTERM during the requeue
    if exit_code == 0:
        return 0
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job_id = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    job = load_job(folder, job_id)
    starts = read_starts(folder, job_id)
    crashed = exit_code not in (UserError.exit_code, EXIT_STORE, EXIT_PREEMPTED)
    start = Start(
        ended=time.time(),
        exit_code=exit_code,
        nodes=os.environ["SLURM_JOB_NODELIST"],
        progress=_progress(job, starts),
        bad_nodes=find_bad_nodes(folder, job_id) if crashed else (),
    )
    starts.append(start)
    with _starts_file(folder, job_id).open("ab") as file:
        file.write(dump_rows([start]))
    if reason := reason_to_stop(starts, job.cluster.max_stalled_starts):
        _print(f"job {job_id} is not requeued: {reason}")
        return exit_code
    if not _may_requeue(job_id):
        return exit_code
    _print(f"job {job_id} ended with exit code {exit_code} on {start.nodes}; requeued")
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    if bad_nodes := sorted({node for start in starts for node in start.bad_nodes}):
        _exclude(job_id, job.cluster.exclude, bad_nodes)
    return exit_code


def _starts_file(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_starts.jsonl"


def read_starts(folder: Path, job_id: str) -> list[Start]:
    """Read the starts of a job that have ended, oldest first."""
    path = _starts_file(folder, job_id)
    return storage.read_rows(Start, str(path)) if path.exists() else []


def reason_to_stop(starts: Sequence[Start], max_stalled: int) -> str | None:
    """Return why the job must not be requeued; None if it must be requeued."""
    exit_code = starts[-1].exit_code
    if exit_code == UserError.exit_code:
        return "the recipe has a mistake, see the line above that begins with `error:`"
    progress = ["", *(start.progress for start in starts)]
    is_equal = (after == before for after, before in pairwise(reversed(progress)))
    stalled = len(list(takewhile(bool, is_equal)))
    if stalled >= max_stalled:
        return f"{stalled} starts in a row saved no new work, the last with exit code {exit_code}"
    return None


def find_bad_nodes(folder: Path, job_id: str) -> tuple[str, ...]:
    """Return the nodes whose tasks reported broken hardware in the last start."""
    found = set()
    pattern = JobPaths(folder, job_id).stdout.name.replace("_0_log", "_*_log")
    for log in folder.glob(pattern):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            text = file.read(_LOG_BYTES).decode(errors="replace")
        last_start = text.rpartition(TASK_START)[2]
        host = re.search(r"hostname=([^,.]+)", last_start)
        if host and HARDWARE_FAILURE.search(last_start):
            found.add(host[1])
    return tuple(sorted(found))


def _progress(job: VerbJob, starts: Sequence[Start]) -> str:
    """Return the progress of the job; if the storage fails, the progress at the last start."""
    try:
        return job.progress()
    except Exception as error:
        _print(f"the progress of {job.run} cannot be read: {error}")
        return starts[-1].progress if starts else ""


def _may_requeue(job_id: str) -> bool:
    """Return False if the job was cancelled or SLURM itself requeues it."""
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id], check=True, capture_output=True, text=True
    ).stdout
    return "JobState=RUNNING" in shown or "Reason=TimeLimit" in shown


def _exclude(job_id: str, excluded: str | None, bad_nodes: Sequence[str]) -> None:
    """Exclude broken nodes from the requeued job; SLURM accepts it once the job is pending."""
    nodes = ",".join(filter(None, [excluded, *bad_nodes]))
    command = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"]
    for _ in range(20):
        if subprocess.run(command, check=False).returncode == 0:
            _print(f"job {job_id} will avoid {nodes}: its log reports broken hardware there")
            return
        time.sleep(0.2)


def _print(text: str) -> None:
    sys.stdout.write(f"ifvit: {printable(text)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2])))
    except UserError as error:
        _print(f"the job is not requeued: {error}")
        sys.exit(int(sys.argv[2]))
