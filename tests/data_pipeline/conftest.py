"""A small image set in COCO layout, and tiny random encoders of the real classes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from data_pipeline.config import EncodeConfig

NUM_IMAGES = 10
SAMPLES_PER_SHARD = 4


@dataclass(frozen=True, kw_only=True)
class EncoderFolders:
    """Hugging Face folders of one VAE and one text encoder."""

    vae: Path
    text_encoder: Path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, because forked children have no OpenMP threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> EncoderFolders:
    return save_encoders(tmp_path_factory.mktemp("encoders"), seed=0)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """tmp_path/images/*.jpg and tmp_path/captions_train2014.json; one to three captions each."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(NUM_IMAGES):
        image_id = 7 * number + 3
        name = f"COCO_train2014_{image_id:012d}.jpg"
        pixels = generator.integers(0, 256, (40 + number, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": image_id, "file_name": name})
        annotations += [
            {"id": len(annotations) + k, "image_id": image_id, "caption": caption}
            for k, caption in enumerate(
                ["a dog", f"cat number {number}", "a dog"][: number % 3 + 1]
            )
        ]
    content = {"images": images[::-1], "annotations": annotations}  # unsorted, as COCO's are
    (tmp_path / "captions_train2014.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def config(coco: Path, encoders: EncoderFolders) -> EncodeConfig:
    return EncodeConfig(
        images=str(coco / "images"),
        captions=str(coco / "captions_train2014.json"),
        output=str(coco / "shards"),
        vae=str(encoders.vae),
        text_encoder=str(encoders.text_encoder),
        image_size=32,
        samples_per_shard=SAMPLES_PER_SHARD,
        batch_size=3,
        device="cpu",
        num_workers=2,
    )


@pytest.fixture
def other_encoders(tmp_path: Path) -> EncoderFolders:
    """Encoders with other weights."""
    return save_encoders(tmp_path / "other_encoders", seed=1)


def save_encoders(folder: Path, seed: int) -> EncoderFolders:
    """Write random encoders: an f8 VAE and a CLIP text tower over single letters."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.save_pretrained(folder / "vae")
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    CLIPTextModel(text_config).save_pretrained(folder / "clip")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "clip" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "clip" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12})
    )
    return EncoderFolders(vae=folder / "vae", text_encoder=folder / "clip")
