"""Tables 1 and 2 of arXiv 2403.16530, our numbers beside the paper's.

`report paper` shows the tables on the page and writes the same numbers to CSV files.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ifvit.evaluation.rows import describe_field
from ifvit.evaluation.runs import Run
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

_CLIP = "clip-vit-large-patch14"
_FID_PROTOCOL = {
    "num_samples": 30_000,
    "caption_rule": "random",
    "guidance_scale": 2.0,
    "num_steps": 50,
    "method": "plain",
}
_CLIP_PROTOCOL = {**_FID_PROTOCOL, "score_caption": "first", "paper_prefix": "A photo depicts "}
_GPU, _BATCH_SIZE = "4090", 256


class _Column(NamedTuple):
    """A quantity of all variants; `differs` says why the paper's numbers are another quantity."""

    metric: Metric
    values: Mapping[str, SeedMean | float | None]
    differs: str | None = None


def table_1(sheet: Sheet) -> Table:
    """Return the four variants' numbers, the paper's, and their difference where comparable."""
    backbone = differs_in_backbone(sheet)
    fid, clip_score = differs_in_protocol(sheet)
    runs = sheet.variants
    params = {v: count_cost(backbone_of(r[0])).params / 1e6 for v, r in runs.items()}
    speeds = {v: iterations_per_s(r) for v, r in runs.items()}
    gflops = {v: gflops_of(r[0]) for v, r in runs.items()}
    columns = [
        _measured(sheet, FID, backbone or fid),
        *([_measured(sheet, FRECHET)] if sheet.has(FRECHET) else []),
        _measured(sheet, PAPER_CLIP_SCORE, backbone or clip_score),
        _Column(PARAMS, params, backbone),
        _Column(SPEED, speeds, backbone or differs_in_hardware(sheet)),
        _Column(GFLOPS, gflops, backbone),
    ]
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
        gflops = gflops_of(sheet.variants[variant][0])
        rows.append((f"ours, {name}", fusion, path, fid and fid.value, *found, gflops))
    keys = ("model", "fusion", "path", "fid", "clip_score_printed", "clip_score_raw", "gflops")
    reasons = differs_in_backbone(sheet), differs_in_protocol(sheet)[1]
    return Table(
        heads=["Model", "Fusion", "Path", "FID ↓", "CLIP Score ↑", "Raw cosine ↑", "GFLOPs ↓"],
        lines=[
            Line(
                title=str(row[0]),
                cells=[text_cell(x, "{:.4g}" if isinstance(x, float) else "{}") for x in row[1:]],
            )
            for row in rows
        ],
        records=[dict(zip(keys, row, strict=True)) for row in rows],
        notes=[f"Ours: {reason}." for reason in reasons if reason],
    )


def differs_in_backbone(sheet: Sheet) -> str | None:
    """Return how the backbones differ from the paper's; None if they do not."""
    free = {"init_std", "timestep_offset"}
    for variant, runs in sheet.variants.items():
        paper = vars(with_setting(PRESETS["small"], variant))
        expected = {name: value for name, value in paper.items() if name not in free}
        if found := _unlike(vars(backbone_of(runs[0])), expected):
            return f"{title_of(variant)}: {found}"
    return None


def differs_in_protocol(sheet: Sheet) -> tuple[str | None, str | None]:
    """Return how the protocol differs from the paper's, for FID and for CLIP Score."""
    if sheet.reference is None:
        return ("nothing was evaluated",) * 2
    ours = sheet.reference.protocol.facts
    clip_score = _unlike(ours, _CLIP_PROTOCOL)
    if not clip_score and not ours["features"].endswith(_CLIP):
        clip_score = f"scored by {ours['features']}, not by {_CLIP}"
    return _unlike(ours, _FID_PROTOCOL), clip_score


def _unlike(ours: Mapping[str, object], paper: Mapping[str, object]) -> str | None:
    found = [
        f"{describe_field(name)} {ours.get(name)!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours.get(name) != value
    ]
    return "; ".join(found) or None


