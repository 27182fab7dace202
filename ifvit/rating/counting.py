"""Numbers of objects that raters saw => errors against the prompts, as in the paper's Figure 5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.rating.forms import CANNOT_TELL
from ifvit.rating.statistics import Floats, agreement, estimate_columns
from ifvit.rating.store import Answer
from ifvit.rating.study import Item, Study
from ifvit.rating.tables import Replies, by_name, split_answers, tabulate


@dataclass(frozen=True, kw_only=True)
class CountGroup:
    """Counts on prompts for `object` and `count`, None for any, by model name.

    `average_error` and `match_ratio` are Eq. 9 and 10 of arXiv 2403.16530; n are the answers.
    """

    object: str | None
    count: int | None
    average_error: dict[str, Estimate]
    match_ratio: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class CountingResults:
    """Counts; of images asked about twice, the first answer.

    `groups` are all prompts together first, then each object, each count, each pair of both.
    `cannot_tell` is the share of images, by model name, in which raters could not count. `alpha`
    is Krippendorff's for interval data, over the images; None where not defined.
    """

    num_counts: int
    groups: list[CountGroup]
    cannot_tell: dict[str, Estimate]
    alpha: float | None
    replies: Replies


def summarise_counting(study: Study, answers: Sequence[Answer]) -> CountingResults | None:
    """None as long as there is no count."""
    replies, first = split_answers(study, answers, "counting", _same_number)
    counted = [answer for answer in first if isinstance(answer.value, int)]
    if not counted:
        return None
    names = [model.name for model in study.models if model.counting is not None]
    items, counts = _tabulate(study, names, {_key(a): _number(a) for a in counted})
    asked = np.array([item.count for item in items], np.float64)
    errors = np.abs(counts - asked[:, None])
    groups = (_count_group(names, items, errors, *wanted) for wanted in _wanted_groups(items))
    unclear = {_key(answer): float(answer.skip_reason == CANNOT_TELL) for answer in first}
    _, cannot_tell = _tabulate(study, names, unclear)
    return CountingResults(
        num_counts=len(counted),
        groups=list(groups),
        cannot_tell=by_name(names, estimate_columns(cannot_tell, is_share=True)),
        alpha=agreement(counts.reshape(len(counts), -1), "interval"),
        replies=replies,
    )


def _key(answer: Answer) -> tuple[int, int]:
    return answer.rater, answer.item


def _number(answer: Answer) -> float:
    assert isinstance(answer.value, int)
    return float(answer.value)


def _same_number(one: Answer, other: Answer) -> float:
    return float(one.value == other.value)


def _tabulate(
    study: Study, names: Sequence[str], values: Mapping[tuple[int, int], float]
) -> tuple[list[Item], Floats]:
    """Values by rater and item => (R, U, M), and an item of each of the U prompts.

    The M images of one prompt and noise stand together, because they are resampled together.
    """
    rows: dict[tuple[int, tuple[int, str]], list[float]] = {}
    items: dict[tuple[int, str], Item] = {}
    column = {blind: names.index(name) for blind, name in study.names.items() if name in names}
    for (rater, number), value in values.items():
        item = study.items[number]
        unit = item.position, item.prompt
        (blind,) = item.images
        rows.setdefault((rater, unit), [np.nan] * len(names))[column[blind]] = value
        items.setdefault(unit, item)
    return list(items.values()), tabulate(rows)


def _wanted_groups(items: Sequence[Item]) -> list[tuple[str | None, int | None]]:
    in_order = sorted(items, key=lambda item: item.number)
    objects = list(dict.fromkeys(item.object for item in in_order))
    counts = sorted({item.count for item in items if item.count is not None})
    asked = {(item.object, item.count) for item in items}
    pairs = (pair for pair in product(objects, counts) if pair in asked)
    return [(None, None), *((o, None) for o in objects), *((None, c) for c in counts), *pairs]


def _count_group(
    names: Sequence[str],
    items: Sequence[Item],
    errors: Floats,
    object_: str | None,
    count: int | None,
) -> CountGroup:
    belongs = [object_ in (None, item.object) and count in (None, item.count) for item in items]
    chosen = errors[:, belongs]
    matches = np.where(np.isnan(chosen), np.nan, chosen == 0)
    return CountGroup(
        object=object_,
        count=count,
        average_error=by_name(names, estimate_columns(chosen)),
        match_ratio=by_name(names, estimate_columns(matches, is_share=True)),
    )
