"""Rows of RUN/metrics.jsonl: what training logged about itself.

`ifvit train` writes them; reports, studies and the status of jobs read them. Each row carries a
seal (see `ifvit.records`).
"""

from itertools import pairwise

from ifvit import storage
from ifvit.errors import UserError
from ifvit.records import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    parse_rows,
    record,
)

FILE = "metrics.jsonl"
"""Name of the file in a run directory."""
_MAX_BYTES = 1 << 30
"""Largest file that is read; a million rows take 0.9 GB."""


@record
class TrainingRow:
    """Training between the row before and this one; None: not measured, or not a finite number.

    `loss`, `loss_q0` to `loss_q3` (by quarter of the timesteps, the cleanest first) and all speeds
    are means over these steps; `learning_rate` and `grad_norm` are those of the last step; counts
    and `seconds` include all steps of the run. `PHASE_seconds` are seconds per step.
    """

    step: PositiveInt
    samples_seen: NonNegativeInt
    loss: NonNegativeFloat | None
    loss_q0: NonNegativeFloat | None = None
    loss_q1: NonNegativeFloat | None = None
    loss_q2: NonNegativeFloat | None = None
    loss_q3: NonNegativeFloat | None = None
    learning_rate: NonNegativeFloat
    grad_norm: NonNegativeFloat | None
    loss_spikes: NonNegativeInt = 0
    nonfinite_steps: NonNegativeInt = 0
    samples_per_s: PositiveFloat
    tokens_per_s: NonNegativeFloat | None = None
    data_wait: Fraction
    """Share of the time that was spent waiting for batches."""
    seconds: NonNegativeFloat
    data_seconds: NonNegativeFloat | None = None
    forward_seconds: NonNegativeFloat | None = None
    backward_seconds: NonNegativeFloat | None = None
    optimizer_seconds: NonNegativeFloat | None = None
    ema_seconds: NonNegativeFloat | None = None
    log_seconds: NonNegativeFloat | None = None
    checkpoint_seconds: NonNegativeFloat | None = None
    samples_seconds: NonNegativeFloat | None = None
    loss_scale: NonNegativeFloat | None = None
    overflows: NonNegativeInt | None = None
    mfu: NonNegativeFloat | None = None
    peak_memory: NonNegativeInt | None = None
    """Bytes."""
    device: str


def read_training_rows(run: str, newest: int | None = None) -> list[TrainingRow]:
    """Read the rows of a run, or only its `newest` ones; [] before the first row.

    An unfinished last line is left out. Raises UserError that names a damaged line, and when steps
    do not rise.
    """
    url = storage.join(run, FILE)
    data = storage.read_bytes(url, _MAX_BYTES) if storage.exists(url) else b""
    if newest is not None:
        complete, _, _ = data.rpartition(b"\n")
        data = b"\n".join([*complete.split(b"\n")[-newest:], b""])
    rows = parse_rows(TrainingRow, data, url)
    for before, row in pairwise(rows):
        if row.step <= before.step:
            raise UserError(f"{url}: step {row.step} follows step {before.step}; restore the file")
    return rows
