"""Backbones by name: the settings of arXiv 2403.16530 and the presets of configs/backbone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifvit.errors import UserError
from ifvit.models.config import (
    Fusion,
    FusionTransformerConfig,
    UNetConfig,
    parse_fusion,
    restore_config,
    symmetric_fusion,
)
from ifvit.records import parse_yaml

_SETTINGS: dict[str, tuple[Fusion, bool, bool]] = {
    "concat_early": ("concat", False, False),
    "concat_intermediate": ("concat", True, True),
    "cross_attention_early": ("cross_attention", False, False),
    "cross_attention_intermediate": ("cross_attention", True, True),
    "concat_image_blocks_only": ("concat", True, False),
    "concat_text_branch_only": ("concat", False, True),
    "cross_attention_image_blocks_only": ("cross_attention", True, False),
    "cross_attention_text_branch_only": ("cross_attention", False, True),
}
SETTINGS = tuple(_SETTINGS)
"""Names of the four settings of arXiv 2403.16530, and of the halves of its ablation."""


def with_setting(config: FusionTransformerConfig, name: str) -> FusionTransformerConfig:
    """Return `config` with the fusion map and text branch of a setting, at the same depth.

    Intermediate fusion has as many image-only blocks on each side as `config` has in front or, if
    it has none, a third of its blocks; and as many text blocks as `config`, or one. Raises
    UserError if it would have none.
    """
    entry, has_image_blocks, has_text_branch = _SETTINGS[name]
    num_blocks = len(config.blocks)
    in_front = (config.text_blocks or (0,))[0] or round((num_blocks - 1) / 3)
    num_image_blocks = min(in_front, (num_blocks - 1) // 2)
    if has_image_blocks and not num_image_blocks:
        raise UserError(f"{name}: needs image blocks on both sides; give 3 blocks or more")
    return replace(
        config,
        fusion=symmetric_fusion(entry, num_blocks, num_image_blocks if has_image_blocks else 0),
        num_text_blocks=(config.num_text_blocks or 1) if has_text_branch else 0,
    )


def setting_of(config: FusionTransformerConfig) -> str | None:
    """Return the setting that a caption backbone's map and text branch are, or None."""
    num_blocks, num_image_blocks = len(config.blocks), (config.text_blocks or (0,))[0]
    entry = config.blocks[num_blocks // 2]
    if config.fusion != symmetric_fusion(entry, num_blocks, num_image_blocks):
        return None
    found = (entry, num_image_blocks > 0, config.num_text_blocks > 0)
    names = {setting: name for name, setting in _SETTINGS.items()}
    return names.get(found) if config.long_skip and config.context_shape else None


def with_maps(
    config: FusionTransformerConfig, maps: Sequence[str]
) -> dict[str, FusionTransformerConfig]:
    """Return `config` with each fusion map or named setting, by the given word.

    Settings have the depth of `config`. A map without text also loses the text branch.
    """
    backbones = {}
    for word in maps:
        sees_text = word in SETTINGS or set(parse_fusion(word)) != {"image"}
        base = config if sees_text else replace(config, num_text_blocks=0)
        backbones[word] = (
            with_setting(base, word) if word in SETTINGS else replace(base, fusion=word)
        )
    return backbones


def _read_presets(*names: str) -> dict[str, Any]:
    """Read configs/backbone/NAME.yaml, which recipes and `--backbone NAME` use as well."""
    folder = Path(__file__).parent.parent / "configs" / "backbone"
    files = {name: (folder / f"{name}.yaml").read_text() for name in names}
    return {name: restore_config(parse_yaml(text, name)) for name, text in files.items()}


PRESETS: dict[str, FusionTransformerConfig] = _read_presets(
    "tiny", "small", "mid", "large", "huge", "1b", "3b"
)
"""For captions. tiny to huge have widths, depths and heads of U-ViT (Bao et al. 2023, Table 1) and
fuse by cross-attention in the middle third of the blocks; `small` is the paper's size. 1b and 3b
have the options of today's backbones."""
CLASS_PRESETS: dict[str, FusionTransformerConfig | UNetConfig] = _read_presets(
    "class_tiny", "class_small", "class_base", "class_large", "unet_tiny", "unet_base"
)
"""For classes; each U-Net has about as many parameters as the transformer of the same size."""
