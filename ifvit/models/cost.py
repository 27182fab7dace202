"""Parameters and floating-point operations of backbones, and the verb `cost`.

Training reports its FLOPs by `count_cost`; bench, plan and the reports of studies use it, too.
"""

import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ifvit.models.config import (
    BackboneConfig,
    CostConfig,
    FusionTransformerConfig,
    name_map,
    without_representation,
)
from ifvit.models.presets import (
    CLASS_PRESETS,
    PRESETS,
    SETTINGS,
    setting_of,
    with_maps,
    with_setting,
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a backbone, and floating-point operations of one forward pass for one sample."""

    params: int
    """Trainable parameters, without the projector for representation alignment."""
    layer_flops: int
    """Twice the multiply-accumulates of Linear and Conv2d layers; the paper counts only these."""
    attention_flops: int
    """Twice the multiply-accumulates of queries with keys, and of attention weights with values."""

    @property
    def flops(self) -> int:
        """Operations of all matrix products."""
        return self.layer_flops + self.attention_flops


@functools.cache
def count_cost(config: BackboneConfig) -> Cost:
    """Count parameters, and the operations that torch dispatches on its meta device per sample."""
    # Imported here, because the modules that read results run without torch until they need costs.
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ifvit.models.weights import describe_backbone

    backbone = describe_backbone(without_representation(config))
    backbone.set_attention("math")  # its matrix products are the only batched ones (bmm)
    size, context = config.latent_size, config.context_shape
    latents = torch.empty(1, config.latent_channels, size, size, device="meta")
    condition = (
        torch.empty(1, dtype=torch.int64, device="meta")
        if context is None
        else torch.empty(1, *context, device="meta")
    )
    counter, repeated = FlopCounterMode(display=False), Counter[Any]()
    if isinstance(config, FusionTransformerConfig):
        for block in backbone.parts():
            block.forward = functools.partial(_run_block, block, block.forward, counter, repeated)
    with counter, torch.no_grad():
        backbone(latents, torch.empty(1, device="meta"), condition)
    flops = _counts(counter) + repeated
    attention_flops = flops.pop(torch.ops.aten.bmm, 0)
    return Cost(
        params=sum(parameter.numel() for parameter in backbone.parameters()),
        layer_flops=flops.total(),
        attention_flops=attention_flops,
    )


_BLOCKS: dict[object, tuple[Any, Counter[Any]]] = {}
"""Outputs on the meta device and operations of blocks that have run, by kind and input shapes."""


def _run_block(
    block: Any,
    forward: Callable[..., Any],
    counter: Any,
    repeated: Counter[Any],
    tokens: Any,
    inputs: Any,
) -> Any:
    """Run a block under `counter`, or add to `repeated` what an equal block has counted before."""
    from torch.utils._pytree import tree_leaves

    leaves = tree_leaves([tokens, *vars(inputs).values()])
    shapes = tuple(leaf.shape for leaf in leaves if leaf is not None)
    weights = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
    key = type(block), weights, shapes
    if key in _BLOCKS:
        outputs, counts = _BLOCKS[key]
        repeated.update(counts)
        return outputs
    before = _counts(counter)
    outputs = forward(tokens, inputs)
    _BLOCKS[key] = outputs, _counts(counter) - before
    return outputs


def _counts(counter: Any) -> Counter[Any]:
    """Return the operations that a FlopCounterMode has counted, by kind."""
    return Counter(counter.get_flop_counts().get("Global", {}))


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """Cost of one preset with one fusion map; GFLOPs are for one forward pass of one image."""

    preset: str | None
    """Name of a file in configs/backbone; None for maps and backbones of the command line."""
    setting: str | None
    """Name of the paper's setting that the fusion map is; None for other maps."""
    fusion: str | None
    """The fusion map; None for U-Nets."""
    num_text_blocks: int | None
    """None for U-Nets."""
    params: int
    """Trainable parameters."""
    gflops_paper: float
    """Twice the multiply-accumulates of Linear and Conv2d layers, as the paper counts."""
    gflops: float
    """The same plus the two matrix products inside attention."""


def cost(config: CostConfig) -> None:
    """Write the table, or with `config.json` a list of objects; with `config.draw` a drawing."""
    rows = list(cost_rows(config))
    if config.draw is not None:
        from ifvit.models.fusion_drawing import draw_maps

        draw_maps(config.draw, _chosen_maps(config))
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
    sys.stdout.write((text if config.json else _format_table(rows)) + "\n")


def _chosen_maps(config: CostConfig) -> dict[str, FusionTransformerConfig]:
    """Backbones that the command line names, by title; six examples if it asks for a drawing."""
    if config.maps:
        return with_maps(config.backbone or PRESETS["small"], config.maps)
    if config.backbone:
        return {config.backbone.fusion: config.backbone}
    if config.draw is None:
        return {}
    from ifvit.models.fusion_drawing import EXAMPLES

    return EXAMPLES


def cost_rows(config: CostConfig) -> Iterator[CostRow]:
    """Yield a row per chosen map, or for every preset.

    The presets of the paper's options have a row per setting.
    """
    chosen = _chosen_maps(config)
    for backbone in chosen.values():
        yield _count_row(None, backbone)
    if not chosen:
        for preset, base in PRESETS.items():
            for setting in SETTINGS if setting_of(base) else ():
                yield _count_row(preset, with_setting(base, setting))
            if not setting_of(base):
                yield _count_row(preset, base)
        for preset, class_config in CLASS_PRESETS.items():
            yield _count_row(preset, class_config)


def _count_row(preset: str | None, config: BackboneConfig) -> CostRow:
    counted = count_cost(config)
    transformer = config if isinstance(config, FusionTransformerConfig) else None
    return CostRow(
        preset=preset,
        setting=setting_of(transformer) if transformer else None,
        fusion=transformer.fusion if transformer else None,
        num_text_blocks=transformer.num_text_blocks if transformer else None,
        params=counted.params,
        gflops_paper=counted.layer_flops / 1e9,
        gflops=counted.flops / 1e9,
    )


def _format_table(rows: list[CostRow]) -> str:
    lines = [f"{'preset':13}{'parameters':>14}{'GFLOPs':>10}{'+ attention':>13}  fusion map"]
    for row in rows:
        fusion = name_map(row.fusion, row.num_text_blocks or 0) if row.fusion else "U-Net"
        preset = row.preset or ""
        lines.append(
            f"{preset:13}{row.params:14,}{row.gflops_paper:10.3f}{row.gflops:13.3f}  {fusion}"
        )
    lines += [
        "",
        "GFLOPs: one forward pass, one image, 2 x multiply-accumulates of Linear and Conv2d",
        "(the paper's convention); + attention: with the matrix products of attention.",
    ]
    return "\n".join(lines)
