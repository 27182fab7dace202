"""Renders scenes and encodes them into shards with the encoders that ship with ifvit."""

from pathlib import Path
from typing import Literal

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.scenes.image_sets import render_scene_set


def encode_scenes(
    folder: Path, split: Literal["train2014", "val2014"], num_images: int, seed: int
) -> str:
    """Write the images to folder/SPLIT; return the URL of the shards."""
    render_scene_set(folder, split, num_images, seed=seed)
    config = EncodeConfig(
        images=str(folder / split),
        captions=str(folder / "annotations" / f"captions_{split}.json"),
        output=str(folder / "shards"),
        vae="scenes/vae",
        text_encoder="scenes/clip",
        image_size=64,
        device="cpu",
        num_workers=1,
    )
    encode(config)
    return config.output
