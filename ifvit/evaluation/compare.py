"""The verb `compare-methods`: the same captions and noise by every alignment method, one table.

OUTPUT/table.md and table.json, OUTPUT/grid.png (a row per caption, a column per line of the
table), OUTPUT/RUN/METHOD with the samples and the row of metrics of each.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePosixPath

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.config import CompareConfig, EvaluateConfig, MeasureConfig
from ifvit.evaluation.evaluate import embed_texts, evaluate
from ifvit.evaluation.frechet import Features, extract
from ifvit.evaluation.metrics import Estimate, MetricsRow, estimate_mean
from ifvit.evaluation.rows import row_url, samples_url
from ifvit.evaluation.samples import Prompt, read_prompts, read_samples
from ifvit.images import Pixels, encode_png
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.sampling.alignment.build import date_updates
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.encoders import choose_device
from ifvit.sampling.grid import make_grid
from ifvit.shards import ShardReader

_NUM_SHOWN = 8
_EVALUATIONS_PER_UPDATE = 2
_METRICS = (
    "clip_score",
    "retrieval_at_16",
    "count_accuracy",
    "colour_accuracy",
    "relation_accuracy",
    "frechet_distance",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method on one run, measured and set against the plain images of the same noise."""

    run: str
    method: str
    evaluations: int
    """Of the backbone per image, guided; an update of DATE counts as two, there and back."""
    row: MetricsRow
    clip_gain: Estimate
    """Mean difference of the raw CLIP cosine, image by image."""
    change: Estimate
    """Mean 1 - cosine of the CLIP features of both images: how far the method moved them."""


def compare_methods(config: CompareConfig) -> list[Comparison]:
    """Draw, measure and write the table; what is drawn already is not drawn again.

    Raises UserError for runs of one name, and whatever `evaluate` refuses.
    """
    names = [PurePosixPath(run).name for run in config.runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs {', '.join(names)}: two of one name; copy or link one to another")
    prompts = read_prompts(ShardReader(config.shards), config.protocol)
    scorer = load_clip(config.protocol.clip, choose_device(config.device))
    batch_size = config.protocol.sampling.batch_size
    texts = embed_texts(scorer, [prompt.score_text for prompt in prompts], batch_size)
    compared: list[Comparison] = []
    columns: list[Pixels] = []
    for name, run in zip(names, config.runs, strict=True):
        plain: Features | None = None
        for method, sampling in _variants(config.protocol.sampling).items():
            output = storage.join(config.output, name, method)
            row = evaluate(_evaluation(config, run, sampling, output))
            assert row is not None  # it is not split over tasks
            protocol, scale = row.protocol.name, row.protocol.guidance_scale
            folder = samples_url(row_url(output, protocol, scale, row.step))
            features = _embed(scorer, folder, prompts, config)
            plain = features if plain is None else plain
            compared.append(
                Comparison(
                    run=name,
                    method=method,
                    evaluations=_num_evaluations(sampling),
                    row=row,
                    clip_gain=estimate_mean(((features - plain) * texts).sum(axis=1)),
                    # 1 - cosine of unit vectors, and exactly 0 for equal ones.
                    change=estimate_mean(np.square(features - plain).sum(axis=1) / 2),
                )
            )
            columns.append(next(read_samples(folder, prompts[:_NUM_SHOWN], _NUM_SHOWN)))
    _write(config.output, compared, columns)
    return compared


def format_table(compared: Sequence[Comparison]) -> str:
    """Markdown: value and standard error; seconds also in percent above the run's first line."""
    heads = ["run", "method", "evaluations", "s/image", *_METRICS, "clip_gain", "change"]
    lines = [heads, ["---"] * len(heads)]
    plain: dict[str, float | None] = {}
    for one in compared:
        seconds = one.row.seconds_per_image
        time = _format_seconds(seconds, plain.setdefault(one.run, seconds))
        estimates = [getattr(one.row, name) for name in _METRICS]
        cells = map(_format, (*estimates, one.clip_gain, one.change))
        lines.append([one.run, one.method, str(one.evaluations), time, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _variants(sampling: SamplingConfig) -> dict[str, SamplingConfig]:
    """The methods, plain first, and plain sampling with as many evaluations as DATE needs."""
    date = replace(sampling, method="date")
    longer = replace(sampling, method="plain", num_steps=_num_evaluations(date))
    return {
        "plain": replace(sampling, method="plain"),
        f"plain_{longer.num_steps}": longer,
        "date": date,
        "regulate": replace(sampling, method="regulate"),
        "both": replace(sampling, method="both"),
    }


def _num_evaluations(sampling: SamplingConfig) -> int:
    if sampling.method not in ("date", "both"):
        return sampling.num_steps
    return sampling.num_steps + _EVALUATIONS_PER_UPDATE * len(date_updates(sampling))


def _evaluation(
    config: CompareConfig, run: str, sampling: SamplingConfig, output: str
) -> EvaluateConfig:
    shared = {field.name: getattr(config, field.name) for field in fields(MeasureConfig)}
    protocol = replace(config.protocol, sampling=sampling)
    return EvaluateConfig(**{**shared, "protocol": protocol}, weights=run, output=output)


def _embed(
    scorer: ClipScorer, folder: str, prompts: list[Prompt], config: CompareConfig
) -> Features:
    samples = read_samples(folder, prompts, config.protocol.sampling.batch_size)
    return np.concatenate(list(extract(scorer.embed_images, samples, choose_device(config.device))))


def _write(output: str, compared: list[Comparison], columns: list[Pixels]) -> None:
    table = format_table(compared)
    rows = {"comparisons": [asdict(one) for one in compared]}
    storage.write_json(storage.join(output, "table.json"), rows)
    storage.write_bytes(storage.join(output, "table.md"), table.encode())
    cells = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
    grid = make_grid(cells, len(columns))
    storage.write_bytes(storage.join(output, "grid.png"), encode_png(grid))
    sys.stdout.write(f"\n{table}")


def _format(estimate: Estimate | None) -> str:
    return f"{estimate.value:.3f} ± {estimate.standard_error:.3f}" if estimate else ""


def _format_seconds(seconds: float | None, plain: float | None) -> str:
    if seconds is None or plain is None:
        return ""
    return f"{seconds:.3f} ({seconds / plain - 1:+.0%})"
