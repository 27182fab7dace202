"""Draws the panels of the paper's figures, and pictures of two models for the same captions."""

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ifvit import storage
from ifvit.analysis.attention_analysis import attention_figure
from ifvit.analysis.attention_maps import AttentionSummary, read_attention
from ifvit.evaluation.detectors import SCENES
from ifvit.evaluation.rows import FOLDER, MetricsRow, row_url, samples_url
from ifvit.evaluation.runs import Run, Sample, read_samples, step_files
from ifvit.figures import house_style, to_png, to_svg
from ifvit.images import Pixels
from ifvit.sampling.samples import read_images
from ifvit.studies.object_counts import figure as object_count_figure
from ifvit.studies.object_counts import table as object_count_table
from ifvit.studies.paper_claims import Counts
from ifvit.studies.paper_panels import Panel, Trace, figure_3, figure_6, figure_7, panel_records
from ifvit.studies.sheet import Sheet, series_of
from ifvit.studies.tables import to_csv
from ifvit.studies.variants import PAPER_SETTINGS, Setting

# In the order of SETTINGS: concat blue, cross-attention orange; early light, intermediate dark;
# then the halves of intermediate fusion. Dark pages have their own, see paper.html.
SETTING_COLOURS = (
    ("#7fb0f2", "#3f6fc0"),
    ("#1d4fb8", "#8db8ff"),
    ("#f0a35e", "#b3672a"),
    ("#b3480c", "#ffb784"),
    ("#1f9d7a", "#57cfab"),
    ("#8a55c8", "#b892f0"),
    ("#7a9a12", "#b5d14a"),
    ("#b4479c", "#e48bd0"),
)
"""Colour on light pages and on paper, and on dark pages."""

_VARIABLES = {light: f"run{number}" for number, (light, _) in enumerate(SETTING_COLOURS)}
_PANEL_SIZE = (4.6, 3.4)
_COLUMNS = 3
_CELL = 1.6
_CAPTION_WIDTH = 24


def panels_png(panels: Sequence[Panel]) -> bytes:
    """All panels in one picture, three in a row, with a legend."""
    num_columns = min(_COLUMNS, len(panels))
    num_lines = -(-len(panels) // num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_lines + 0.5)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(num_lines, num_columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        handles = {
            name: handle
            for axes in grid.flat
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
        return to_png(figure)


def panel_svg(panel: Panel) -> str:
    """One panel for the page, without a title: the page has it."""
    with house_style():
        figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, panel)
        axes.set_title("")
        return to_svg(figure, _VARIABLES)


