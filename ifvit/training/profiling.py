"""Where the time of a training step goes: phases, traces, and the peak rates of known devices."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.profiler import profile, record_function, schedule

from ifvit.storage import write_file

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}
"""Dense bf16 tensor-core FLOP/s from the vendors' data sheets, by a part of the device's name."""


def device_name(device: torch.device) -> str:
    """The model of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device; None when it is not in `PEAK_FLOPS`."""
    name = device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this process has held, on its GPU or else in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepTimer:
    """Seconds of each phase of a step, measured on the device without making the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._profiler: profile | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time work that runs on the device; a phase may occur several times in a step."""
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
        """Time what the host waits for, such as data or a checkpoint."""
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; the device must be synchronised."""
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, defaultdict(float), []
        return dict(seconds)

    @contextmanager
    def trace(self, url: str | None) -> Iterator[None]:
        """Trace three steps with torch's profiler and write the trace to `url`; None: no trace."""
        if url is None:
            yield
            return
        # Caches and compilers settle during the first steps.
        steps = schedule(wait=5, warmup=2, active=3, repeat=1)
        with profile(schedule=steps, on_trace_ready=partial(_write_trace, url)) as self._profiler:
            yield
        self._profiler = None

    def end_step(self) -> None:
        """Tell the profiler that a step has ended."""
        if self._profiler is not None:
            self._profiler.step()


def _write_trace(url: str, finished: profile) -> None:
    with write_file(url) as path:
        finished.export_chrome_trace(str(path))
