"""Stopping early: any process may ask, all of them stop after the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed

from ifvit.distributed import EXIT_PREEMPTED, World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(SystemExit):
    """A signal ended the run after a step, and what must be saved is saved.

    Exits with `EXIT_PREEMPTED`, or 130 after SIGINT, as shells expect.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(130 if number is signal.SIGINT else EXIT_PREEMPTED)
        self.message = (
            f"{number.name}: stopped after step {step}; run the same command again to go on"
        )


class StopRequest:
    """Notes signals and asks all processes at every step whether one of them has any.

    The question is asked when a step begins and answered when it ends, so that the exchange runs
    beside the step. It goes over gloo, which leaves the device alone.
    """

    def __init__(self, world: World) -> None:
        self._group = distributed.new_group(backend="gloo") if world.size > 1 else None
        self._noted = 0
        self._asked = torch.zeros((), dtype=torch.int32)
        self._exchange: distributed.Work | None = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Have all processes stop after this step or the next; callable from any thread."""
        self._noted = number

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note signals inside instead of dying from them.

        Programs started inside do not get them: SLURM and terminals send them to all processes,
        and a step that waits for a compiler that died of one fails, or never ends.
        """
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        ended = threading.Event()
        receiver = threading.Thread(target=ended.wait, name="signals", daemon=True)
        receiver.start()  # it takes the signals; this thread and all that it starts block them
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            ended.set()
            receiver.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self) -> None:
        """Begin to ask all processes."""
        self._asked.fill_(self._noted)
        if self._group is not None:
            self._exchange = distributed.all_reduce(
                self._asked, distributed.ReduceOp.MAX, self._group, async_op=True
            )

    def answer(self) -> signal.Signals | None:
        """The signal for which all processes stop now, the same on each of them."""
        if self._exchange is not None:
            self._exchange.wait()
        number = int(self._asked)
        return signal.Signals(number) if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(number)
