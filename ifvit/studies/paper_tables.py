"""Tables 1 and 2 of arXiv 2403.16530 with our numbers beside the paper's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ifvit.evaluation.rows import describe_field
from ifvit.evaluation.runs import Run
from ifvit.models.config import PRESETS
from ifvit.studies.comparisons import (
    CLIP_SCORE,
    FID,
    FRECHET,
    METRICS,
    PAPER_CLIP_SCORE,
    Metric,
)
from ifvit.studies.sheet import Sheet
from ifvit.studies.tables import HOLE, Cell, Line
from ifvit.studies.variants import PAPER_SETTINGS, SeedMean, Setting, noise_between, shape_of

CLIP_SCALE = 2.5
"""Of the paper's CLIP Score, 2.5 max(cosine, 0); its code shows it, its text does not."""

_CLIP = "clip-vit-large-patch14"
_FID_PROTOCOL = {
    "num_samples": 30_000,
    "caption_rule": "random",
    "guidance_scale": 2.0,
    "num_steps": 50,
    "method": "plain",
}
_CLIP_PROTOCOL = {**_FID_PROTOCOL, "score_caption": "first", "paper_prefix": "A photo depicts "}
_BATCH_SIZE = 256
_GPU = "4090"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of Table 1; parameters in millions, GFLOPs without those of attention."""

    fid: float
    clip_score: float
    mparams: float
    iterations_per_s: float
    gflops: float


PAPER_TABLE_1 = dict(
    zip(
        PAPER_SETTINGS,
        (
            PaperRow(fid=5.98, clip_score=0.584, mparams=45, iterations_per_s=1.81, gflops=29.56),
            PaperRow(fid=5.77, clip_score=0.588, mparams=48, iterations_per_s=2.31, gflops=25.84),
            PaperRow(fid=6.48, clip_score=0.575, mparams=45, iterations_per_s=2.54, gflops=23.82),
            PaperRow(fid=5.68, clip_score=0.588, mparams=48, iterations_per_s=2.74, gflops=23.66),
        ),
        strict=True,
    )
)

FOUNDATION_MODELS = (
    ("DALLE 3", None, "0.320"),
    ("Imagen", 7.27, "~0.29"),
    ("Stable Diffusion", 8.59, "0.325"),
    ("SDXL", None, "0.305"),
)
"""Of Table 2, all early fusion by cross-attention: name, zero-shot FID, CLIP Score as printed."""

PAPER_OWN = {"U-ViT-Small": PAPER_SETTINGS[0], "IF-U-ViT": PAPER_SETTINGS[3]}
"""Of Table 2, trained on COCO; their CLIP Scores are on the other scale."""


def other_backbone(sheet: Sheet) -> str | None:
    """Why these backbones are not those of the paper; None if they are."""
    paper = PRESETS["small"]
    for setting, runs in sheet.settings.items():
        shape = shape_of(runs[0])
        same = replace(
            paper,
            conditioning=setting.conditioning,
            num_image_blocks=paper.num_image_blocks if setting.image_blocks else 0,
            num_text_blocks=paper.num_text_blocks if setting.text_blocks else 0,
            init_std=shape.init_std,
            timestep_offset=shape.timestep_offset,
        )
        if shape != same:
            return (
                f"a backbone of width {shape.width} and depth {shape.depth} on latents of "
                f"{shape.latent_size} x {shape.latent_size} is not the paper's"
            )
    return None


def other_fid(sheet: Sheet) -> str | None:
    """Why FID was not measured as the paper did; None if it was."""
    return _other_protocol(sheet, _FID_PROTOCOL)


def other_clip_score(sheet: Sheet) -> str | None:
    """Why the CLIP Score was not measured as the paper did; None if it was."""
    reason = _other_protocol(sheet, _CLIP_PROTOCOL)
    if reason or sheet.reference is None:
        return reason
    features = sheet.reference.protocol.features
    return None if features.endswith(_CLIP) else f"scored by {features}, not by {_CLIP}"


def _other_protocol(sheet: Sheet, paper: dict[str, object]) -> str | None:
    if sheet.reference is None:
        return "nothing was evaluated"
    ours = sheet.reference.protocol.facts
    found = [
        f"{describe_field(name)} {ours[name]!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours[name] != value
    ]
    return "; ".join(found) or None


def other_hardware(sheet: Sheet) -> str | None:
    """Why the training speed is not that of the paper's GPU; None if it is."""
    runs = [run for members in sheet.settings.values() for run in members]
    names, sizes = devices(sheet), {batch_size(run) for run in runs}
    if len(names) == 1 and _GPU in names[0] and sizes == {_BATCH_SIZE}:
        return None
    found = ", ".join(names) or "unknown hardware"
    batches = ", ".join(str(size) for size in sizes)
    return f"{found} at batch {batches} is not an RTX 4090 at batch {_BATCH_SIZE}"


