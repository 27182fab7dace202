"""Recipes of jobs that take seconds, and functions that wait for jobs and inspect them."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ifvit.evaluation.rows import read_training_rows
from slurm.config import LogsConfig
from slurm.jobs import VerbJob
from slurm.status import JobStatus, find_log, read_statuses

Command = Callable[[str, str], None]
PATIENCE = 600.0
"""Seconds after which a job counts as stuck."""
NUM_IMAGES = 48
BACKBONE = {
    "latent_size": 8,
    "patch_size": 2,
    "width": 32,
    "num_heads": 2,
    "context_length": 16,
    "context_width": 64,
    "fusion": "2*concat",
}


SAMPLING = {"num_steps": 2, "guidance_scale": 1.5}
PROTOCOL = {
    "name": "small",
    "num_samples": 4,
    "clip": "scenes/clip",
    "paper_prefix": "",
    "scenes": True,
    "sampling": SAMPLING,
}


def encoding(images: Path, output: str) -> dict[str, object]:
    """Recipe of the encode job: 48 scenes in four shards."""
    return {
        "images": str(images / "train2014"),
        "captions": str(images / "annotations" / "captions_train2014.json"),
        "output": output,
        "vae": "scenes/vae",
        "text_encoder": "scenes/clip",
        "image_size": 64,
        "samples_per_shard": NUM_IMAGES // 4,
        "num_workers": 1,
    }


def training(run: str, shards: str) -> dict[str, object]:
    """Recipe of a run of 240 small steps on CPUs."""
    return {
        "run": run,
        "shards": shards,
        "backbone": BACKBONE,
        "engine": {"backend": "plain"},
        "optim": {"warmup_steps": 10},
        "sample_grid": {"every": 0},
        "max_steps": 240,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 40,
        "num_workers": 1,
    }


def wait_until(is_true: Callable[[], Any], what: str) -> None:
    """Poll until `is_true()`; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.2)


def wait_for_jobs(home: str) -> list[JobStatus]:
    """Wait until all jobs of a run have ended; return their statuses. Each must have completed."""

    def has_ended() -> bool:
        statuses = read_statuses(home)
        return all(s.has_ended for s in statuses) or any(s.state == "FAILED" for s in statuses)

    wait_until(has_ended, f"the jobs of {home}")
    statuses = read_statuses(home)
    for status in statuses:
        if status.state != "COMPLETED":
            log = find_log(LogsConfig(run=home, job=status.job_id)).read_text()
            raise AssertionError(f"{status}\n{log[-5000:]}")
    return statuses


def read_losses(run: str) -> dict[int, float]:
    """Return the loss of every logged step."""
    return {row.step: row.loss for row in read_training_rows(run) if row.loss is not None}


def find_tasks(job_id: str) -> dict[int, int]:
    """Return rank => process id of a job's tasks; the virtual nodes are this machine."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" not in command or b"srun" in command[0]:
                continue
            pairs = (process / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue  # the process has ended
        variables = dict(pair.partition("=")[::2] for pair in pairs)
        ids = (variables.get(f"SLURM_{name}_ID", "") for name in ("ARRAY_JOB", "ARRAY_TASK", "JOB"))
        array, task, job = ids
        if job_id in (job, f"{array}_{task}") and "SLURM_STEP_ID" in variables:
            found[int(variables["SLURM_PROCID"])] = int(process.name)
    return found


class BrokenNodeJob(VerbJob):
    """Reports broken hardware on its first node, then succeeds; writes the names of both nodes."""

    def __call__(self) -> None:
        first, then = Path(self.run, "first"), Path(self.run, "then")
        if not first.exists():
            first.write_text(socket.gethostname())
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        then.write_text(socket.gethostname())
