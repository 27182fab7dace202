"""Load the published weights of U-ViT and of the fusion paper's authors; the verb `import`.

The authors' code base is a fork of U-ViT: the same tensors, with other block names, another order
of positions and, under cross-attention, queries apart from keys and values.
"""

import math
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor

from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.models.config import (
    Fusion,
    FusionTransformerConfig,
    ImportConfig,
    name_map,
    symmetric_fusion,
)
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.pretrained import identify, read_pickled_tensors, reading, resolve_pretrained
from ifvit.models.text_encoders import load_text_encoder
from ifvit.models.weights import (
    WeightsInfo,
    describe_backbone,
    read_stored_weights,
    restore_backbone,
    save_weights,
    step_name,
)

_RANKS = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "context_embed.weight": 2,
    "mid_block.mlp.fc1.weight": 2,
}
"""Tensors whose shapes tell the configuration, with their number of dimensions."""

_KNOWN = re.compile(
    r"(pos_embed$|(patch_embed\.proj|context_embed|norm|decoder_pred|final_layer)\.(weight|bias)$"
    r"|mid_block\.|((image|caption|joint|joint_skip|image_skip|in|out)_blocks\.\d+\.))"
)
_BLOCK = re.compile(r"(?:text_)?blocks\.\d+")
"""Name of one of our blocks, at the start of a parameter's name."""
_CLIP_TOKENS = 77
_HEAD_WIDTH = 64
_HUGE_WIDTH, _HUGE_HEADS = 1152, 16
"""U-ViT-H, the one size whose heads are not 64 channels wide."""
_FORK_QUERIES = 257


def from_published_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    context_length: int | None = None,
) -> FusionTransformer:
    """Build the backbone, in eval mode, that weights of U-ViT or its fork describe.

    Call it as model(latents, timesteps, context) with timesteps 0 ... 999; it adds the 1 from which
    both code bases count. Shapes show neither the number of heads nor how many positions are text.
    Unless given, heads are 64 channels wide, as in all published text-to-image weights, and the
    context has 77 tokens, or as few as leave a square of image tokens.
    Raises UserError that lists unexpected and missing keys for any other weights.
    """
    config = _infer_config(state_dict, num_heads, context_length)
    wanted = describe_backbone(config).state_dict()
    blocks = _published_blocks(config, is_fork=_is_fork(state_dict))
    names = {key: _published_names(key, blocks, state_dict) for key in wanted}
    expected = {name for parts in names.values() for name in parts}
    unexpected = [key for key in state_dict if key not in expected]
    missing = [name for name in sorted(expected) if name not in state_dict]
    if unexpected or missing:
        raise _foreign_keys(unexpected, missing)

    with reading("published weights: parts of one tensor do not fit each other"):
        converted = {key: torch.cat([state_dict[name] for name in names[key]]) for key in wanted}
    for key, tensor in wanted.items():
        if converted[key].shape != tensor.shape:
            raise UserError(
                f"published weights: {' + '.join(names[key])} has shape "
                f"{tuple(converted[key].shape)}; the other tensors imply {tuple(tensor.shape)}"
            )
    if _is_fork(state_dict):
        sizes = [config.num_image_tokens, 1, config.num_text_tokens]
        image, time, text = torch.split(converted["pos_embed"], sizes, dim=1)
        converted["pos_embed"] = torch.cat([time, text, image], dim=1)
        _warn_of_fixed_queries(config)
    return cast(FusionTransformer, restore_backbone(config, converted))


def _infer_config(
    state_dict: Mapping[str, Tensor], num_heads: int | None, context_length: int | None
) -> FusionTransformerConfig:
    missing = [key for key in _RANKS if key not in state_dict]
    if missing:
        raise _foreign_keys([key for key in state_dict if not _KNOWN.match(key)], missing)
    for key, rank in _RANKS.items():
        if state_dict[key].ndim != rank:
            raise UserError(
                f"published weights: {key} has {state_dict[key].ndim} dimensions, not {rank}"
            )
        if 0 in state_dict[key].shape:
            raise UserError(f"published weights: {key} is empty; use a complete file")

    num_positions, width = state_dict["pos_embed"].shape[1:]
    _, channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    if context_length is None:
        context_length = _guess_context_length(num_positions)
    sides = {stack: _count_blocks(state_dict, stack) for stack in ("image", "joint", "in")}
    entry: Fusion = "cross_attention" if _splits_queries(state_dict) else "concat"
    return FusionTransformerConfig(
        fusion=symmetric_fusion(entry, 2 * sum(sides.values()) + 1, sides["image"]),
        num_text_blocks=_count_blocks(state_dict, "caption"),
        latent_size=math.isqrt(max(num_positions - 1 - context_length, 0)) * patch_size,
        latent_channels=channels,
        patch_size=patch_size,
        width=width,
        num_heads=num_heads or _guess_num_heads(width),
        mlp_ratio=state_dict["mid_block.mlp.fc1.weight"].shape[0] // width,
        context_length=context_length,
        context_width=state_dict["context_embed.weight"].shape[1],
        timestep_offset=1,
    )


def _is_fork(state_dict: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("joint_blocks.", "image_blocks.")) for key in state_dict)


