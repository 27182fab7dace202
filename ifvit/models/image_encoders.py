"""Frozen image encoders, DINOv2 or CLIP's vision tower: images => features of their patches.

The encode job stores the features; training aligns image tokens of the backbone with them (REPA, Yu
et al. 2024). Shapes: B batch, H, W image, G patches per side, F channels.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ifvit.errors import UserError
from ifvit.models.clip import (
    ImagePreprocessor,
    ImageProcessorConfig,
    load_transformers,
    load_vision_tower,
)
from ifvit.models.config import Size
from ifvit.models.pretrained import (
    identify,
    read_model_config,
    read_safe_config,
    reading,
    resolve_pretrained,
)
from ifvit.records import PositiveFloat, record
from ifvit.shards.format import EncoderIdentity, FeatureEncoding

_PROCESSOR = "preprocessor_config.json"


@record
class CropSize:
    """Size of an encoder's input as preprocessor_config.json states it."""

    height: Size
    width: Size


@record
class CroppingProcessorConfig(ImageProcessorConfig):
    """The keys of preprocessor_config.json; the defaults are ImageNet's, as for DINOv2."""

    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    crop_size: CropSize | Size | None = None


@record
class EncoderKind:
    """The key of config.json that names the class of the model."""

    model_type: Literal["dinov2", "dinov2_with_registers", "clip", "clip_vision_model"]


class ImageEncoder:
    """Images => the patch tokens after the final norm, without class and register tokens."""

    def __init__(
        self, model: Any, preprocess: ImagePreprocessor, identity: EncoderIdentity
    ) -> None:
        self._model, self._preprocess = model, preprocess
        grid = preprocess.image_size // model.config.patch_size
        self.encoding = FeatureEncoding(encoder=identity, grid=grid, width=model.config.hidden_size)
        """Identity, patches per side (G) and channels of a feature (F), as manifests state them."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => features (B, G * G, F) row by row, float32."""
        pixels = self._preprocess(images).to(self._model.dtype)
        tokens: Tensor = self._model(pixel_values=pixels).last_hidden_state
        # CLIP's tower normalises the class token alone; DINOv2 normalises all tokens.
        norm: nn.Module = getattr(self._model, "post_layernorm", nn.Identity())
        patches: Tensor = norm(tokens[:, -(self.encoding.grid**2) :])
        return patches.float()


def load_image_encoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """Load the image encoder `name`: a DINOv2 or a CLIP; hub name, local folder, or scenes/clip.

    Images get the crop size, mean and deviation of the folder's preprocessor_config.json. Raises
    UserError for a folder that does not hold a whole such model.
    """
    folder = resolve_pretrained(name, "--image_encoder")
    kind = read_model_config(EncoderKind, folder).model_type
    is_dino = kind.startswith("dinov2")
    model = (_load_dinov2(kind, folder, dtype) if is_dino else load_vision_tower(folder, dtype)).to(
        device
    )
    processor = CroppingProcessorConfig()
    if (folder / _PROCESSOR).is_file():
        processor = read_model_config(CroppingProcessorConfig, folder, name=_PROCESSOR)
    crop, size, patch = processor.crop_size, model.config.image_size, model.config.patch_size
    if isinstance(crop, CropSize) and crop.height != crop.width:
        raise UserError(f"{folder}/{_PROCESSOR}: crop_size is not square; set one number")
    if is_dino and crop is not None:  # a CLIP has no positions for other sizes
        size = crop.height if isinstance(crop, CropSize) else crop
    if size % patch:
        raise UserError(
            f"{folder}: images of {size} pixels do not divide into patches of {patch}; set "
            f"crop_size in {_PROCESSOR} to a multiple of {patch}"
        )
    preprocess = ImagePreprocessor(processor, size, device)
    return ImageEncoder(model, preprocess, identify(name, folder))


def _load_dinov2(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    keys = read_safe_config(folder)
    plain = kind == "dinov2"
    with reading(f"{folder}/config.json: not a DINOv2"):
        config = Dinov2Config(**keys) if plain else Dinov2WithRegistersConfig(**keys)
    return load_transformers(
        Dinov2Model if plain else Dinov2WithRegistersModel, config, folder, dtype
    )