def differs_in_hardware(sheet: Sheet) -> str | None:
    """Return how the GPU or the batch size differs from the paper's; None if both are equal."""
    names, sizes = devices(sheet), {run.batch_size for run in sheet.runs}
    if len(names) == 1 and _GPU in names[0] and sizes == {_BATCH_SIZE}:
        return None
    found = ", ".join(names) or "unknown hardware"
    return (
        f"{found} at batch {', '.join(map(str, sizes))} is not an RTX 4090 at batch {_BATCH_SIZE}"
    )


def devices(sheet: Sheet) -> list[str]:
    """Return the names of the training devices, from metrics.jsonl."""
    rows = (row for run in sheet.runs for row in run.curve)
    return sorted({row.device for row in rows})


def gflops_of(run: Run) -> float:
    """Return the GFLOPs of a forward pass, by the paper's convention without attention."""
    return count_cost(backbone_of(run)).layer_flops / 1e9


def iterations_per_s(runs: Sequence[Run]) -> float | None:
    """Return training steps per second: the mean over runs of the median over log lines.

    A pause hardly changes the median.
    """
    speeds = []
    for run in runs:
        rates = [row.samples_per_s for row in run.curve]
        if rates and run.batch_size:
            speeds.append(statistics.median(rates) / run.batch_size)
    return statistics.mean(speeds) if speeds else None


def _measured(sheet: Sheet, metric: Metric, differs: str | None = None) -> _Column:
    return _Column(metric, {v: sheet.mean(v, metric) for v in sheet.variants}, differs)


def _make_table(sheet: Sheet, variants: Sequence[str], columns: Sequence[_Column]) -> Table:
    cells = [_cells(column, variants) for column in columns]
    lines, records = [], []
    for variant in variants:
        runs = sheet.variants.get(variant, [])
        compared = sum(bool(sheet.rows[run.name]) for run in runs)
        count = Cell(
            text=str(len(runs)), note=f"{compared} compared" if compared < len(runs) else ""
        )
        lines.append(
            Line(title=title_of(variant), cells=[count, *(column[variant] for column in cells)])
        )
        record: dict[str, object] = {"variant": variant, "runs": len(runs)}
        for column in columns:
            record |= _record(column, variant)
        records.append(record)
    reasons: dict[str, list[str]] = {}
    for column in columns:
        if column.differs:
            reasons.setdefault(column.differs, []).append(column.metric.title)
    return Table(
        heads=["Variant", "Runs", *(column.metric.heading for column in columns)],
        lines=lines,
        records=records,
        notes=[f"{', '.join(titles)}: {reason}." for reason, titles in reasons.items()],
    )


def _cells(column: _Column, variants: Sequence[str]) -> dict[str, Cell]:
    """Return our numbers; beneath stand the paper's, and the difference where it has a meaning."""
    metric, values = column.metric, {variant: column.values.get(variant) for variant in variants}
    means = {v: value for v, value in values.items() if isinstance(value, SeedMean)}
    marked = metric_cells(metric, means)
    cells = {}
    for variant, value in values.items():
        number = value.value if isinstance(value, SeedMean) else value
        text = None if number is None else metric.show(number)
        cell = marked.get(variant, text_cell(text))
        if metric in PAPER_TABLE_1:
            paper = PAPER_TABLE_1[metric][variant]
            note = f"{cell.note}\npaper {paper:g}".lstrip()
            if number is not None and not column.differs:
                note += f", {'+' if number >= paper else '-'}{metric.show(abs(number - paper))}"
            cell = replace(cell, note=note)
        cells[variant] = cell
    return cells


def _record(column: _Column, variant: str) -> dict[str, object]:
    found, key = column.values.get(variant), column.metric.field
    mean = found if isinstance(found, SeedMean) else None
    record: dict[str, object] = {key: mean.value if mean else found}
    if column.metric in METRICS:
        record[f"{key}_seed_error"] = mean.seed_error if mean else None
        record[f"{key}_sample_error"] = mean.sample_error if mean else None
    if column.metric in PAPER_TABLE_1:
        record[f"{key}_paper"] = PAPER_TABLE_1[column.metric][variant]
    return record