def _splits_queries(state_dict: Mapping[str, Tensor]) -> bool:
    return "mid_block.attn.kv.weight" in state_dict


def _count_blocks(state_dict: Mapping[str, Tensor], stack: str) -> int:
    prefix = f"{stack}_blocks."
    return len({key.split(".")[1] for key in state_dict if key.startswith(prefix)})


def _guess_context_length(num_positions: int) -> int:
    tokens = num_positions - 1
    if tokens > _CLIP_TOKENS and math.isqrt(tokens - _CLIP_TOKENS) ** 2 == tokens - _CLIP_TOKENS:
        return _CLIP_TOKENS
    # A wrong guess is noticed: the backbone rejects latents and context of other shapes.
    return tokens - math.isqrt(max(tokens - 1, 0)) ** 2


def _guess_num_heads(width: int) -> int:
    if width == _HUGE_WIDTH:
        return _HUGE_HEADS
    if width % _HEAD_WIDTH:
        raise UserError(
            f"published weights of width {width}: shapes do not show num_heads; pass num_heads"
        )
    return width // _HEAD_WIDTH


def _published_blocks(config: FusionTransformerConfig, *, is_fork: bool) -> dict[str, str]:
    """Names of our blocks => names of the published ones."""
    half = len(config.blocks) // 2

    def names(stack: str, count: int) -> list[str]:
        return [f"{stack}_blocks.{number}" for number in range(count)]

    if is_fork:
        num_image = config.text_blocks[0]
        num_joint = half - num_image
        first = names("image", num_image) + names("joint", num_joint)
        last = names("joint_skip", num_joint) + names("image_skip", num_image)
    else:
        first, last = names("in", half), names("out", half)
    published = {f"blocks.{n}": name for n, name in enumerate([*first, "mid_block", *last])}
    for number in range(config.num_text_blocks):
        published[f"text_blocks.{number}"] = f"caption_blocks.{number}"
    return published


def _published_names(
    key: str, blocks: Mapping[str, str], state_dict: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Names of the published tensors that, concatenated in this order, are our tensor `key`."""
    if match := _BLOCK.match(key):
        key = blocks[match[0]] + key[match.end() :]
    key = key.removeprefix("head_") if key.startswith("head_norm.") else key
    if _splits_queries(state_dict) and key.endswith(".attn.qkv.weight"):
        return key.replace(".qkv.", ".q."), key.replace(".qkv.", ".kv.")
    return (key,)


def _warn_of_fixed_queries(config: FusionTransformerConfig) -> None:
    if "cross_attention" in config.blocks and 1 + config.num_image_tokens != _FORK_QUERIES:
        warnings.warn(
            f"the fork's cross-attention code fixes its middle block at {_FORK_QUERIES} queries; "
            f"with {1 + config.num_image_tokens} image tokens it also updates text there, "
            "which this backbone does not",
            stacklevel=3,
        )


def _foreign_keys(unexpected: list[str], missing: list[str]) -> UserError:
    def first(keys: list[str]) -> str:
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    reasons = [f"unexpected {first(unexpected)}"] if unexpected else []
    reasons += [f"missing {first(missing)}"] if missing else []
    return UserError("not weights of U-ViT or of its fusion fork; keys: " + "; ".join(reasons))


def import_weights(config: ImportConfig) -> None:
    """Write published weights to `RUN/weights/step_N/ema` (or `raw`).

    Raises UserError for a file that does not hold the state dict of such a backbone alone.
    """
    with tempfile.TemporaryDirectory(prefix="ifvit-") as temporary:
        path = Path(config.file)
        if connections.is_remote(config.file):
            path = Path(temporary, "weights")
            storage.download(config.file, path)
        tensors = _read(config.file, path)
        digest = storage.sha256_of(path)
    text_encoder = load_text_encoder(config.text_encoder)
    backbone = from_published_state_dict(
        tensors, num_heads=config.num_heads, context_length=text_encoder.context_shape[0]
    )
    null_context = config.null_context or ("zeros" if _is_fork(tensors) else "empty_caption")
    info = WeightsInfo(
        step=config.step,
        null_context=null_context,
        ema_decay=config.ema_decay,
        scaling_factor=config.scaling_factor,
        vae=identify(config.vae, resolve_pretrained(config.vae, "--vae")),
        text_encoder=text_encoder.identity,
        recipe_sha256=digest,
    )
    kind = "raw" if config.ema_decay is None else "ema"
    folder = storage.join(config.run, "weights", step_name(config.step), kind)
    is_imported = storage.exists(storage.join(folder, "weights.json"))
    if is_imported and read_stored_weights(folder).info != info:
        # Results in the run name only the hash of the tensors.
        raise UserError(f"{folder}: holds weights of another import; choose another run")
    save_weights(folder, backbone, info)
    found = backbone.config
    sys.stdout.write(
        f"{folder}: {name_map(found.fusion, found.num_text_blocks)}, "
        f"{backbone.num_parameters():,} parameters, null context {null_context}\n"
    )


def _read(file: str, path: Path) -> Mapping[str, Tensor]:
    if file.endswith(".safetensors"):
        with reading(f"{file}: cannot be read as safetensors"):
            return safetensors.torch.load_file(path)
    return read_pickled_tensors(path)
