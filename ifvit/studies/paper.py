"""The verb `report paper`: run folders => tables and figures of arXiv 2403.16530."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import Run, read_runs
from ifvit.models.cost import count_cost
from ifvit.models.presets import PRESETS, with_setting
from ifvit.records import dump_csv
from ifvit.studies import paper_figures
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import read_counts
from ifvit.studies.page import Cell, Line, Table, inline_image, metric_cells, render_page, text_cell
from ifvit.studies.quantities import (
    CLIP_SCORE,
    FID,
    FRECHET,
    METRICS,
    PAPER_CLIP_SCORE,
    Metric,
    SeedMean,
    mean_over_seeds,
)
from ifvit.studies.report import recipe_differences
from ifvit.studies.variants import (
    PAPER_VARIANTS,
    VARIANT_COLOURS,
    Sheet,
    backbone_of,
    make_sheet,
    title_of,
)

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.fusion", "backbone.num_text_blocks")

PARAMS = Metric(field="mparams", title="Parameters, M", digits=2)
SPEED = Metric(field="iterations_per_s", title="Training it/s", digits=2)
GFLOPS = Metric(field="gflops", title="GFLOPs", digits=3)
"""Products inside attention are left out, as in the paper."""
_COSTS = (PARAMS, SPEED, GFLOPS)

_PAPER_TABLE_1: dict[Metric, dict[str, float]] = {
    metric: dict(zip(PAPER_VARIANTS, numbers, strict=True))
    for metric, numbers in {
        FID: (5.98, 5.77, 6.48, 5.68),
        PAPER_CLIP_SCORE: (0.584, 0.588, 0.575, 0.588),
        PARAMS: (45, 48, 45, 48),
        SPEED: (1.81, 2.31, 2.54, 2.74),
        GFLOPS: (29.56, 25.84, 23.82, 23.66),
    }.items()
}

_PAPER_TABLE_2 = (  # model, zero-shot FID, CLIP Score as printed, raw cosine, GFLOPs
    ("DALLE 3, as the paper cites it", None, "0.320", "0.320", None),
    ("Imagen, as the paper cites it", 7.27, "~0.29", "~0.29", None),
    ("Stable Diffusion, as the paper cites it", 8.59, "0.325", "0.325", None),
    ("SDXL, as the paper cites it", None, "0.305", "0.305", None),
    # 2.5 max(cosine, 0): the paper's code has the factor, its text has not.
    ("U-ViT-Small, the paper's own", 5.98, "0.584", "0.234", 29.56),
    ("IF-U-ViT, the paper's own", 5.68, "0.588", "0.235", 23.66),
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


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, each table as CSV, and each figure as PNG and CSV.

    The page names missing data, and the runs that are left out. Raises UserError if no run is one
    of the paper's variants, for an unknown series, and for a broken file.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    sheet = make_sheet(read_runs(config.runs), config.series)
    paired = [v for v in PAPER_VARIANTS if v in sheet.variants] or list(sheet.variants)
    baseline, best = paired[0], paired[-1]
    counts, counts_excluded = read_counts(sheet.variants)
    preference = _read_preference(config.study) if config.study else None
    tables = {
        "table1": table_1(sheet),
        "table1_further": table_further(sheet),
        "table2": table_2(sheet, dict.fromkeys([baseline, best])),
    }
    figures = {
        "figure3": paper_figures.figure_3(sheet),
        "figure4": paper_figures.figure_4(sheet, baseline, best),
        "figure5": paper_figures.figure_5(counts, counts_excluded),
        "figure6": paper_figures.figure_6(preference),
        "figure7": paper_figures.figure_7(sheet),
        "figure8": paper_figures.figure_8(sheet),
    }
    files = {f"{name}.csv": dump_csv(table.records) for name, table in tables.items() if table}
    files |= {f"{name}.png": figure.png for name, figure in figures.items() if figure.png}
    files |= {f"{name}.csv": figure.csv for name, figure in figures.items() if figure.csv}
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    changed = [line.title for line in recipe_differences(sheet.runs)]
    files["paper.html"] = render_page(
        "paper.html",
        title="Intermediate fusion: the paper's tables and figures from our runs",
        sheet=sheet,
        baseline=title_of(baseline),
        best=title_of(best),
        variants=[
            {"name": title_of(v), "colour": VARIANT_COLOURS[v], "runs": [r.name for r in runs]}
            for v, runs in sheet.variants.items()
        ],
        missing_variants=[title_of(v) for v in PAPER_VARIANTS if v not in sheet.variants],
        protocol=[(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
        tables=tables,
        unlike=unlike_the_paper(sheet),
        figures=figures,
        inline_image=inline_image,
        differences=[name for name in changed if name not in _MAY_DIFFER],
    )
    for name, data in files.items():
        storage.write_bytes(storage.join(config.output, name), data)
    sys.stdout.write(f"{storage.join(config.output, 'paper.html')}\n")


def _read_preference(study: str) -> "PreferenceResults | None":
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"--study needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(study).preference


def table_1(sheet: Sheet) -> Table:
    """Return the numbers of the four variants beside the paper's."""
    quality = [FID, FRECHET] if sheet.has(FRECHET) else [FID]
    return _make_table(sheet, PAPER_VARIANTS, [*quality, PAPER_CLIP_SCORE, *_COSTS])