def pairs_png(captions: Sequence[str], top: Sequence[Pixels], bottom: Sequence[Pixels]) -> bytes:
    """Two pictures (H, W, 3) per caption, one above the other, six captions in a row."""
    num_columns = min(6, len(captions))
    num_lines = -(-len(captions) // num_columns)
    with house_style():
        figure = Figure(
            figsize=(_CELL * num_columns, (2 * _CELL + 0.4) * num_lines), layout="constrained"
        )
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


def _draw(axes: Axes, panel: Panel) -> None:
    for trace in panel.traces:
        _draw_trace(axes, trace, connected=not panel.places)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, axis="y")
    if panel.places:
        axes.set_xticks(range(len(panel.places)), panel.places, fontsize=9)
        axes.set_xlim(-0.5, len(panel.places) - 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_trace(axes: Axes, trace: Trace, connected: bool) -> None:
    """Means with standard errors; early fusion dashed and hollow; single runs as small points."""
    if not trace.points:
        return
    colour = SETTING_COLOURS[trace.colour][0]
    line = "" if not connected else "--" if trace.is_early else "-"
    axes.errorbar(
        [point.x for point in trace.points],
        [point.y for point in trace.points],
        [point.error for point in trace.points],
        [point.x_error or 0.0 for point in trace.points],
        color=colour,
        linestyle=line,
        linewidth=1.8,
        elinewidth=1.0,
        capsize=2,
        marker="o",
        markersize=5,
        markerfacecolor="none" if trace.is_early else colour,
        label=trace.name,
    )
    for point in trace.points:
        if not connected:
            axes.plot(
                [point.x + 0.14] * len(point.values), point.values, ".", color=colour, alpha=0.55
            )
    for point in (trace.points[0], trace.points[-1]):
        if point.label:
            axes.annotate(
                point.label, (point.x, point.y), (4, 4), textcoords="offset points", fontsize=8
            )


if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_NUM_PAIRS = 12
_PAIRS_SCALE = 4.0  # "a CFG scale of 3"; the paper prints w - 1
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A figure as files, and on the page as `panels` (title, SVG) or as its PNG; or a `hole`."""

    name: str
    title: str
    text: str = ""
    """What is seen, below the title."""
    notes: list[str] = field(default_factory=list)
    hole: str | None = None
    """What is missing and how to make it."""
    panels: list[tuple[str, str]] = field(default_factory=list)
    legend: list[dict[str, object]] = field(default_factory=list)
    """Name and colour of what the panels show, where their axes do not say it."""
    png: bytes | None = None
    csv: bytes | None = None


def make_exhibits(
    sheet: Sheet,
    curves: Sheet,
    baseline: Setting,
    best: Setting,
    counts: Counts,
    preference: "PreferenceResults | None",
) -> list[Exhibit]:
    """All six in the paper's order; `curves` are the evaluations for Figure 3."""
    return [
        _curves(curves),
        _pairs(sheet, baseline, best),
        _counts(counts),
        _preference(preference),
        _ablation(sheet),
        _attention(sheet),
    ]


def _curves(sheet: Sheet) -> Exhibit:
    settings = [setting for setting in PAPER_SETTINGS if setting in sheet.settings]
    series = series_of(sheet.reference.protocol) if sheet.reference else ""
    return _panelled(
        "figure3",
        "Figure 3: during training, and under guidance",
        figure_3(sheet, settings),
        text=f"Evaluations {series}: means over a setting's runs with standard errors. Guidance w "
        "counts as in eps_uncond + w (eps_cond - eps_uncond); the paper prints w - 1.",
        hole="no run was evaluated at two steps or two guidance scales; run "
        "`ifvit evaluate --weights RUN --steps all --guidance_scales [1.5,3] …`",
    )


def _ablation(sheet: Sheet) -> Exhibit:
    return _panelled(
        "figure7",
        "Figure 7: each half of intermediate fusion alone",
        figure_7(sheet),
        text="Image blocks: text is fused in the middle blocks only. Text branch: text goes "
        "through blocks of its own first. Small points are single runs.",
        hole="no run has one half of intermediate fusion; train with "
        "`--backbone.num_image_blocks N --backbone.num_text_blocks 0` and with `0` and `1`",
    )


def _panelled(name: str, title: str, panels: list[Panel], *, text: str, hole: str) -> Exhibit:
    if not panels:
        return Exhibit(name=name, title=title, hole=hole)
    traces = {trace.name: trace.colour for panel in panels for trace in panel.traces}
    return Exhibit(
        name=name,
        title=title,
        text=text,
        panels=[(panel.title, panel_svg(panel)) for panel in panels],
        legend=[{"name": name, "colour": colour} for name, colour in traces.items()],
        png=panels_png(panels),
        csv=to_csv(panel_records(panels)),
    )


def _pairs(sheet: Sheet, baseline: Setting, best: Setting) -> Exhibit:
    """Captions drawn by chance among those that both runs drew; never chosen by eye."""
    name, title = "figure4", "Figure 4: the same captions and noise"
    scale = _scale_of_pairs(sheet, baseline, best)
    drawn = [_samples(sheet, setting, scale) for setting in (baseline, best)]
    if baseline == best or not all(drawn):
        hole = "no samples of two settings; run `ifvit evaluate --weights RUN …` for both"
        return Exhibit(name=name, title=title, hole=hole)
    top, bottom = drawn
    common = sorted(set(top) & set(bottom))
    chosen = random.Random(_SEED).sample(common, min(_NUM_PAIRS, len(common)))
    pairs = [(top[key], bottom[key]) for key in chosen]
    above, below = (read_images(s.image for s in line) for line in zip(*pairs, strict=True))
    records = [{"caption": a.prompt, "top": a.image, "bottom": b.image} for a, b in pairs]
    return Exhibit(
        name=name,
        title=title,
        text=f"Top: {baseline.title}, bottom: {best.title}, the first compared run of each, at "
        f"guidance w = {scale:g}; {len(pairs)} captions drawn at random with a fixed seed.",
        png=pairs_png([a.prompt for a, _ in pairs], list(above), list(below)),
        csv=to_csv(records),
    )


def _scale_of_pairs(sheet: Sheet, baseline: Setting, best: Setting) -> float | None:
    """Of the guidance scales that both runs were evaluated at, the nearest to the paper's."""
    runs = (_first_compared(sheet, setting) for setting in (baseline, best))
    scales = set.intersection(
        *({row.protocol.guidance_scale for row in _last(sheet, r)} for r in runs)
    )
    return min(scales, key=lambda scale: abs(scale - _PAIRS_SCALE), default=None)


def _samples(sheet: Sheet, setting: Setting, scale: float | None) -> dict[str, Sample]:
    """Samples by file name, which says position, of the setting's first compared run."""
    run = _first_compared(sheet, setting)
    if run is None or sheet.reference is None or scale is None:
        return {}
    protocol, step = sheet.reference.protocol, sheet.reference.step
    folder = storage.join(run.url, FOLDER)
    samples = read_samples(samples_url(row_url(folder, protocol.name, scale, step)))
    return {sample.image.rpartition("/")[2]: sample for sample in samples}


def _first_compared(sheet: Sheet, setting: Setting) -> Run | None:
    return next((run for run in sheet.settings[setting] if sheet.rows[run.name]), None)


def _last(sheet: Sheet, run: Run | None) -> list[MetricsRow]:
    """The run's rows at the step that is compared."""
    if run is None or sheet.reference is None:
        return []
    return [row for row in sheet.rows[run.name] if row.step == sheet.reference.step]


def _counts(counts: Counts) -> Exhibit:
    name, title = "figure5", "Figure 5: object count"
    if not counts.rows:
        hole = "no run has object counts; run `ifvit count-objects RUN… --prompts paper …`"
        return Exhibit(name=name, title=title, hole=hole, notes=counts.excluded)
    rows = counts.figure_rows()
    (detector,) = {row.protocol.rule.detector for row in rows.values()}
    how = "exact analysis of the scenes" if detector == SCENES else detector
    return Exhibit(
        name=name,
        title=title,
        text=f"Counted by {how}, where the paper asked people. Bars of several runs are "
        "their mean with its 95 % interval over runs, bars of one run have one over images.",
        notes=counts.excluded,
        png=to_png(object_count_figure(rows)),
        csv=object_count_table(rows).encode(),
    )


def _preference(found: "PreferenceResults | None") -> Exhibit:
    name, title = "figure6", "Figure 6: human preference"
    if found is None:
        hole = (
            "no study with rankings; run `ifvit rate create STUDY …`, let people rate, give --study"
        )
        return Exhibit(name=name, title=title, hole=hole)
    return _panelled(
        name,
        title,
        figure_6(found.score),
        text=f"{found.num_rankings} rankings by people; the order on the page was random. Standard "
        "errors from resampling raters and items.",
        hole="",
    )


def _attention(sheet: Sheet) -> Exhibit:
    name, title = "figure8", "Figure 8: where attention goes"
    found = [(s, summary) for s, runs in sheet.settings.items() if (summary := _summary(runs))]
    if not found:
        hole = "no run has an analysis; run `ifvit analyze attention RUN… --shards HELD_OUT`"
        return Exhibit(name=name, title=title, hole=hole)
    protocol = found[0][1].protocol
    alike = {s.title: summary for s, summary in found if summary.protocol == protocol}
    others = [s.title for s, summary in found if summary.protocol != protocol]
    records: list[dict[str, object]] = [
        {
            "setting": setting,
            "layer": layer.name,
            "text_share": layer.text_share.value,
            "effective_rank": layer.text.effective_rank if layer.text else None,
            "largest_singular_value": layer.text.singular_values[0] if layer.text else None,
        }
        for setting, summary in alike.items()
        for layer in summary.layers
    ]
    return Exhibit(
        name=name,
        title=title,
        text="Of the first analysed run of each setting: image-to-image maps, text-to-image maps, "
        "singular values of the latter, layer by layer.",
        notes=[f"{setting} was analysed otherwise and is left out." for setting in others],
        png=to_png(attention_figure(alike)),
        csv=to_csv(records),
    )


def _summary(runs: Sequence[Run]) -> AttentionSummary | None:
    """The newest analysis of the first run that has one."""
    for run in runs:
        files = step_files(storage.join(run.url, "analysis", "attention"), ".json")
        if files:
            return read_attention(files[-1][1])
    return None
