"""Figures 3 to 8 of arXiv 2403.16530 from runs: first the numbers, then the plots.

`report paper` shows the figures on the page and writes each one as PNG and CSV.
"""

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ifvit import storage
from ifvit.analysis.attention_analysis import attention_figure
from ifvit.analysis.attention_maps import AttentionSummary, read_attention
from ifvit.evaluation.detectors import SCENES
from ifvit.evaluation.rows import FOLDER, row_url, samples_url
from ifvit.evaluation.runs import Run, Sample, read_samples, step_files
from ifvit.figures import house_style, literal, to_png, to_svg
from ifvit.images import Pixels
from ifvit.records import dump_csv, shorten
from ifvit.sampling.samples import read_images
from ifvit.studies import object_counts
from ifvit.studies.comparisons import COUNT, PAPER_CLIP_SCORE, RELATION, RETRIEVAL, SeedMean
from ifvit.studies.paper_claims import CountsByVariant, quality_metric
from ifvit.studies.variants import PAPER_VARIANTS, VARIANTS, Sheet, Variant, series_of

if TYPE_CHECKING:  # a sheet without a rating study does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults

# In the order of VARIANTS: concat is blue, cross-attention is orange; early fusion is light,
# intermediate fusion is dark. The halves of intermediate fusion follow.
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
"""Colour on paper and on light pages, then colour on dark pages."""

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
class Point:
    """A mean of one variant or model with its standard error `error`.

    `colour` is an index of VARIANT_COLOURS; `values` holds the number of each run.
    """

    name: str
    colour: int
    is_early: bool
    x: float
    y: float
    error: float
    x_error: float | None = None
    values: tuple[float, ...] = ()
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The content of one pair of axes; with `places`, x is an index of `places`."""

    title: str
    x_label: str
    y_label: str
    points: list[Point]
    places: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A figure as PNG and CSV; both are None if the runs lack the data of the figure.

    `facts` fill the text below the figure on the page; `notes` are sentences about runs left out.
    """

    png: bytes | None = None
    csv: bytes | None = None
    panels: list[Panel] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def svgs(self) -> list[tuple[str, str]]:
        """Title and SVG of each panel, for the page."""
        return [(panel.title, _panel_svg(panel)) for panel in self.panels]

    @property
    def legend(self) -> list[dict[str, object]]:
        """Name and colour of the variants or models in the panels."""
        colours = {point.name: point.colour for panel in self.panels for point in panel.points}
        return [{"name": name, "colour": colour} for name, colour in colours.items()]


def figure_3(sheet: Sheet) -> PaperFigure:
    """Plot metrics over training steps, and quality over CLIP Score as guidance grows.

    Panels in which no variant has two points are left out. Evaluations of scenes get panels that
    the paper does not have.
    """
    variants = [variant for variant in PAPER_VARIANTS if variant in sheet.variants]
    quality = quality_metric(sheet)
    panels = []
    for metric in (quality, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION):
        points = [
            _point(variant, step, mean)
            for variant in variants
            for step, mean in sheet.over_steps(variant, metric).items()
        ]
        title = f"{metric.title} during training"
        panels.append(Panel(title=title, x_label="step", y_label=metric.heading, points=points))
    points = []
    for variant in variants:
        scores = sheet.over_guidance(variant, PAPER_CLIP_SCORE)
        for scale, mean in sheet.over_guidance(variant, quality).items():
            point = _point(variant, scores[scale].value, mean)
            points.append(replace(point, x_error=scores[scale].error, label=f"w={scale:g}"))
    guidance = Panel(
        title=f"{quality.title} over {PAPER_CLIP_SCORE.title}",
        x_label=PAPER_CLIP_SCORE.heading,
        y_label=quality.heading,
        points=points,
    )
    panels.insert(2, guidance)
    shown = [p for p in panels if len(p.points) > len({point.name for point in p.points})]
    series = series_of(sheet.reference.protocol) if sheet.reference else ""
    return _panel_figure(shown, series=series)


