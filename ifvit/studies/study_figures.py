"""The figures of a study's page: first the numbers, then the plots."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

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
from ifvit.evaluation.runs import Run, step_files
from ifvit.figures import COLOURS, house_style, literal
from ifvit.images import Pixels
from ifvit.models.config import FusionTransformerConfig
from ifvit.records import shorten
from ifvit.sampling.samples import read_images
from ifvit.studies.arms import Arm, Captioned, Selection, means_of, operations_per_step
from ifvit.studies.comparisons import Arms, Comparison
from ifvit.studies.object_counts import count_panels
from ifvit.studies.page import Bar, Forest, PageFigure, Panel, Point
from ifvit.studies.quantities import (
    FID,
    HELD_OUT_LOSS,
    PAPER_CLIP_SCORE,
    Metric,
    SeedMean,
    mean_over_seeds,
)

if TYPE_CHECKING:  # a page without human ratings does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults

_CELL = 1.3
_CAPTION_WIDTH = 22
_NAME_WIDTH = 14
_NUM_CAPTIONS = 10
_NUM_BINS = 100
_MIN_WINDOWS = 4


def forest_figure(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> PageFigure:
    """Plot the differences from the baseline, metric by metric."""
    colours = {arm.name: arm.colour for arm in arms}
    plots = []
    for metric in dict.fromkeys(found.metric for found in comparisons):
        bars = [
            Bar(
                name=found.question.arm,
                colour=colours[found.question.arm],
                mean=found.difference.mean,
                low=found.difference.low,
                high=found.difference.high,
                values=found.difference.values,
                outcome=found.outcome,
            )
            for found in comparisons
            if found.metric == metric
        ]
        plots.append(
            Forest(
                title=metric.title,
                bars=bars,
                lower_is_better=metric.lower_is_better,
                is_share=metric.digits is None,
            )
        )
    text = (
        "Difference of each arm from the baseline with its 95 % interval. Small dots are seeds. A "
        "filled mark is a difference by the rule of this page, an open ring is not."
    )
    return PageFigure(title="Differences from the baseline", text=text, plots=plots)


_AXES = {"step": "step", "operations": "training operations", "seconds": "training seconds"}
_CURVES = (  # title, quantity of metrics.jsonl, key of _AXES
    ("Held-out loss", "validation_loss", "step"),
    ("Held-out loss", "validation_loss", "operations"),
    ("Loss", "loss", "step"),
    ("Loss", "loss", "operations"),
    ("Held-out loss", "validation_loss", "seconds"),
    ("Gradient norm", "grad_norm", "step"),
    ("Samples per second", "samples_per_s", "step"),
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
    return PageFigure(title="Training", text=text, plots=plots)


def _curve(arm: Arm, runs: Sequence[Run], quantity: str, axis: str) -> Iterator[Point]:
    """Yield at most 100 points with values of all runs."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run, row in [(one, row) for one in runs for row in one.curve]:
        cost, value = operations_per_step(run), getattr(row, quantity)
        places = {"step": row.step, "operations": cost and cost * row.step, "seconds": row.seconds}
        if value is not None and places[axis] is not None:
            by_step.setdefault(row.step, []).append((places[axis] or 0.0, value))
    for steps in _bins(sorted(by_step)):
        xs, ys = np.array([pair for step in steps for pair in by_step[step]]).T
        low, high = np.quantile(ys, [0.1, 0.9])
        yield Point(
            name=arm.name,
            colour=arm.colour,
            x=float(xs.mean()),
            y=float(ys.mean()),
            low=float(low),
            high=float(high),
        )


def _bins(steps: Sequence[int]) -> list[NDArray[np.int64]]:
    """Split steps into at most 100 groups of neighbours."""
    return np.array_split(np.array(steps), min(_NUM_BINS, len(steps))) if steps else []


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
    for metric in metrics:
        for x_label in ("step", "training operations"):
            points = []
            for arm in selection.arms:
                found: dict[float, list[Estimate]] = {}
                for run in arm.runs.values():
                    cost = operations_per_step(run)
                    scale = 1.0 if x_label == "step" else cost
                    for row in selection.history(run, selection.series[0]) if scale else ():
                        if estimate := metric.of(row):
                            found.setdefault(row.step * (scale or 1.0), []).append(estimate)
                points += [
                    _point(arm, x, mean_over_seeds(estimates))
                    for x, estimates in sorted(found.items())
                ]
            panel = Panel(
                title=metric.title, x_label=x_label, y_label=metric.heading, points=points
            )
            plots += [panel] if _has_lines(panel) else []
    text = "The evaluations of each step: means over seeds with standard errors."
    return PageFigure(title="Metrics during training", text=text, plots=plots)


