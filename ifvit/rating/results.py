"""What a study found; read by the report, the admin's page and the paper's sheet."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeVar

import numpy as np

from ifvit.evaluation.estimates import Estimate
from ifvit.rating.agreement import Floats, OrderBias, agreement, estimate_columns, order_bias
from ifvit.rating.forms import CANNOT_TELL
from ifvit.rating.store import Answer, Store
from ifvit.rating.study import Item, Kind, Study, read_study

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


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often `first` was ranked above `second`."""

    first: str
    second: str
    share: Estimate


@dataclass(frozen=True, kw_only=True)
class PreferenceResults:
    """Rankings by model name; of prompts asked twice, the first answer.

    `score` is the paper's: the number of models for rank 1, 1 for the last rank. `alpha` is
    Krippendorff's for ordinal data, over the rank of every image; None where not defined.
    """

    num_rankings: int
    mean_rank: dict[str, Estimate]
    score: dict[str, Estimate]
    win_rates: list[WinRate]
    alpha: float | None
    order_bias: OrderBias
    replies: Replies


def summarise_preference(study: Study, answers: Sequence[Answer]) -> PreferenceResults | None:
    """None as long as there is no ranking."""
    replies, first = split_answers(study, answers, "preference", _same_order)
    rankings = {(a.rater, a.item): a for a in first if a.value is not None}
    if not rankings:
        return None
    models = [model for model in study.models if model.preference is not None]
    blind, names = [model.blind for model in models], [model.name for model in models]
    table = tabulate({key: _ranks(answer, blind) for key, answer in rankings.items()})
    pairs = list(combinations(range(len(models)), 2))
    beats = np.stack([table[..., a] < table[..., b] for a, b in pairs], axis=-1).astype(float)
    beats[np.isnan(table[..., 0])] = np.nan
    shares = estimate_columns(beats, is_share=True)
    return PreferenceResults(
        num_rankings=len(rankings),
        mean_rank=by_name(names, estimate_columns(table)),
        score=by_name(names, estimate_columns(len(models) + 1 - table)),
        win_rates=[
            WinRate(first=names[a], second=names[b], share=share)
            for (a, b), share in zip(pairs, shares, strict=True)
            if share is not None
        ],
        alpha=agreement(table.reshape(len(table), -1), "ordinal"),
        order_bias=order_bias(np.array([_ranks(a, a.shown) for a in rankings.values()])),
        replies=replies,
    )


def _ranking(answer: Answer) -> tuple[str, ...]:
    assert isinstance(answer.value, tuple)
    return answer.value


def _ranks(answer: Answer, order: Sequence[str]) -> list[float]:
    """Ranks, 1 is best, of the blind names in `order`."""
    return [1.0 + _ranking(answer).index(name) for name in order]


def _same_order(one: Answer, other: Answer) -> float:
    """Share of the pairs of images that both rankings put in the same order."""
    first, second = set(combinations(_ranking(one), 2)), set(combinations(_ranking(other), 2))
    return len(first & second) / len(first)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a rater is; `last` is the time of the newest answer, UTC."""

    rater: int
    done: int
    total: int
    last: str | None


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All of a study. None: no such question has been answered yet."""

    models: list[str]
    progress: list[Progress]
    preference: PreferenceResults | None
    counting: CountingResults | None


def read_results(folder: str) -> StudyResults:
    """The results of the answers so far. Raises UserError when there is no study in `folder`."""
    study = read_study(folder)
    store = Store(study.folder)
    try:
        return summarise(study, store)
    finally:
        store.close()


def summarise(study: Study, store: Store) -> StudyResults:
    """The results of the answers that `store` has now."""
    answers = store.answers()
    return StudyResults(
        models=[model.name for model in study.models],
        progress=_progress(study, store, answers),
        preference=summarise_preference(study, answers),
        counting=summarise_counting(study, answers),
    )


def _progress(study: Study, store: Store, answers: Sequence[Answer]) -> list[Progress]:
    done = Counter(answer.rater for answer in answers)
    last = {answer.rater: answer.answered_at for answer in answers}
    total = len(study.tasks(rater=0))
    return [
        Progress(rater=rater.id, done=done[rater.id], total=total, last=last.get(rater.id))
        for rater in store.raters()
    ]
