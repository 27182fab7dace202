"""The report's tables: one line per quantity, one cell per run."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import Run
from ifvit.models.config import FusionUViTConfig
from ifvit.studies.comparisons import METRICS, best_run, mismatches

HOLE = "—"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of one run in a table; `note` is printed small beside it."""

    text: str = HOLE
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: one cell per run."""

    title: str
    cells: list[Cell]


def to_csv(records: Sequence[Mapping[str, object]]) -> bytes:
    """A CSV file of records (at least one) with the same keys; None is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().encode()


def setting_lines(runs: list[Run]) -> list[Line]:
    """The backbone, its cost and its training, side by side."""

    def line(title: str, values: list[object], template: str = "{}", note: str = "") -> Line:
        cells = [
            Cell() if value is None else Cell(text=template.format(value), note=note)
            for value in values
        ]
        return Line(title=title, cells=cells)

    shapes = [b if isinstance(b := run.backbone, FusionUViTConfig) else None for run in runs]
    costs = [run.cost for run in runs]
    ends = [run.curve[-1] if run.curve else {} for run in runs]
    return [
        line("Architecture", [run.backbone.architecture if run.backbone else None for run in runs]),
        line("Fusion", [run.fusion for run in runs]),
        line("Conditioning", [s.conditioning.replace("_", "-") if s else None for s in shapes]),
        line(
            "Adaptive norms", [("yes" if s.is_modulated else "no") if s else None for s in shapes]
        ),
        line("Image-only blocks per side", [s.num_image_blocks if s else None for s in shapes]),
        line("Text-branch blocks", [s.num_text_blocks if s else None for s in shapes]),
        line("Blocks, width", [f"{s.depth + 1}, {s.width}" if s else None for s in shapes]),
        line("Parameters", [c.params if c else None for c in costs], "{:,}"),
        line("GFLOPs", [c.layer_flops / 1e9 if c else None for c in costs], "{:.3f}"),
        line("GFLOPs with attention", [c.flops / 1e9 if c else None for c in costs], "{:.3f}"),
        line("Steps", [end.get("step") for end in ends], "{:,}"),
        line("Images seen", [end.get("samples_seen") for end in ends], "{:,}"),
        line("Training seconds", [end.get("seconds") for end in ends], "{:,.0f}"),
        line("Last loss", [_last_loss(run) for run in runs], "{:.4f}", "mean of the last tenth"),
    ]


def metric_lines(runs: list[Run]) -> list[Line]:
    """The metrics that any run has, with standard errors; the best of two or more is marked.

    So are the numbers of runs that do not compare with the first.
    """
    lines = []
    marks = dict.fromkeys(mismatches(runs), ", not compared")
    for metric in METRICS:
        estimates = [metric.of(run.last) for run in runs]
        if not any(estimates):
            continue
        best = best_run(metric, runs)
        cells = [
            Cell(
                text=metric.show(estimate.value),
                note=f"± {metric.show(estimate.standard_error)}{marks.get(run.name, '')}",
                is_best=run is best,
            )
            if estimate
            else Cell()
            for run, estimate in zip(runs, estimates, strict=True)
        ]
        hint = " (lower is better)" if metric.lower_is_better else ""
        lines.append(Line(title=f"{metric.title}{hint}", cells=cells))
    return lines


def protocol_lines(runs: list[Run]) -> list[Line]:
    """How the last evaluation of each run was done."""
    rows = [run.last.protocol.facts | {"step": run.last.step} if run.last else {} for run in runs]
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        Line(
            title=describe_field(name),
            cells=[Cell(text=describe_value(name, row.get(name, HOLE))) for row in rows],
        )
        for name in names
    ]


def history(runs: list[Run]) -> list[tuple[str, int, list[str]]]:
    """(run, step, metric values) of every evaluation, when a run has more than one."""
    if all(len(run.evaluations) < 2 for run in runs):
        return []
    return [
        (
            run.name,
            row.step,
            [
                metric.show(estimate.value) if (estimate := metric.of(row)) else HOLE
                for metric in METRICS
            ],
        )
        for run in runs
        for row in run.evaluations
    ]


def recipe_differences(runs: list[Run]) -> list[Line]:
    """Keys of config.yaml whose values are not the same in all runs."""
    flat = [_flatten(run.recipe or {}) for run in runs]
    names = dict.fromkeys(name for recipe in flat for name in recipe)
    return [
        Line(title=name, cells=[Cell(text=str(recipe.get(name, HOLE))) for recipe in flat])
        for name in names
        if len({repr(recipe.get(name)) for recipe in flat}) > 1
    ]


def _last_loss(run: Run) -> float | None:
    losses = [row["loss"] for row in run.curve if "loss" in row]
    last = losses[-math.ceil(len(losses) / 10) :]
    return sum(last) / len(last) if last else None


def _flatten(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` => `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
