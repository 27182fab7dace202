"""The verb `analyze attention`: runs and prompts => maps and singular values by layer, a figure."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    LayerAttention,
    LayerSums,
    PromptRows,
    TextAttention,
    inner_tokens,
    layer_names,
    read_attention,
    watch_attention,
    write_attention,
)
from ifvit.analysis.config import AttentionConfig
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.evaluation.runs import short_names
from ifvit.figures import INK, RUN_COLOURS, house_style, to_png
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.weights import WeightsInfo, find_weights, load_weights, run_of, step_name
from ifvit.sampling.generate import read_prompt_file
from ifvit.sampling.load import (
    check_identity,
    load_trained_text_encoder,
    require_text_encoder,
    weights_sha256,
)
from ifvit.shards import ShardReader

_CELL = 1.25
_ROWS = ("image to image", "text to image", "singular values\n(dots: per prompt)")
_SMALLEST = 1e-4
"""Share of the largest singular value below which the axis ends."""


def attention_figure(summaries: dict[str, AttentionSummary]) -> Figure:
    """Three rows a run: image-to-image maps, text-to-image maps, singular values; a layer a column.

    Rows of an image-to-image map are the image tokens that look, its columns those looked at; in a
    text-to-image map, text tokens are the rows and the image tokens that look at them the columns.
    All maps of one kind share one colour scale, the square root of attention, that ends at their
    99.5th percentile; all singular values share one logarithmic axis. So layers and runs compare.
    """
    layers = [layer for summary in summaries.values() for layer in summary.layers]
    texts = [layer.text for layer in layers if layer.text]
    scales = (_scale(layer.image_map for layer in layers), _scale(text.map for text in texts))
    largest = max(text.singular_values[0] for text in texts)
    limits = (_SMALLEST * largest, 2 * largest)
    num_columns = max(len(summary.layers) for summary in summaries.values())
    size = (_CELL * num_columns + 2, (3 * _CELL + 0.6) * len(summaries))
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        parts = figure.subfigures(len(summaries), 1, squeeze=False)[:, 0]
        for part, (name, summary) in zip(parts, summaries.items(), strict=True):
            part.suptitle(f"{name}: {_setting(summary)}", fontsize=9, fontweight="bold")
            _draw_run(part, summary, num_columns, scales, limits)
    return figure


def _draw_run(
    part: SubFigure,
    summary: AttentionSummary,
    num_columns: int,
    scales: tuple[Normalize, Normalize],
    limits: tuple[float, float],
) -> None:
    axes = part.subplots(3, num_columns, squeeze=False)
    for cell in axes[:, len(summary.layers) :].flat:
        cell.set_axis_off()
    for column, layer in zip(axes.T, summary.layers, strict=False):
        column[0].set_title(layer.name, fontsize=8)
        _draw_map(column[0], layer.image_map, scales[0])
        _prepare_values(column[2], limits)
        if layer.text:
            _draw_map(column[1], layer.text.map, scales[1])
            _draw_values(column[2], layer.text)
        else:
            column[1].set(xticks=[], yticks=[])
            for cell in column[1:]:
                middle = {"transform": cell.transAxes, "ha": "center", "va": "center"}
                cell.text(0.5, 0.5, "no text", fontsize=7, **middle)
    axes[2, 0].tick_params(labelleft=True)
    for cells, label in zip(axes, _ROWS, strict=True):
        cells[0].set_ylabel(label, fontsize=8)
    for cells in axes[:2]:
        drawn = next(cell.images[0] for cell in cells if cell.images)
        bar = part.colorbar(drawn, ax=list(cells), pad=0.01, aspect=12, extend="max")
        bar.ax.tick_params(labelsize=6)


def _scale(maps: Iterable[Floats]) -> Normalize:
    """0 ... 99.5th percentile of all maps together."""
    top = np.quantile(np.concatenate([one.ravel() for one in maps]), 0.995)
    return PowerNorm(0.5, 0, float(top))


def _draw_map(cell: Axes, values: Floats, scale: Normalize) -> None:
    cell.imshow(values, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
    cell.set(xticks=[], yticks=[])


def _prepare_values(cell: Axes, limits: tuple[float, float]) -> None:
    cell.set(yscale="log", ylim=limits, xlim=(0.5, NUM_SINGULAR_VALUES + 0.5))
    cell.set_xticks([1, NUM_SINGULAR_VALUES])
    cell.tick_params(labelsize=6, labelleft=False)


def _draw_values(cell: Axes, text: TextAttention) -> None:
    """Those of the mean map as a line, the prompts' own as dots with standard errors."""
    orders = np.arange(1, 1 + len(text.singular_values))
    means = [mean.value for mean in text.prompt_singular_values]
    errors = [mean.standard_error for mean in text.prompt_singular_values]
    cell.plot(orders, text.singular_values, linewidth=1.4, color=RUN_COLOURS[0])
    cell.errorbar(orders, means, errors, fmt=".", markersize=3, color=INK, linewidth=0.8)
    rank = f"rank {text.effective_rank:.1f}\n({text.prompt_effective_rank.value:.1f})"
    cell.text(0.96, 0.97, rank, transform=cell.transAxes, ha="right", va="top", fontsize=6)


