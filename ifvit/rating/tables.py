"""Answers as arrays, and what is said of both kinds of question alike."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.rating.statistics import Floats
from ifvit.rating.store import Answer
from ifvit.rating.study import Kind, Study

_Unit = TypeVar("_Unit", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Replies:
    """How questions of one kind were replied to, repeats included.

    `skips` are numbers of skips by reason. `consistency` is about the `num_repeats` questions that
    one rater answered twice: share of equal numbers, or of pairs of images ranked alike; None
    without any.
    """

    num_shown: int
    skips: dict[str, int]
    num_repeats: int
    consistency: float | None

    @property
    def num_skipped(self) -> int:
        """Skips for whatever reason."""
        return sum(self.skips.values())


def split_answers(
    study: Study,
    answers: Sequence[Answer],
    kind: Kind,
    alike: Callable[[Answer, Answer], float],
) -> tuple[Replies, list[Answer]]:
    """The replies to one kind of question, and the first answer to each, skips included."""
    all_of_kind = [answer for answer in answers if study.items[answer.item].kind == kind]
    first = [answer for answer in all_of_kind if answer.repetition == 0]
    given = {(a.rater, a.item): a for a in first if a.value is not None}
    again = [a for a in all_of_kind if a.repetition == 1 and a.value is not None]
    consistency = [alike(given[a.rater, a.item], a) for a in again if (a.rater, a.item) in given]
    replies = Replies(
        num_shown=len(all_of_kind),
        skips=dict(Counter(a.skip_reason for a in all_of_kind if a.skip_reason).most_common()),
        num_repeats=len(consistency),
        consistency=float(np.mean(consistency)) if consistency else None,
    )
    return replies, first


def tabulate(rows: Mapping[tuple[int, _Unit], Sequence[float]]) -> Floats:
    """Rows of C numbers by (rater, unit) => (R, I, C), NaN where there is none."""
    raters = {rater: place for place, rater in enumerate({rater: 0 for rater, _ in rows})}
    units = {unit: place for place, unit in enumerate({unit: 0 for _, unit in rows})}
    num_columns = len(next(iter(rows.values())))
    table = np.full((len(raters), len(units), num_columns), np.nan)
    for (rater, unit), row in rows.items():
        table[raters[rater], units[unit]] = row
    return table


def by_name(names: Sequence[str], estimates: Sequence[Estimate | None]) -> dict[str, Estimate]:
    """The estimates that there are, by the names of their columns."""
    return {name: found for name, found in zip(names, estimates, strict=True) if found}
