"""The figures of a study's page: first the numbers, then the plots."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.figure import Figure

from ifvit import storage
from ifvit.analysis.atlas import AtlasPoint, atlas_figure, atlas_rows
from ifvit.analysis.attention_analysis import attention_figure
from ifvit.analysis.attention_analysis import table_rows as attention_rows
from ifvit.analysis.attention_maps import AttentionSummary, read_attention
from ifvit.analysis.knockout import FOLDER, KnockoutAnalysis, read_knockout
from ifvit.analysis.knockout_analysis import knockout_figure
from ifvit.analysis.knockout_analysis import table_rows as knockout_rows
from ifvit.diffusion.config import ObjectiveConfig
from ifvit.evaluation.detectors import SCENES
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.runs import Run, step_files
from ifvit.figures import COLOURS, house_style, literal
from ifvit.records import shorten
from ifvit.sampling.samples import read_images
from ifvit.studies.arms import Arm, Captioned, Selection, means_of, operations_per_step
from ifvit.studies.comparisons import Arms, Comparison
from ifvit.studies.page import Forest, PageFigure, Panel, Point, wrap_name
from ifvit.studies.quantities import (
    COUNT_ERROR,
    FID,
    HELD_OUT_LOSS,
    MATCH_RATIO,
    PAPER_CLIP_SCORE,
    Metric,
    SeedMean,
    mean_over_seeds,
)

if TYPE_CHECKING:  # a page without human ratings does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults

Group = tuple[str | None, int | None]
"""An object and an asked count; None stands for all of them."""

_CELL = 1.3
_CAPTION_WIDTH = 22
_NUM_CAPTIONS = 10
_NUM_BINS = 100
_MIN_WINDOWS = 4


def forest_figure(comparisons: Sequence[Comparison], colours: Mapping[str, int]) -> PageFigure:
    """Plot the differences from the baseline, metric by metric."""
    by_metric: dict[Metric, list[Comparison]] = {}
    for found in comparisons:
        by_metric.setdefault(found.metric, []).append(found)
    plots = [
        Forest(metric=metric, comparisons=found, colours=colours)
        for metric, found in by_metric.items()
    ]
    text = (
        "Difference of each arm from the baseline with its 95 % interval. Small dots are seeds. A "
        "filled mark is a difference by the rule of this page, an open ring is not."
    )
    return PageFigure("Differences from the baseline", text, plots)


_AXES = {"step": "step", "operations": "training operations", "seconds": "training seconds"}
_CURVES = (  # title, quantity of metrics.jsonl, key of _AXES
    ("Held-out loss", "validation_loss", "step"),
    ("Held-out loss", "validation_loss", "operations"),
    ("Loss", "loss", "step"),
    ("Loss", "loss", "operations"),
    ("Held-out loss", "validation_loss", "seconds"),
    ("Gradient norm", "grad_norm", "step"),
)


def curves_figure(arms: Sequence[Arm]) -> PageFigure:
    """Plot what training logged, over steps, operations and time."""
    plots = []
    for title, quantity, axis in _CURVES:
        groups: dict[str, list[Point]] = {}
        for arm in arms:
            for group, runs in _comparable_groups(arm, quantity).items():
                groups.setdefault(group, []).extend(_curve(arm, runs, quantity, axis))
        for group, points in groups.items():
            name = f"{title}: {group}" if len(groups) > 1 else title
            if points:
                plots.append(Panel(title=name, x_label=_AXES[axis], points=points))
    text = (
        "Means over the seeds of an arm and over neighbouring lines of the log; bands hold 80 % of "
        "the single values. Losses that do not compare have plots of their own."
    )
    return PageFigure("Training", text, plots)


def _curve(arm: Arm, runs: Sequence[Run], quantity: str, axis: str) -> Iterator[Point]:
    """Yield at most 100 points, each of the values of all runs at neighbouring steps."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run, row in [(one, row) for one in runs for row in one.curve]:
        cost, value = operations_per_step(run), getattr(row, quantity)
        x = {"step": row.step, "operations": cost and cost * row.step, "seconds": row.seconds}[axis]
        if value is not None and x is not None:
            by_step.setdefault(row.step, []).append((x, value))
    steps = np.array(sorted(by_step))
    for group in np.array_split(steps, min(_NUM_BINS, len(steps))) if by_step else ():
        xs, ys = np.array([pair for step in group for pair in by_step[step]]).T
        x, y, low, high = map(float, (xs.mean(), ys.mean(), *np.quantile(ys, [0.1, 0.9])))
        yield Point(name=arm.name, colour=arm.colour, x=x, y=y, low=low, high=high)


