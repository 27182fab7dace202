"""Tables 1 and 2 of arXiv 2403.16530, our numbers beside the paper's.

`report paper` shows the tables on the page and writes the same numbers to CSV files.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    find_best,
)
from ifvit.studies.report import Cell, Line
from ifvit.studies.variants import PAPER_VARIANTS, Sheet, Variant, backbone_of

_CLIP_SCALE = 2.5
"""Factor of the paper's CLIP Score, 2.5 max(cosine, 0). The paper's code has it, its text not."""

PAPER_TABLE_1: dict[str, dict[Variant, float]] = {
    key: dict(zip(PAPER_VARIANTS, numbers, strict=True))
    for key, numbers in {
        "fid": (5.98, 5.77, 6.48, 5.68),
        "clip_score_paper": (0.584, 0.588, 0.575, 0.588),
        "mparams": (45, 48, 45, 48),  # millions of parameters
        "iterations_per_s": (1.81, 2.31, 2.54, 2.74),
        "gflops": (29.56, 25.84, 23.82, 23.66),  # without the products inside attention
    }.items()
}

_FOUNDATION_MODELS = (
    ("DALLE 3", None, "0.320"),
    ("Imagen", 7.27, "~0.29"),
    ("Stable Diffusion", 8.59, "0.325"),
    ("SDXL", None, "0.305"),
)
"""Models in Table 2, all early fusion by cross-attention: name, zero-shot FID, raw CLIP Score."""

_PAPER_MODELS = {"U-ViT-Small": PAPER_VARIANTS[0], "IF-U-ViT": PAPER_VARIANTS[3]}
"""The paper's own models in Table 2, whose CLIP Scores are on the paper's scale."""

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


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for the page, and the same numbers with all their digits for a CSV file."""

    heads: list[str]
    lines: list[Line]
    records: list[dict[str, object]]
    notes: list[str]
    """Reasons why numbers cannot be compared with the paper's."""


class _Column(NamedTuple):
    """A quantity of all variants: a SeedMean where it has noise, else a float."""

    key: str
    title: str
    values: Mapping[Variant, SeedMean | float | None]
    show: Callable[[float], str]
    differs: str | None = None
    """Why our numbers cannot be compared with the paper's; None if they can."""
    metric: Metric | None = None


def table_1(sheet: Sheet) -> Table:
    """Return the four variants' numbers, the paper's, and their difference where comparable."""
    backbone = differs_in_backbone(sheet)
    clip_score = differs_in_protocol(sheet, _CLIP_PROTOCOL, with_clip=True)
    params = {v: count_cost(backbone_of(r[0])).params / 1e6 for v, r in sheet.variants.items()}
    speeds = {variant: iterations_per_s(runs) for variant, runs in sheet.variants.items()}
    gflops = {variant: gflops_of(runs[0]) for variant, runs in sheet.variants.items()}
    show_two = "{:.2f}".format
    show_gflops = show_two if min(gflops.values()) >= 1 else "{:.4f}".format
    hardware = differs_in_hardware(sheet)
    columns = [
        _metric_column(sheet, FID, "FID ↓", backbone or differs_in_protocol(sheet, _FID_PROTOCOL)),
        *([_metric_column(sheet, FRECHET)] if sheet.has(FRECHET) else []),
        _metric_column(sheet, PAPER_CLIP_SCORE, "CLIP Score ↑", backbone or clip_score),
        _Column("mparams", "Parameters, M", params, show_two, backbone),
        _Column("iterations_per_s", "Training it/s ↑", speeds, show_two, backbone or hardware),
        _Column("gflops", "GFLOPs ↓", gflops, show_gflops, backbone),
    ]
    return _make_table(sheet, PAPER_VARIANTS, columns)


def table_further(sheet: Sheet) -> Table | None:
    """Return the metrics that the paper did not measure; None if none of them was measured."""
    in_table_1 = (FID, FRECHET, PAPER_CLIP_SCORE, CLIP_SCORE)
    metrics = [metric for metric in METRICS if metric not in in_table_1 and sheet.has(metric)]
    columns = [_metric_column(sheet, metric) for metric in metrics]
    return _make_table(sheet, list(sheet.variants), columns) if columns else None


def table_2(sheet: Sheet, ours: Mapping[str, Variant]) -> Table:
    """Return the paper's Table 2 followed by our variants `ours`, a map from name to variant."""
    rows: list[tuple[object, ...]] = [
        (f"{name}, as the paper cites it", "early", "cross-attention", fid, score, score, None)
        for name, fid, score in _FOUNDATION_MODELS
    ]
    for name, variant in _PAPER_MODELS.items():
        paper = {key: numbers[variant] for key, numbers in PAPER_TABLE_1.items()}
        score = paper["clip_score_paper"]
        scores = f"{score:.3f}", f"{score / _CLIP_SCALE:.3f}"
        head = (f"{name}, the paper's own", variant.fusion, variant.path)
        rows.append((*head, paper["fid"], *scores, paper["gflops"]))
    for name, variant in ours.items():
        fid, *means = (sheet.mean(variant, m) for m in (FID, PAPER_CLIP_SCORE, CLIP_SCORE))
        found = [f"{mean.value:.3f}" if mean else None for mean in means]
        head = (f"ours, {name}", variant.fusion, variant.path)
        rows.append((*head, fid and fid.value, *found, gflops_of(sheet.variants[variant][0])))
    keys = ("model", "fusion", "path", "fid", "clip_score_printed", "clip_score_raw", "gflops")
    clip_score = differs_in_protocol(sheet, _CLIP_PROTOCOL, with_clip=True)
    reasons = differs_in_backbone(sheet), clip_score
    return Table(
        heads=["Model", "Fusion", "Path", "FID ↓", "CLIP Score ↑", "Raw cosine ↑", "GFLOPs ↓"],
        lines=[Line(title=str(row[0]), cells=list(map(_plain_cell, row[1:]))) for row in rows],
        records=[dict(zip(keys, row, strict=True)) for row in rows],
        notes=[f"Ours: {reason}." for reason in reasons if reason],
    )


