"""A small ImageReward in its released format, with reproducible weights."""

import json
from pathlib import Path

import torch
from torch import Tensor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "bus", "two", "sheep"]
TEXT_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 3,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS),
    "encoder_width": 64,
    "add_cross_attention": True,
}


def released_weights() -> dict[str, Tensor]:
    """Small tensors under the names of ImageReward.pt, sampled in the order of the names."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 64),
        "pos_embed": (1, 5, 64),
        "patch_embed.proj.weight": (64, 3, 16, 16),
        "patch_embed.proj.bias": (64,),
        **_pair("norm", 64),
    }
    for block in ("blocks.0.", "blocks.1."):
        shapes |= _pair(f"{block}norm1", 64) | _pair(f"{block}norm2", 64)
        shapes |= _linear(f"{block}attn.qkv", 64, 192) | _linear(f"{block}attn.proj", 64, 64)
        shapes |= _linear(f"{block}mlp.fc1", 64, 256) | _linear(f"{block}mlp.fc2", 256, 64)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = "blip.text_encoder."
    shapes[f"{text}embeddings.word_embeddings.weight"] = (len(WORDS), 32)
    shapes[f"{text}embeddings.position_embeddings.weight"] = (64, 32)
    shapes |= _pair(f"{text}embeddings.LayerNorm", 32)
    for layer in (f"{text}encoder.layer.0.", f"{text}encoder.layer.1."):
        for kind, width in (("attention", 32), ("crossattention", 64)):
            shapes |= _linear(f"{layer}{kind}.self.query", 32, 32)
            shapes |= _linear(f"{layer}{kind}.self.key", width, 32)
            shapes |= _linear(f"{layer}{kind}.self.value", width, 32)
            shapes |= _linear(f"{layer}{kind}.output.dense", 32, 32)
            shapes |= _pair(f"{layer}{kind}.output.LayerNorm", 32)
        shapes |= _linear(f"{layer}intermediate.dense", 32, 48)
        shapes |= _linear(f"{layer}output.dense", 48, 32) | _pair(f"{layer}output.LayerNorm", 32)
    widths = {0: (32, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for index, (before, after) in widths.items():
        shapes |= _linear(f"mlp.layers.{index}", before, after)
    generator = torch.Generator().manual_seed(0)
    sampled = {
        name: torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5
        for name, shape in sorted(shapes.items())
    }
    # The file also holds buffers and the heads of BLIP's pretraining.
    sampled[f"{text}embeddings.position_ids"] = torch.arange(64)[None]
    sampled["blip.vision_proj.weight"] = torch.zeros(256, 64)
    return sampled


def write_image_reward(folder: Path) -> str:
    """The three files that `load_image_reward` reads."""
    torch.save(released_weights(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(TEXT_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return str(folder)


def _linear(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def _pair(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
