"""Figures 3 to 8 of arXiv 2403.16530 from runs: the numbers, then the plots.

`report paper` shows the figures on the page and writes each one as PNG and CSV.
"""

import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ifvit import storage
from ifvit.analysis.attention_analysis import attention_figure
from ifvit.analysis.attention_maps import AttentionSummary, read_attention
from ifvit.evaluation.detectors import SCENES
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import FOLDER, row_url, samples_url
from ifvit.evaluation.runs import Run, Sample, read_samples, step_files
from ifvit.figures import house_style, to_csv, to_png, to_svg
from ifvit.images import Pixels
from ifvit.sampling.samples import read_images
from ifvit.studies import object_counts
from ifvit.studies.comparisons import COUNT, PAPER_CLIP_SCORE, RELATION, RETRIEVAL, Metric, SeedMean
from ifvit.studies.paper_claims import CountsByVariant, quality_metric
from ifvit.studies.variants import PAPER_VARIANTS, VARIANTS, Sheet, Variant, series_of

if TYPE_CHECKING:  # a sheet without a rating study does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults

# In the order of VARIANTS: concat blue, cross-attention orange; early light, intermediate dark;
# then the halves of intermediate fusion.
VARIANT_COLOURS = (
    ("#7fb0f2", "#3f6fc0"),
    ("#1d4fb8", "#8db8ff"),
    ("#f0a35e", "#b3672a"),
    ("#b3480c", "#ffb784"),
    ("#1f9d7a", "#57cfab"),
    ("#8a55c8", "#b892f0"),
    ("#7a9a12", "#b5d14a"),
    ("#b4479c", "#e48bd0"),
)
"""Colour on paper and on light pages, and colour on dark pages."""

_VARIABLES = {light: f"run{number}" for number, (light, _) in enumerate(VARIANT_COLOURS)}
_PANEL_SIZE = (4.6, 3.4)
_COLUMNS = 3
_CELL = 1.6
_CAPTION_WIDTH = 24
_PLACE_WIDTH = 12
_NUM_PAIRS = 12
_PAIRS_SCALE = 4.0  # "a CFG scale of 3"; the paper prints w - 1
_PAIRS_SEED = 0
_HALVES = {
    (False, False): "none\n(early)",
    (True, False): "image\nblocks",
    (False, True): "text\nbranch",
    (True, True): "both",
}


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A figure: panels (title, SVG) or a PNG on the page, PNG and CSV as files; or `missing`."""

    name: str
    title: str
    text: str = ""
    """What the figure shows, below its title."""
    notes: list[str] = field(default_factory=list)
    missing: str | None = None
    """What the figure needs and how to make it."""
    panels: list[tuple[str, str]] = field(default_factory=list)
    legend: list[dict[str, object]] = field(default_factory=list)
    """Name and colour of each trace of the panels."""
    png: bytes | None = None
    csv: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mean with its standard error; `values` are those of the single runs."""

    x: float
    y: float
    error: float
    x_error: float | None = None
    values: tuple[float, ...] = ()
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The points of one variant or model; `colour` is an index of VARIANT_COLOURS."""

    name: str
    colour: int
    is_early: bool
    points: list[Point]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A pair of axes; if `places` are given, x is the index of a place."""

    title: str
    x_label: str
    y_label: str
    traces: list[Trace]
    places: tuple[str, ...] = ()


def figure_3(sheet: Sheet) -> PaperFigure:
    """Plot metrics over training steps, and quality over CLIP Score as guidance grows."""
    series = series_of(sheet.reference.protocol) if sheet.reference else ""
    return _panel_figure(
        "figure3",
        "Figure 3: during training, and under guidance",
        figure_3_panels(sheet),
        text=f"Evaluations {series}: means over a variant's runs with standard errors. Guidance w "
        "counts as in eps_uncond + w (eps_cond - eps_uncond); the paper prints w - 1.",
        missing="no run was evaluated at two steps or two guidance scales; run "
        "`ifvit evaluate --weights RUN --steps all --guidance_scales [1.5,3] …`",
    )


