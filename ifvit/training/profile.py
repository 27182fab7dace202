"""A trace of a few steps by torch's profiler, for chrome://tracing or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import profile, schedule

from ifvit.distributed import World
from ifvit.storage import join, write_file

_SKIPPED, _WARMUP, _TRACED = 5, 2, 3


class StepProfiler:
    """Traces three steps of each process, after a few that let caches and compilers settle."""

    def __init__(self, run: str, world: World, *, enabled: bool) -> None:
        self._url = join(run, "profile", f"rank_{world.rank}.json")
        self._profiler = (
            profile(
                schedule=schedule(wait=_SKIPPED, warmup=_WARMUP, active=_TRACED, repeat=1),
                on_trace_ready=self._write,
            )
            if enabled
            else None
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around training."""
        if self._profiler is None:
            yield
            return
        with self._profiler:
            yield

    def step(self) -> None:
        """A step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, finished: profile) -> None:
        with write_file(self._url) as path:
            finished.export_chrome_trace(str(path))