def devices(sheet: Sheet) -> list[str]:
    """What trained, as metrics.jsonl names it."""
    runs = [run for members in sheet.settings.values() for run in members]
    return sorted({str(row["device"]) for run in runs for row in run.curve if "device" in row})


def batch_size(run: Run) -> int | None:
    """Of the run's recipe, over all processes."""
    size: int | None = (run.recipe or {}).get("global_batch_size")
    return size


_IN_TABLE_1 = (FID, FRECHET, PAPER_CLIP_SCORE, CLIP_SCORE)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for the page, and the same numbers with all their digits for a CSV file."""

    name: str
    heads: list[str]
    lines: list[Line]
    records: list[dict[str, object]]
    notes: list[str]
    """Why numbers are not set against the paper's."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One quantity; a SeedMean has noise, a plain number has none."""

    key: str
    title: str
    values: Mapping[Setting, SeedMean | float | None]
    show: Callable[[float], str]
    metric: Metric | None = None
    paper: Callable[[PaperRow], float] | None = None
    differs: str | None = None
    """Why our number and the paper's do not compare."""


def table_1(sheet: Sheet) -> Table:
    """The four settings, each number with the paper's and, where both compare, the difference."""
    shape = other_backbone(sheet)
    gflops = {s: _cost(runs, "layer_flops", 1e9) for s, runs in sheet.settings.items()}
    digits = 2 if min(gflops.values()) >= 1 else 4
    columns = [
        _metric_column(sheet, FID, "FID ↓", lambda row: row.fid, shape or other_fid(sheet)),
        _metric_column(
            sheet,
            PAPER_CLIP_SCORE,
            "CLIP Score ↑",
            lambda row: row.clip_score,
            shape or other_clip_score(sheet),
        ),
        _Column(
            key="mparams",
            title="Parameters, M",
            values={s: _cost(runs, "params", 1e6) for s, runs in sheet.settings.items()},
            show=lambda value: f"{value:.2f}",
            paper=lambda row: row.mparams,
            differs=shape,
        ),
        _Column(
            key="iterations_per_s",
            title="Training it/s ↑",
            values={s: iterations_per_s(runs) for s, runs in sheet.settings.items()},
            show=lambda value: f"{value:.2f}",
            paper=lambda row: row.iterations_per_s,
            differs=shape or other_hardware(sheet),
        ),
        _Column(
            key="gflops",
            title="GFLOPs ↓",
            values=gflops,
            show=lambda value: f"{value:.{digits}f}",
            paper=lambda row: row.gflops,
            differs=shape,
        ),
    ]
    if sheet.has(FRECHET):
        columns.insert(1, _metric_column(sheet, FRECHET, f"{FRECHET.title} ↓"))
    return _make_table("table1", sheet, PAPER_SETTINGS, columns)


def table_further(sheet: Sheet) -> Table | None:
    """What the paper did not measure, for all settings; None where nothing of it was."""
    columns = [
        _metric_column(sheet, metric, f"{metric.title} {'↓' if metric.lower_is_better else '↑'}")
        for metric in METRICS
        if metric not in _IN_TABLE_1 and sheet.has(metric)
    ]
    return _make_table("table1_further", sheet, list(sheet.settings), columns) if columns else None


def table_2(sheet: Sheet, ours: Mapping[str, Setting]) -> Table:
    """The paper's Table 2 with CLIP Scores as raw cosines too, and our settings by a name."""
    rows: list[tuple[object, ...]] = [
        (f"{name}, as the paper cites it", "early", "cross-attention", fid, printed, printed, None)
        for name, fid, printed in FOUNDATION_MODELS
    ]
    for name, setting in PAPER_OWN.items():
        paper = PAPER_TABLE_1[setting]
        score, raw = f"{paper.clip_score:.3f}", f"{paper.clip_score / CLIP_SCALE:.3f}"
        head = (f"{name}, the paper's own", setting.fusion, setting.path)
        rows.append((*head, paper.fid, score, raw, paper.gflops))
    for name, setting in ours.items():
        means = [sheet.mean(setting, metric) for metric in (PAPER_CLIP_SCORE, CLIP_SCORE)]
        scores = [f"{mean.value:.3f}" if mean else None for mean in means]
        fid = sheet.mean(setting, FID)
        gflops = _cost(sheet.settings[setting], "layer_flops", 1e9)
        head = (f"ours, {name}", setting.fusion, setting.path)
        rows.append((*head, fid.value if fid else None, *scores, gflops))
    reasons = other_backbone(sheet), other_clip_score(sheet)
    keys = ("model", "fusion", "path", "fid", "clip_score_printed", "clip_score_raw", "gflops")
    return Table(
        name="table2",
        heads=["Model", "Fusion", "Path", "FID ↓", "CLIP Score ↑", "Raw cosine ↑", "GFLOPs ↓"],
        lines=[Line(title=str(row[0]), cells=list(map(_plain_cell, row[1:]))) for row in rows],
        records=[dict(zip(keys, row, strict=True)) for row in rows],
        notes=[f"Ours: {reason}." for reason in reasons if reason],
    )


