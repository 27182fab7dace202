"""metrics.jsonl, the trackers that repeat it, the progress line and the summary; a hook."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from tqdm import tqdm

from ifvit.arrays import Array
from ifvit.connections import is_remote
from ifvit.errors import UserError
from ifvit.evaluation.rows import TRAINING_FILE, TrainingRow, read_training_rows
from ifvit.models.cost import count_cost
from ifvit.records import dump_rows
from ifvit.storage import join, write_bytes
from ifvit.training.config import VALIDATION_LOSS, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport, TrainState
from ifvit.training.profiling import device_name, peak_flops, peak_memory

_LARGEST = 1e18
"""A value above this counts as infinite."""


class MetricsLog:
    """Writes one row every `log_every` steps; a resumed run drops the rows that it will repeat.

    A local file grows row by row. An object store cannot append, so `publish` replaces a remote
    file before each checkpoint: a run that resumes from the checkpoint has every row before it.
    """

    name = "log"
    on_stop = False

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self.every = config.log_every
        self._config, self._engine = config, engine
        self._url = join(config.run, TRAINING_FILE)
        self._rows: list[bytes] = []
        self._row: TrainingRow | None = None
        self._validation: dict[str, float | None] = {}
        """Numbers of the last validation, for the row of its step."""
        self.validation_losses: dict[int, float] = {}
        """The held-out losses so far by step, on the main process."""

    @contextmanager
    def open(self, state: TrainState) -> Iterator[None]:
        """Open file, trackers and progress line at the step where training starts or resumes.

        Raises UserError when a tracker of the recipe is not installed.
        """
        self._last = state
        if not self._engine.world.is_main:
            yield
            return
        self._keep_rows_until(state.step)
        self._trackers = _open_trackers(self._config, state)
        try:
            with tqdm(
                total=self._config.max_steps,
                initial=state.step,
                desc=f"train {self._config.run}",
                unit="step",
                mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file keeps every line
            ) as self._bar:
                yield
        finally:
            for tracker in self._trackers:
                tracker.finish()
        self._summarise()

    def publish(self) -> None:
        """Make the rows so far durable; the thread that saves checkpoints calls this."""
        if is_remote(self._url):
            write_bytes(self._url, b"".join(list(self._rows)))
            return
        with Path(self._url).open() as file:
            os.fsync(file.fileno())

    def _keep_rows_until(self, step: int) -> None:
        rows = [row for row in read_training_rows(self._config.run) if row.step <= step]
        losses = {row.step: row.validation_loss for row in rows}
        self.validation_losses = {n: loss for n, loss in losses.items() if loss is not None}
        self._rows = [dump_rows([row]) for row in rows]
        write_bytes(self._url, b"".join(self._rows))

    def add_validation(self, step: int, losses: Array) -> None:
        """Add held-out losses (N, 8) of N samples at 8 timesteps to the row of this step."""
        mean = _finite(float(losses.mean(axis=1).mean()))
        by_time = enumerate(losses.mean(axis=0).tolist())
        self._validation = {f"{VALIDATION_LOSS}_t{k}": _finite(loss) for k, loss in by_time}
        self._validation[VALIDATION_LOSS] = mean
        if mean is not None:
            self.validation_losses[step] = mean

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Write the row of this step."""
        self._row = self._build_row(state, report)
        self._last, self._validation = state, {}
        if not self._engine.world.is_main:
            return
        self._rows.append(dump_rows([self._row]))
        if not is_remote(self._url):
            with Path(self._url).open("ab") as file:
                file.write(self._rows[-1])
        values = asdict(self._row).items()
        numbers = {key: value for key, value in values if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=state.step)
        shown = {"loss": state.since_log.mean, **self._last_validation()}
        self._bar.set_postfix({k: f"{loss:.4f}" for k, loss in shown.items()}, refresh=False)
        self._bar.update(state.step - self._bar.n)

    def _build_row(self, state: TrainState, report: StepReport) -> TrainingRow:
        engine, last = self._engine, self._last
        num_steps, seconds = state.step - last.step, state.seconds - last.seconds
        rate = (state.samples_seen - last.samples_seen) / seconds
        peak, scale = peak_flops(engine.device), engine.loss_scale
        # A backward pass costs two forward passes.
        flops = 3 * count_cost(self._config.backbone).flops * rate / engine.world.size
        totals = engine.timer.take()
        return TrainingRow(
            step=state.step,
            samples_seen=state.samples_seen,
            loss=_finite(state.since_log.mean),
            **{f"loss_q{n}": _finite(loss) for n, loss in enumerate(state.since_log.mean_by_time)},
            representation_loss=_finite(state.since_log.mean_representation),
            learning_rate=report.learning_rate,
            grad_norm=_finite(report.grad_norm),
            nonfinite_steps=state.nonfinite_steps,
            samples_per_s=rate,
            tokens_per_s=rate * self._config.backbone.num_tokens,
            data_wait=min(1.0, (state.data_wait - last.data_wait) / seconds),
            seconds=state.seconds,
            **self._validation,
            **{f"{phase}_seconds": total / num_steps for phase, total in totals.items()},
            loss_scale=None if scale is None else scale.value,
            overflows=None if scale is None else scale.overflows,
            mfu=None if peak is None else flops / peak,
            peak_memory=peak_memory(engine.device),
            device=device_name(engine.device),
        )

    def _last_validation(self) -> dict[str, float]:
        """The newest held-out loss, named for the progress line; empty before the first one."""
        losses = list(self.validation_losses.values())
        return {"validation": losses[-1]} if losses else {}

    def _summarise(self) -> None:
        state, row = self._last, self._row
        if row is None:
            if state.step == self._config.max_steps:
                end = f"complete at step {state.step}; raise max_steps to continue"
                sys.stderr.write(f"{self._config.run}: {end}\n")
            return
        facts = [
            f"step {state.step} in {state.seconds:.0f} s",
            f"loss {math.nan if row.loss is None else row.loss:.4f}",
            *(f"validation loss {loss:.4f}" for loss in self._last_validation().values()),
            f"{row.samples_per_s:.1f} samples/s",
            f"data wait {row.data_wait:.1%}",
            *([f"MFU {row.mfu:.1%}"] if row.mfu is not None else []),
            f"peak memory {peak_memory(self._engine.device) / 1e9:.2f} GB on {row.device}",
            f"{state.nonfinite_steps} skipped steps",
        ]
        sys.stderr.write(f"{self._config.run}: {', '.join(facts)}\n")


def _finite(value: float) -> float | None:
    """`value`, or None where JSON has no such number."""
    return value if value < _LARGEST else None


def _open_trackers(config: TrainConfig, state: TrainState) -> list[GeneralTracker]:
    trackers: list[GeneralTracker] = []
    # TensorBoard appends to its event files, which an object store cannot do.
    if "tensorboard" in config.trackers and not is_remote(config.run):
        trackers.append(TensorBoardTracker("tensorboard", config.run, purge_step=state.step + 1))
    if "wandb" in config.trackers:
        name = config.run.rstrip("/").replace("/", "-")
        trackers.append(WandBTracker("ifvit", name=name, id=name, resume="allow"))
    try:
        for tracker in trackers:
            tracker.start()
    except ImportError as error:
        raise UserError(
            f"trackers: {error.name} is not installed; install it with pip install {error.name}"
        ) from None
    return trackers