def _comparable_groups(arm: Arm, quantity: str) -> dict[str, list[Run]]:
    """Group the runs of an arm by what their loss is the error of."""
    groups: dict[str, list[Run]] = {}
    for run in arm.runs.values():
        groups.setdefault(_error_of(run, quantity), []).append(run)
    return groups


def _error_of(run: Run, quantity: str) -> str:
    """What a loss of the run is the error of; equal for all runs that compare."""
    if not quantity.endswith("loss"):
        return ""
    target, held_out = run.target or "no weights yet", run.facts.validation
    if quantity == "loss":  # the mean over other timesteps, or with other weights, is another loss
        default = ObjectiveConfig()
        own = vars(replace(run.facts.objective, prediction=default.prediction)).items()
        changed = [f"{name} {value}" for name, value in own if value != getattr(default, name)]
        return ", ".join([target, *changed])
    return f"{target}, {held_out.get('num_samples')} samples of {held_out.get('shards')}"


def steps_figure(selection: Selection, metrics: Sequence[Metric]) -> PageFigure:
    """Plot metrics over the steps that were evaluated, and over the operations until then."""
    plots = []
    for metric, x_label in product(metrics, ("step", "training operations")):
        points = []
        for arm in selection.arms:
            found: dict[float, list[Estimate]] = {}
            for run in arm.runs.values():
                scale = 1.0 if x_label == "step" else operations_per_step(run)
                for row in selection.history(run, selection.series[0]) if scale else ():
                    if estimate := metric.of(row):
                        found.setdefault(row.step * (scale or 1.0), []).append(estimate)
            points += [_point(arm, x, mean_over_seeds(own)) for x, own in sorted(found.items())]
        panel = Panel(title=metric.title, x_label=x_label, y_label=metric.heading, points=points)
        plots += [panel] if _has_lines(panel) else []
    text = "The evaluations of each step: means over seeds with standard errors."
    return PageFigure("Metrics during training", text, plots)


def guidance_figure(selection: Selection, metrics: Sequence[Metric]) -> PageFigure:
    """Plot the first metric over CLIP Score as guidance grows (arXiv 2403.16530, Figure 3)."""
    quality, alignment, points = metrics[0] if metrics else FID, PAPER_CLIP_SCORE, []
    scales = sorted(one for one in selection.series if one.name == selection.series[0].name)
    for arm, series in product(selection.arms, scales):
        rows = [selection.last(run, series) for run in arm.runs.values()]
        both = [(x, y) for row in rows if (x := alignment.of(row)) and (y := quality.of(row))]
        if both:
            score, mean = (mean_over_seeds(found) for found in zip(*both, strict=True))
            points.append(replace(_point(arm, score.value, mean), label=f"w={series.scale:g}"))
    panel = Panel(
        title=f"{quality.title} over {alignment.title}",
        x_label=alignment.heading,
        y_label=quality.heading,
        points=points,
    )
    text = (
        "Quality against alignment as the guidance scale w grows: means over seeds with standard "
        "errors. The paper prints w - 1."
    )
    plots = [panel] if _has_lines(panel) else []
    return PageFigure("Quality and alignment under guidance", text, plots)


def _has_lines(panel: Panel) -> bool:
    """Whether any name has two points."""
    return len(panel.points) > len({point.name for point in panel.points})


def _point(arm: Arm, x: float, mean: SeedMean) -> Point:
    """Return a mean with its standard error."""
    low, high, values = mean.value - mean.error, mean.value + mean.error, mean.values
    point = Point(name=arm.name, colour=arm.colour, x=x, y=mean.value, low=low, high=high)
    return replace(point, values=values)


def captions_figure(captions: Sequence[Captioned]) -> PageFigure:
    """Show images of all arms for the same captions and noise, a row per arm."""
    shown = [row for row in captions if all(row.images.values())][:_NUM_CAPTIONS]
    text = "The first seed that all arms share; captions are the first ones of the evaluation."
    records = [
        {"caption": row.caption, "arm": name, "file": url}
        for row in shown
        for name, url in row.images.items()
    ]
    picture = _draw_grid(shown) if shown else None
    return PageFigure("The same captions and noise", text, (), picture, records)