def figure_3_panels(sheet: Sheet) -> list[Panel]:
    """Return the panels of Figure 3 in which any variant has two points.

    Evaluations of scenes have panels that the paper does not have.
    """
    variants = [variant for variant in PAPER_VARIANTS if variant in sheet.variants]
    quality = quality_metric(sheet)
    panels = []
    for metric in (quality, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION):
        traces = []
        for variant in variants:
            means = sheet.over_steps(variant, metric)
            traces.append(_trace(variant, [_point(step, mean) for step, mean in means.items()]))
        title = f"{metric.title} during training"
        panels.append(Panel(title=title, x_label="step", y_label=metric.heading, traces=traces))
    guidance = Panel(
        title=f"{quality.title} over {PAPER_CLIP_SCORE.title}",
        x_label=PAPER_CLIP_SCORE.heading,
        y_label=quality.heading,
        traces=[_trace(variant, _over_guidance(sheet, variant, quality)) for variant in variants],
    )
    panels.insert(2, guidance)
    return [panel for panel in panels if any(len(trace.points) > 1 for trace in panel.traces)]


def figure_4(sheet: Sheet, baseline: Variant, best: Variant) -> PaperFigure:
    """Show images of two variants for random captions that both have; never chosen by eye."""
    name, title = "figure4", "Figure 4: the same captions and noise"
    runs = [_first_compared(sheet, variant) for variant in (baseline, best)]
    scale = _scale_of_pairs(sheet, runs)
    top, bottom = (_samples(sheet, run, scale) for run in runs)
    if baseline == best or not top or not bottom:
        missing = "no samples of two variants; run `ifvit evaluate --weights RUN …` for both"
        return PaperFigure(name=name, title=title, missing=missing)
    common = sorted(set(top) & set(bottom))
    chosen = random.Random(_PAIRS_SEED).sample(common, min(_NUM_PAIRS, len(common)))
    pairs = [(top[key], bottom[key]) for key in chosen]
    above, below = (list(read_images(s.image for s in line)) for line in zip(*pairs, strict=True))
    records = [{"caption": a.prompt, "top": a.image, "bottom": b.image} for a, b in pairs]
    return PaperFigure(
        name=name,
        title=title,
        text=f"Top: {baseline.title}, bottom: {best.title}, the first compared run of each, at "
        f"guidance w = {scale:g}; {len(pairs)} captions drawn at random with a fixed seed.",
        png=plot_pairs([a.prompt for a, _ in pairs], above, below),
        csv=to_csv(records),
    )


def figure_5(counts: CountsByVariant, excluded: list[str]) -> PaperFigure:
    """Plot the object counts, averaged over the runs of each variant."""
    name, title = "figure5", "Figure 5: object count"
    if not counts:
        missing = "no run has object counts; run `ifvit evaluate --protocol object_count …`"
        return PaperFigure(name=name, title=title, missing=missing, notes=excluded)
    rows: dict[str, ObjectCountRow] = {
        variant.title: object_counts.mean_row(found) for variant, found in counts.items()
    }
    (detector,) = {row.protocol.rule.detector for row in rows.values()}
    how = "exact analysis of the scenes" if detector == SCENES else detector
    return PaperFigure(
        name=name,
        title=title,
        text=f"Counted by {how}, where the paper asked people. Bars of several runs are "
        "their mean with its 95 % interval over runs, bars of one run have one over images.",
        notes=excluded,
        png=to_png(object_counts.figure(rows)),
        csv=object_counts.table(rows),
    )


def figure_6(found: "PreferenceResults | None") -> PaperFigure:
    """Plot the preference scores of a rating study."""
    return _panel_figure(
        "figure6",
        "Figure 6: human preference",
        [figure_6_panel(found.score)] if found else [],
        text=f"{found.num_rankings if found else 0} rankings by people; the order on the page was "
        "random. Standard errors from resampling raters and items.",
        missing="no study with rankings; run `ifvit rate create STUDY …`, let people rate, give "
        "--study",
    )


def figure_6_panel(score: Mapping[str, Estimate]) -> Panel:
    """Return scores by model name; a model named by a variant's slug has the variant's colour."""
    known = {variant.slug: variant for variant in VARIANTS}
    traces = [
        Trace(
            name=name,
            colour=VARIANTS.index(known[name]) if name in known else place,
            is_early=name in known and known[name].is_early,
            points=[Point(x=place, y=found.value, error=found.standard_error)],
        )
        for place, (name, found) in enumerate(score.items())
    ]
    places = tuple(textwrap.fill(name.replace("_", " "), _PLACE_WIDTH) for name in score)
    title = f"Preference score, from 1 (last) to {len(score)} (first)"
    return Panel(title=title, x_label="", y_label="score", traces=traces, places=places)


