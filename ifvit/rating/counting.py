"""Numbers of objects that raters saw => errors against the prompts, as in the paper's Figure 5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.rating.forms import CANNOT_TELL
from ifvit.rating.statistics import agreement, estimate_columns
from ifvit.rating.store import Answer
from ifvit.rating.study import Item, Study
from ifvit.rating.tables import Replies, by_name, split_answers, tabulate

_Values = Mapping[tuple[int, int], float]
"""By rater and number of the item."""


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
    counts = {(a.rater, a.item): float(a.value) for a in first if isinstance(a.value, int)}
    if not counts:
        return None
    groups = (_count_group(study, counts, *wanted) for wanted in _wanted_groups(study))
    unclear = {(a.rater, a.item): float(a.skip_reason == CANNOT_TELL) for a in first}
    units = tabulate({key: [count] for key, count in counts.items()})[..., 0]
    return CountingResults(
        num_counts=len(counts),
        groups=[group for group in groups if group.average_error],
        cannot_tell=_by_model(study, unclear, is_share=True),
        alpha=agreement(units, "interval"),
        replies=replies,
    )


def _same_number(one: Answer, other: Answer) -> float:
    return float(one.value == other.value)


def _wanted_groups(study: Study) -> list[tuple[str | None, int | None]]:
    items = [item for item in study.items if item.kind == "counting"]
    objects = dict.fromkeys(item.object for item in items)
    counts = sorted({_asked(item) for item in items})
    pairs = sorted({(item.object, _asked(item)) for item in items}, key=str)
    return [(None, None), *((o, None) for o in objects), *((None, c) for c in counts), *pairs]


def _count_group(
    study: Study, counts: _Values, object_: str | None, count: int | None
) -> CountGroup:
    errors = {
        (rater, number): abs(counted - _asked(study.items[number]))
        for (rater, number), counted in counts.items()
        if object_ in (None, study.items[number].object)
        and count in (None, study.items[number].count)
    }
    matches = {key: float(error == 0) for key, error in errors.items()}
    return CountGroup(
        object=object_,
        count=count,
        average_error=_by_model(study, errors),
        match_ratio=_by_model(study, matches, is_share=True),
    )


def _asked(item: Item) -> int:
    assert item.count is not None
    return item.count


def _by_model(study: Study, values: _Values, is_share: bool = False) -> dict[str, Estimate]:
    """Means for each model that has values; images of one prompt and noise resampled together."""
    names = [model.name for model in study.models if model.counting is not None]
    rows: dict[tuple[int, tuple[int, str]], list[float]] = {}
    for (rater, number), value in values.items():
        item = study.items[number]
        (blind,) = item.images
        row = rows.setdefault((rater, (item.position, item.prompt)), [np.nan] * len(names))
        row[names.index(study.names[blind])] = value
    return by_name(names, estimate_columns(tabulate(rows), is_share)) if rows else {}
