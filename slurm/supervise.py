"""The last line of every sbatch script: the tasks have ended, shall the job be requeued?

    python -m slurm.supervise FOLDER EXIT_CODE

Exit code 0 is the end, 2 a user's mistake. Anything else, preemption and time limit (75) or a
crash, is requeued unless start after start saves nothing new.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from submitit.core.utils import JobPaths

from ifvit.errors import EXIT_PREEMPTED
from slurm.jobs import VerbJob, load_job

HARDWARE_FAILURE = re.compile(
    r"uncorrectable ECC error|fallen off the bus|Unable to determine the device handle"
    r"|all CUDA-capable devices are busy or unavailable|no CUDA-capable device is detected"
    r"|Stale file handle"
)
"""What a task prints when it is its node that is broken."""

TASK_START = "Starting with JobEnvironment("
"""What submitit writes first into a task's log, at every start."""

_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Start:
    """How one start of a job ended; a line of FOLDER/JOBID_starts.jsonl."""

    ended: float
    """Seconds since the epoch."""
    exit_code: int
    nodes: str
    progress: str
    """What `VerbJob.progress` said at the end."""
    bad_nodes: tuple[str, ...]


def starts_file(folder: Path, job_id: str) -> Path:
    """Where a job's starts are written down."""
    return folder / f"{job_id}_starts.jsonl"


def read_starts(folder: Path, job_id: str) -> list[Start]:
    """All ended starts of a job, oldest first."""
    path = starts_file(folder, job_id)
    lines = path.read_text().splitlines() if path.exists() else []
    return [Start(**json.loads(line)) for line in lines]


def reason_to_stop(starts: Sequence[Start], max_stalled: int) -> str | None:
    """Why the job must not be requeued after its last start; None: requeue it."""
    last = starts[-1]
    if last.exit_code == 2:
        return "the recipe is refused, see the line that begins with `error:` above"
    progress = ["", *(start.progress for start in starts)]
    stalled = 0
    while stalled < len(starts) and progress[-1 - stalled] == progress[-2 - stalled]:
        stalled += 1
    if stalled >= max_stalled:
        return f"{stalled} starts in a row saved nothing new, the last with exit {last.exit_code}"
    return None


def find_bad_nodes(folder: Path, job_id: str) -> tuple[str, ...]:
    """Nodes whose tasks, in their last start, reported broken hardware."""
    found = set()
    pattern = JobPaths(folder, job_id).stdout.name.replace("_0_log", "_*_log")
    for log in folder.glob(pattern):
        text = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        last_start = text.rpartition(TASK_START)[2]
        host = re.search(r"hostname=([^,.]+)", last_start)
        if host and HARDWARE_FAILURE.search(last_start):
            found.add(host[1])
    return tuple(sorted(found))


def supervise(folder: Path, exit_code: int) -> int:
    """Requeue the job of this batch script or say why not; returns the script's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes with the requeue, before all is done
    job_id = _own_job_id()
    if exit_code == 0:
        return 0
    job = load_job(folder, job_id)
    crashed = exit_code not in (2, EXIT_PREEMPTED)
    start = Start(
        ended=time.time(),
        exit_code=exit_code,
        nodes=os.environ["SLURM_JOB_NODELIST"],
        progress=_progress(job, read_starts(folder, job_id)),
        bad_nodes=find_bad_nodes(folder, job_id) if crashed else (),
    )
    with starts_file(folder, job_id).open("a") as file:
        file.write(json.dumps(asdict(start)) + "\n")
    starts = read_starts(folder, job_id)
    reason = reason_to_stop(starts, job.cluster.max_stalled_starts)
    if reason:
        _say(f"job {job_id} is not requeued: {reason}")
        return exit_code
    if not _may_requeue(job_id):
        return exit_code
    _say(f"job {job_id} ended with exit {exit_code} on {start.nodes}; requeued")
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    bad_nodes = sorted({node for start in starts for node in start.bad_nodes})
    if bad_nodes:
        _exclude(job_id, job.cluster.exclude, bad_nodes)
    return exit_code


def _own_job_id() -> str:
    """As submitit names it: `123`, or `123_4` in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def _progress(job: VerbJob, starts: Sequence[Start]) -> str:
    """What the job says; a store that does not answer counts as no progress, not as the end."""
    try:
        return job.progress()
    except Exception as error:
        _say(f"progress of {job.run} cannot be read now: {error}")
        return starts[-1].progress if starts else ""


def _may_requeue(job_id: str) -> bool:
    """Not when the job was cancelled, or when SLURM itself is requeueing it already."""
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id], check=True, capture_output=True, text=True
    ).stdout
    return "JobState=RUNNING" in shown or "Reason=TimeLimit" in shown


def _exclude(job_id: str, excluded: str | None, bad_nodes: Sequence[str]) -> None:
    """Keep the requeued job off broken nodes; SLURM accepts this only once the job is pending."""
    nodes = ",".join(filter(None, [excluded, *bad_nodes]))
    command = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}"]
    for _ in range(20):
        if subprocess.run(command, check=False).returncode == 0:
            _say(f"job {job_id} will avoid {nodes}: its log names broken hardware there")
            return
        time.sleep(0.2)


def _say(text: str) -> None:
    sys.stdout.write(f"ifvit: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2])))
