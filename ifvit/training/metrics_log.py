"""metrics.jsonl, TensorBoard and the progress line."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ifvit.storage import exists, is_remote, join, read_bytes, write_bytes
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport
from ifvit.training.state import TrainState


class MetricsLog:
    """One row every `every` steps; a resumed run drops the rows it is about to repeat.

    A local file grows row by row. An object cannot, so a remote one is replaced whole by
    `publish`, before each checkpoint: a run that goes on from it has every row up to there.
    """

    def __init__(self, config: TrainConfig, engine: Engine, flops_per_sample: float) -> None:
        self.every = config.log_every
        self._config = config
        self._url = join(config.run, "metrics.jsonl")
        self._rows: list[str] = []
        self._engine = engine
        self._flops_per_sample = flops_per_sample

    @contextmanager
    def open(self, state: TrainState) -> Iterator[None]:
        """Around the loop: open the files at the step where training starts or goes on."""
        self._last = state
        if not self._engine.world.is_main:
            yield
            return
        self._keep_rows_until(state.step)
        with (
            tqdm(
                total=self._config.max_steps,
                initial=state.step,
                desc=f"train {self._config.run}",
                unit="step",
            ) as self._bar,
            self._open_board(state.step) as self._board,
        ):
            yield

    def publish(self) -> None:
        """Make the rows so far survive whatever happens to this machine, even beside training."""
        if is_remote(self._url):
            write_bytes(self._url, "".join(list(self._rows)).encode())
            return
        with Path(self._url).open() as file:
            os.fsync(file.fileno())

    def _keep_rows_until(self, step: int) -> None:
        rows = read_bytes(self._url).decode().splitlines() if exists(self._url) else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
        self._rows = [f"{row}\n" for row in kept]
        write_bytes(self._url, "".join(self._rows).encode())

    def _open_board(self, step: int) -> AbstractContextManager[SummaryWriter | None]:
        """TensorBoard's event files, which only grow, so that an object store cannot hold them."""
        if is_remote(self._url):
            return nullcontext()
        return SummaryWriter(join(self._config.run, "tensorboard"), purge_step=step + 1)

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Write the step's row; raises FloatingPointError when the loss is not finite."""
        loss = self._engine.mean(report.loss).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {state.step}: the loss is {loss}")
        row = self._row(state, report, loss)
        self._last = state
        if not self._engine.world.is_main:
            return
        self._rows.append(json.dumps(row) + "\n")
        if not is_remote(self._url):
            with Path(self._url).open("a") as file:
                file.write(self._rows[-1])
        for key, value in row.items():
            if key != "step" and self._board is not None:
                self._board.add_scalar(key, value, state.step)
        self._bar.update(state.step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.4f}")

    def _row(self, state: TrainState, report: StepReport, loss: float) -> dict[str, float]:
        seconds = state.seconds - self._last.seconds
        rate = (state.samples_seen - self._last.samples_seen) / seconds
        row = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "loss": loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm.item(),
            "samples_per_s": rate,
            "data_wait": (state.data_wait - self._last.data_wait) / seconds,
            "seconds": state.seconds,
        }
        if self._engine.peak_flops is not None:
            # Three forwards' worth of arithmetic: one forward, two for the backward.
            row["mfu"] = 3 * self._flops_per_sample * rate / self._engine.peak_flops
        return row
