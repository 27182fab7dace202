"""Rankings of images of one prompt => which model is preferred, and whether to believe it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.rating.statistics import OrderBias, agreement, estimate_columns, order_bias
from ifvit.rating.store import Answer
from ifvit.rating.study import Study
from ifvit.rating.tables import Replies, by_name, split_answers, tabulate


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