def figure_4(sheet: Sheet, baseline: Variant, best: Variant) -> PaperFigure:
    """Show images of two variants for captions that are sampled from those that both have."""
    runs = [
        next((run for run in sheet.variants[variant] if sheet.rows[run.name]), None)
        for variant in (baseline, best)
    ]
    scale = _scale_of_pairs(sheet, runs)
    top, bottom = (_samples(sheet, run, scale) for run in runs)
    common = sorted(set(top) & set(bottom))
    if baseline == best or not common:
        return PaperFigure()
    chosen = random.Random(_PAIRS_SEED).sample(common, min(_NUM_PAIRS, len(common)))
    pairs = [(top[key], bottom[key]) for key in chosen]
    above, below = (
        list(read_images(run.locate(sample.image) for sample in line))
        for run, line in zip(filter(None, runs), zip(*pairs, strict=True), strict=True)
    )
    records = [{"caption": a.prompt, "top": a.image, "bottom": b.image} for a, b in pairs]
    return PaperFigure(
        png=_plot_pairs([a.prompt for a, _ in pairs], above, below),
        csv=dump_csv(records),
        facts={
            "top": baseline.title,
            "bottom": best.title,
            "scale": f"{scale:g}",
            "num_pairs": len(pairs),
        },
    )


def figure_5(counts: CountsByVariant, excluded: list[str]) -> PaperFigure:
    """Plot the object counts, each a mean over the runs of a variant."""
    if not counts:
        return PaperFigure(notes=excluded)
    rows = {variant.title: object_counts.mean_row(found) for variant, found in counts.items()}
    (detector,) = {row.protocol.rule.detector for row in rows.values()}
    return PaperFigure(
        png=to_png(object_counts.figure(rows)),
        csv=object_counts.table(rows),
        facts={"how": "exact analysis of the scenes" if detector == SCENES else detector},
        notes=excluded,
    )


def figure_6(found: "PreferenceResults | None") -> PaperFigure:
    """Plot preference scores; a model named by a variant's slug has the variant's colour."""
    if found is None:
        return PaperFigure()
    known = {variant.slug: variant for variant in VARIANTS}
    points = [
        Point(
            name=name,
            colour=VARIANTS.index(known[name]) if name in known else place,
            is_early=name in known and known[name].is_early,
            x=place,
            y=score.value,
            error=score.standard_error,
        )
        for place, (name, score) in enumerate(found.score.items())
    ]
    panel = Panel(
        title=f"Preference score, from 1 (last) to {len(points)} (first)",
        x_label="",
        y_label="score",
        points=points,
        places=tuple(textwrap.fill(p.name.replace("_", " "), _PLACE_WIDTH) for p in points),
    )
    return _panel_figure([panel], num_rankings=found.num_rankings)


def figure_7(sheet: Sheet) -> PaperFigure:
    """Plot early fusion, each half of intermediate fusion, and both halves.

    There are panels for each conditioning for which one half alone was trained.
    """
    halves = (v for v in sheet.variants if v.image_blocks != v.text_blocks)
    panels = []
    for conditioning in dict.fromkeys(variant.conditioning for variant in halves):
        variants = [Variant(conditioning, *blocks) for blocks in _HALVES]
        for metric in (quality_metric(sheet), PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION):
            panel = Panel(
                title=f"{metric.title}, {variants[0].path}",
                x_label="",
                y_label=metric.heading,
                points=[
                    _point(variant, place, mean)
                    for place, variant in enumerate(variants)
                    if (mean := sheet.mean(variant, metric))
                ],
                places=tuple(_HALVES.values()),
            )
            panels += [panel] if panel.points else []
    return _panel_figure(panels)


def figure_8(sheet: Sheet) -> PaperFigure:
    """Show the newest attention analysis of the first analysed run of each variant."""
    found = {v.title: s for v, runs in sheet.variants.items() if (s := _attention(runs))}
    if not found:
        return PaperFigure()
    protocol = next(iter(found.values())).protocol
    alike = {name: summary for name, summary in found.items() if summary.protocol == protocol}
    records: list[dict[str, object]] = [
        {
            "variant": variant,
            "layer": layer.name,
            "text_share": layer.text_share and layer.text_share.value,
            "effective_rank": layer.text.effective_rank if layer.text else None,
            "largest_singular_value": layer.text.singular_values[0] if layer.text else None,
        }
        for variant, summary in alike.items()
        for layer in summary.layers
    ]
    notes = [
        f"{name} was analysed with another protocol and is left out."
        for name in found
        if name not in alike
    ]
    return PaperFigure(png=to_png(attention_figure(alike)), csv=dump_csv(records), notes=notes)


