"""Parameters and floating-point operations of backbones, and the verb `cost`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ifvit.models.config import (
    CLASS_PRESETS,
    PRESETS,
    BackboneConfig,
    Conditioning,
    CostConfig,
    FusionUViTConfig,
    PatchesConfig,
    TokenTransformerConfig,
    UNetConfig,
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a backbone, and the work of one forward pass for one sample."""

    params: int
    """Trainable parameters."""
    layer_flops: int
    """Two per multiply-accumulate of Linear and Conv2d layers; the paper counts only these."""
    attention_flops: int
    """Two per multiply-accumulate of queries with keys and of weights with values."""

    @property
    def flops(self) -> int:
        """All matrix products."""
        return self.layer_flops + self.attention_flops


def count_cost(config: BackboneConfig) -> Cost:
    """Count `config`: transformers by formulas, which tests hold against the modules; the U-Net by
    running it without data.
    """
    if isinstance(config, FusionUViTConfig):
        return _count_fusion(config)
    if isinstance(config, TokenTransformerConfig):
        return _count_token_transformer(config)
    return _measure(config)


def _count_fusion(config: FusionUViTConfig) -> Cost:
    """L image tokens and one time token run through every block, M text tokens through the text
    branch, and through fused blocks as full tokens (concat) or as keys and values only.
    """
    width, num_fused = config.width, config.num_fused_blocks
    image, text = 1 + config.num_image_tokens, config.context_length
    joint = image + text
    per_token = _block_macs(config)

    fused_tokens = joint if config.conditioning == "concat" else image
    keys = image if config.conditioning == "adaln" else joint
    text_keys_values = text * 2 * width**2 if config.conditioning == "cross_attention" else 0
    modulation = _modulation_cost(config, config.depth + 1) if config.is_modulated else _FREE
    time_embed = _time_embed_cost(width) if config.is_modulated else _FREE
    num_plain, num_fused_skips = 2 * config.num_image_blocks, num_fused // 2
    layer_macs = (
        num_plain * image * per_token
        + num_fused * (fused_tokens * per_token + text_keys_values)
        + config.num_text_blocks * text * per_token
        + (num_fused_skips * fused_tokens + config.num_image_blocks * image) * 2 * width**2
        + text * config.context_width * width
        + _end_macs(config)
        + modulation.macs
        + time_embed.macs
    )
    pairs = (
        num_plain * image**2 + num_fused * fused_tokens * keys + config.num_text_blocks * text**2
    )
    params = (
        (config.depth + 1 + config.num_text_blocks) * _block_params(config)
        + config.depth // 2 * _skip_params(config)
        + (config.context_width + 1) * width
        + _end_params(config, config.num_tokens)
        + modulation.params
        + time_embed.params
    )
    return Cost(params=params, layer_flops=2 * layer_macs, attention_flops=2 * 2 * width * pairs)


def _count_token_transformer(config: TokenTransformerConfig) -> Cost:
    """All tokens run through all blocks."""
    width, tokens = config.width, config.num_tokens
    num_skips = config.depth // 2 if config.long_skip else 0
    modulation = _modulation_cost(config, config.depth) if config.is_modulated else _FREE
    time_embed = _time_embed_cost(width)
    layer_macs = (
        tokens * (config.depth * _block_macs(config) + num_skips * 2 * width**2)
        + _end_macs(config)
        + modulation.macs
        + time_embed.macs
    )
    params = (
        config.depth * _block_params(config)
        + num_skips * _skip_params(config)
        + _end_params(config, tokens)
        + modulation.params
        + time_embed.params
    )
    if config.context_shape is None:
        assert config.num_classes is not None
        params += (config.num_classes + 1) * width
    else:
        length, context_width = config.context_shape
        params += (context_width + 1) * width
        layer_macs += length * context_width * width
    attention_flops = 2 * 2 * width * config.depth * tokens**2
    return Cost(params=params, layer_flops=2 * layer_macs, attention_flops=attention_flops)


def _measure(config: UNetConfig) -> Cost:
    """Count what torch would compute, on its meta device."""
    import torch  # the other architectures do without
    from torch.utils.flop_counter import FlopCounterMode

    from ifvit.models.build import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(config)
        latents = torch.zeros(1, config.latent_channels, config.latent_size, config.latent_size)
        condition = (
            torch.zeros(1, dtype=torch.int64)
            if config.context_shape is None
            else torch.zeros(1, *config.context_shape)
        )
        backbone.set_attention("math")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(latents, torch.zeros(1), condition)
    by_operation = counter.get_flop_counts()["Global"]
    attention_flops = by_operation[torch.ops.aten.bmm]
    return Cost(
        params=sum(parameter.numel() for parameter in backbone.parameters()),
        layer_flops=counter.get_total_flops() - attention_flops,
        attention_flops=attention_flops,
    )


@dataclass(frozen=True)
class _Part:
    """Of a part that sees a sample once, not token by token."""

    macs: int
    params: int