def _draw_grid(captions: Sequence[Captioned]) -> Figure:
    """Draw a column per caption and a row per arm."""
    names = list(captions[0].images)
    with house_style():
        size = (_CELL * len(captions) + 1, _CELL * len(names) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(names), len(captions), squeeze=False)
        for column, row in zip(grid.T, captions, strict=True):
            images = read_images(url for url in row.images.values() if url)
            for cell, image in zip(column, images, strict=True):
                cell.imshow(image, interpolation="nearest")
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_visible(False)
            text = shorten(row.caption, 200)
            lines = textwrap.wrap(text, _CAPTION_WIDTH, max_lines=3, placeholder=" …")
            column[0].set_title("\n".join(map(literal, lines)), fontsize=7)
        for cell, name in zip(grid[:, 0], names, strict=True):
            cell.set_ylabel(wrap_name(name), fontsize=7)
    return figure


def counts_figure(selection: Selection) -> PageFigure:
    """Plot the error by asked count for each object, then error and match ratio over all counts."""
    rows = [
        (arm, [selection.counts[r.name] for r in arm.runs.values() if r.name in selection.counts])
        for arm in selection.arms
    ]
    counted = [row for _, own in rows for row in own]
    text = (
        f"Counted by {_counters(counted)}. Average error is the mean of |counted - asked|, match "
        "ratio the share of images with the number asked for (arXiv 2403.16530, equations 9 and "
        "10; there, people counted). Several runs are shown as their mean with its 95 % interval "
        "over runs, one run with an interval over images."
    )
    plots = []
    if counted:
        objects, counts = counted[0].objects, counted[0].asked_counts
        for name in objects:
            groups = {str(count): (name, count) for count in counts}
            plots.append(_count_panel(name, COUNT_ERROR, rows, groups, x_label="asked count"))
        overall: dict[str, Group] = {name: (name, None) for name in objects} | {"all": (None, None)}
        for metric in (COUNT_ERROR, MATCH_RATIO):
            plots.append(_count_panel(f"{metric.title}, all counts", metric, rows, overall))
    return PageFigure("Object count", text, plots)


def _counters(rows: Sequence[ObjectCountRow]) -> str:
    detectors = sorted({row.protocol.rule.detector for row in rows})
    return " and ".join("exact analysis" if name == SCENES else name for name in detectors)


def _count_panel(
    title: str,
    metric: Metric,
    rows: Sequence[tuple[Arm, Sequence[ObjectCountRow]]],
    groups: Mapping[str, Group],
    x_label: str = "",
) -> Panel:
    """Plot means over the rows of each arm, with intervals that stay where the numbers can be."""
    points = []
    for arm, own in rows:
        for place, (name, asked) in enumerate(groups.values()):
            scores = [score for row in own if (score := row.score(name, asked))]
            if scores:
                mean = mean_over_seeds([getattr(score, metric.field) for score in scores])
                high = mean.high if metric == COUNT_ERROR else min(1.0, mean.high)
                points.append(replace(_point(arm, place, mean), low=max(0.0, mean.low), high=high))
    return Panel(
        title=shorten(title, 200),
        x_label=x_label,
        y_label=metric.title.lower(),
        points=points,
        places=tuple(groups),
    )


def rating_figure(found: "PreferenceResults | None", colours: Mapping[str, int]) -> PageFigure:
    """Plot preference scores; a model that is named as an arm has its colour."""
    scores = found.score if found else {}
    points = [
        Point(
            name=name,
            colour=colours.get(name, place % len(COLOURS)),
            x=place,
            y=score.value,
            low=score.low,
            high=score.high,
        )
        for place, (name, score) in enumerate(scores.items())
    ]
    title = f"Score from 1 (last) to {len(points)} (first)"
    panel = Panel(title=title, y_label="preference score", points=points, places=tuple(scores))
    count = found.num_rankings if found else 0
    text = f"{count} rankings by people, in random order on the page, with 95 % intervals."
    return PageFigure("Human preference", text, [panel] if points else [])


Analysis = TypeVar("Analysis", AttentionSummary, KnockoutAnalysis)


