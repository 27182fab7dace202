"""Which checkpoints of a run are kept, and the removal of the others.

Only files and folders of the names that training writes are removed.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.estimates import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows
from ifvit.storage import is_remote, join, list_names
from ifvit.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    is_committed,
    is_part_name,
    saved_steps,
    step_url,
)
from ifvit.training.config import TrainConfig


def check_retention(config: TrainConfig) -> None:
    """Raise UserError when no evaluation has the metric `keep_best`."""
    if config.keep_best is not None and config.keep_best not in MetricsRow.__dataclass_fields__:
        raise UserError(
            f"keep_best: evaluations have no metric named {config.keep_best}; "
            "use for example frechet_distance or clip_score"
        )


def prune_checkpoints(config: TrainConfig, saved: Checkpoint) -> None:
    """Remove the checkpoints that need not be kept, and the leftovers of interrupted saves.

    `saved` is the checkpoint that was committed last. Later ones are damaged, because the run did
    not continue from them; they stay until the run has reached their steps.
    """
    run = config.run
    steps = [step for step in saved_steps(run) if step <= saved.state.step]
    committed = [step for step in steps if is_committed(run, step)]
    kept = set(committed[-config.keep_checkpoints :])
    if config.keep_every:
        kept.update(step for step in committed if step % config.keep_every == 0)
    if config.keep_best:
        kept.update(_steps_by_metric(run, config.keep_best, committed)[:1])
    for step in set(steps) - kept:
        # The manifest goes first: a half-removed checkpoint must not look complete.
        storage.remove(join(step_url(run, step), MANIFEST))
        _remove_files(step_url(run, step), ())
    # An earlier attempt at the same step may have left other parts.
    _remove_files(saved.url, [MANIFEST, *(part.name for part in saved.parts)])


def _remove_files(url: str, kept: Sequence[str]) -> None:
    """Remove the files of a checkpoint, except those `kept`, and the folder if it is then empty."""
    for name in set(list_names(url)) - set(kept):
        # A process that was killed while it wrote NAME has left .NAME.XXXXXXXX.
        written = re.sub(r"^\.(.+)\.\w{8}$", r"\1", name)
        if written == MANIFEST or is_part_name(written):
            storage.remove(join(url, name))
    if not is_remote(url):
        with suppress(OSError):
            Path(url).rmdir()


def _steps_by_metric(run: str, metric: str, steps: Sequence[int]) -> list[int]:
    """Those of `steps` whose evaluation has this metric, the best first, the earlier of equals."""
    rows = main_series(list(read_rows(join(run, FOLDER)).values()))
    measured = [(getattr(row, metric), row.step) for row in rows if row.step in steps]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scores = [(sign * value.value, step) for value, step in measured if isinstance(value, Estimate)]
    return [step for _, step in sorted(scores)]