def _setting(summary: AttentionSummary) -> str:
    blocks = f"[{summary.num_image_blocks}, {summary.num_text_blocks}]"
    return f"{summary.conditioning}, [N_image, N_text] = {blocks}, step {summary.step:,}"


_NUM_OF_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """N captions, their contexts (N, M, D), and the null context (M, D)."""

    texts: list[str]
    contexts: torch.Tensor
    null_context: torch.Tensor


def analyze_attention(config: AttentionConfig) -> dict[str, AttentionSummary]:
    """Analyse each run, write its files, then figure and table; by the runs' short names.

    A run of the same weights that has been analysed in the same way is not analysed again.
    Raises UserError for runs without text, fewer than two prompts, or too wide a trim.
    """
    names = short_names(config.runs)
    summaries: dict[str, AttentionSummary] = {}
    folders: dict[str, dict[str, AttentionSummary]] = {}
    for name, run in zip(names, config.runs, strict=True):
        folder = _folder(config, name, run)
        summaries[name] = summary = summarise_run(config, run, folder)
        folders.setdefault(config.output or folder, {})[name] = summary
    for folder, shown in folders.items():
        write_overview(folder, shown)
    sys.stdout.write(format_table(table_rows(summaries)))
    return summaries


def summarise_run(config: AttentionConfig, run: str, folder: str) -> AttentionSummary:
    """Record the attention of the run's newest weights, or read it where it has been recorded."""
    device = choose_device(config.device)
    backbone, info = load_weights(run)
    if not isinstance(backbone, FusionUViT):
        raise UserError(
            f"{run}: weights of a {type(backbone).__name__}, but attention to text is analysed of "
            "fusion backbones; leave this run out"
        )
    if backbone.config.conditioning == "adaln":
        raise UserError(f"{run}: under conditioning adaln no attention goes to text; leave it out")
    digest = weights_sha256(backbone)
    backbone.to(device)
    prompts = _open_prompts(config, info, device)
    protocol = AttentionProtocol(
        num_prompts=len(prompts.texts),
        prompts_sha256=hashlib.sha256(json.dumps(prompts.texts).encode()).hexdigest(),
        sampling=config.sampling.settings,
        trim=config.trim,
    )
    url = storage.join(folder, f"{step_name(info.step)}.json")
    before = _read_if_whole(url)
    if before and (before.weights_sha256, before.protocol) == (digest, protocol):
        sys.stdout.write(f"{url} is there\n")
        return before
    summary = AttentionSummary(
        weights=run,
        weights_sha256=digest,
        step=info.step,
        conditioning=backbone.config.conditioning,
        num_image_blocks=backbone.config.num_image_blocks,
        num_text_blocks=backbone.config.num_text_blocks,
        protocol=protocol,
        layers=record_layers(backbone, prompts, config),
    )
    write_attention(url, summary)
    sys.stdout.write(f"{url}\n")
    return summary


def _read_if_whole(url: str) -> AttentionSummary | None:
    """None where nothing is, and where an analysis was killed while it wrote."""
    try:
        return read_attention(url)
    except UserError:
        return None


