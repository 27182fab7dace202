"""Which checkpoints of a run stay."""

from collections.abc import Collection
from dataclasses import dataclass

from ifvit.errors import UserError
from ifvit.evaluation.metrics import LOWER_IS_BETTER, Estimate, MetricsRow
from ifvit.evaluation.rows import FOLDER, main_series, read_rows
from ifvit.storage import join, list_names, read_json, remove
from ifvit.training.checkpoint import MANIFEST, is_committed, saved_steps, step_url


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The newest `last`, every step divisible by `every` (0: none), the best by `metric`."""

    last: int
    every: int = 0
    metric: str | None = None
    """Field of MetricsRow, looked up in the run's main evaluations (`main_series`)."""

    def __post_init__(self) -> None:
        """Refuse a metric that no evaluation has."""
        if self.metric is not None and self.metric not in MetricsRow.__dataclass_fields__:
            raise UserError(f"keep_best: evaluations have no number named {self.metric}")


def prune(run: str, retention: Retention) -> None:
    """Remove the checkpoints that need not stay, and all that interrupted saves have left."""
    steps = saved_steps(run)
    complete = [step for step in steps if is_committed(run, step)]
    best = _best_step(run, retention.metric, complete) if retention.metric else None
    kept = kept_steps(complete, retention, best)
    for step in steps:
        if step not in kept:
            # The manifest goes first: a half-removed checkpoint must not look complete.
            remove(join(step_url(run, step), MANIFEST))
            remove(step_url(run, step))
    _remove_leftovers(step_url(run, complete[-1]))


def kept_steps(complete: list[int], retention: Retention, best: int | None) -> set[int]:
    """Those of the rising `complete` steps that stay; never none."""
    kept = set(complete[-retention.last :])
    if retention.every:
        kept.update(step for step in complete if step % retention.every == 0)
    if best is not None:
        kept.add(best)
    return kept


def _best_step(run: str, metric: str, complete: Collection[int]) -> int | None:
    """The complete step whose evaluation has the best `metric`; the earliest of equals."""
    rows = main_series(list(read_rows(join(run, FOLDER)).values()))
    measured = {row.step: getattr(row, metric) for row in rows if row.step in complete}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scores = [
        (sign * estimate.value, step)
        for step, estimate in measured.items()
        if isinstance(estimate, Estimate)
    ]
    return min(scores)[1] if scores else None


def _remove_leftovers(url: str) -> None:
    """Remove the parts that an attempt before the one that finished has left in its folder."""
    named = {MANIFEST, *(part["name"] for part in read_json(join(url, MANIFEST))["parts"])}
    for name in set(list_names(url)) - named:
        remove(join(url, name))
