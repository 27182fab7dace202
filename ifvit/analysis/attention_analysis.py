"""The verb `analyze attention`: runs and prompts => attention maps and singular values by layer.

The page of a study shows the same figure, from the files that this verb wrote.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure
from tqdm import tqdm

from ifvit import storage
from ifvit.analysis.attention_maps import (
    NUM_SINGULAR_VALUES,
    AttentionProtocol,
    AttentionSummary,
    Floats,
    LayerMeans,
    LayerSums,
    PromptRows,
    TextSpectrum,
    inner_tokens,
    read_attention,
    watch_attention,
    write_attention,
)
from ifvit.analysis.config import AttentionConfig
from ifvit.analysis.run_analysis import analyze_runs, find_equal, mean_columns, plot_runs
from ifvit.conditions import Condition, concatenate, lengths_of, move, select_rows
from ifvit.diffusion.sampler import ConditionBatch, sample_latents, sampling_precision
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.figures import RUN_COLOURS, literal
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import WeightsInfo, step_name
from ifvit.records import dump_csv
from ifvit.sampling.config import EncoderPlaces
from ifvit.sampling.generate import read_prompt_file
from ifvit.sampling.load import (
    load_conditions,
    load_model,
    open_dataset_conditions,
    require_text_encoder,
    schedule_of,
)
from ifvit.sampling.samples import batched, hash_json
from ifvit.shards.reader import ShardReader

_NUM_OF_SHARDS = 64
_CELL = 1.25
_ROWS = ("image to image", "text to image", "singular values")
_SMALLEST = 1e-4
"""The axis of singular values begins at this fraction of the largest singular value."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """N captions, their N contexts, and the null context, one row."""

    texts: list[str]
    contexts: Condition
    null_context: Condition


def analyze_attention(config: AttentionConfig) -> dict[str, AttentionSummary]:
    """Analyse each run, write its files, the figure and the table; return run name => summary.

    A run whose file has the same weights and protocol is not analysed again. Raises UserError for
    a run without attention to text, for fewer than two prompts, and for a trim that leaves no
    token.
    """
    analyze = partial(analyze_run, config)
    summaries = analyze_runs(config, "attention", analyze, attention_figure, table_rows)
    sys.stdout.write(dump_csv(table_rows(summaries)).decode())
    return summaries


def analyze_run(config: AttentionConfig, run: str, folder: str) -> AttentionSummary:
    """Record the attention of the run's newest weights, or read the file of an equal analysis."""
    device = choose_device(config.device)
    model = load_model(run, device, EncoderPlaces(text_encoder=config.text_encoder))
    backbone, info = model.backbone, model.info
    if not isinstance(backbone, FusionTransformer) or not backbone.config.text_key_blocks:
        raise UserError(f"{run}: its image tokens attend to no text; leave this run out")
    prompts, shape = _open_prompts(config, info, device), backbone.config
    protocol = AttentionProtocol(
        num_prompts=len(prompts.texts),
        prompts_sha256=hash_json(prompts.texts),
        sampling=config.sampling.settings,
        trim=config.trim,
    )
    url = storage.join(folder, f"{step_name(info.step)}.json")
    if before := find_equal(url, read_attention, model.sha256, shape.fusion, protocol):
        return before
    layers = record_layers(backbone, schedule_of(info, device), prompts, config)
    summary = AttentionSummary(
        weights=run,
        weights_sha256=model.sha256,
        step=info.step,
        fusion=shape.fusion,
        num_text_blocks=shape.num_text_blocks,
        protocol=protocol,
        layers=tuple(layer.numbers for layer in layers),
        image_maps=np.stack([layer.image_map for layer in layers]),
        text_maps={n: layer.text_map for n, layer in enumerate(layers) if layer.numbers.text},
    )
    write_attention(url, summary)
    sys.stdout.write(f"{url}\n")
    return summary