def table_further(sheet: Sheet) -> Table | None:
    """Return the metrics that the paper did not measure; None if none of them was measured."""
    in_table_1 = (FID, FRECHET, PAPER_CLIP_SCORE, CLIP_SCORE)
    metrics = [metric for metric in METRICS if metric not in in_table_1 and sheet.has(metric)]
    return _make_table(sheet, list(sheet.variants), metrics) if metrics else None


def table_2(sheet: Sheet, variants: Iterable[str]) -> Table:
    """Return the paper's Table 2, followed by our variants."""
    heads = ["Model", "FID ↓", "CLIP Score ↑", "Raw cosine ↑", "GFLOPs ↓"]
    rows: list[tuple[object, ...]] = list(_PAPER_TABLE_2)
    for variant in variants:
        fid, *means = (sheet.mean(variant, m) for m in (FID, PAPER_CLIP_SCORE, CLIP_SCORE))
        scores = [f"{mean.value:.3f}" if mean else None for mean in means]
        gflops = measure(sheet, GFLOPS)[variant].value
        rows.append((f"ours: {title_of(variant)}", fid and fid.value, *scores, gflops))
    template = {True: "{:.4g}", False: "{}"}
    cells = [[text_cell(x, template[isinstance(x, float)]) for x in row[1:]] for row in rows]
    lines = [Line(str(row[0]), line) for row, line in zip(rows, cells, strict=True)]
    return Table(heads, lines, [dict(zip(heads, row, strict=True)) for row in rows])


def unlike_the_paper(sheet: Sheet) -> list[str]:
    """Return sentences on how our backbones, evaluation and training differ from the paper's."""
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    found = [_unlike("evaluation", protocol, _PROTOCOL)]
    backbones = []
    for variant, runs in sheet.variants.items():
        backbone = vars(with_setting(PRESETS["small"], variant))
        expected = {name: value for name, value in backbone.items() if name not in _FREE}
        backbones.append(_unlike(title_of(variant), vars(backbone_of(runs[0])), expected))
    found += [sentence for sentence in backbones if sentence][:1]  # all differ alike
    devices = sorted({row.device for run in sheet.runs for row in run.curve})
    ours = {
        "devices": devices,
        "batch": sorted({run.facts.global_batch_size or 0 for run in sheet.runs}),
    }
    found.append(_unlike("training", ours, {"devices": [_GPU], "batch": [256]}))
    return [sentence for sentence in found if sentence]


def _unlike(what: str, ours: Mapping[str, object], paper: Mapping[str, object]) -> str | None:
    found = [
        f"{describe_field(name)} {ours.get(name)!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours.get(name) != value
    ]
    return f"{what}: {'; '.join(found)}" if found else None


def measure(sheet: Sheet, metric: Metric) -> dict[str, SeedMean]:
    """Return the mean of each variant for which the metric was measured, or what it costs."""
    if metric not in _COSTS:
        return {v: mean for v in sheet.variants if (mean := sheet.mean(v, metric))}
    found = {v: [_cost(metric, run) for run in runs] for v, runs in sheet.variants.items()}
    known = {v: [cost for cost in costs if cost] for v, costs in found.items()}
    return {v: mean_over_seeds(costs) for v, costs in known.items() if costs}


def _cost(metric: Metric, run: Run) -> Estimate | None:
    """Return what a run costs. The speed is a median over time, which a pause hardly changes."""
    cost, error, num_lines = count_cost(backbone_of(run)), 0.0, len(run.curve)
    value = cost.params / 1e6 if metric == PARAMS else cost.layer_flops / 1e9
    if metric == SPEED:
        if not num_lines or not run.facts.global_batch_size:
            return None
        rates = np.array([row.samples_per_s for row in run.curve]) / run.facts.global_batch_size
        value, error = float(np.median(rates)), float(np.std(rates) / np.sqrt(num_lines))
    low, high = value - 2 * error, value + 2 * error
    return Estimate(value=value, standard_error=error, num_samples=1, low=low, high=high)


def _make_table(sheet: Sheet, variants: Sequence[str], metrics: Sequence[Metric]) -> Table:
    """Return our numbers, with the paper's beneath."""
    lines, records = {}, []
    for variant in variants:
        runs = sheet.variants.get(variant, [])
        compared = sum(map(sheet.is_compared, runs))
        lines[variant] = [Cell(str(len(runs)), f"{compared} compared" * (compared < len(runs)))]
    for metric in metrics:
        means, paper = measure(sheet, metric), _PAPER_TABLE_1.get(metric, {})
        cells = metric_cells(metric, {variant: means.get(variant) for variant in variants})
        for variant, cell in cells.items():
            mean = means.get(variant)
            note = f"{cell.note}\npaper {paper[variant]:g}".lstrip() if paper else cell.note
            lines[variant].append(cell._replace(note=note))
            record: dict[str, object] = {
                "variant": variant,
                "quantity": metric.field,
                "value": mean and mean.value,
                "seed_error": mean and mean.seed_error,
                "sample_error": mean and mean.sample_error,
                "runs": mean and len(mean.values),
                "paper": paper.get(variant),
            }
            records.append(record)
    return Table(
        heads=["Variant", "Runs", *(metric.heading for metric in metrics)],
        lines=[Line(title_of(variant), cells) for variant, cells in lines.items()],
        records=records,
    )
