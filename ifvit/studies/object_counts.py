"""The verb `count-objects`, its figure and its table."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ifvit import storage
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.evaluation.config import ObjectCountConfig
from ifvit.evaluation.detectors import open_counter
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.object_count import (
    CountScore,
    ObjectCountRow,
    count_objects,
    differences,
    draw_objects,
    object_count_folder,
)
from ifvit.evaluation.object_prompts import read_count_prompts
from ifvit.evaluation.runs import short_names
from ifvit.figures import INK, house_style, to_png

# Light for early fusion, dark for intermediate, between them for one half of it alone.
_COLOURS = {
    "concat": ("#a6cbe8", "#5c9bcb", "#1f5f99"),
    "cross_attention": ("#f7c59f", "#e58e4d", "#b3541e"),
}
_OTHER = ("#9aa0a8",) * 3
_HATCHES = ("", "///", "...", "xxx")
_GROUP_WIDTH = 0.8
_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class _Style:
    label: str
    colour: str
    hatch: str


def figure(rows_by_run: Mapping[str, ObjectCountRow]) -> Figure:
    """All runs side by side. Raises UserError for rows that do not compare."""
    _require_one_protocol(rows_by_run)
    with house_style():
        return _draw(rows_by_run)


def _draw(rows_by_run: Mapping[str, ObjectCountRow]) -> Figure:
    rows = list(rows_by_run.values())
    styles = _choose_styles(rows_by_run)
    objects, counts = rows[0].objects, rows[0].asked_counts
    num_lines = max(2, -(-len(objects) // (_COLUMNS - 1)))
    drawing = Figure(figsize=(12, 1 + 2.8 * num_lines), layout="constrained")
    grid = drawing.add_gridspec(num_lines, _COLUMNS)
    shared: Axes | None = None
    for index, name in enumerate(objects):
        line, column = divmod(index, _COLUMNS - 1)
        axes = drawing.add_subplot(grid[line, column], sharey=shared)
        shared = shared or axes
        scores = [[row.score(name, count) for count in counts] for row in rows]
        _draw_bars(axes, scores, styles, "average_error")
        _label(axes, name, list(map(str, counts)), "asked count", "average error")
    for line, (quantity, title) in enumerate(
        (("average_error", "average error"), ("match_ratio", "match ratio"))
    ):
        axes = drawing.add_subplot(grid[line, _COLUMNS - 1])
        scores = [[row.score(name) for name in objects] for row in rows]
        _draw_bars(axes, scores, styles, quantity)
        _label(axes, f"{title}, all counts", objects, "", title)
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return drawing


def table(rows_by_run: Mapping[str, ObjectCountRow]) -> str:
    """CSV text: a line per run, object and asked count; empty object or count: all of them."""
    buffer = io.StringIO()
    estimates = ("average_error", "match_ratio")
    heads = ["run", "weights", "step", "object", "asked", "num_images"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [*heads, *(f"{name}{end}" for name in estimates for end in ("", "_low", "_high"))]
    )
    for run, row in rows_by_run.items():
        for score in row.scores:
            found = [getattr(score, name) for name in estimates]
            numbers = [f"{n:.4f}" for one in found for n in (one.value, one.low, one.high)]
            of = [run, row.weights, row.step, score.object, score.asked]
            writer.writerow([*of, score.match_ratio.num_samples, *numbers])
    return buffer.getvalue()


def _require_one_protocol(rows_by_run: Mapping[str, ObjectCountRow]) -> None:
    (first, row), *others = rows_by_run.items()
    for name, other in others:
        differing = differences(row.protocol, other.protocol)
        if differing:
            raise UserError(
                f"object counts of {first} and {name} differ in {', '.join(differing)}; "
                "count both with the same settings"
            )


def _choose_styles(rows_by_run: Mapping[str, ObjectCountRow]) -> list[_Style]:
    """Colour by setting; runs of the same setting (seeds, steps) get different hatches."""
    seen: Counter[str] = Counter()
    styles = []
    for name, row in rows_by_run.items():
        shape = row.backbone
        darkness = sum(bool(shape.get(key)) for key in ("num_image_blocks", "num_text_blocks"))
        colour = _COLOURS.get(shape.get("conditioning", ""), _OTHER)[darkness]
        hatch = _HATCHES[seen[colour] % len(_HATCHES)]
        seen[colour] += 1
        styles.append(_Style(label=name, colour=colour, hatch=hatch))
    return styles


def _draw_bars(
    axes: Axes,
    scores: Sequence[Sequence[CountScore | None]],
    styles: Sequence[_Style],
    quantity: str,
) -> None:
    """A group of bars per place, in it a bar per run; `scores` is runs x places."""
    width = _GROUP_WIDTH / len(styles)
    for index, (style, line) in enumerate(zip(styles, scores, strict=True)):
        places = [place for place, score in enumerate(line) if score]
        found: list[Estimate] = [getattr(score, quantity) for score in line if score]
        axes.bar(
            [place + (index - (len(styles) - 1) / 2) * width for place in places],
            [one.value for one in found],
            width,
            label=style.label,
            color=style.colour,
            hatch=style.hatch,
            edgecolor="white",
            # Rounding may put the end of an interval past its value.
            yerr=[
                [max(0.0, one.value - one.low) for one in found],
                [max(0.0, one.high - one.value) for one in found],
            ],
            capsize=1.5,
            error_kw={"elinewidth": 0.9, "ecolor": INK},
        )


def _label(axes: Axes, title: str, places: list[str], x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, axis="y")


def count_objects_of_runs(config: ObjectCountConfig) -> dict[str, ObjectCountRow]:
    """Draw what is not drawn yet, count, write rows, object_count.png and .csv; rows by run.

    Of several processes (torchrun, srun) each draws a share, and the last to finish counts; the
    others return no rows. Raises UserError for prompts or objects that cannot be counted before
    anything is drawn.
    """
    prompts = read_count_prompts(config.prompts)
    counter = open_counter(config.detector, config.threshold, choose_device(config.device))
    counter.check(prompt.object for prompt in prompts)
    runs = dict(zip(short_names(config.runs), config.runs, strict=True))
    drawn = {
        name: draw_objects(
            config,
            run,
            prompts,
            storage.join(config.output, name) if config.output else object_count_folder(run),
        )
        for name, run in runs.items()
    }
    if not all(images.is_complete for images in drawn.values()):
        sys.stdout.write("the last process to finish drawing counts\n")
        return {}
    rows = {name: count_objects(config, images, prompts, counter) for name, images in drawn.items()}
    _write(config.output or "runs/object_count", rows)
    return rows


def _write(folder: str, rows: Mapping[str, ObjectCountRow]) -> None:
    url = storage.join(folder, "object_count.png")
    storage.write_bytes(url, to_png(figure(rows)))
    storage.write_bytes(storage.join(folder, "object_count.csv"), table(rows).encode())
    width = max(map(len, rows))
    for name, row in rows.items():
        overall = row.scores[0]
        numbers = _format(overall.average_error), _format(overall.match_ratio)
        sys.stdout.write(f"{name:{width}}  average error {numbers[0]}  match ratio {numbers[1]}\n")
    sys.stdout.write(f"{url}\n")


def _format(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
