"""Frozen CLIP (Radford et al. 2021): captions => context tokens; images and captions => features.

Shapes: B batch, M context tokens, D context width, E feature width, H, W image.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils.logging import disable_progress_bar

from ifvit.errors import UserError
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import read_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Normalisation = tuple[Tensor, Tensor]
"""Mean and standard deviation of CLIP's training images in [0, 1], each (1, 3, 1, 1)."""


class TextEncoder:
    """Captions => the last hidden state of CLIP's text tower, padding included, no mask."""

    def __init__(self, model: Any, tokenizer: "CLIPTokenizer", identity: EncoderIdentity) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D): 77 tokens of width 768 for CLIP ViT-L/14."""
        config = self.model.config
        return (config.max_position_embeddings, config.hidden_size)

    def encode(self, captions: list[str]) -> Tensor:
        """B captions => context (B, M, D), after CLIP's final layer norm."""
        return encode_captions(self.model, self.tokenizer, captions)

    def null_context(self) -> Tensor:
        """(M, D) context of the empty caption, which stands for "no text" under guidance."""
        return self.encode([""])[0]


class ClipScorer:
    """Image and text features on the unit sphere; their dot product is the raw CLIP cosine."""

    def __init__(
        self,
        model: Any,
        tokenizer: "CLIPTokenizer",
        normalisation: Normalisation,
        identity: EncoderIdentity,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._normalisation = normalisation
        self.image_size: int = model.config.vision_config.image_size
        self.identity = identity

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, E), unit length; differentiable."""
        vision = self._model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return functional.normalize(self._model.visual_projection(vision).float(), dim=1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => resized, normalised input of the image tower."""
        pixels = images / 2 + 0.5
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 1)
        mean, std = (statistic.to(pixels) for statistic in self._normalisation)
        return ((pixels - mean) / std).to(self._model.device, self._model.dtype)

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> Tensor:
        """B captions => (B, E), unit length."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = _tokenize(self._tokenizer, captions, length).to(self._model.device)
        text = self._model.text_model(input_ids=tokens).pooler_output
        return functional.normalize(self._model.text_projection(text).float(), dim=1)


@torch.no_grad()
def encode_captions(model: Any, tokenizer: "CLIPTokenizer", captions: list[str]) -> Tensor:
    """B captions => the last hidden state (B, M, D) of CLIP's text tower `model`, float32."""
    tokens = _tokenize(tokenizer, captions, model.config.max_position_embeddings)
    hidden: Tensor = model(input_ids=tokens.to(model.device)).last_hidden_state
    return hidden.float()


def load_text_encoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load CLIP's text tower `name`: a hub name, a local folder, or scenes/clip."""
    # transformers' CLIP is imported where it is loaded: most training runs do not need it.
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = resolve_pretrained(name)
    model = _load(CLIPTextModel, folder, device, dtype)
    return TextEncoder(model, CLIPTokenizer.from_pretrained(folder), identify(name, folder))


def load_clip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipScorer:
    """Load a whole CLIP model with its tokenizer and image normalisation for scoring."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = resolve_pretrained(name)
    model = _load(CLIPModel, folder, device, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return ClipScorer(model, tokenizer, _read_normalisation(folder), identify(name, folder))


def load_token_spans(name: str, length: int) -> Callable[[str], list[tuple[int, int]]]:
    """Return a function: caption => (first character, last + 1) of each of its `length` tokens.

    Start, end and padding tokens span no characters.
    """
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(resolve_pretrained(name))

    def token_spans(caption: str) -> list[tuple[int, int]]:
        batch = tokenizer(
            caption,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_offsets_mapping=True,
        )
        spans: list[tuple[int, int]] = batch.offset_mapping
        return spans

    return token_spans


def _load(cls: Any, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """Load a frozen model; `Any`, because transformers' types do not hold."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it counts tensors and takes a second
    model = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model.to(device).eval().requires_grad_(False)


def _read_normalisation(folder: Path) -> Normalisation:
    # Read by hand, because transformers' image processor needs torchvision.
    path = str(folder / "preprocessor_config.json")
    stored = read_json(path)
    try:
        mean, std = torch.tensor([stored["image_mean"], stored["image_std"]]).view(2, 1, 3, 1, 1)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: no image_mean and image_std of three channels") from None
    return mean, std


def _tokenize(tokenizer: "CLIPTokenizer", captions: list[str], length: int) -> Tensor:
    """Token ids (B, length), padded; a long caption is truncated and keeps its end token."""
    batch = tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    tokens: Tensor = batch.input_ids
    return tokens
