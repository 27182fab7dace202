"""ImageReward (Xu et al. 2023): predicts how much people like an image for its prompt.

The rewards are about N(0, 1). DATE raises them while sampling. The released `ImageReward.pt` is
loaded into transformers' BLIP, which needs neither ImageReward's own package nor torchvision.
Shapes: B batch, H, W image, D width of the text tower.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ifvit.models.clip import tokenize
from ifvit.models.config import NumBlocks, NumClasses, Size
from ifvit.models.pretrained import (
    download_pretrained,
    read_model_config,
    read_pickled_tensors,
    reading,
    require_shapes,
)
from ifvit.records import NonNegativeInt, PlainName, PositiveFloat, record

_WEIGHTS, _TEXT_CONFIG = "ImageReward.pt", "med_config.json"
_TOKENIZER = "bert-base-uncased"
_MAX_TOKENS = 35
_HEAD_WIDTH = 64
_MEAN, _STANDARD_DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw rewards over the prompts of ImageReward's authors."""

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_VISION_NAMES = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"blocks\.(\d+)\.norm([12])": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
    r"norm(?=\.)": "post_layernorm",
}
"""Name patterns of BLIP's own vision tower => names in transformers; the text tower's agree."""


@record
class TextConfig:
    """The keys of med_config.json that describe BLIP's text tower."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: NumBlocks
    num_attention_heads: Size
    max_position_embeddings: Size
    vocab_size: NumClasses
    hidden_act: PlainName = "gelu"
    layer_norm_eps: PositiveFloat = 1e-12
    pad_token_id: NonNegativeInt = 0
    bos_token_id: NonNegativeInt = 30522
    sep_token_id: NonNegativeInt = 102


class ImageReward(nn.Module):
    """BLIP's text tower reads the prompt and cross-attends to the image; an MLP gives the score."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, tokenizer: Any) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.tokenizer = tokenizer
        # Five linear layers without a nonlinearity; the released names also count Dropout layers.
        widths = (text.config.hidden_size, 1024, 128, 64, 16, 1)
        a, b, c, *last = (nn.Linear(before, after) for before, after in pairwise(widths))
        self.mlp = nn.Sequential(a, nn.Identity(), b, nn.Identity(), c, nn.Identity(), *last)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards (B,) of images (B, 3, H, W) in [-1, 1] for their B prompts.

        The rewards are differentiable in the images. Images are resized but not clamped, which
        would stop gradients.
        """
        tokens = tokenize(self.tokenizer, prompts, _MAX_TOKENS).to(self.text.device)
        side = int(self.vision.config.image_size)  # type: ignore[arg-type]  # square by our loader
        mean, standard_deviation = torch.tensor(
            [OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=self.text.device
        ).view(2, 1, 3, 1, 1)
        resized = functional.interpolate(images, (side, side), mode="bilinear")
        pixels = (resized / 2 + 0.5 - mean) / standard_deviation
        image_tokens = self.vision(pixel_values=pixels).last_hidden_state
        text_tokens = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=image_tokens,
            is_decoder=False,
        ).last_hidden_state
        reward: Tensor = (self.mlp(text_tokens[:, 0]).squeeze(1) - _MEAN) / _STANDARD_DEVIATION
        return reward


def load_image_reward(name: str, device: str = "cpu") -> ImageReward:
    """Load a folder or hub repository that holds ImageReward.pt and med_config.json.

    BERT's tokenizer is read from the same folder if its vocab.txt is there, else from the hub.
    Raises UserError if the files are missing, unreadable or of another model.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = download_pretrained(name, files=(_WEIGHTS, _TEXT_CONFIG))
    path = folder / _WEIGHTS
    stored = read_pickled_tensors(path)
    settings = read_model_config(TextConfig, folder, name=_TEXT_CONFIG)
    tokenizer = _load_tokenizer(folder)
    with reading(f"{path}: not the weights of ImageReward"):
        # The file also holds BLIP's contrastive heads and queues, which no score needs.
        tensors = {
            _rename(key): value
            for key, value in stored.items()
            if key.startswith((_VISION, _TEXT, _HEAD)) and not key.endswith("position_ids")
        }
        vision = _vision_config(stored)
        text = BlipTextConfig(**asdict(settings), encoder_hidden_size=vision.hidden_size)
        with torch.device("meta"):
            described = _build(vision, text, tokenizer)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        require_shapes(f"{path}: not the weights of ImageReward", described, shapes)
        model = _build(vision, text, tokenizer)
        model.load_state_dict(tensors)
    return model.eval().requires_grad_(False).to(device)


def _build(vision: BlipVisionConfig, text: BlipTextConfig, tokenizer: Any) -> ImageReward:
    towers = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    return ImageReward(*towers, tokenizer)


def _vision_config(stored: dict[str, Tensor]) -> BlipVisionConfig:
    """Infer the vision tower from the weights; heads are 64 wide in all of BLIP's towers."""
    width, _, patch_size, _ = stored[f"{_VISION}patch_embed.proj.weight"].shape
    positions = stored[f"{_VISION}pos_embed"].shape[1] - 1
    layers = [key for key in stored if key.startswith(_VISION) and key.endswith("attn.qkv.weight")]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch_size * round(positions**0.5),
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _load_tokenizer(folder: Path) -> Any:
    with reading(f"{folder}: BERT's tokenizer does not load"):
        if (folder / "vocab.txt").is_file():
            return BertTokenizer(vocab=str(folder / "vocab.txt"))
        return AutoTokenizer.from_pretrained(_TOKENIZER, trust_remote_code=False)


def _rename(key: str) -> str:
    """Name in `ImageReward` of the released tensor `key`. Raises KeyError for an unknown name."""
    if key.startswith(_HEAD):
        return key.replace("mlp.layers.", "mlp.")
    if key.startswith(_TEXT):
        return key.replace(_TEXT, "text.")
    rest = key.removeprefix(_VISION)
    for pattern, name in _VISION_NAMES.items():
        renamed, found = re.subn(f"^{pattern}", name, rest)
        if found:
            return f"vision.{renamed}"
    raise KeyError(f"unknown tensor {key}")
