"""The verb `export`: trained weights and their encoders => a diffusers pipeline with its card."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.models.pretrained import upload_pretrained
from ifvit.models.weights import WeightsInfo, find_weights, load_weights
from ifvit.sampling.config import ExportConfig
from ifvit.sampling.encoders import open_autoencoder, open_text_encoder, weights_sha256
from ifvit.sampling.model_card import describe_pipeline
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.solvers import SOLVERS

_INDEX = "model_index.json"


def export(config: ExportConfig) -> None:
    """Write the pipeline to `output`, complete once model_index.json is there.

    Raises UserError for missing weights, other encoders than those of the training, or a hub
    that refuses.
    """
    folder = find_weights(config.weights, prefer=config.kind)
    backbone, info = load_weights(folder)
    text_encoder = open_text_encoder(info, "cpu") if info.text_encoder else None
    pipeline = FusionPipeline(
        backbone=backbone,
        vae=_open_vae(info),
        text_encoder=text_encoder.model if text_encoder else None,
        tokenizer=text_encoder.tokenizer if text_encoder else None,
        scheduler=SOLVERS["dpm_solver_pp"](),
        classes=info.classes,
    )
    with tempfile.TemporaryDirectory(prefix="ifvit-") as temporary:
        pipeline.save_pretrained(temporary)
        card = describe_pipeline(folder, info, weights_sha256(backbone), backbone.shape)
        Path(temporary, "README.md").write_text(card)
        _upload(Path(temporary), config.output)
        if config.hub:
            upload_pretrained(Path(temporary), config.hub)
    sys.stdout.write(f"{config.output}\n")


def _open_vae(info: WeightsInfo) -> Any:
    """The VAE, with the scaling factor of the training in the place of its own."""
    vae = open_autoencoder(info, "cpu").vae
    vae.register_to_config(scaling_factor=info.scaling_factor)
    return vae


def _upload(folder: Path, url: str) -> None:
    """Every file to `url`, the index last, so that what can be loaded is complete."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _INDEX)
    for path in (*paths, folder / _INDEX):
        storage.upload(path, storage.join(url, path.relative_to(folder).as_posix()))
