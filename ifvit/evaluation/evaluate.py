"""The verb `evaluate`: weights, guidance scales and held-out captions => rows of metrics."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import PurePosixPath

import numpy as np

from ifvit import storage
from ifvit.distributed import ProcessGroup, choose_device, open_process_group, show_progress
from ifvit.errors import UserError
from ifvit.evaluation.config import CompareConfig, EvaluateConfig, MeasureConfig
from ifvit.evaluation.estimates import Estimate, estimate_mean
from ifvit.evaluation.features import CLIP
from ifvit.evaluation.measure import Measurement, Numbers, scene_numbers, score_scenes
from ifvit.evaluation.metrics import Features
from ifvit.evaluation.references import list_images
from ifvit.evaluation.rows import (
    FOLDER,
    MetricsRow,
    Protocol,
    differences,
    format_row,
    read_row,
    row_url,
    samples_url,
    write_row,
)
from ifvit.evaluation.sample_set import (
    generate_missing,
    open_model,
    read_prompts,
    read_samples,
    write_overview,
)
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.models.weights import find_weights, run_of, step_name
from ifvit.sampling.alignment import date_updates
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.load import Model
from ifvit.scenes.score import SceneScore
from ifvit.shards import ShardReader


def evaluate(config: EvaluateConfig) -> list[MetricsRow]:
    """A row for every chosen step and guidance scale, written where `row_url` says.

    What is drawn or measured already is not done again. Under torchrun or srun the processes share
    the work and all return the rows. One of several tasks draws its share and returns no rows.
    Raises UserError for shards of other encoders than the backbone's, or other samples in place.
    """
    with open_process_group() as channel:
        evaluator = Evaluator(config, channel)
        output = config.output or _rows_folder(config.weights)
        scales = config.guidance_scales or [config.protocol.sampling.guidance_scale]
        rows = []
        for weights in _weights_of(config):
            model = evaluator.open(weights)
            for scale in scales:
                sampling = replace(config.protocol.sampling, guidance_scale=scale)
                if config.num_tasks > 1:
                    evaluator.draw(model, sampling, output, config.task, config.num_tasks)
                else:
                    rows.append(evaluator.row(model, sampling, output))
    return rows


class Evaluator:
    """What the rows of one command share: captions, and what they are measured by."""

    def __init__(self, config: MeasureConfig, channel: ProcessGroup) -> None:
        self._config = config
        self._channel = channel
        self._reader = ShardReader(config.shards)
        self.prompts = read_prompts(self._reader, config.protocol)
        self._photographs = list_images(config.images) if config.images else []

    @cached_property
    def measurement(self) -> Measurement:
        """Opened when there is something to measure."""
        return Measurement(self._config, self._reader.manifest, self.prompts, self._channel)

    def open(self, weights: str) -> Model:
        """Weights that fit the shards."""
        return open_model(weights, self._reader, choose_device(self._config.device))

    def draw(
        self, model: Model, sampling: SamplingConfig, output: str, task: int = 0, num_tasks: int = 1
    ) -> float | None:
        """Draw what is missing of a task's share; returns this process's seconds per image."""
        folder = samples_url(self._row_url(model, sampling, output))
        world = self._channel.world
        share = self.prompts[task::num_tasks][world.rank :: world.size]
        protocol = replace(self._config.protocol, sampling=sampling)
        seconds = generate_missing(folder, model, self._reader, share, protocol)
        if num_tasks > 1 and world.is_main:
            sys.stdout.write(f"{folder}: share {task} of {num_tasks} is drawn\n")
        return seconds

    def row(self, model: Model, sampling: SamplingConfig, output: str) -> MetricsRow:
        """Draw, measure, write; or read the row that is there, if it is of the same protocol."""
        url, main = self._row_url(model, sampling, output), self._channel.on_main
        protocol = self.measurement.protocol(sampling)
        before = main(lambda: read_row(url) if storage.exists(url) else None)
        if before and self._is_done(before, model, protocol):
            main(lambda: _tell(f"{url} is there\n{format_row(before)}\n"))
            return before
        seconds = self.draw(model, sampling, output)
        self._channel.gather(None)  # until the others have drawn, too
        drawn, real = self.measurement.embed(samples_url(url)), self.measurement.real

        def measure() -> MetricsRow:
            numbers = self._overlook(samples_url(url)) | self.measurement.compare(drawn, real)
            row = MetricsRow(
                weights=model.url,
                weights_sha256=model.sha256,
                step=model.info.step,
                ema_decay=model.info.ema_decay,
                protocol=protocol,
                seconds_per_image=seconds or (before.seconds_per_image if before else None),
                **numbers,  # type: ignore[arg-type]  # some fields are never None
            )
            write_row(url, row)
            _tell(f"{url}\n{format_row(row)}\n")
            return row

        return main(measure)

    def _row_url(self, model: Model, sampling: SamplingConfig, output: str) -> str:
        return row_url(output, self._config.protocol.name, sampling.guidance_scale, model.info.step)

    def _is_done(self, row: MetricsRow, model: Model, protocol: Protocol) -> bool:
        """Whether computing the row again would give the same one."""
        return (
            row.weights_sha256 == model.sha256
            and not differences(row.protocol, protocol)
            and (row.scene_accuracy is not None or not self._config.protocol.scenes)
        )

    def _overlook(self, folder: str) -> Numbers:
        """Write what shows the samples to people; on scenes, score them."""
        scores: list[SceneScore] = []
        if self._config.protocol.scenes:
            batches = read_samples(folder, self.prompts, self._config.protocol.sampling.batch_size)
            shown = show_progress(batches, len(self.prompts), "scenes", self._channel.world)
            captions = [prompt.text for prompt in self.prompts]
            scores = score_scenes(itertools.chain.from_iterable(shown), captions)
        size = self._reader.manifest.image_size
        write_overview(folder, self.prompts, self._photographs, size, scores)
        return scene_numbers(scores) if scores else {}


def _weights_of(config: EvaluateConfig) -> list[str]:
    """The weights folders to measure. Raises UserError for steps that the run does not have."""
    if config.steps is None:
        return [config.weights]
    folder = storage.join(config.weights, "weights")
    saved = [name for name in storage.list_names(folder) if name.startswith("step_")]
    wanted = saved if config.steps == "all" else [step_name(step) for step in config.steps]
    missing = sorted(set(wanted) - set(saved))
    if missing or not wanted:
        there = ", ".join(saved) or "none"
        raise UserError(f"{folder}: no {', '.join(missing) or 'weights'}; there are: {there}")
    return [storage.join(folder, name) for name in wanted]


def _rows_folder(weights: str) -> str:
    """RUN/evaluation of RUN/weights/step_…; `evaluation` here for weights without a run."""
    return storage.join(run_of(find_weights(weights)) or ".", FOLDER)


def _tell(text: str) -> None:
    sys.stdout.write(text)


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
    with open_process_group() as channel:
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
