"""A row of metrics.jsonl, as training would write it."""

from typing import Any

from ifvit.evaluation.rows import TrainingRow


def made_training_row(step: int, **fields: Any) -> TrainingRow:
    """Row of a run with 64 samples a step; `fields` replace the made-up values."""
    values: dict[str, Any] = {
        "samples_seen": 64 * step,
        "loss": 1 / step,
        "grad_norm": 1.0,
        "learning_rate": 2e-4,
        "samples_per_s": 400.0,
        "data_wait": 0.01,
        "seconds": step / 8,
        "device": "cpu",
    }
    return TrainingRow(step=step, **{**values, **fields})
