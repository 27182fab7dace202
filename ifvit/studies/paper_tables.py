"""Tables 1 and 2 of arXiv 2403.16530, our numbers beside the paper's.

`report paper` shows the tables on the page and writes the same numbers to CSV files.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ifvit.evaluation.rows import describe_field
from ifvit.models.config import PRESETS, with_setting
from ifvit.models.cost import count_cost
from ifvit.studies.comparisons import (
    CLIP_SCORE,
    FID,
    FRECHET,
    METRICS,
    PAPER_CLIP_SCORE,
    Metric,
    SeedMean,
)
from ifvit.studies.page import Cell, Line, Table, metric_cells, text_cell
from ifvit.studies.variants import PAPER_VARIANTS, Sheet, backbone_of, describe, title_of

PARAMS = Metric(field="mparams", title="Parameters, M", digits=2)
SPEED = Metric(field="iterations_per_s", title="Training it/s", digits=2)
GFLOPS = Metric(field="gflops", title="GFLOPs", digits=3)
"""Products inside attention are left out, as in the paper."""

PAPER_TABLE_1: dict[Metric, dict[str, float]] = {
    metric: dict(zip(PAPER_VARIANTS, numbers, strict=True))
    for metric, numbers in {
        FID: (5.98, 5.77, 6.48, 5.68),
        PAPER_CLIP_SCORE: (0.584, 0.588, 0.575, 0.588),
        PARAMS: (45, 48, 45, 48),
        SPEED: (1.81, 2.31, 2.54, 2.74),
        GFLOPS: (29.56, 25.84, 23.82, 23.66),
    }.items()
}

_CITED = ", as the paper cites it"
_PAPER_TABLE_2 = (  # model, fusion, path, zero-shot FID, CLIP Score as printed, raw cosine, GFLOPs
    (f"DALLE 3{_CITED}", "early", "cross-attention", None, "0.320", "0.320", None),
    (f"Imagen{_CITED}", "early", "cross-attention", 7.27, "~0.29", "~0.29", None),
    (f"Stable Diffusion{_CITED}", "early", "cross-attention", 8.59, "0.325", "0.325", None),
    (f"SDXL{_CITED}", "early", "cross-attention", None, "0.305", "0.305", None),
    # 2.5 max(cosine, 0): the paper's code has the factor, its text has not.
    ("U-ViT-Small, the paper's own", "early", "concat", 5.98, "0.584", "0.234", 29.56),
    ("IF-U-ViT, the paper's own", "intermediate", "cross-attention", 5.68, "0.588", "0.235", 23.66),
)

_PROTOCOL: dict[str, object] = {
    "num_samples": 30_000,
    "caption_rule": "random",
    "guidance_scale": 2.0,
    "num_steps": 50,
    "method": "plain",
    "score_caption": "first",
    "paper_prefix": "A photo depicts ",
    "features": "openai/clip-vit-large-patch14",
}
_GPU = "NVIDIA GeForce RTX 4090"
_FREE = {"init_std", "timestep_offset"}
"""Fields of a backbone that do not change what is compared."""


class _Column(NamedTuple):
    """A quantity of all variants: a mean where it has noise."""

    metric: Metric
    values: Mapping[str, SeedMean | float | None]


def table_1(sheet: Sheet) -> Table:
    """Return the numbers of the four variants beside the paper's."""
    metrics = [FID, FRECHET, PAPER_CLIP_SCORE] if sheet.has(FRECHET) else [FID, PAPER_CLIP_SCORE]
    columns = [_measured(sheet, metric) for metric in metrics]
    columns += [_Column(metric, values) for metric, values in costs(sheet).items()]
    return _make_table(sheet, PAPER_VARIANTS, columns)


def table_further(sheet: Sheet) -> Table | None:
    """Return the metrics that the paper did not measure; None if none of them was measured."""
    in_table_1 = (FID, FRECHET, PAPER_CLIP_SCORE, CLIP_SCORE)
    metrics = [metric for metric in METRICS if metric not in in_table_1 and sheet.has(metric)]
    columns = [_measured(sheet, metric) for metric in metrics]
    return _make_table(sheet, list(sheet.variants), columns) if columns else None


def table_2(sheet: Sheet, ours: Mapping[str, str]) -> Table:
    """Return the paper's Table 2 followed by our variants `ours`, a map from name to variant."""
    rows: list[tuple[object, ...]] = list(_PAPER_TABLE_2)
    for name, variant in ours.items():
        path, fusion = describe(variant)
        fid, *means = (sheet.mean(variant, m) for m in (FID, PAPER_CLIP_SCORE, CLIP_SCORE))
        found = [f"{mean.value:.3f}" if mean else None for mean in means]
        gflops = costs(sheet)[GFLOPS][variant]
        rows.append((f"ours, {name}", fusion, path, fid and fid.value, *found, gflops))
    keys = ("model", "fusion", "path", "fid", "clip_score_printed", "clip_score_raw", "gflops")
    return Table(
        heads=["Model", "Fusion", "Path", "FID ↓", "CLIP Score ↑", "Raw cosine ↑", "GFLOPs ↓"],
        lines=[
            Line(
                str(row[0]),
                [text_cell(x, "{:.4g}" if isinstance(x, float) else "{}") for x in row[1:]],
            )
            for row in rows
        ],
        records=[dict(zip(keys, row, strict=True)) for row in rows],
    )


