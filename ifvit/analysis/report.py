"""The verb `report`: run folders => one self-contained HTML page."""

import sys
from dataclasses import dataclass
from typing import Any

import yaml

from ifvit import storage
from ifvit.analysis.config import ReportConfig
from ifvit.analysis.curves import CURVES, NUM_COLOURS, draw_curve
from ifvit.analysis.page import inline, render
from ifvit.analysis.runs import Run, Sample, read_runs
from ifvit.analysis.tables import (
    history,
    metric_lines,
    protocol_lines,
    recipe_differences,
    setting_lines,
)
from ifvit.analysis.verdicts import METRICS, compare, mismatches
from ifvit.errors import UserError

_NUM_CAPTIONS = 24
_NUM_GRIDS = 6


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An inline image; `uri` None is a hole. `marks` say what is right about it.

    `colour` is the CSS variable of the run that drew it.
    """

    colour: str
    uri: str | None
    marks: dict[str, bool]


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One caption, its photograph if known, and what each run drew for it."""

    caption: str
    pictures: list[Picture]


def report(config: ReportConfig) -> None:
    """Write the page; what a run lacks is a named hole in it.

    Raises UserError for a folder that does not exist or a file that is broken.
    """
    if not config.runs:
        raise UserError("report: no runs given; name at least one run folder")
    runs = read_runs(config.runs)
    page = render(
        "report.html",
        title=config.title,
        runs=[{"name": run.name, "colour": n % NUM_COLOURS} for n, run in enumerate(runs)],
        settings=setting_lines(runs),
        metrics=metric_lines(runs),
        comparisons=[found for other in runs[1:] if (found := compare(runs[0], other))],
        protocol=protocol_lines(runs),
        mismatches=mismatches(runs),
        history=history(runs),
        metric_titles=[metric.title for metric in METRICS],
        curves=[(curve.title, draw_curve(curve, runs)) for curve in CURVES],
        has_real=any(sample.real for run in runs for sample in run.samples),
        captions=_caption_rows(runs),
        grids=[(run.name, _grid_pictures(run)) for run in runs],
        differences=recipe_differences(runs),
        recipes=[(run.name, _as_yaml(run.recipe)) for run in runs],
        holes=[hole for run in runs for hole in _holes(run)],
    )
    storage.write_bytes(config.output, page)
    sys.stdout.write(f"{config.output}\n")


def _caption_rows(runs: list[Run]) -> list[CaptionRow]:
    """The first captions that were drawn; each with every run's picture of that caption."""
    drawn = [{(s.image_id, s.prompt): s for s in run.samples} for run in runs]
    wanted = list(dict.fromkeys(key for samples in drawn for key in samples))[:_NUM_CAPTIONS]
    has_real = any(sample.real for run in runs for sample in run.samples)
    rows = []
    for key in wanted:
        found = [samples.get(key) for samples in drawn]
        real = next((sample.real for sample in found if sample and sample.real), None)
        pictures = [Picture(colour="muted", uri=_inline_if_there(real), marks={})]
        pictures = pictures if has_real else []
        pictures += [_picture(f"run{n % NUM_COLOURS}", sample) for n, sample in enumerate(found)]
        rows.append(CaptionRow(caption=key[1], pictures=pictures))
    return rows


def _picture(colour: str, sample: Sample | None) -> Picture:
    scores = (sample.scores if sample else None) or {}
    marks = {name: value for name, value in scores.items() if value is not None}
    uri = _inline_if_there(sample.image if sample else None)
    return Picture(colour=colour, uri=uri, marks=marks)


def _grid_pictures(run: Run) -> list[tuple[int, str]]:
    """(step, inline image) of grids drawn while training: first, last and some between."""
    grids = run.training_grids
    if len(grids) > _NUM_GRIDS:
        stride = (len(grids) - 1) / (_NUM_GRIDS - 1)
        grids = [grids[round(stride * number)] for number in range(_NUM_GRIDS)]
    return [(step, inline(url)) for step, url in grids]


def _holes(run: Run) -> list[str]:
    """What the page would show had the run the files for it."""
    wanted = {
        f"{run.url}/config.yaml: no recipe": run.recipe,
        f"{run.url}/metrics.jsonl: no training curve": run.curve,
        f"{run.url}/weights: no backbone, so no parameters and GFLOPs": run.backbone,
        f"{run.url}/samples: no pictures from training": run.training_grids,
        f"{run.url}/evaluation: not evaluated; run ifvit evaluate --weights {run.url}": run.last,
    }
    return [text for text, found in wanted.items() if not found]


def _as_yaml(recipe: dict[str, Any] | None) -> str | None:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None


def _inline_if_there(url: str | None) -> str | None:
    return inline(url) if url and storage.exists(url) else None
