"""`ifvit cost`: parameters and GFLOPs of every preset, of fusion backbones in every setting."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ifvit.analysis.config import CostConfig
from ifvit.models.config import Conditioning
from ifvit.models.flops import count_cost
from ifvit.models.presets import CLASS_PRESETS, PRESETS

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