def _metric_column(
    sheet: Sheet,
    metric: Metric,
    title: str,
    paper: Callable[[PaperRow], float] | None = None,
    differs: str | None = None,
) -> _Column:
    return _Column(
        key=metric.field,
        title=title,
        values={setting: sheet.mean(setting, metric) for setting in sheet.settings},
        show=metric.show,
        metric=metric,
        paper=paper,
        differs=differs,
    )


def _make_table(
    name: str, sheet: Sheet, settings: Sequence[Setting], columns: Sequence[_Column]
) -> Table:
    lines, records = [], []
    for setting in settings:
        runs = sheet.settings.get(setting, [])
        compared = sum(bool(sheet.rows[run.name]) for run in runs)
        count = Cell(
            text=str(len(runs)), note=f"{compared} compared" if compared < len(runs) else ""
        )
        cells = [count, *(_cell(column, setting, settings) for column in columns)]
        lines.append(Line(title=setting.title, cells=cells))
        record: dict[str, object] = {"setting": setting.slug, "runs": len(runs)}
        for column in columns:
            record |= _record(column, setting)
        records.append(record)
    reasons: dict[str, list[str]] = {}
    for column in columns:
        if column.differs:
            reasons.setdefault(column.differs, []).append(column.title.rstrip(" ↑↓"))
    return Table(
        name=name,
        heads=["Setting", "Runs", *(column.title for column in columns)],
        lines=lines,
        records=records,
        notes=[f"{', '.join(titles)}: {reason}." for reason, titles in reasons.items()],
    )


def _cell(column: _Column, setting: Setting, shown: Sequence[Setting]) -> Cell:
    found = column.values.get(setting)
    text = HOLE if found is None else column.show(_value(found))
    notes = [f"± {column.show(found.error)}"] if isinstance(found, SeedMean) else []
    if column.paper:
        paper = column.paper(PAPER_TABLE_1[setting])
        notes.append(f"paper {paper:g}")
        if found is not None and not column.differs:
            difference = _value(found) - paper
            notes[-1] += f", {'+' if difference >= 0 else '-'}{column.show(abs(difference))}"
    return Cell(text=text, note="\n".join(notes), is_best=_is_best(column, setting, shown))


def _is_best(column: _Column, setting: Setting, shown: Sequence[Setting]) -> bool:
    """Whether it is better than every other one shown, each time by more than the noise."""
    mean = column.values.get(setting)
    others = [column.values.get(other) for other in shown if other != setting]
    measured = [other for other in others if isinstance(other, SeedMean)]
    if column.metric is None or not isinstance(mean, SeedMean) or not measured:
        return False
    sign = 1 if column.metric.lower_is_better else -1
    return all(sign * (o.value - mean.value) > noise_between(mean, o) for o in measured)


def _record(column: _Column, setting: Setting) -> dict[str, object]:
    found = column.values.get(setting)
    record: dict[str, object] = {column.key: None if found is None else _value(found)}
    if column.metric:
        mean = found if isinstance(found, SeedMean) else None
        record[f"{column.key}_seed_error"] = mean.seed_error if mean else None
        record[f"{column.key}_sample_error"] = mean.sample_error if mean else None
    if column.paper:
        record[f"{column.key}_paper"] = column.paper(PAPER_TABLE_1[setting])
    return record


def _plain_cell(value: object) -> Cell:
    if value is None:
        return Cell()
    return Cell(text=f"{value:.4g}" if isinstance(value, float) else str(value))


def _value(found: SeedMean | float) -> float:
    return found.value if isinstance(found, SeedMean) else found


def _cost(runs: Sequence[Run], field: str, unit: float) -> float:
    """Of the backbone that the runs of a setting share."""
    return float(getattr(runs[0].cost, field)) / unit


def iterations_per_s(runs: Sequence[Run]) -> float | None:
    """Mean over runs of the median over log lines: a median forgives pauses."""
    speeds = [speed for run in runs if (speed := _speed(run))]
    return statistics.mean(speeds) if speeds else None


def _speed(run: Run) -> float | None:
    rates = [row["samples_per_s"] for row in run.curve if "samples_per_s" in row]
    size = batch_size(run)
    return statistics.median(rates) / size if rates and size else None
