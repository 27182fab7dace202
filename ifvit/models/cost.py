"""Parameters and floating-point operations of backbones, and the verb `cost`.

Training reports its FLOPs by `count_cost`; bench, plan and the reports of studies use it, too.
"""

import dataclasses
import functools
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
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a backbone, and floating-point operations of one forward pass for one sample."""

    params: int
    """Trainable parameters."""
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
    """Count the parameters of a backbone and the operations of one sample's forward pass.

    Blocks of one kind cost the same. For a fusion backbone, networks of one to three blocks are
    counted, and the cost of each kind of block is multiplied by its number.
    """
    if not isinstance(config, FusionUViTConfig):
        return _count_network(config)
    shallow = dataclasses.replace(config, depth=2, num_image_blocks=0, num_text_blocks=0)
    further = {  # networks with one more block, or pair of blocks => number of these blocks
        dataclasses.replace(shallow, depth=4): config.depth // 2 - 1,
        dataclasses.replace(shallow, num_image_blocks=1): config.num_image_blocks,
        dataclasses.replace(shallow, num_text_blocks=1): config.num_text_blocks,
    }
    start = vars(_count_network(shallow))
    total = dict(start)
    for network, num_blocks in further.items():
        for name, count in vars(_count_network(network)).items() if num_blocks else ():
            total[name] += num_blocks * (count - start[name])
    return Cost(**total)


@functools.cache
def _count_network(config: BackboneConfig) -> Cost:
    """Count the operations that torch dispatches on its meta device, without memory for weights."""
    # Imported here, because the modules that read results run without torch until they need costs.
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ifvit.models.weights import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(config)
    backbone.set_attention("math")  # its matrix products are the only batched ones (bmm)
    size, context = config.latent_size, config.context_shape
    latents = torch.empty(1, config.latent_channels, size, size, device="meta")
    condition = (
        torch.empty(1, dtype=torch.int64, device="meta")
        if context is None
        else torch.empty(1, *context, device="meta")
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(latents, torch.empty(1, device="meta"), condition)
    attention_flops = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return Cost(
        params=sum(parameter.numel() for parameter in backbone.parameters()),
        layer_flops=counter.get_total_flops() - attention_flops,
        attention_flops=attention_flops,
    )


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """Cost of one preset with one kind of fusion; GFLOPs are for one forward pass of one image."""

    preset: str
    """Name of a file in configs/backbone."""
    conditioning: Conditioning | Literal["classes"]
    """How blocks see text; "classes" for class-conditional presets."""
    num_image_blocks: int | None
    """None for class-conditional presets, which have no fusion."""
    num_text_blocks: int | None
    """None for class-conditional presets."""
    params: int
    """Trainable parameters."""
    gflops_paper: float
    """Twice the multiply-accumulates of Linear and Conv2d layers, as the paper counts."""
    gflops: float
    """The same plus the two matrix products inside attention."""


def cost(config: CostConfig) -> None:
    """Write the table, or with `config.json` a list of objects, to standard output."""
    rows = list(cost_rows())
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
    sys.stdout.write((text if config.json else _format_table(rows)) + "\n")


def cost_rows() -> Iterator[CostRow]:
    """Yield four rows per caption preset and conditioning, then one per class-conditional preset.

    The four are early fusion, intermediate fusion, the text branch alone, and image-only blocks
    alone. Intermediate fusion has the preset's own number of image blocks: 4 at the paper's depth
    of 12, the same third of the depth elsewhere.
    """
    conditionings: tuple[Conditioning, ...] = ("concat", "cross_attention", "adaln")
    for preset, base in PRESETS.items():
        image, text = base.num_image_blocks, base.num_text_blocks
        for conditioning in conditionings:
            for num_image, num_text in ((0, 0), (image, text), (0, text), (image, 0)):
                config = dataclasses.replace(
                    base,
                    conditioning=conditioning,
                    num_image_blocks=num_image,
                    num_text_blocks=num_text,
                )
                yield _count_row(preset, config)
    for preset, class_config in CLASS_PRESETS.items():
        yield _count_row(preset, class_config)


def _count_row(preset: str, config: BackboneConfig) -> CostRow:
    counted = count_cost(config)
    fusion = config if isinstance(config, FusionUViTConfig) else None
    return CostRow(
        preset=preset,
        conditioning=fusion.conditioning if fusion else "classes",
        num_image_blocks=fusion.num_image_blocks if fusion else None,
        num_text_blocks=fusion.num_text_blocks if fusion else None,
        params=counted.params,
        gflops_paper=counted.layer_flops / 1e9,
        gflops=counted.flops / 1e9,
    )


def _format_table(rows: list[CostRow]) -> str:
    heading = f"{'preset':13}{'conditioning':17}{'N_image':>7}{'N_text':>8}"
    lines = [f"{heading}{'parameters':>14}{'GFLOPs':>10}{'+ attention':>13}"]
    for row in rows:
        blocks = ("-" if n is None else n for n in (row.num_image_blocks, row.num_text_blocks))
        fusion = f"{row.preset:13}{row.conditioning:17}" + "{:>7}{:>8}".format(*blocks)
        lines.append(f"{fusion}{row.params:14,}{row.gflops_paper:10.2f}{row.gflops:13.2f}")
    lines += [
        "",
        "GFLOPs: one forward pass, one image, 2 x multiply-accumulates of Linear and Conv2d",
        "(the paper's convention); + attention: with the matrix products of attention.",
    ]
    return "\n".join(lines)