def differs_in_backbone(sheet: Sheet) -> str | None:
    """Return how the backbones differ from the paper's; None if they do not."""
    paper = PRESETS["small"]
    for variant, runs in sheet.variants.items():
        ours = backbone_of(runs[0])
        expected = replace(
            with_setting(paper, variant.slug),
            init_std=ours.init_std,
            timestep_offset=ours.timestep_offset,
        )
        if ours != expected:
            return (
                f"a backbone of width {ours.width} and depth {ours.depth} on latents of "
                f"{ours.latent_size} x {ours.latent_size} is not the paper's"
            )
    return None


def differs_in_protocol(
    sheet: Sheet, paper: Mapping[str, object], *, with_clip: bool = False
) -> str | None:
    """Return how the protocol differs from the fields `paper`; None if it does not.

    With `with_clip`, the CLIP model must be the paper's, too.
    """
    if sheet.reference is None:
        return "nothing was evaluated"
    ours = sheet.reference.protocol.facts
    found = [
        f"{describe_field(name)} {ours.get(name)!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours.get(name) != value
    ]
    if with_clip and not found and not ours["features"].endswith(_CLIP):
        return f"scored by {ours['features']}, not by {_CLIP}"
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


def _metric_column(
    sheet: Sheet, metric: Metric, title: str | None = None, differs: str | None = None
) -> _Column:
    values = {variant: sheet.mean(variant, metric) for variant in sheet.variants}
    heading = title or metric.heading
    return _Column(metric.field, heading, values, metric.show, differs, metric)


def _make_table(sheet: Sheet, variants: Sequence[Variant], columns: Sequence[_Column]) -> Table:
    best = {}
    for column in columns:
        values = {variant: column.values.get(variant) for variant in variants}
        means = {v: mean for v, mean in values.items() if isinstance(mean, SeedMean)}
        best[column.key] = find_best(column.metric, means) if column.metric else None
    lines, records = [], []
    for variant in variants:
        runs = sheet.variants.get(variant, [])
        compared = sum(bool(sheet.rows[run.name]) for run in runs)
        note = f"{compared} compared" if compared < len(runs) else ""
        cells = [Cell(text=str(len(runs)), note=note)]
        record: dict[str, object] = {"variant": variant.slug, "runs": len(runs)}
        for column in columns:
            cells.append(_cell(column, variant, is_best=best[column.key] == variant))
            record |= _record(column, variant)
        lines.append(Line(title=variant.title, cells=cells))
        records.append(record)
    reasons: dict[str, list[str]] = {}
    for column in columns:
        if column.differs:
            reasons.setdefault(column.differs, []).append(column.title.rstrip(" ↑↓"))
    return Table(
        heads=["Variant", "Runs", *(column.title for column in columns)],
        lines=lines,
        records=records,
        notes=[f"{', '.join(titles)}: {reason}." for reason, titles in reasons.items()],
    )


def _cell(column: _Column, variant: Variant, *, is_best: bool) -> Cell:
    found = column.values.get(variant)
    value = found.value if isinstance(found, SeedMean) else found
    notes = [f"± {column.show(found.error)}"] if isinstance(found, SeedMean) else []
    if column.key in PAPER_TABLE_1:
        paper = PAPER_TABLE_1[column.key][variant]
        notes.append(f"paper {paper:g}")
        if value is not None and not column.differs:
            sign = "+" if value >= paper else "-"
            notes[-1] += f", {sign}{column.show(abs(value - paper))}"
    text = {} if value is None else {"text": column.show(value)}
    return Cell(**text, note="\n".join(notes), is_best=is_best)


def _record(column: _Column, variant: Variant) -> dict[str, object]:
    found = column.values.get(variant)
    mean = found if isinstance(found, SeedMean) else None
    record: dict[str, object] = {column.key: mean.value if mean else found}
    if column.metric:
        record[f"{column.key}_seed_error"] = mean.seed_error if mean else None
        record[f"{column.key}_sample_error"] = mean.sample_error if mean else None
    if column.key in PAPER_TABLE_1:
        record[f"{column.key}_paper"] = PAPER_TABLE_1[column.key][variant]
    return record


def _plain_cell(value: object) -> Cell:
    if value is None:
        return Cell()
    return Cell(text=f"{value:.4g}" if isinstance(value, float) else str(value))
