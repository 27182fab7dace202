"""Results of a study from its answers; the verbs `rate report` and `rate export`.

The report, the admin's page and the page of a study show `StudyResults`. `render` makes all HTML
pages of this package.
"""

import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate
from ifvit.rating.agreement import Floats, OrderBias, agreement, estimate_columns, order_bias
from ifvit.rating.answers import Answer, Store, read_answers
from ifvit.rating.config import RateExportConfig, RateReportConfig
from ifvit.rating.study import CANNOT_TELL, Item, Study, read_study
from ifvit.records import dump_csv

_Unit = TypeVar("_Unit", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Skips and repeats among all answers to one kind of question, repeated questions included."""

    num_shown: int
    skips: dict[str, int]
    """Number of skips by reason."""
    num_repeats: int
    """Number of questions that a rater answered twice."""
    consistency: float | None
    """Mean over the repeats: of 1 for equal counts and 0 for different ones, or of the share of
    image pairs that both rankings put in the same order. None without repeats."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often raters ranked `first` above `second`."""

    first: str
    second: str
    share: Estimate


@dataclass(frozen=True, kw_only=True)
class PreferenceResults:
    """Results of the rankings by model name; of a repeated question the first answer counts."""

    num_rankings: int
    mean_rank: dict[str, Estimate]
    score: dict[str, Estimate]
    """The paper's score: the number of models for rank 1, down to 1 for the last rank."""
    win_rates: list[WinRate]
    alpha: float | None
    """Krippendorff's alpha for ordinal data, over the ranks of all images."""
    order_bias: OrderBias
    replies: Replies


@dataclass(frozen=True, kw_only=True)
class CountGroup:
    """Accuracy by model name on the prompts that ask for `count` `object`s; None stands for any."""

    object: str | None
    count: int | None
    average_error: dict[str, Estimate]
    """Eq. 9 of arXiv 2403.16530."""
    match_ratio: dict[str, Estimate]
    """Eq. 10 of arXiv 2403.16530."""


@dataclass(frozen=True, kw_only=True)
class CountingResults:
    """Results of the counts by model name; of a repeated question the first answer counts."""

    num_counts: int
    groups: list[CountGroup]
    """First all prompts together, then by object, by count, and by both."""
    cannot_tell: dict[str, Estimate]
    """Share of the images in which the raters could not count the objects."""
    alpha: float | None
    """Krippendorff's alpha for interval data, over the counts in all images."""
    replies: Replies


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Number of tasks that a rater has answered, and the time of the last answer (UTC)."""

    rater: int
    done: int
    total: int
    last: str | None


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All results of a study; None for a kind of question without answers."""

    models: list[str]
    progress: list[Progress]
    preference: PreferenceResults | None
    counting: CountingResults | None


def read_results(folder: str) -> StudyResults:
    """Summarise the answers so far. Raises UserError when `folder` holds no study."""
    study = read_study(folder)
    with closing(Store(study.folder)) as store:
        return summarise(study, store)


def summarise(study: Study, store: Store) -> StudyResults:
    """Summarise the answers that `store` holds now. Raises UserError for those of another study."""
    answers = read_answers(study, store)
    rankings = [answer for answer in answers if study.items[answer.item].kind == "preference"]
    counts = [answer for answer in answers if study.items[answer.item].kind == "counting"]
    done = Counter(answer.rater for answer in answers)
    last = {answer.rater: answer.answered_at for answer in answers}
    total = len(study.tasks(rater=0))
    return StudyResults(
        models=[model.name for model in study.models],
        progress=[
            Progress(rater=rater.id, done=done[rater.id], total=total, last=last.get(rater.id))
            for rater in store.raters()
        ],
        preference=_summarise_preference(study, rankings),
        counting=_summarise_counting(study, counts),
    )


def _summarise_preference(study: Study, answers: Sequence[Answer]) -> PreferenceResults | None:
    rankings = {
        (a.rater, a.item): a for a in answers if a.repetition == 0 and isinstance(a.value, tuple)
    }
    if not rankings:
        return None
    models = {model.blind: model.name for model in study.models if model.preference is not None}
    names = list(models.values())
    ranks = _tabulate({key: _ranks(answer, list(models)) for key, answer in rankings.items()})
    pairs = list(combinations(range(len(models)), 2))
    wins = np.stack([ranks[..., a] < ranks[..., b] for a, b in pairs], axis=-1).astype(float)
    wins[np.isnan(ranks[..., 0])] = np.nan
    shares = estimate_columns(wins, pairs, is_share=True)
    return PreferenceResults(
        num_rankings=len(rankings),
        mean_rank=estimate_columns(ranks, names),
        score=estimate_columns(len(models) + 1 - ranks, names),
        win_rates=[
            WinRate(first=names[a], second=names[b], share=share)
            for (a, b), share in shares.items()
        ],
        alpha=agreement(ranks.reshape(len(ranks), -1), "ordinal"),
        order_bias=order_bias(np.array([_ranks(a, a.shown) for a in rankings.values()])),
        replies=_summarise_replies(answers),
    )


def _ranks(answer: Answer, order: Sequence[str]) -> list[float]:
    """Return the ranks of the models `order`, which are blind names; 1 is best."""
    assert isinstance(answer.value, tuple)
    return [1.0 + answer.value.index(name) for name in order]


def _summarise_counting(study: Study, answers: Sequence[Answer]) -> CountingResults | None:
    first = {(a.rater, a.item): a for a in answers if a.repetition == 0}
    counted = {key: float(a.value) for key, a in first.items() if isinstance(a.value, int)}
    if not counted:
        return None
    names = [model.name for model in study.models if model.counting is not None]
    items, counts = _tabulate_by_model(study, names, counted)
    asked = np.array([item.count for item in items], np.float64)
    errors = np.abs(counts - asked[:, None])
    unclear = {key: float(a.skip_reason == CANNOT_TELL) for key, a in first.items()}
    _, cannot_tell = _tabulate_by_model(study, names, unclear)
    return CountingResults(
        num_counts=len(counted),
        groups=list(_count_groups(names, items, errors)),
        cannot_tell=estimate_columns(cannot_tell, names, is_share=True),
        alpha=agreement(counts.reshape(len(counts), -1), "interval"),
        replies=_summarise_replies(answers),
    )


def _count_groups(
    names: Sequence[str], items: Sequence[Item], errors: Floats
) -> Iterator[CountGroup]:
    objects = list(dict.fromkeys(item.object for item in sorted(items, key=lambda i: i.number)))
    counts = sorted({item.count for item in items if item.count is not None})
    alone = [(None, None), *((each, None) for each in objects), *((None, each) for each in counts)]
    for object_, count in [*alone, *product(objects, counts)]:
        belongs = [object_ in (None, i.object) and count in (None, i.count) for i in items]
        if not any(belongs):
            continue
        chosen = errors[:, belongs]
        matches = np.where(np.isnan(chosen), np.nan, chosen == 0)
        yield CountGroup(
            object=object_,
            count=count,
            average_error=estimate_columns(chosen, names),
            match_ratio=estimate_columns(matches, names, is_share=True),
        )


def _tabulate_by_model(
    study: Study, names: Sequence[str], values: Mapping[tuple[int, int], float]
) -> tuple[list[Item], Floats]:
    """Return one item per unit, and values (R, U, M) of R raters, U units and M models.

    The images of all models for one prompt and noise form a unit, so that the bootstrap resamples
    them together. `values` maps (rater, item) to a number; NaN marks a missing one.
    """
    rows: dict[tuple[int, tuple[int, str]], list[float]] = {}
    items: dict[tuple[int, str], Item] = {}
    for (rater, number), value in values.items():
        item = study.items[number]
        unit = item.position, item.prompt
        (blind,) = item.images
        row = rows.setdefault((rater, unit), [np.nan] * len(names))
        row[names.index(study.names[blind])] = value
        items.setdefault(unit, item)
    return list(items.values()), _tabulate(rows)


def _tabulate(rows: Mapping[tuple[int, _Unit], Sequence[float]]) -> Floats:
    """Convert (rater, unit) => C numbers to an array (R, U, C); NaN marks a missing row."""
    raters = list(dict.fromkeys(rater for rater, _ in rows))
    units = list(dict.fromkeys(unit for _, unit in rows))
    missing = [np.nan] * len(next(iter(rows.values())))
    return np.array([[rows.get((rater, unit), missing) for unit in units] for rater in raters])


def _summarise_replies(answers: Sequence[Answer]) -> Replies:
    given = {(a.rater, a.item, a.repetition): a.value for a in answers if a.value is not None}
    consistency = [
        _similarity(given[rater, item, 0], value)
        for (rater, item, repetition), value in given.items()
        if repetition == 1 and (rater, item, 0) in given
    ]
    return Replies(
        num_shown=len(answers),
        skips=dict(Counter(a.skip_reason for a in answers if a.skip_reason).most_common()),
        num_repeats=len(consistency),
        consistency=float(np.mean(consistency)) if consistency else None,
    )


def _similarity(one: int | tuple[str, ...], other: int | tuple[str, ...]) -> float:
    """Return the share of pairs that both rankings put in the same order; for counts 0 or 1."""
    if isinstance(one, int) or isinstance(other, int):
        return float(one == other)
    first, second = set(combinations(one, 2)), set(combinations(other, 2))
    return len(first & second) / len(first)


def report(config: RateReportConfig) -> None:
    """Write results.json and report.html, a single page that needs no network."""
    study, results = read_study(config.study), read_results(config.study)
    style = files("ifvit.rating").joinpath("static", "style.css").read_text()
    page = render("report.html", study=study, results=results, style=style)
    storage.write_json(str(study.folder / "results.json"), asdict(results))
    storage.write_bytes(str(study.folder / "report.html"), page.encode())
    sys.stdout.write(f"{study.folder / 'report.html'}\n")


def render(template: str, **values: Any) -> str:
    """Render a template of the folder `pages`; text in `values` is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ifvit.rating", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
    return environment


def export(config: RateExportConfig) -> None:
    """Write the current answers, oldest first. Raises UserError when there are none."""
    study = read_study(config.study)
    with closing(Store(study.folder)) as store:
        answers = read_answers(study, store)
    rows = [row for answer in answers for row in _export_rows(study, answer)]
    if not rows:
        raise UserError(f"{config.study}: no answers yet; serve it with ifvit rate serve")
    is_csv = Path(config.output).suffix == ".csv"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(config.output, dump_csv(rows) if is_csv else lines.encode())
    sys.stdout.write(f"{config.output}: {len(rows)} rows\n")


def _export_rows(study: Study, answer: Answer) -> Iterator[dict[str, Any]]:
    """Yield one row per shown image; `place` (on the page) and `rank` count from 1."""
    item = study.items[answer.item]
    ranking = answer.value if isinstance(answer.value, tuple) else None
    for place, blind in enumerate(answer.shown, 1):
        yield {
            "rater": answer.rater,
            "kind": item.kind,
            "item": item.number,
            "prompt": item.prompt,
            "position": item.position,
            "object": item.object,
            "asked_count": item.count,
            "repetition": answer.repetition,
            "place": place,
            "model": study.names[blind],
            "count": answer.value if isinstance(answer.value, int) else None,
            "rank": ranking.index(blind) + 1 if ranking else None,
            "skip_reason": answer.skip_reason,
            "answered_at": answer.answered_at,
        }
