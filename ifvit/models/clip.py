"""Frozen CLIP (Radford et al. 2021): captions => context tokens; images and captions => features.

Shapes: B batch, M context tokens, D context width, E feature width, H, W image.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.shards import EncoderIdentity


class TextEncoder:
    """Captions => the last hidden state of CLIP's text tower, padding included, no mask."""

    def __init__(
        self, model: CLIPTextModel, tokenizer: CLIPTokenizer, identity: EncoderIdentity
    ) -> None:
        self._model: Any = model  # transformers' types do not hold
        self._tokenizer = tokenizer
        self.identity = identity

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D): 77 tokens of width 768 for CLIP ViT-L/14."""
        config = self._model.config
        return (config.max_position_embeddings, config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """B captions => context (B, M, D), after CLIP's final layer norm; long ones are cut."""
        tokens = _tokenize(self._tokenizer, captions, self.context_shape[0])
        hidden: Tensor = self._model(input_ids=tokens.to(self._model.device)).last_hidden_state
        return hidden.float()

    def null_context(self) -> Tensor:
        """(M, D) context of the empty caption, which stands for "no text" under guidance."""
        return self.encode([""])[0]


class ClipScorer:
    """Image and text features on the unit sphere; their dot product is the raw CLIP cosine."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        processor: CLIPImageProcessor,
        identity: EncoderIdentity,
    ) -> None:
        self._model: Any = model  # transformers' types do not hold
        self._tokenizer = tokenizer
        config: Any = model.config
        self._image_size: int = config.vision_config.image_size
        self._mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
        self.identity = identity

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, E), unit length; differentiable."""
        pixels = images / 2 + 0.5
        if pixels.shape[-1] != self._image_size:
            size = (self._image_size, self._image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(
                0, 1
            )
        mean, std = self._mean.to(pixels), self._std.to(pixels)
        pixels = ((pixels - mean) / std).to(self._model.device, self._model.dtype)
        vision = self._model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self._model.visual_projection(vision).float(), dim=1)

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> Tensor:
        """B captions => (B, E), unit length."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = _tokenize(self._tokenizer, captions, length).to(self._model.device)
        text = self._model.text_model(input_ids=tokens).pooler_output
        return functional.normalize(self._model.text_projection(text).float(), dim=1)


def load_text_encoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Open the text tower of `openai/clip-vit-large-patch14`, a local folder or `scenes/clip`."""
    folder = resolve_pretrained(name)
    identity = identify(name, folder)
    disable_progress_bar()  # it counts tensors, within a second
    model: Any = CLIPTextModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    model.requires_grad_(False)
    return TextEncoder(model.to(device).eval(), CLIPTokenizer.from_pretrained(folder), identity)


def load_clip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipScorer:
    """Open a whole CLIP model with its tokenizer and image normalisation for scoring."""
    folder = resolve_pretrained(name)
    identity = identify(name, folder)
    disable_progress_bar()
    model: Any = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    processor = CLIPImageProcessor.from_pretrained(folder)
    return ClipScorer(model.to(device), CLIPTokenizer.from_pretrained(folder), processor, identity)


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> Tensor:
    """(B, length) token ids, padded to full length and cut with the end token kept."""
    batch = tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    tokens: Tensor = batch.input_ids
    return tokens
