"""Where the time of a training step goes: phases, traces, and what the device can do."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import profile, record_function, schedule

from ifvit.distributed import World
from ifvit.storage import join, write_file

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}
"""Dense bf16 tensor-core FLOP/s from the vendors' data sheets, by a part of the device's name."""


def device_name(device: torch.device) -> str:
    """The GPU's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one such device, None where unknown."""
    name = device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most, on its GPU or in its whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseTimer:
    """Seconds of each phase of a step, on the device's clock and without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around work of the device; a phase may come often in a step."""
        with record_function(name):
            if not self._on_cuda:
                with self.host_phase(name):
                    yield
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))

    @contextmanager
    def host_phase(self, name: str) -> Iterator[None]:
        """Around what the host waits for, such as data or a checkpoint."""
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; the device must be synchronised."""
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, defaultdict(float), []
        return dict(seconds)


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
