"""Processes of their own for runs and other jobs: what kills one of them stops no other.

`study run`, the demo and `ifvit bench quality` start their processes here. They die with the
process that started them.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from ifvit.errors import UserError
from ifvit.records import printable, shorten

_GRACE_SECONDS = 20.0
"""Time that processes have to save their work after SIGTERM."""
_LOG_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call that gets a process of its own."""

    name: str
    call: Callable[[], object]
    """A `functools.partial` of a function of a module."""
    log: Path
    """File to which the process appends what it prints."""
    after: str | None = None
    """Name of a job that must have succeeded before this one starts."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Some time has passed, or a job has ended."""

    running: Sequence[Job]
    ended: Job | None = None
    error: str | None = None
    """Why the job that has ended failed; None if it did not."""


class JobProcesses:
    """Runs as many jobs at once as the machine carries.

    By default that is one per GPU, or without a GPU one per core. A process sees one GPU and
    shares the cores equally with the others. Without a GPU they are forked from a process that has
    imported `modules`, which takes seconds.
    """

    def __init__(self, number: int | None, modules: Sequence[str]) -> None:
        self._gpus = _list_gpus()
        # A process that is forked may not use a GPU that the imported modules have asked for.
        self._context = get_context("spawn") if self._gpus else get_context("forkserver")
        self._context.set_forkserver_preload(["torch", *modules])
        num_cores = os.cpu_count() or 1
        self.number = number or len(self._gpus) or num_cores
        self._threads = max(1, num_cores // self.number)

    def run(
        self, jobs: Sequence[Job], seconds: float | None = None
    ) -> Generator[Event, None, None]:
        """Run all jobs, in order; yield an event for each job that ends, and every `seconds`.

        When the iterator is closed, all processes get SIGTERM, and those that go on SIGKILL.
        """
        waiting, failed = list(jobs), set[str]()
        running: dict[BaseProcess, Job] = {}
        places: dict[int, BaseProcess | None] = dict.fromkeys(range(self.number))
        try:
            while waiting or running:
                unfinished = {job.name for job in (*waiting, *running.values())}
                for place in [n for n, process in places.items() if process is None]:
                    job = next((job for job in waiting if job.after not in unfinished), None)
                    if job is None:
                        break
                    waiting.remove(job)
                    if job.after in failed:
                        failed.add(job.name)
                        error = f"not started, because {job.after} failed"
                        yield Event(running=[*running.values()], ended=job, error=error)
                        continue
                    started = places[place] = self._start(job, place)
                    running[started] = job
                wait([process.sentinel for process in running], timeout=seconds)
                yield Event(running=[*running.values()])
                for place, process in places.items():
                    if process is None or process.is_alive():
                        continue
                    job, places[place] = running.pop(process), None
                    failure = _explain(process.exitcode, job.log)
                    failed |= {job.name} if failure else set()
                    yield Event(running=[*running.values()], ended=job, error=failure)
        finally:
            _end([*running])

    def _start(self, job: Job, place: int) -> BaseProcess:
        gpu = self._gpus[place % len(self._gpus)] if self._gpus else None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(
            target=_work, args=(job.call, str(job.log), self._threads, gpu), name=job.name
        )
        process.start()
        return process


def _list_gpus() -> list[str]:
    """Return the names of the visible GPUs for CUDA_VISIBLE_DEVICES."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return names[:count] if names != [""] else [str(number) for number in range(count)]


def _explain(exit_code: int | None, log: Path) -> str | None:
    """Return why a process failed, in words that its log ends with; None if it did not."""
    if not exit_code:
        return None
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    lines = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"exit code {exit_code}, {shorten(last.removeprefix('error: '), 300)}"


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _work(call: Callable[[], object], log: str, threads: int, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # torch has not asked for the GPUs yet
    _start_worker(threads, log)
    try:
        call()
    except UserError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        sys.exit(error.exit_code)


def worker_processes(number: int, threads: int, log: str | None = None) -> ProcessPoolExecutor:
    """Open a pool of processes with `threads` threads each, for calls that return a value.

    Steps of so small a model last milliseconds. Two threads would spend much of that waiting for
    each other; two processes do not wait. With `log` what the processes print goes to this file.
    """
    return ProcessPoolExecutor(
        number, get_context("spawn"), initializer=_start_worker, initargs=(threads, log)
    )


def _start_worker(threads: int, log: str | None) -> None:
    if log is not None:
        with Path(log).open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(threads)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent dies; the workers of a killed study would go on training otherwise."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
