"""Reads the object counts of runs (arXiv 2403.16530, Figure 5), averages and plots them.

`ifvit evaluate --protocol object_count` measures them.
"""

from collections.abc import Iterable, Mapping, Sequence

from ifvit import storage
from ifvit.evaluation.object_count import ObjectCountRow, differences, read_object_counts
from ifvit.evaluation.rows import FOLDER
from ifvit.evaluation.runs import Run
from ifvit.records import shorten
from ifvit.studies.page import Panel, Point
from ifvit.studies.quantities import COUNT_ERROR, MATCH_RATIO, Metric, SeedMean, mean_over_seeds

Group = tuple[str | None, int | None]
"""An object and an asked count; None stands for all of them."""


def read_counts(runs: Sequence[Run]) -> tuple[dict[str, ObjectCountRow], list[str]]:
    """Return the newest row of each run, by its name, and sentences about runs that are left out.

    A run is left out if the protocol of its row differs from that of the first row, so all returned
    rows can be plotted together.
    """
    rows: dict[str, ObjectCountRow] = {}
    excluded = []
    for run in runs:
        counted = read_object_counts(storage.join(run.url, FOLDER))
        if not counted:
            continue
        row = counted[-1]
        first = next(iter(rows.values()), row)
        reasons = differences(first.protocol, row.protocol)
        reasons += ["list of prompts"] if row.group_sizes != first.group_sizes else []
        if reasons:
            excluded.append(f"{run.name} was counted with another {', '.join(reasons)}.")
        else:
            rows[run.name] = row
    return rows, excluded


def mean_score(
    rows: Sequence[ObjectCountRow], metric: Metric, name: str | None, asked: int | None
) -> SeedMean | None:
    """Return the mean over runs for an object and an asked count; None without such images.

    None in the place of an object or a count means all of them.
    """
    scores = [score for row in rows if (score := row.score(name, asked))]
    return mean_over_seeds([getattr(score, metric.field) for score in scores]) if scores else None


def count_panels(
    rows: Mapping[str, Sequence[ObjectCountRow]], colours: Mapping[str, int]
) -> list[Panel]:
    """Plot the error by asked count for each object, then error and match ratio over all counts.

    `rows` maps a name to the rows of one or more runs, `colours` the name to an index of COLOURS.
    """
    first = next((row for members in rows.values() for row in members), None)
    if first is None:
        return []

    objects, counts = first.objects, first.asked_counts
    overall: list[Group] = [*((name, None) for name in objects), (None, None)]
    shown: list[tuple[str, str, Metric, list[Group], Iterable[str]]] = [
        (name, "asked count", COUNT_ERROR, [(name, count) for count in counts], map(str, counts))
        for name in objects
    ]
    shown += [
        (f"{metric.title}, all counts", "", metric, overall, (*objects, "all"))
        for metric in (COUNT_ERROR, MATCH_RATIO)
    ]
    return [
        Panel(
            title=shorten(title, 200),
            x_label=x_label,
            y_label=metric.title.lower(),
            points=[
                Point(
                    name=name,
                    colour=colours[name],
                    x=place,
                    y=mean.value,
                    low=max(0.0, mean.low),
                    high=mean.high if metric == COUNT_ERROR else min(1.0, mean.high),
                    values=mean.values,
                )
                for name, members in rows.items()
                for place, key in enumerate(keys)
                if (mean := mean_score(members, metric, *key))
            ],
            places=tuple(places),
        )
        for title, x_label, metric, keys, places in shown
    ]