def guidance_figure(selection: Selection, metrics: Sequence[Metric]) -> PageFigure:
    """Plot the first metric over CLIP Score as guidance grows (arXiv 2403.16530, Figure 3)."""
    quality = metrics[0] if metrics else FID
    main = selection.series[0] if selection.series else None
    scales = sorted(one for one in selection.series if main and one.name == main.name)
    points = []
    for arm in selection.arms:
        for series in scales:
            rows = [row for run in arm.runs.values() if (row := selection.last(run, series))]
            both = [
                (score, value)
                for row in rows
                if (score := PAPER_CLIP_SCORE.of(row)) and (value := quality.of(row))
            ]
            if both:
                score_mean, mean = (mean_over_seeds(found) for found in zip(*both, strict=True))
                label = f"w={series.scale:g}"
                points.append(replace(_point(arm, score_mean.value, mean), label=label))
    panel = Panel(
        title=f"{quality.title} over {PAPER_CLIP_SCORE.title}",
        x_label=PAPER_CLIP_SCORE.heading,
        y_label=quality.heading,
        points=points,
    )
    text = (
        "Quality against alignment as the guidance scale w grows: means over seeds with standard "
        "errors. The paper prints w - 1."
    )
    plots = [panel] if _has_lines(panel) else []
    return PageFigure(title="Quality and alignment under guidance", text=text, plots=plots)


def _has_lines(panel: Panel) -> bool:
    """Whether any name has two points."""
    return len(panel.points) > len({point.name for point in panel.points})


def _point(arm: Arm, x: float, mean: SeedMean) -> Point:
    """Return a mean with its standard error."""
    return Point(
        name=arm.name,
        colour=arm.colour,
        x=x,
        y=mean.value,
        low=mean.value - mean.error,
        high=mean.value + mean.error,
        values=mean.values,
    )


def captions_figure(captions: Sequence[Captioned]) -> PageFigure:
    """Show images of all arms for the same captions and noise, a row per arm."""
    shown = [row for row in captions if all(row.images.values())][:_NUM_CAPTIONS]
    records: list[dict[str, object]] = [
        {"caption": row.caption, "arm": name, "file": url}
        for row in shown
        for name, url in row.images.items()
    ]
    title = "The same captions and noise"
    if not shown:
        return PageFigure(title=title, text="")
    pixels = [read_images(url for url in row.images.values() if url) for row in shown]
    text = "The first seed that all arms share; captions are the first ones of the evaluation."
    return PageFigure(
        title=title,
        text=text,
        picture=_draw_grid([row.caption for row in shown], list(shown[0].images), pixels),
        records=records,
    )


def _draw_grid(captions: Sequence[str], names: Sequence[str], pixels: Sequence[Pixels]) -> Figure:
    """Draw a column per caption, whose images are (rows, H, W, 3)."""
    size = (_CELL * len(captions) + 1, _CELL * len(names) + 0.6)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(names), len(captions), squeeze=False)
        for column, (caption, images) in enumerate(zip(captions, pixels, strict=True)):
            for cell, image in zip(grid[:, column], images, strict=True):
                cell.imshow(image, interpolation="nearest")
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_visible(False)
            text = shorten(caption, 200)
            lines = textwrap.wrap(text, _CAPTION_WIDTH, max_lines=3, placeholder=" …")
            grid[0, column].set_title("\n".join(map(literal, lines)), fontsize=7)
        for cell, name in zip(grid[:, 0], names, strict=True):
            label = textwrap.fill(name.replace("_", " "), _NAME_WIDTH)
            cell.set_ylabel("\n".join(map(literal, label.split("\n"))), fontsize=7)
    return figure


def counts_figure(selection: Selection) -> PageFigure:
    """Plot the object counts, each a mean over the runs of an arm."""
    rows = {
        arm.name: [
            selection.counts[run.name] for run in arm.runs.values() if run.name in selection.counts
        ]
        for arm in selection.arms
    }
    rows = {name: found for name, found in rows.items() if found}
    detectors = sorted({r.protocol.rule.detector for found in rows.values() for r in found})
    how = " and ".join("exact analysis" if d == SCENES else d for d in detectors)
    text = (
        f"Counted by {how}. Average error is the mean of |counted - asked|, match ratio the share "
        "of images with the number asked for (arXiv 2403.16530, equations 9 and 10; there, people "
        "counted). Several runs are shown as their mean with its 95 % interval over runs, one run "
        "with an interval over images."
    )
    colours = {arm.name: arm.colour for arm in selection.arms}
    return PageFigure(title="Object count", text=text, plots=count_panels(rows, colours))