def unlike_the_paper(sheet: Sheet) -> list[str]:
    """Return sentences on how our backbones, evaluation and training differ from the paper's."""
    ours: dict[str, object] = {"evaluated": sheet.reference is not None}
    paper: dict[str, object] = {"evaluated": True}
    if sheet.reference:
        ours, paper = sheet.reference.protocol.facts, _PROTOCOL
    found = [_unlike("evaluation", ours, paper)]
    backbones = []
    for variant, runs in sheet.variants.items():
        backbone = vars(with_setting(PRESETS["small"], variant))
        expected = {name: value for name, value in backbone.items() if name not in _FREE}
        backbones.append(_unlike(title_of(variant), vars(backbone_of(runs[0])), expected))
    found += [sentence for sentence in backbones if sentence][:1]  # all differ alike
    ours = {"devices": devices(sheet), "batch": sorted({run.batch_size or 0 for run in sheet.runs})}
    found.append(_unlike("training", ours, {"devices": [_GPU], "batch": [256]}))
    return [sentence for sentence in found if sentence]


def _unlike(what: str, ours: Mapping[str, object], paper: Mapping[str, object]) -> str | None:
    found = [
        f"{describe_field(name)} {ours.get(name)!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours.get(name) != value
    ]
    return f"{what}: {'; '.join(found)}" if found else None


def devices(sheet: Sheet) -> list[str]:
    """Return the names of the training devices, from metrics.jsonl."""
    rows = (row for run in sheet.runs for row in run.curve)
    return sorted({row.device for row in rows})


def costs(sheet: Sheet) -> dict[Metric, dict[str, float | None]]:
    """Return what the variants cost: parameters, training speed and operations.

    The speed is the mean over runs of the median over log lines, which a pause hardly changes.
    """
    found: dict[Metric, dict[str, float | None]] = {PARAMS: {}, SPEED: {}, GFLOPS: {}}
    for variant, runs in sheet.variants.items():
        cost = count_cost(backbone_of(runs[0]))
        found[PARAMS][variant] = cost.params / 1e6
        found[GFLOPS][variant] = cost.layer_flops / 1e9
        speeds = [
            statistics.median(row.samples_per_s for row in run.curve) / run.batch_size
            for run in runs
            if run.curve and run.batch_size
        ]
        found[SPEED][variant] = statistics.mean(speeds) if speeds else None
    return found


def _measured(sheet: Sheet, metric: Metric) -> _Column:
    return _Column(metric, {v: sheet.mean(v, metric) for v in sheet.variants})


def _make_table(sheet: Sheet, variants: Sequence[str], columns: Sequence[_Column]) -> Table:
    counts = {}
    for variant in variants:
        runs = sheet.variants.get(variant, [])
        compared = sum(map(sheet.is_compared, runs))
        counts[variant] = Cell(str(len(runs)), f"{compared} compared" * (compared < len(runs)))
    cells = [counts, *(_cells(column, variants) for column in columns)]
    return Table(
        heads=["Variant", "Runs", *(column.metric.heading for column in columns)],
        lines=[Line(title_of(v), [column[v] for column in cells]) for v in variants],
        records=[_record(column, v) for v in variants for column in columns],
    )


def _cells(column: _Column, variants: Sequence[str]) -> dict[str, Cell]:
    """Return our numbers, with the paper's beneath."""
    metric, values = column.metric, {variant: column.values.get(variant) for variant in variants}
    means = {v: value for v, value in values.items() if isinstance(value, SeedMean)}
    marked = metric_cells(metric, means)
    cells = {}
    for variant, value in values.items():
        number = value.value if isinstance(value, SeedMean) else value
        cell = marked.get(variant, text_cell(None if number is None else metric.show(number)))
        if metric in PAPER_TABLE_1:
            note = f"{cell.note}\npaper {PAPER_TABLE_1[metric][variant]:g}".lstrip()
            cell = cell._replace(note=note)
        cells[variant] = cell
    return cells


def _record(column: _Column, variant: str) -> dict[str, object]:
    found = column.values.get(variant)
    mean = found if isinstance(found, SeedMean) else None
    return {
        "variant": variant,
        "quantity": column.metric.field,
        "value": mean.value if mean else found,
        "seed_error": mean and mean.seed_error,
        "sample_error": mean and mean.sample_error,
        "runs": mean and len(mean.values),
        "paper": PAPER_TABLE_1.get(column.metric, {}).get(variant),
    }
