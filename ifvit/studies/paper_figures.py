"""Figures 3 to 8 of arXiv 2403.16530 from runs: first the numbers, then the plots.

`report paper` shows the figures on the page and writes each one as PNG and CSV.
"""

import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.figure import Figure

from ifvit import storage
from ifvit.analysis.attention_analysis import attention_figure, table_rows
from ifvit.analysis.attention_maps import AttentionSummary, read_attention
from ifvit.evaluation.detectors import SCENES
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import FOLDER, row_url, samples_url
from ifvit.evaluation.runs import Run, step_files
from ifvit.figures import RUN_COLOURS, house_style, literal, to_png
from ifvit.images import Pixels
from ifvit.records import dump_csv, shorten
from ifvit.sampling.samples import read_images, read_samples
from ifvit.studies.object_counts import count_panels
from ifvit.studies.page import Panel, Point, panels_to_csv, panels_to_png
from ifvit.studies.quantities import PAPER_CLIP_SCORE, SeedMean, mean_over_seeds
from ifvit.studies.variants import PAPER_VARIANTS, VARIANT_COLOURS, Sheet, title_of

if TYPE_CHECKING:  # a sheet without a rating study does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults

_CELL = 1.6
_CAPTION_WIDTH = 24
_PLACE_WIDTH = 12
_NUM_PAIRS = 12
_PAIRS_PER_LINE = 6
_PAIRS_SEED = 0
_HALVES = {
    "early": "none\n(early)",
    "image_blocks_only": "image\nblocks",
    "text_branch_only": "text\nbranch",
    "intermediate": "both",
}


class PaperFigure(NamedTuple):
    """A figure as PNG and CSV; both are None if the runs lack the data of the figure.

    `notes` are sentences about the runs.
    """

    png: bytes | None = None
    csv: bytes | None = None
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = ()


def figure_3(sheet: Sheet) -> PaperFigure:
    """Plot metrics over training steps, and quality over CLIP Score as guidance grows.

    Panels in which no variant has two points are left out. Evaluations of scenes get panels that
    the paper does not have.
    """
    variants, quality = [v for v in PAPER_VARIANTS if v in sheet.variants], sheet.metrics[0]
    shown_step, shown_scale = sheet.place
    panels = [
        Panel(
            title=f"{metric.title} during training",
            x_label="step",
            y_label=metric.heading,
            points=[
                _point(variant, step, mean)
                for variant in variants
                for (step, scale), mean in sheet.means(variant, metric).items()
                if scale == shown_scale
            ],
        )
        for metric in sheet.metrics
    ]
    guidance = Panel(
        title=f"{quality.title} over {PAPER_CLIP_SCORE.title}",
        x_label=PAPER_CLIP_SCORE.heading,
        y_label=quality.heading,
        points=[
            replace(_point(variant, scores[step, scale].value, mean), label=f"w={scale:g}")
            for variant in variants
            for scores in [sheet.means(variant, PAPER_CLIP_SCORE)]
            for (step, scale), mean in sheet.means(variant, quality).items()
            if step == shown_step
        ],
    )
    panels.insert(2, guidance)
    return _panel_figure([p for p in panels if len(p.points) > len({q.name for q in p.points})])


def figure_4(sheet: Sheet, baseline: str, best: str) -> PaperFigure:
    """Show images of two variants for captions that are sampled from those that both have."""
    top, bottom = (_samples(sheet, variant) for variant in (baseline, best))
    common = sorted(set(top) & set(bottom))
    if baseline == best or not common:
        return PaperFigure()
    chosen = random.Random(_PAIRS_SEED).sample(common, min(_NUM_PAIRS, len(common)))
    above, below = (list(read_images(found[key][1] for key in chosen)) for found in (top, bottom))
    captions = [top[key][0] for key in chosen]
    records: list[dict[str, object]] = [
        {"caption": top[key][0], "top": top[key][1], "bottom": bottom[key][1]} for key in chosen
    ]
    return PaperFigure(png=_plot_pairs(captions, above, below), csv=dump_csv(records))