def _point(variant: Variant, x: float, mean: SeedMean) -> Point:
    return Point(
        name=variant.title,
        colour=VARIANTS.index(variant),
        is_early=variant.is_early,
        x=x,
        y=mean.value,
        error=mean.error,
        values=mean.values,
    )


def _scale_of_pairs(sheet: Sheet, runs: Sequence[Run | None]) -> float | None:
    """Return the guidance scale nearest to the paper's at which all runs were evaluated."""
    step = sheet.reference.step if sheet.reference else None
    rows = [sheet.rows[run.name] if run else [] for run in runs]
    scales = [{row.protocol.guidance_scale for row in r if row.step == step} for r in rows]
    common = set.intersection(*scales)
    return min(common, key=lambda scale: abs(scale - _PAIRS_SCALE), default=None)


def _samples(sheet: Sheet, run: Run | None, scale: float | None) -> dict[str, Sample]:
    """Return file name => sample; equal names are equal positions in the evaluation."""
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


def _panel_figure(panels: list[Panel], **facts: object) -> PaperFigure:
    if not panels:
        return PaperFigure()
    records: list[dict[str, object]] = [
        {
            "panel": panel.title,
            "name": point.name,
            "x": panel.places[round(point.x)].replace("\n", " ") if panel.places else point.x,
            "x_error": point.x_error,
            "y": point.y,
            "y_error": point.error,
            "runs": len(point.values) or None,
            "label": point.label,
        }
        for panel in panels
        for point in panel.points
    ]
    return PaperFigure(png=_plot_panels(panels), csv=dump_csv(records), panels=panels, facts=facts)


def _plot_panels(panels: Sequence[Panel]) -> bytes:
    """Return a PNG of all panels, three in a row, with one legend."""
    num_columns = min(_COLUMNS, len(panels))
    num_lines = -(-len(panels) // num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_lines + 0.5)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = list(figure.subplots(num_lines, num_columns, squeeze=False).flat)
        handles = {}
        for axes, panel in zip(grid, panels, strict=False):
            _plot_panel(axes, panel)
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles[name] = handle
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
        return to_png(figure)


def _panel_svg(panel: Panel) -> str:
    """Return an SVG without a title; the page shows the title as text."""
    with house_style():
        figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
        axes = figure.add_subplot()
        _plot_panel(axes, panel)
        axes.set_title("")
        return to_svg(figure, _VARIABLES)


def _plot_panel(axes: Axes, panel: Panel) -> None:
    """Plot means with standard errors; early fusion is dashed and hollow, single runs are dots."""
    for name in dict.fromkeys(point.name for point in panel.points):
        points = [point for point in panel.points if point.name == name]
        colour = VARIANT_COLOURS[points[0].colour][0]
        axes.errorbar(
            [point.x for point in points],
            [point.y for point in points],
            [point.error for point in points],
            [point.x_error or 0.0 for point in points],
            color=colour,
            linestyle="" if panel.places else "--" if points[0].is_early else "-",
            linewidth=1.8,
            elinewidth=1.0,
            capsize=2,
            marker="o",
            markersize=5,
            markerfacecolor="none" if points[0].is_early else colour,
            label=literal(name),
        )
        for point in points if panel.places else ():
            x = [point.x + 0.14] * len(point.values)
            axes.plot(x, point.values, ".", color=colour, alpha=0.55)
        for point in (points[0], points[-1]):
            if point.label:
                place = (point.x, point.y)
                axes.annotate(point.label, place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, axis="y")
    if panel.places:
        axes.set_xticks(range(len(panel.places)), map(literal, panel.places), fontsize=9)
        axes.set_xlim(-0.5, len(panel.places) - 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _plot_pairs(captions: Sequence[str], top: Sequence[Pixels], bottom: Sequence[Pixels]) -> bytes:
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
            text = shorten(caption, 200)
            lines = textwrap.wrap(text, _CAPTION_WIDTH, max_lines=3, placeholder=" …")
            cells[0].set_title("\n".join(map(literal, lines)), fontsize=7)
        return to_png(figure)
