"""The verb `compare-methods`: the same captions and noise by every alignment method, one table.

OUTPUT/table.md and table.json, OUTPUT/grid.png (a row per caption, a column per line of the
table), OUTPUT/RUN/METHOD with the samples and the row of metrics of each.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.config import CompareConfig
from ifvit.evaluation.evaluate import Evaluator
from ifvit.evaluation.frechet import Features
from ifvit.evaluation.metrics import Estimate, MetricsRow, estimate_mean
from ifvit.evaluation.networks import CLIP
from ifvit.evaluation.rows import row_url, samples_url
from ifvit.evaluation.samples import read_samples
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.sampling.alignment.build import date_updates
from ifvit.sampling.config import SamplingConfig
from ifvit.side_channel import open_channel

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
    """Mean perceptual distance from the plain image of the same noise."""


def compare_methods(config: CompareConfig) -> list[Comparison]:
    """Draw, measure and write the table; what is drawn already is not drawn again.

    Raises UserError for runs of one name, and whatever `evaluate` refuses.
    """
    names = [PurePosixPath(run).name for run in config.runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs {', '.join(names)}: two of one name; copy or link one to another")
    compared: list[Comparison] = []
    columns: list[Pixels] = []
    with open_channel() as channel:
        evaluator = Evaluator(config, channel)
        for name, run in zip(names, config.runs, strict=True):
            model = evaluator.open(run)
            plain: Features | None = None
            plain_url = ""
            for method, sampling in _variants(config.protocol.sampling).items():
                output = storage.join(config.output, name, method)
                row = evaluator.row(model, sampling, output)
                url = row_url(output, row.protocol.name, sampling.guidance_scale, row.step)
                features = evaluator.measurement.embed(samples_url(url))[CLIP].part
                if plain is None:
                    plain, plain_url = features, url
                folders = samples_url(plain_url), samples_url(url)
                distances = channel.on_main(partial(evaluator.measurement.distances, *folders))
                gains = ((features - plain) * evaluator.measurement.texts).sum(axis=1)
                compared.append(
                    Comparison(
                        run=name,
                        method=method,
                        evaluations=_num_evaluations(sampling),
                        row=row,
                        clip_gain=estimate_mean(gains),
                        change=estimate_mean(distances),
                    )
                )
                shown = evaluator.prompts[:_NUM_SHOWN]
                columns.append(next(read_samples(samples_url(url), shown, _NUM_SHOWN)))
        if channel.world.is_main:
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