def rating_figure(found: "PreferenceResults | None", arms: Sequence[Arm]) -> PageFigure:
    """Plot preference scores; a model that is named as an arm has its colour."""
    colours = {arm.name: arm.colour for arm in arms}
    points = [
        Point(
            name=name,
            colour=colours.get(name, place % len(COLOURS)),
            x=place,
            y=score.value,
            low=score.low,
            high=score.high,
        )
        for place, (name, score) in enumerate(found.score.items() if found else ())
    ]
    places = tuple(textwrap.fill(p.name.replace("_", " "), _NAME_WIDTH) for p in points)
    count = found.num_rankings if found else 0
    panel = Panel(
        title=f"Score from 1 (last) to {len(points)} (first)",
        y_label="preference score",
        points=points,
        places=places,
    )
    text = f"{count} rankings by people, in random order on the page, with 95 % intervals."
    return PageFigure(title="Human preference", text=text, plots=[panel] if points else [])


def attention_of(arms: Sequence[Arm]) -> PageFigure:
    """Show the newest attention analysis of the first analysed run of each arm."""
    found, others = _first_analyses(arms, _read_attention)
    text = (
        "The first analysed run of each arm: image-to-image maps, text-to-image maps and singular "
        f"values of the latter, block by block (arXiv 2403.16530, Figure 8).{others}"
    )
    return PageFigure(
        title="Where attention goes",
        text=text,
        picture=attention_figure(found) if found else None,
        records=attention_rows(found),
    )


def knockout_of(arms: Sequence[Arm]) -> PageFigure:
    """Show the newest knock-out analysis of the first analysed run of each arm."""
    found, others = _first_analyses(arms, _read_knockout)
    text = (
        "The first analysed run of each arm, without training: what changes when the captions are "
        f"switched off in some blocks.{others}"
    )
    return PageFigure(
        title="Where trained networks use text",
        text=text,
        picture=knockout_figure(found) if found else None,
        records=knockout_rows(found),
    )


Analysis = TypeVar("Analysis", AttentionSummary, KnockoutAnalysis)


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
        if arm.name in windows and (knockout := _predict(arm))
    }
    figures = {}
    for metric in sorted(metrics, key=lambda metric: metric != HELD_OUT_LOSS):
        scale = 100.0 if metric.digits is None else 1.0
        points = [
            AtlasPoint(
                mechanism=mechanism,
                first=first,
                last=last,
                values=[scale * value for value in mean.values],
            )
            for name, mean in means_of(evaluations, metric).items()
            if name in windows
            for mechanism, first, last in [windows[name]]
        ]
        picture = atlas_figure(
            points,
            metric.title + (", %" if metric.digits is None else ""),
            predictions,
            lower_is_better=metric.lower_is_better,
            digits=1 if metric.digits is None else min(metric.digits, 3),
        )
        figures[f"atlas_{metric.field}"] = PageFigure(
            title=f"Atlas: {metric.title}",
            text="Where text is fused: an arm per cell, the mean over its seeds and its standard "
            "error. The frame marks the best mean; it need not differ from the others. Below, if "
            "there is an analysis: what the knock-out of the network with text in all blocks says.",
            picture=picture,
            records=atlas_rows(points, predictions),
        )
    return figures


def _predict(arm: Arm) -> KnockoutAnalysis | None:
    """Return the knock-out of an arm whose text is in all blocks."""
    for run in arm.runs.values():
        config, found = run.backbone, _read_knockout(run)
        is_whole = isinstance(config, FusionTransformerConfig) and "image" not in config.blocks
        if found and is_whole:
            return found
    return None


def window_of(arm: Arm) -> tuple[str, int, int] | None:
    """Return the mechanism, and the first and last block, of an arm whose text has one window."""
    config = next((run.backbone for run in arm.runs.values()), None)
    if not isinstance(config, FusionTransformerConfig) or not config.text_blocks:
        return None
    first, last = config.text_blocks[0], config.text_blocks[-1]
    entries = set(config.blocks[first : last + 1])
    return (entries.pop(), first, last) if len(entries) == 1 else None
