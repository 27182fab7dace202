"""Which checkpoints and exported weights of a run are kept, and the removal of the others.

Only files and folders of the names that training writes are removed.
"""

import re
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ifvit import storage
from ifvit.connections import StoreError, is_remote
from ifvit.errors import UserError
from ifvit.evaluation.estimates import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows
from ifvit.models.weights import (
    WeightsInfo,
    read_stored_weights,
    remove_weights,
    step_name,
)
from ifvit.storage import join, list_names
from ifvit.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    is_committed,
    is_part_name,
    saved_steps,
    step_folders,
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
    _remove_empty(url)


def prune_exports(config: TrainConfig, kinds: Set[str], info: WeightsInfo) -> None:
    """Remove the exported weights that need not be kept; `info` describes those exported last.

    Only weights whose weights.json names this step and this run's encoders and scaling are removed.
    """
    folder = join(config.run, "weights")
    steps = [step for step in step_folders(folder) if step <= info.step]
    kept = {*steps[-config.keep_exports :]}
    if config.keep_best:
        kept.update(_steps_by_metric(config.run, config.keep_best, steps)[:1])
    for step in set(steps) - kept:
        url = join(folder, step_name(step))
        for kind in kinds & set(list_names(url)):
            if _is_own_export(join(url, kind), replace(info, step=step)):
                remove_weights(join(url, kind))
                _remove_empty(join(url, kind))
        _remove_empty(url)


def _is_own_export(url: str, info: WeightsInfo) -> bool:
    """Whether weights.json in folder `url` says what `info` does, apart from decay and recipe."""
    try:
        stored = read_stored_weights(url).info
    except StoreError:
        raise
    except UserError:
        return False
    own = replace(info, ema_decay=stored.ema_decay, recipe_sha256=stored.recipe_sha256)
    return stored == own


def _remove_empty(url: str) -> None:
    """Remove a local folder that is empty; an object store has no empty folders."""
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
