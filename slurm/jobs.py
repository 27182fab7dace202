"""What a job runs: one verb with one recipe, as a picklable callable."""

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.helpers import TorchDistributedEnvironment

from ifvit import storage
from ifvit.distributed import EXIT_PREEMPTED
from ifvit.errors import UserError
from slurm.cluster import ClusterConfig


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
            return str(len(storage.list_names(storage.join(self.run, "receipts"))))
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