_FREE = _Part(macs=0, params=0)


def _time_embed_cost(width: int) -> _Part:
    return _Part(macs=8 * width**2, params=8 * width**2 + 5 * width)


def _modulation_cost(config: PatchesConfig, num_blocks: int) -> _Part:
    """Six vectors for each block, two for the head, one of the condition; norms lose their own."""
    width, vectors = config.width, 6 * num_blocks + 2 + 1
    macs = vectors * width**2
    own_norms = (2 * num_blocks + 1) * 2 * width
    return _Part(macs=macs, params=macs + vectors * width - own_norms)


def _block_macs(config: PatchesConfig) -> int:
    """Of one token in one block, without attention and skip."""
    return (4 + 2 * config.mlp_ratio) * config.width**2


def _end_macs(config: PatchesConfig) -> int:
    """Of patch embedding and head."""
    patch_values = config.patch_size**2 * config.latent_channels
    convolution = (config.latent_size * config.latent_channels) ** 2 * 9
    return 2 * config.num_image_tokens * patch_values * config.width + convolution


def _block_params(config: PatchesConfig) -> int:
    """Of a block without skip."""
    width, hidden = config.width, config.mlp_ratio * config.width
    norms = 2 * 2 * width
    attention = 4 * width**2 + width
    mlp = 2 * width * hidden + hidden + width
    return norms + attention + mlp


def _skip_params(config: PatchesConfig) -> int:
    return 2 * config.width**2 + config.width


def _end_params(config: PatchesConfig, num_tokens: int) -> int:
    """Of positions, patch embedding and head."""
    width, channels = config.width, config.latent_channels
    patch_values = config.patch_size**2 * channels
    return (
        num_tokens * width
        + (patch_values + 1) * width
        + 2 * width
        + (width + 1) * patch_values
        + (9 * channels + 1) * channels
    )


_CONDITIONINGS: tuple[Conditioning, ...] = ("concat", "cross_attention", "adaln")


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One preset in one setting; GFLOPs are those of one forward pass for one image."""

    preset: str
    conditioning: Conditioning | Literal["classes"]
    num_image_blocks: int | None
    """None where nothing fuses, as the next."""
    num_text_blocks: int | None
    params: int
    gflops_paper: float
    """Twice the multiply-accumulates of Linear and Conv2d layers, as the paper counts."""
    gflops: float
    """The same and the two matrix products inside attention."""


def cost(config: CostConfig) -> None:
    """Write the table, or with `config.json` a list of objects, to standard output."""
    rows = [*cost_rows(), *class_rows()]
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
    sys.stdout.write((text if config.json else _format_table(rows)) + "\n")


def cost_rows() -> Iterator[CostRow]:
    """Per preset and conditioning: early fusion, intermediate fusion, and one half of it each.

    Intermediate fusion has the preset's own number of image blocks: 4 at the paper's depth of
    12, the same third of the depth elsewhere.
    """
    for preset, base in PRESETS.items():
        image, text = base.num_image_blocks, base.num_text_blocks
        for conditioning in _CONDITIONINGS:
            for num_image, num_text in ((0, 0), (image, text), (0, text), (image, 0)):
                counted = count_cost(
                    dataclasses.replace(
                        base,
                        conditioning=conditioning,
                        num_image_blocks=num_image,
                        num_text_blocks=num_text,
                    )
                )
                yield CostRow(
                    preset=preset,
                    conditioning=conditioning,
                    num_image_blocks=num_image,
                    num_text_blocks=num_text,
                    params=counted.params,
                    gflops_paper=counted.layer_flops / 1e9,
                    gflops=counted.flops / 1e9,
                )


def class_rows() -> Iterator[CostRow]:
    """The presets for classes."""
    for preset, config in CLASS_PRESETS.items():
        counted = count_cost(config)
        yield CostRow(
            preset=preset,
            conditioning="classes",
            num_image_blocks=None,
            num_text_blocks=None,
            params=counted.params,
            gflops_paper=counted.layer_flops / 1e9,
            gflops=counted.flops / 1e9,
        )


def _format_table(rows: list[CostRow]) -> str:
    heading = f"{'preset':13}{'conditioning':17}{'N_image':>7}{'N_text':>8}"
    lines = [f"{heading}{'parameters':>14}{'GFLOPs':>10}{'+ attention':>13}"]
    for row in rows:
        blocks = ("-" if n is None else n for n in (row.num_image_blocks, row.num_text_blocks))
        setting = f"{row.preset:13}{row.conditioning:17}" + "{:>7}{:>8}".format(*blocks)
        numbers = f"{row.params:14,}{row.gflops_paper:10.2f}{row.gflops:13.2f}"
        lines.append(f"{setting}{numbers}")
    lines.append("")
    lines.append(
        "GFLOPs: one forward pass, one image, 2 x multiply-accumulates of Linear and Conv2d"
    )
    lines.append("(the paper's convention); + attention: with the matrix products of attention.")
    return "\n".join(lines)