def figure_7(sheet: Sheet) -> PaperFigure:
    """Plot each half of intermediate fusion between early and intermediate fusion."""
    return _panel_figure(
        "figure7",
        "Figure 7: each half of intermediate fusion alone",
        figure_7_panels(sheet),
        text="Image blocks: text is fused in the middle blocks only. Text branch: text goes "
        "through blocks of its own first. Small points are single runs.",
        missing="no run has one half of intermediate fusion; train with "
        "`--backbone.num_image_blocks N --backbone.num_text_blocks 0` and with `0` and `1`",
    )


def figure_7_panels(sheet: Sheet) -> list[Panel]:
    """Return the panels of Figure 7 for each conditioning of which one half was trained."""
    halves = (v for v in sheet.variants if v.image_blocks != v.text_blocks)
    panels = []
    for conditioning in dict.fromkeys(variant.conditioning for variant in halves):
        for metric in (quality_metric(sheet), PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION):
            variants = [Variant(conditioning, *blocks) for blocks in _HALVES]
            traces = [
                _trace(variant, [_point(place, mean)])
                for place, variant in enumerate(variants)
                if (mean := sheet.mean(variant, metric))
            ]
            if traces:
                panel = Panel(
                    title=f"{metric.title}, {variants[0].path}",
                    x_label="",
                    y_label=metric.heading,
                    traces=traces,
                    places=tuple(_HALVES.values()),
                )
                panels.append(panel)
    return panels


def figure_8(sheet: Sheet) -> PaperFigure:
    """Show the newest attention analysis of each variant's first analysed run."""
    name, title = "figure8", "Figure 8: where attention goes"
    found = {v: summary for v, runs in sheet.variants.items() if (summary := _attention(runs))}
    if not found:
        missing = "no run has an analysis; run `ifvit analyze attention RUN… --shards HELD_OUT`"
        return PaperFigure(name=name, title=title, missing=missing)
    protocol = next(iter(found.values())).protocol
    alike = {v.title: summary for v, summary in found.items() if summary.protocol == protocol}
    others = [v.title for v in found if v.title not in alike]
    records: list[dict[str, object]] = [
        {
            "variant": variant,
            "layer": layer.name,
            "text_share": layer.text_share.value,
            "effective_rank": layer.text.effective_rank if layer.text else None,
            "largest_singular_value": layer.text.singular_values[0] if layer.text else None,
        }
        for variant, summary in alike.items()
        for layer in summary.layers
    ]
    return PaperFigure(
        name=name,
        title=title,
        text="The first analysed run of each variant: image-to-image maps, text-to-image maps, "
        "singular values of the latter, layer by layer.",
        notes=[f"{variant} was analysed otherwise and is left out." for variant in others],
        png=to_png(attention_figure(alike)),
        csv=to_csv(records),
    )


def _trace(variant: Variant, points: list[Point]) -> Trace:
    colour = VARIANTS.index(variant)
    return Trace(name=variant.title, colour=colour, is_early=variant.is_early, points=points)


def _point(x: float, mean: SeedMean) -> Point:
    return Point(x=x, y=mean.value, error=mean.error, values=mean.values)


def _over_guidance(sheet: Sheet, variant: Variant, quality: Metric) -> list[Point]:
    scores = sheet.over_guidance(variant, PAPER_CLIP_SCORE)
    return [
        Point(
            x=scores[scale].value,
            y=mean.value,
            error=mean.error,
            x_error=scores[scale].error,
            values=mean.values,
            label=f"w={scale:g}",
        )
        for scale, mean in sheet.over_guidance(variant, quality).items()
    ]


def _first_compared(sheet: Sheet, variant: Variant) -> Run | None:
    return next((run for run in sheet.variants[variant] if sheet.rows[run.name]), None)


def _scale_of_pairs(sheet: Sheet, runs: Sequence[Run | None]) -> float | None:
    """Return the guidance scale nearest to the paper's at which all runs were evaluated."""
    step = sheet.reference.step if sheet.reference else None
    rows = [sheet.rows[run.name] if run else [] for run in runs]
    scales = [{row.protocol.guidance_scale for row in r if row.step == step} for r in rows]
    common = set.intersection(*scales)
    return min(common, key=lambda scale: abs(scale - _PAIRS_SCALE), default=None)


