"""A small image set in COCO layout, and a recipe that encodes it with the encoders of scenes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_pipeline.config import EncodeConfig
from ifvit.models.pretrained import resolve_pretrained

NUM_IMAGES = 10
SAMPLES_PER_SHARD = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, because forked children have no OpenMP threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def config(coco: Path) -> EncodeConfig:
    return EncodeConfig(
        images=str(coco / "images"),
        captions=str(coco / "captions_train2014.json"),
        output=str(coco / "shards"),
        vae="scenes/vae",
        text_encoder="scenes/clip",
        image_size=32,
        samples_per_shard=SAMPLES_PER_SHARD,
        batch_size=3,
        device="cpu",
        num_workers=2,
    )


@pytest.fixture
def other_encoders(config: EncodeConfig, tmp_path: Path) -> EncodeConfig:
    """The recipe with other weights of both encoders."""
    folders = {}
    for kind in ("vae", "clip"):
        folder = Path(shutil.copytree(resolve_pretrained(f"scenes/{kind}"), tmp_path / kind))
        (path,) = folder.glob("*.safetensors")
        weights = {name: 1.01 * tensor for name, tensor in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
        folders[kind] = str(folder)
    return replace(config, vae=folders["vae"], text_encoder=folders["clip"])
