"""Frozen CLIP (Radford et al. 2021): its towers, and images and captions => features.

Shapes: B batch, E feature width, H, W image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ifvit.errors import UserError
from ifvit.models.pretrained import (
    identify,
    load_frozen,
    read_model_config,
    read_safe_config,
    reading,
    resolve_pretrained,
)
from ifvit.records import PositiveFloat, record
from ifvit.shards.format import EncoderIdentity

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_CHARACTERS = 10_000
"""Longer captions are cut before they are tokenised; only their first tokens count anyway."""


@record
class ImageProcessorConfig:
    """The keys of preprocessor_config.json that prepare images."""

    image_mean: tuple[float, float, float]
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class ImagePreprocessor:
    """Images => resized, normalised input of an image encoder."""

    def __init__(
        self, processor: ImageProcessorConfig, image_size: int, device: torch.device | str
    ) -> None:
        self.image_size = image_size
        mean, std = torch.tensor([processor.image_mean, processor.image_std]).view(2, 1, 3, 1, 1)
        self._mean, self._std = mean.to(device), std.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, 3, image_size, image_size), resized bicubic."""
        pixels = images / 2 + 0.5
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(0, 1)
        normalised: Tensor = (pixels.to(self._mean.device) - self._mean) / self._std
        return normalised


class ClipScorer:
    """Image and text features on the unit sphere; their dot product is the raw CLIP cosine."""

    def __init__(
        self,
        model: Any,
        tokenizer: "CLIPTokenizer",
        processor: ImageProcessorConfig,
        identity: EncoderIdentity,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.image_size: int = model.config.vision_config.image_size
        self.preprocess = ImagePreprocessor(processor, self.image_size, model.device)
        self.identity = identity

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, E), unit length; differentiable."""
        pixels = self.preprocess(images).to(self._model.dtype)
        vision = self._model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self._model.visual_projection(vision).float(), dim=1)

    @torch.no_grad()
    def embed_texts(self, captions: list[str]) -> Tensor:
        """B captions => (B, E), unit length."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = tokenize(self._tokenizer, captions, length).input_ids.to(self._model.device)
        text = self._model.text_model(input_ids=tokens).pooler_output
        return functional.normalize(self._model.text_projection(text).float(), dim=1)


def load_clip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipScorer:
    """Load a whole CLIP model with its tokenizer and image normalisation for scoring."""
    from transformers import CLIPConfig, CLIPModel

    folder = resolve_pretrained(name, "the field clip")
    stored = read_safe_config(folder)
    with reading(f"{folder}/config.json: not a CLIP"):
        config = CLIPConfig(**stored)
    model = load_transformers(CLIPModel, config, folder, dtype).to(device)
    # Read by hand, because transformers' image processor needs torchvision.
    processor = read_model_config(ImageProcessorConfig, folder, name="preprocessor_config.json")
    return ClipScorer(model, load_tokenizer(folder), processor, identify(name, folder))


def load_text_tower(folder: Path, dtype: torch.dtype) -> Any:
    """Load the text tower of a folder, alone or part of a CLIP."""
    # transformers' CLIP is imported where it is loaded: most training runs do not need it.
    from transformers import CLIPTextConfig, CLIPTextModel

    return _load_tower(CLIPTextModel, CLIPTextConfig, "text_config", folder, dtype)


def load_vision_tower(folder: Path, dtype: torch.dtype) -> Any:
    """Load the vision tower of a folder, alone or part of a CLIP."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _load_tower(CLIPVisionModel, CLIPVisionConfig, "vision_config", folder, dtype)


def _load_tower(cls: Any, config_cls: Any, part: str, folder: Path, dtype: torch.dtype) -> Any:
    stored = read_safe_config(folder)
    with reading(f"{folder}/config.json: not a CLIP with {part}"):
        config = config_cls(**stored.get(part, stored))  # a tower alone has its keys at the top
    return load_transformers(cls, config, folder, dtype)


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """Load CLIP's tokenizer. Raises UserError if its files are missing or broken."""
    from transformers import CLIPTokenizer

    require_vocabulary(folder)
    with reading(f"{folder}: the tokenizer does not load"):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def require_vocabulary(folder: Path) -> None:
    """Raise UserError for a folder without a tokenizer, for which transformers makes one up."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json; restore them")


def load_transformers(
    cls: Any, config: Any, folder: Path, dtype: torch.dtype, **options: Any
) -> Any:
    """Load the frozen model of a class of transformers; see `load_frozen`."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it counts tensors and takes a second
    set_verbosity_error()  # type: ignore[no-untyped-call]  # it lists tensors of other parts
    return load_frozen(
        f"a {cls.__name__}",
        folder,
        lambda: cls(config),
        lambda: cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        ),
    )


def tokenize(tokenizer: Any, captions: Sequence[str], length: int, **options: bool) -> Any:
    """Token ids (B, length), padded; a long caption is truncated and keeps its end token."""
    return tokenizer(
        [caption[:MAX_CHARACTERS] for caption in captions],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        **options,
    )
