"""The verb `analyze attention`: runs and prompts => maps and singular values by layer, a figure."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ifvit import storage
from ifvit.analysis.attention import (
    AttentionProtocol,
    AttentionSummary,
    LayerAttention,
    read_attention,
    write_attention,
)
from ifvit.analysis.attention_figure import attention_figure
from ifvit.analysis.attention_maps import (
    LayerSums,
    PromptRows,
    inner_tokens,
    layer_names,
    watch_attention,
)
from ifvit.analysis.config import AttentionConfig
from ifvit.analysis.figure_style import to_png
from ifvit.analysis.runs import short_names
from ifvit.device import choose_device
from ifvit.errors import UserError
from ifvit.models.uvit import FusionUViT
from ifvit.models.weights import WeightsInfo, find_weights, load_weights, run_of, step_name
from ifvit.sampling.encoders import (
    check_identity,
    open_text_encoder,
    require_text_encoder,
    weights_sha256,
)
from ifvit.sampling.generate import read_prompt_file
from ifvit.sampling.sampler import ConditionOf, sample_latents
from ifvit.shards import ShardReader

_NUM_OF_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Captions, their contexts by position, and the null context (M, D)."""

    texts: list[str]
    context_of: ConditionOf
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
    if backbone.shape.conditioning == "adaln":
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
        conditioning=backbone.shape.conditioning,
        num_image_blocks=backbone.shape.num_image_blocks,
        num_text_blocks=backbone.shape.num_text_blocks,
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
    shape = backbone.shape
    inside = inner_tokens(shape.latent_size // shape.patch_size, config.trim)
    names = layer_names(shape.depth)
    layers = [LayerSums(name, shape.num_image_tokens, inside) for name in names]
    null_text = backbone.encode_condition(prompts.null_context[None].to(backbone.device))
    positions = torch.arange(len(prompts.texts))
    with tqdm(total=len(positions), unit="prompt", desc="attend", leave=False) as progress:
        for batch in torch.split(positions, config.sampling.batch_size):
            context = prompts.context_of(batch).to(backbone.device)
            rows = PromptRows(len(batch), inside)
            with watch_attention(backbone, rows):
                sample_latents(backbone, context, null_text, batch, config.sampling)
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
        encoder = open_text_encoder(info, device)
        return Prompts(
            texts=texts,
            context_of=lambda positions: encoder.encode([texts[p] for p in positions.tolist()]),
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

    def read_contexts(positions: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([reader.context(p, 0) for p in positions.tolist()]))

    return Prompts(
        texts=[reader.metadata(position).captions[0] for position in range(count)],
        context_of=read_contexts,
        null_context=torch.from_numpy(np.array(reader.null_context)),
    )


def _folder(config: AttentionConfig, name: str, run: str) -> str:
    """OUTPUT/NAME, or RUN/analysis/attention; weights without a run keep it in their folder."""
    if config.output:
        return storage.join(config.output, name)
    return storage.join(run_of(find_weights(run)) or run, "analysis", "attention")