def _samples(sheet: Sheet, run: Run | None, scale: float | None) -> dict[str, Sample]:
    """Return the samples by file name, which is the position in the evaluation."""
    if run is None or sheet.reference is None or scale is None:
        return {}
    folder, name = storage.join(run.url, FOLDER), sheet.reference.protocol.name
    samples = read_samples(samples_url(row_url(folder, name, scale, sheet.reference.step)))
    return {sample.image.rpartition("/")[2]: sample for sample in samples}


def _attention(runs: Sequence[Run]) -> AttentionSummary | None:
    """Return the newest analysis of the first run that has one."""
    for run in runs:
        files = step_files(storage.join(run.url, "analysis", "attention"), ".json")
        if files:
            return read_attention(files[-1][1])
    return None


def _panel_figure(
    name: str, title: str, panels: list[Panel], *, text: str, missing: str
) -> PaperFigure:
    if not panels:
        return PaperFigure(name=name, title=title, missing=missing)
    colours = {trace.name: trace.colour for panel in panels for trace in panel.traces}
    return PaperFigure(
        name=name,
        title=title,
        text=text,
        panels=[(panel.title, _panel_svg(panel)) for panel in panels],
        legend=[{"name": trace, "colour": colour} for trace, colour in colours.items()],
        png=plot_panels(panels),
        csv=to_csv(_panel_records(panels)),
    )


def _panel_records(panels: Sequence[Panel]) -> list[dict[str, object]]:
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


def plot_panels(panels: Sequence[Panel]) -> bytes:
    """Return a PNG of all panels, three in a row, with one legend."""
    num_columns = min(_COLUMNS, len(panels))
    num_lines = -(-len(panels) // num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_lines + 0.5)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = list(figure.subplots(num_lines, num_columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _plot_panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles = {
            name: handle
            for axes in grid
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
        return to_png(figure)


def _panel_svg(panel: Panel) -> str:
    """Return an SVG for the page, without a title, for the page has the title."""
    with house_style():
        figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
        axes = figure.add_subplot()
        _plot_panel(axes, panel)
        axes.set_title("")
        return to_svg(figure, _VARIABLES)


def _plot_panel(axes: Axes, panel: Panel) -> None:
    for trace in panel.traces:
        _plot_trace(axes, trace, connected=not panel.places)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, axis="y")
    if panel.places:
        axes.set_xticks(range(len(panel.places)), panel.places, fontsize=9)
        axes.set_xlim(-0.5, len(panel.places) - 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _plot_trace(axes: Axes, trace: Trace, *, connected: bool) -> None:
    """Plot means with standard errors, early fusion dashed and hollow, single runs small."""
    if not trace.points:
        return
    colour = VARIANT_COLOURS[trace.colour][0]
    axes.errorbar(
        [point.x for point in trace.points],
        [point.y for point in trace.points],
        [point.error for point in trace.points],
        [point.x_error or 0.0 for point in trace.points],
        color=colour,
        linestyle="" if not connected else "--" if trace.is_early else "-",
        linewidth=1.8,
        elinewidth=1.0,
        capsize=2,
        marker="o",
        markersize=5,
        markerfacecolor="none" if trace.is_early else colour,
        label=trace.name,
    )
    if not connected:
        for point in trace.points:
            x = [point.x + 0.14] * len(point.values)
            axes.plot(x, point.values, ".", color=colour, alpha=0.55)
    for point in (trace.points[0], trace.points[-1]):
        if point.label:
            place = (point.x, point.y)
            axes.annotate(point.label, place, (4, 4), textcoords="offset points", fontsize=8)


def plot_pairs(captions: Sequence[str], top: Sequence[Pixels], bottom: Sequence[Pixels]) -> bytes:
    """Return a PNG with two images (H, W, 3) per caption, one above the other, six in a row."""
    num_columns = min(6, len(captions))
    num_lines = -(-len(captions) // num_columns)
    size = (_CELL * num_columns, (2 * _CELL + 0.4) * num_lines)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(2 * num_lines, num_columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for index, (caption, *pictures) in enumerate(zip(captions, top, bottom, strict=True)):
            line, column = divmod(index, num_columns)
            cells = grid[2 * line : 2 * line + 2, column]
            for axes, picture in zip(cells, pictures, strict=True):
                axes.imshow(picture, interpolation="nearest")
            lines = textwrap.wrap(caption, _CAPTION_WIDTH, max_lines=3, placeholder=" …")
            cells[0].set_title("\n".join(lines), fontsize=7)
        return to_png(figure)