def attention_of(arms: Sequence[Arm]) -> PageFigure:
    """Show the newest attention analysis of the first analysed run of each arm."""
    found, others = _first_analyses(arms, _read_attention)
    text = (
        "The first analysed run of each arm: image-to-image maps, text-to-image maps and singular "
        f"values of the latter, block by block (arXiv 2403.16530, Figure 8).{others}"
    )
    picture = attention_figure(found) if found else None
    return PageFigure("Where attention goes", text, (), picture, attention_rows(found))


def knockout_of(arms: Sequence[Arm]) -> PageFigure:
    """Show the newest knock-out analysis of the first analysed run of each arm."""
    found, others = _first_analyses(arms, _read_knockout)
    text = (
        "The first analysed run of each arm, without training: what changes when the captions are "
        f"switched off in some blocks.{others}"
    )
    picture = knockout_figure(found) if found else None
    return PageFigure("Where trained networks use text", text, (), picture, knockout_rows(found))


def _first_analyses(
    arms: Sequence[Arm], read: Callable[[Run], Analysis | None]
) -> tuple[dict[str, Analysis], str]:
    """Return the first analysis of each arm, as far as protocols agree, and who is left out."""
    found = {arm.name: next(filter(None, map(read, arm.runs.values())), None) for arm in arms}
    known = {name: analysis for name, analysis in found.items() if analysis}
    protocols = [analysis.protocol for analysis in known.values()][:1]
    alike = {name: one for name, one in known.items() if one.protocol in protocols}
    others = ", ".join(name for name in known if name not in alike)
    return alike, f" Analysed under another protocol, and left out: {others}." if others else ""


def _read_knockout(run: Run) -> KnockoutAnalysis | None:
    run.locate(storage.join(run.url, FOLDER))  # raises UserError for a link out of the run
    return read_knockout(run.url)


def _read_attention(run: Run) -> AttentionSummary | None:
    files = step_files(storage.join(run.url, "analysis", "attention"), ".json")
    return read_attention(run.locate(files[-1][1])) if files else None


def atlas_figures(
    selection: Selection, evaluations: Arms, metrics: Sequence[Metric]
) -> dict[str, PageFigure]:
    """Draw the atlas of each metric, by file name; none unless a mechanism has four windows.

    The held-out loss comes first, because the knock-out predicts it.
    """
    windows = {arm.name: found for arm in selection.arms if (found := window_of(arm))}
    mechanisms = Counter(mechanism for mechanism, _, _ in set(windows.values()))
    if max(mechanisms.values(), default=0) < _MIN_WINDOWS:
        return {}
    predictions = {
        windows[arm.name][0]: knockout.predictions
        for arm in selection.arms
        if arm.backbone and "image" not in arm.backbone.blocks and arm.name in windows
        for knockout in [*filter(None, map(_read_knockout, arm.runs.values()))][:1]
    }
    text = (
        "Where text is fused: an arm per cell, the mean over its seeds and its standard error. The "
        "frame marks the best mean; it need not differ from the others. Below, if there is an "
        "analysis: what the knock-out of the network with text in all blocks says."
    )
    figures = {}
    for metric in sorted(metrics, key=lambda metric: metric != HELD_OUT_LOSS):
        scale, unit, digits = 100.0, ", %", 1
        if metric.digits is not None:
            scale, unit, digits = 1.0, "", min(metric.digits, 3)
        points = []
        for name, mean in means_of(evaluations, metric).items():
            if name in windows:
                mechanism, first, last = windows[name]
                values = [scale * value for value in mean.values]
                points += [AtlasPoint(mechanism=mechanism, first=first, last=last, values=values)]
        lower, title = metric.lower_is_better, metric.title + unit
        picture = atlas_figure(points, title, predictions, lower_is_better=lower, digits=digits)
        rows = atlas_rows(points, predictions)
        figures[f"atlas_{metric.field}"] = PageFigure(
            f"Atlas: {metric.title}", text, (), picture, rows
        )
    return figures


def window_of(arm: Arm) -> tuple[str, int, int] | None:
    """Return the mechanism, and the first and last block, of an arm whose text has one window."""
    if arm.backbone is None or not arm.backbone.text_blocks:
        return None
    first, last = arm.backbone.text_blocks[0], arm.backbone.text_blocks[-1]
    entries = set(arm.backbone.blocks[first : last + 1])
    return (entries.pop(), first, last) if len(entries) == 1 else None
