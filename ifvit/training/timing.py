"""Where the time of a training step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


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
