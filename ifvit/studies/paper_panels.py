"""The numbers in Figures 3, 6 and 7 of arXiv 2403.16530, before anything is drawn."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ifvit.evaluation.estimates import Estimate
from ifvit.studies.comparisons import (
    COUNT,
    FID,
    FRECHET,
    PAPER_CLIP_SCORE,
    RELATION,
    RETRIEVAL,
    Metric,
)
from ifvit.studies.sheet import Sheet
from ifvit.studies.variants import SETTINGS, SeedMean, Setting

_PLACE_WIDTH = 12
_ABLATION = {
    (False, False): "none\n(early)",
    (True, False): "image\nblocks",
    (False, True): "text\nbranch",
    (True, True): "both",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mean with its standard error; `values` are those of the single runs, where several."""

    x: float
    y: float
    error: float
    x_error: float | None = None
    values: tuple[float, ...] = ()
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The points of one setting or model; `colour` is its place in SETTINGS."""

    name: str
    colour: int
    is_early: bool
    points: list[Point]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes; with `places` x counts them instead of measuring."""

    title: str
    x_label: str
    y_label: str
    traces: list[Trace]
    places: tuple[str, ...] = ()


def quality_metric(sheet: Sheet) -> Metric:
    """FID; where it was not measured but the distance on CLIP features was, that one."""
    return FRECHET if sheet.has(FRECHET) and not sheet.has(FID) else FID


def figure_3(sheet: Sheet, settings: Sequence[Setting]) -> list[Panel]:
    """Metrics over training steps, and quality over CLIP Score as guidance grows.

    Panels without two points of any setting are left out; on scenes there are some that the paper
    does not have.
    """
    quality = quality_metric(sheet)
    panels = [
        _over_steps(sheet, settings, metric)
        for metric in (quality, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION)
    ]
    panels.insert(2, _over_guidance(sheet, settings, quality))
    return [panel for panel in panels if any(len(trace.points) > 1 for trace in panel.traces)]


def figure_6(score: Mapping[str, Estimate]) -> list[Panel]:
    """Preference score by the study's model names, in a setting's colour if named by its slug."""
    known = {setting.slug: setting for setting in SETTINGS}
    traces = [
        Trace(
            name=name,
            colour=SETTINGS.index(known[name]) if name in known else place,
            is_early=name in known and known[name].is_early,
            points=[Point(x=place, y=found.value, error=found.standard_error)],
        )
        for place, (name, found) in enumerate(score.items())
    ]
    places = tuple(textwrap.fill(name.replace("_", " "), _PLACE_WIDTH) for name in score)
    title = f"Preference score, from 1 (last) to {len(score)} (first)"
    panel = Panel(title=title, x_label="", y_label="score", traces=traces, places=places)
    return [panel]


def figure_7(sheet: Sheet) -> list[Panel]:
    """Early fusion, each half of intermediate fusion, both; for whichever conditioning has a half.

    Empty where no run is one of the halves.
    """
    conditionings = {
        s.conditioning: None for s in sheet.settings if s.image_blocks != s.text_blocks
    }
    panels = []
    for conditioning in conditionings:
        for metric in (quality_metric(sheet), PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION):
            traces = []
            for place, halves in enumerate(_ABLATION):
                setting = Setting(conditioning, *halves)
                mean = sheet.mean(setting, metric)
                traces += [_trace(setting, [_point(place, mean)])] if mean else []
            panel = Panel(
                title=f"{metric.title}, {setting.path}",
                x_label="",
                y_label=_arrow(metric),
                traces=traces,
                places=tuple(_ABLATION.values()),
            )
            panels += [panel] if traces else []
    return panels


def panel_records(panels: Sequence[Panel]) -> list[dict[str, object]]:
    """A record per point, for a CSV file."""
    return [
        {
            "panel": panel.title,
            "name": trace.name,
            "x": panel.places[round(point.x)].replace("\n", " ") if panel.places else point.x,
            "x_error": point.x_error,
            "y": point.y,
            "y_error": point.error,
            "runs": len(point.values) or None,
            "label": point.label,
        }
        for panel in panels
        for trace in panel.traces
        for point in trace.points
    ]


def _over_steps(sheet: Sheet, settings: Sequence[Setting], metric: Metric) -> Panel:
    traces = [
        _trace(s, [_point(step, mean) for step, mean in sheet.over_steps(s, metric).items()])
        for s in settings
    ]
    return Panel(
        title=f"{metric.title} during training",
        x_label="step",
        y_label=_arrow(metric),
        traces=traces,
    )


def _over_guidance(sheet: Sheet, settings: Sequence[Setting], quality: Metric) -> Panel:
    traces = []
    for setting in settings:
        scores = sheet.over_guidance(setting, PAPER_CLIP_SCORE)
        found = sheet.over_guidance(setting, quality)
        points = [
            Point(
                x=scores[scale].value,
                y=mean.value,
                error=mean.error,
                x_error=scores[scale].error,
                values=mean.values,
                label=f"w={scale:g}",
            )
            for scale, mean in found.items()
        ]
        traces.append(_trace(setting, points))
    return Panel(
        title=f"{quality.title} over {PAPER_CLIP_SCORE.title}",
        x_label=_arrow(PAPER_CLIP_SCORE),
        y_label=_arrow(quality),
        traces=traces,
    )


def _trace(setting: Setting, points: list[Point]) -> Trace:
    return Trace(
        name=setting.title,
        colour=SETTINGS.index(setting),
        is_early=setting.is_early,
        points=points,
    )


def _point(x: float, mean: SeedMean) -> Point:
    return Point(x=x, y=mean.value, error=mean.error, values=mean.values)


def _arrow(metric: Metric) -> str:
    return f"{metric.title} {'↓' if metric.lower_is_better else '↑'}"
