"""Features of DINOv2 and of CLIP's vision tower are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from ifvit.errors import UserError
from ifvit.models.image_encoders import load_image_encoder
from ifvit.models.pretrained import resolve_pretrained

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
"""Mean and standard deviation."""


def sample_images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_dinov2(folder: Path, *, registers: bool = False, **processor: object) -> Any:
    """Save a small random DINOv2, and what it should be given an image of 28 pixels."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SIZES) if registers else Dinov2Config(**SIZES)
    model = (Dinov2WithRegistersModel if registers else Dinov2Model)(config).eval()
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("crop_size", [28, {"height": 28, "width": 28}])
def test_dinov2_gives_the_normalised_patch_tokens(
    registers: bool, crop_size: object, tmp_path: Path
) -> None:
    mean, std = [0.2, 0.4, 0.6], [0.5, 0.3, 0.7]
    model = save_dinov2(
        tmp_path, registers=registers, crop_size=crop_size, image_mean=mean, image_std=std
    )
    encoder, images = load_image_encoder(str(tmp_path)), sample_images(28)
    assert encoder.encoding.shape == (4, 32)
    pixels = (images / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model(pixel_values=pixels).last_hidden_state
    expected = tokens[:, 5 if registers else 1 :]
    torch.testing.assert_close(encoder.encode(images), expected, rtol=0, atol=1e-5)


def test_without_a_processor_file_the_normalisation_is_imagenets(tmp_path: Path) -> None:
    model = save_dinov2(tmp_path)
    encoder, images = load_image_encoder(str(tmp_path)), sample_images(70)
    mean, std = IMAGENET
    with torch.no_grad():
        tokens = model(pixel_values=(images / 2 + 0.5 - mean) / std).last_hidden_state
    torch.testing.assert_close(encoder.encode(images), tokens[:, 1:], rtol=0, atol=1e-5)


def test_images_are_resized_bicubic_to_the_input_size(tmp_path: Path) -> None:
    save_dinov2(tmp_path, crop_size=28)
    encoder, images = load_image_encoder(str(tmp_path)), sample_images(32)
    resized = torch.nn.functional.interpolate(images, (28, 28), mode="bicubic", antialias=True)
    expected = encoder.encode(resized.clamp(-1, 1))
    torch.testing.assert_close(encoder.encode(images), expected, rtol=0, atol=1e-4)


def test_clips_patch_tokens_pass_its_final_norm() -> None:
    encoder, images = load_image_encoder("scenes/clip"), sample_images(64)
    tower = CLIPModel.from_pretrained(resolve_pretrained("scenes/clip")).eval().vision_model
    with torch.no_grad():
        tokens = tower(pixel_values=images).last_hidden_state  # mean and deviation are 0.5
        expected = tower.post_layernorm(tokens[:, 1:])
    torch.testing.assert_close(encoder.encode(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "model_type", "vit"),
        ("config.json", "num_hidden_layers", 10**9),
        ("config.json", "num_hidden_layers", 3),
        ("config.json", "hidden_act", "os.system"),
        ("config.json", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("preprocessor_config.json", "crop_size", 30),
        ("preprocessor_config.json", "crop_size", {"height": 28, "width": 56}),
        ("preprocessor_config.json", "image_std", [0, 1, 1]),
    ],
)
def test_a_folder_of_another_model_is_one_line(
    file: str, key: str, value: object, tmp_path: Path
) -> None:
    save_dinov2(tmp_path, crop_size=28)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError) as error:
        load_image_encoder(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