def figure_5(counts: Mapping[str, Sequence[ObjectCountRow]], excluded: list[str]) -> PaperFigure:
    """Plot the object counts, each a mean over the runs of a variant."""
    rows = {title_of(variant): found for variant, found in counts.items()}
    colours = {title_of(variant): colour for variant, colour in VARIANT_COLOURS.items()}
    detectors = {row.protocol.rule.detector for found in counts.values() for row in found}
    how = [f"Counted by {'exact analysis' if d == SCENES else d}." for d in detectors]
    return _panel_figure(count_panels(rows, colours))._replace(notes=how + excluded)


def figure_6(found: "PreferenceResults | None") -> PaperFigure:
    """Plot preference scores; a model named by a variant has the variant's colour."""
    if found is None:
        return PaperFigure()
    points = [
        _point(name, place, mean_over_seeds([score]))
        for place, (name, score) in enumerate(found.score.items())
    ]
    panel = Panel(
        title=f"Score from 1 (last) to {len(points)} (first), {found.num_rankings} rankings",
        y_label="preference score",
        points=points,
        places=tuple(textwrap.fill(p.name.replace("_", " "), _PLACE_WIDTH) for p in points),
    )
    return _panel_figure([panel])


def figure_7(sheet: Sheet) -> PaperFigure:
    """Plot early fusion, each half of intermediate fusion, and both halves.

    There are panels for each mechanism for which one half alone was trained.
    """
    panels = []
    for mechanism in ("concat", "cross_attention"):
        variants = [f"{mechanism}_{half}" for half in _HALVES]
        if not {*variants[1:3]} & sheet.variants.keys():
            continue
        for metric in sheet.metrics:
            panel = Panel(
                title=f"{metric.title}, {mechanism.replace('_', '-')}",
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
    found = {title_of(v): s for v, runs in sheet.variants.items() if (s := _attention(runs))}
    if not found:
        return PaperFigure()
    protocol = next(iter(found.values())).protocol
    alike = {name: summary for name, summary in found.items() if summary.protocol == protocol}
    notes = [
        f"{name} was analysed with another protocol and is left out."
        for name in found
        if name not in alike
    ]
    return PaperFigure(
        png=to_png(attention_figure(alike)), csv=dump_csv(table_rows(alike)), notes=notes
    )


def _point(name: str, x: float, mean: SeedMean) -> Point:
    """Return a mean with its standard error, in the colour of the variant `name` if it is one."""
    return Point(
        name=title_of(name) if name in VARIANT_COLOURS else name,
        colour=VARIANT_COLOURS.get(name, round(x) % len(RUN_COLOURS)),
        is_hollow=name.endswith("_early"),
        x=x,
        y=mean.value,
        low=mean.value - mean.error,
        high=mean.value + mean.error,
        values=mean.values,
    )


def _panel_figure(panels: list[Panel]) -> PaperFigure:
    if not panels:
        return PaperFigure()
    return PaperFigure(png=panels_to_png(panels), csv=panels_to_csv(panels), panels=panels)


def _samples(sheet: Sheet, variant: str) -> dict[str, tuple[str, str]]:
    """Return file name => prompt and URL, of the variant's first run that is compared.

    Equal names are equal positions in the evaluation.
    """
    row = sheet.reference
    run = next((run for run in sheet.variants[variant] if sheet.is_compared(run)), None)
    if row is None or run is None:
        return {}
    evaluations, scale = storage.join(run.url, FOLDER), row.protocol.guidance_scale
    folder = samples_url(row_url(evaluations, row.protocol.name, scale, row.step))
    samples = read_samples(folder)
    return {s.file: (s.prompt, run.locate(storage.join(folder, s.file))) for s in samples}


def _attention(runs: Sequence[Run]) -> AttentionSummary | None:
    """Return the newest analysis of the first run that has one."""
    for run in runs:
        files = step_files(storage.join(run.url, "analysis", "attention"), ".json")
        if files:
            return read_attention(files[-1][1])
    return None


def _plot_pairs(captions: Sequence[str], top: Sequence[Pixels], bottom: Sequence[Pixels]) -> bytes:
    """Return a PNG with two images (H, W, 3) per caption, one above the other, six in a row."""
    num_columns = min(_PAIRS_PER_LINE, len(captions))
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
