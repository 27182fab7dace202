"""metrics.jsonl, TensorBoard and the progress line."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ifvit.storage import write_bytes
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport
from ifvit.training.state import TrainState


class MetricsLog:
    """One row every `every` steps; a resumed run drops the rows it is about to repeat."""

    def __init__(self, config: TrainConfig, engine: Engine, flops_per_sample: float) -> None:
        self.every = config.log_every
        self._config = config
        self._path = Path(config.run, "metrics.jsonl")
        self._engine = engine
        self._flops_per_sample = flops_per_sample

    @contextmanager
    def open(self, state: TrainState) -> Iterator[None]:
        """Around the loop: open the files at the step where training starts or goes on."""
        self._last = state
        if not self._engine.world.is_main:
            yield
            return
        self._drop_rows_after(state.step)
        folder = str(self._path.parent / "tensorboard")
        with (
            tqdm(
                total=self._config.max_steps,
                initial=state.step,
                desc=f"train {self._config.run}",
                unit="step",
            ) as self._bar,
            SummaryWriter(folder, purge_step=state.step + 1) as self._board,
        ):
            yield

    def _drop_rows_after(self, step: int) -> None:
        rows = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
        write_bytes(str(self._path), "".join(f"{row}\n" for row in kept).encode())

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Write the step's row; raises FloatingPointError when the loss is not finite."""
        loss = self._engine.mean(report.loss).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {state.step}: the loss is {loss}")
        row = self._row(state, report, loss)
        self._last = state
        if not self._engine.world.is_main:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "step":
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
