"""Reads the object counts of runs (arXiv 2403.16530, Figure 5), averages and plots them.

`report` and `report paper` show them; `ifvit evaluate --protocol object_count` measures them.
"""

from collections.abc import Mapping, Sequence

from ifvit import storage
from ifvit.evaluation.object_count import ObjectCountRow, differences, read_object_counts
from ifvit.evaluation.rows import FOLDER
from ifvit.evaluation.runs import Run
from ifvit.records import shorten
from ifvit.studies.comparisons import Metric, SeedMean, mean_over_seeds
from ifvit.studies.page import Panel, Point

ERROR = Metric(field="average_error", title="Average error", digits=3)
MATCH = Metric(field="match_ratio", title="Match ratio")


def read_counts(runs: Sequence[Run]) -> tuple[dict[str, ObjectCountRow], list[str]]:
    """Return run name => newest row, and sentences about runs that are left out.

    A run is left out if the protocol or step of its row differs from that of the first row, so
    all returned rows can be plotted together.
    """
    rows: dict[str, ObjectCountRow] = {}
    excluded = []
    first: ObjectCountRow | None = None
    for run in runs:
        found = read_object_counts(storage.join(run.url, FOLDER))
        if not found:
            continue
        row = found[-1]
        first = first or row
        reasons = differences(first.protocol, row.protocol)
        reasons += ["step"] if row.step != first.step else []
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

    def points(metric: Metric, keys: Sequence[tuple[str | None, int | None]]) -> list[Point]:
        highest = 1.0 if metric == MATCH else float("inf")
        return [
            Point(
                name=name,
                colour=colours[name],
                x=place,
                y=mean.value,
                low=max(0.0, mean.low),
                high=min(highest, mean.high),
                values=mean.values,
            )
            for name, members in rows.items()
            for place, key in enumerate(keys)
            if (mean := mean_score(members, metric, *key))
        ]

    objects, counts = first.objects, first.asked_counts
    errors = {name: points(ERROR, [(name, count) for count in counts]) for name in objects}
    top = _top([point for found in errors.values() for point in found])
    panels = [
        Panel(
            title=shorten(name, 200),
            x_label="asked count",
            y_label="average error",
            points=found,
            places=tuple(map(str, counts)),
            top=top,
        )
        for name, found in errors.items()
    ]
    for metric in (ERROR, MATCH):
        found = points(metric, [*((name, None) for name in objects), (None, None)])
        title = metric.title.lower()
        places = (*objects, "all")
        panels.append(
            Panel(
                title=f"{title}, all counts",
                y_label=title,
                points=found,
                places=places,
                top=_top(found),
            )
        )
    return panels


def _top(points: Sequence[Point]) -> float:
    """End of an axis that holds every whisker."""
    return 1.05 * max(point.high for point in points) or 1.0