@torch.no_grad()
def record_layers(
    backbone: FusionUViT, prompts: Prompts, config: AttentionConfig
) -> tuple[LayerAttention, ...]:
    """Sample the prompts as ever, batch by batch, and average their attention by layer."""
    shape = backbone.config
    inside = inner_tokens(shape.latent_size // shape.patch_size, config.trim)
    names = layer_names(shape.depth)
    layers = [LayerSums(name, shape.num_image_tokens, inside) for name in names]
    null_text = backbone.encode_condition(prompts.null_context[None].to(backbone.device))
    positions = torch.arange(len(prompts.texts))
    with tqdm(total=len(positions), unit="prompt", desc="attend", leave=False) as progress:
        for batch in torch.split(positions, config.sampling.batch_size):
            rows = PromptRows(len(batch), inside)
            with watch_attention(backbone, rows):
                sample_latents(
                    backbone,
                    ConditionBatch(positions=batch, condition=prompts.contexts[batch]),
                    null_text,
                    config.sampling,
                )
            for layer, mean in zip(layers, rows.means(), strict=True):
                layer.add(mean)
            progress.update(len(batch))
    return tuple(layer.finish() for layer in layers)


def write_overview(folder: str, summaries: dict[str, AttentionSummary]) -> None:
    """FOLDER/attention.png and attention.csv."""
    figure = to_png(attention_figure(summaries))
    storage.write_bytes(storage.join(folder, "attention.png"), figure)
    rows = table_rows(summaries)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(storage.join(folder, "attention.csv"), table.getvalue().encode())


def table_rows(summaries: Mapping[str, AttentionSummary]) -> list[dict[str, Any]]:
    """One row per run and layer; ranks are None where a layer has no text."""
    return [
        {
            "run": name,
            "layer": layer.name,
            "text_share": layer.text_share.value,
            "text_share_error": layer.text_share.standard_error,
            "effective_rank": layer.text and layer.text.effective_rank,
            "prompt_rank": layer.text and layer.text.prompt_effective_rank.value,
            "prompt_rank_error": layer.text and layer.text.prompt_effective_rank.standard_error,
        }
        for name, summary in summaries.items()
        for layer in summary.layers
    ]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lines of text: of the mean map, and mean and standard error over the prompts' own."""
    width = max(len(row["run"]) for row in rows)
    lines = [f"{'run':{width}}  layer   {'text share':15}   rank  rank per prompt"]
    for row in rows:
        of_text = "no text"
        if row["effective_rank"] is not None:
            share = f"{row['text_share']:.4f} ± {row['text_share_error']:.4f}"
            prompt_rank = f"{row['prompt_rank']:.2f} ± {row['prompt_rank_error']:.2f}"
            of_text = f"{share}  {row['effective_rank']:5.2f}  {prompt_rank}"
        lines.append(f"{row['run']:{width}}  {row['layer']:6}  {of_text}")
    return "".join(f"{line}\n" for line in lines)


def _open_prompts(config: AttentionConfig, info: WeightsInfo, device: str) -> Prompts:
    """From the text file, or the first caption of each of the first held-out images."""
    if config.shards is None:
        assert config.prompts is not None
        texts = read_prompt_file(config.prompts)[: config.num_prompts]
        if len(texts) < (config.num_prompts or 2):
            raise UserError(
                f"{config.prompts}: {len(texts)} prompts, needed are {config.num_prompts or 2}; "
                "write more of them, one a line"
            )
        encoder = load_trained_text_encoder(info, device)
        return Prompts(
            texts=texts,
            contexts=torch.cat(
                [
                    encoder.encode(texts[start : start + config.sampling.batch_size])
                    for start in range(0, len(texts), config.sampling.batch_size)
                ]
            ),
            null_context=encoder.null_context(),
        )
    reader = ShardReader(config.shards)
    trained_with = require_text_encoder(info)
    check_identity(f"{reader.url}: text encoder", reader.text.encoder, trained_with)
    count = config.num_prompts or _NUM_OF_SHARDS
    if count > len(reader):
        raise UserError(
            f"{reader.url}: {len(reader)} images, num_prompts asks for {count}; lower it"
        )

    return Prompts(
        texts=[reader.metadata(position).captions[0] for position in range(count)],
        contexts=torch.from_numpy(np.stack([reader.context(p, 0) for p in range(count)])),
        null_context=torch.from_numpy(np.array(reader.null_context)),
    )


def _folder(config: AttentionConfig, name: str, run: str) -> str:
    """OUTPUT/NAME, or RUN/analysis/attention; weights without a run keep it in their folder."""
    if config.output:
        return storage.join(config.output, name)
    return storage.join(run_of(find_weights(run)) or run, "analysis", "attention")