@torch.no_grad()
def record_layers(
    backbone: FusionTransformer, schedule: NoiseSchedule, prompts: Prompts, config: AttentionConfig
) -> list[LayerMeans]:
    """Generate images for the prompts, batch by batch, and average the attention of each block."""
    shape = backbone.config
    inside = inner_tokens(shape.latent_size // shape.patch_size, config.trim)
    layers = [LayerSums(shape, number, inside) for number in range(len(shape.blocks))]
    positions = torch.arange(len(prompts.texts))
    with (
        sampling_precision(backbone, config.sampling.precision),
        tqdm(total=len(positions), unit="prompt", desc="attention", leave=False) as progress,
    ):
        null_text = backbone.encode_condition(move(prompts.null_context, backbone.device))
        for batch in torch.split(positions, config.sampling.batch_size):
            contexts = select_rows(prompts.contexts, batch)
            conditions = ConditionBatch(positions=batch, condition=contexts)
            rows = PromptRows(shape, len(batch), inside)
            with watch_attention(backbone, rows):
                sample_latents(backbone, schedule, conditions, null_text, config.sampling)
            for layer, mean in zip(layers, rows.means(), strict=True):
                layer.add(mean, lengths_of(contexts).numpy())
            progress.update(len(batch))
    return [layer.finish() for layer in layers]


def _open_prompts(config: AttentionConfig, info: WeightsInfo, device: str) -> Prompts:
    """Read the prompts file, or the first captions of the first images in the shards."""
    require_text_encoder(info)
    if config.shards is None:
        assert config.prompts is not None
        texts = read_prompt_file(config.prompts)[: config.num_prompts]
        wanted = config.num_prompts or 2
        if len(texts) < wanted:
            raise UserError(
                f"{config.prompts}: {len(texts)} prompts, but {wanted} are needed; write more "
                "prompts, one per line"
            )
        trained, size = load_conditions(info, device), config.sampling.batch_size
        return Prompts(
            texts=texts,
            contexts=concatenate([trained.encode([*batch]) for batch in batched(texts, size)]),
            null_context=trained.null,
        )
    reader = ShardReader(config.shards)
    conditions = open_dataset_conditions(info, reader, device)
    count = config.num_prompts or _NUM_OF_SHARDS
    if count > len(reader):
        raise UserError(
            f"{reader.url}: {len(reader)} images, but num_prompts is {count}; lower num_prompts"
        )
    return Prompts(
        texts=[reader.metadata(position).captions[0] for position in range(count)],
        contexts=conditions.read(range(count), [0] * count),
        null_context=conditions.null,
    )


def table_rows(summaries: Mapping[str, AttentionSummary]) -> list[dict[str, Any]]:
    """Return a row per run and block, means over prompts; what a block does not have is empty."""
    rows = []
    for name, summary in summaries.items():
        for layer in summary.layers:
            means = {
                "text_share": layer.text_share,
                "rank": layer.text and layer.text.effective_rank,
                "singular_value": layer.text and layer.text.singular_values[0],
            }
            rows.append({"run": name, "layer": layer.name, **mean_columns(means)})
    return rows


def attention_figure(summaries: Mapping[str, AttentionSummary]) -> Figure:
    """Return a figure with a column per block and three rows per run.

    The first row has image-to-image maps: the image token in row i attends to the one in column j.
    The second has text-to-image maps: the image token in column j attends to the text token in row
    i. The third has singular values. All maps of one kind share a colour scale, the square root of
    attention up to the 99.5th percentile, and all singular values share a logarithmic axis, so that
    blocks and runs can be compared.
    """
    runs = summaries.values()
    scales = (
        _scale(run.image_maps for run in runs),
        _scale(one for run in runs for one in run.text_maps.values()),
    )
    spectra = [layer.text for run in runs for layer in run.layers if layer.text]
    largest = max(spectrum.singular_values[0].value for spectrum in spectra)
    limits = (_SMALLEST * largest, 2 * largest)
    num_columns = max(len(run.layers) for run in runs)
    size = (_CELL * num_columns + 2, 3 * _CELL + 0.6)
    plot = partial(_plot_run, num_columns=num_columns, scales=scales, limits=limits)
    return plot_runs(summaries, size, plot, fontsize=9)


def _plot_run(
    part: SubFigure,
    run: AttentionSummary,
    *,
    num_columns: int,
    scales: tuple[Normalize, Normalize],
    limits: tuple[float, float],
) -> None:
    axes = part.subplots(3, num_columns, squeeze=False)
    for cell in axes[:, len(run.layers) :].flat:
        cell.set_axis_off()
    for number, (column, layer) in enumerate(zip(axes.T, run.layers, strict=False)):
        column[0].set_title(literal(layer.name).replace(" ", "\n"), fontsize=6)
        _plot_map(column[0], run.image_maps[number], scales[0])
        column[2].set(yscale="log", ylim=limits, xlim=(0.5, NUM_SINGULAR_VALUES + 0.5))
        column[2].set_xticks([1, NUM_SINGULAR_VALUES])
        column[2].tick_params(labelsize=6, labelleft=number == 0)
        if layer.text:
            _plot_map(column[1], run.text_maps[number], scales[1])
            _plot_singular_values(column[2], layer.text)
        else:
            column[1].set(xticks=[], yticks=[])
            for cell in column[1:]:
                middle = {"transform": cell.transAxes, "ha": "center", "va": "center"}
                cell.text(0.5, 0.5, "no text", fontsize=7, **middle)
    for cells, label in zip(axes, _ROWS, strict=True):
        cells[0].set_ylabel(label, fontsize=8)
    for cells in axes[:2]:
        image = next(cell.images[0] for cell in cells if cell.images)
        bar = part.colorbar(image, ax=list(cells), pad=0.01, aspect=12, extend="max")
        bar.ax.tick_params(labelsize=6)


def _scale(maps: Iterable[Floats]) -> Normalize:
    """Return the colour scale from 0 to the 99.5th percentile of all maps together."""
    top = np.quantile(np.concatenate([one.ravel() for one in maps]), 0.995)
    return PowerNorm(0.5, 0, float(top))


def _plot_map(cell: Axes, values: Floats, scale: Normalize) -> None:
    cell.imshow(values, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
    cell.set(xticks=[], yticks=[])


def _plot_singular_values(cell: Axes, text: TextSpectrum) -> None:
    """Plot means over prompts with their standard errors."""
    orders = np.arange(1, 1 + len(text.singular_values))
    means = [mean.value for mean in text.singular_values]
    errors = [mean.standard_error for mean in text.singular_values]
    cell.errorbar(orders, means, errors, fmt=".-", markersize=3, color=RUN_COLOURS[0], linewidth=1)
    rank = f"rank {text.effective_rank.value:.1f}"
    cell.text(0.96, 0.97, rank, transform=cell.transAxes, ha="right", va="top", fontsize=6)
