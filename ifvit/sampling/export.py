"""The verb `export`: trained weights and their encoders => a diffusers pipeline with its card."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ifvit import storage
from ifvit.diffusion.solvers import SOLVERS
from ifvit.models.config import BackboneConfig, FusionUViTConfig
from ifvit.models.pretrained import upload_pretrained
from ifvit.models.weights import WeightsInfo, find_weights, load_weights, run_of, step_name
from ifvit.sampling.config import ExportConfig
from ifvit.sampling.load import open_autoencoder, open_text_encoder, weights_sha256
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.shards import ShardError, read_manifest

_HEAD = """\
---
library_name: diffusers
pipeline_tag: {task}
tags: [ifvit, {task}]
---
# {title}

```python
from ifvit.sampling.pipeline import FusionPipeline

pipeline = FusionPipeline.from_pretrained("THIS FOLDER, s3:// PREFIX OR HUB NAME")
image = pipeline("{prompt}", guidance_scale=2.0).images[0]
```
"""


def describe_pipeline(
    folder: str, info: WeightsInfo, weights_sha256: str, shape: BackboneConfig
) -> str:
    """Markdown for README.md; recipe, data and metrics from the run that `folder` lies in.

    `weights_sha256` is that of the backbone: metrics of other weights are not shown.
    """
    head = _describe_use(info, shape)
    kind = f"exponential moving average, decay {info.ema_decay}" if info.ema_decay else "raw"
    facts = {
        "weights": kind,
        "optimiser steps": info.step,
        "architecture": shape.architecture,
        **_describe_condition(info, shape),
        "scaling factor of the latents": info.scaling_factor,
        "VAE": f"{info.vae.name}, sha256 {info.vae.sha256}",
        "sha256 of the backbone": weights_sha256,
        "sha256 of the recipe": info.recipe_sha256,
    }
    run = run_of(folder)
    recipe_url = storage.join(run, "config.yaml") if run else ""
    if run is None or not storage.exists(recipe_url):
        return head + _table(facts) + "\nThe run that made these weights was not at hand.\n"
    recipe = storage.read_bytes(recipe_url).decode()
    return (
        head
        + _table(facts)
        + f"\n## Data\n{_describe_data(str(yaml.safe_load(recipe)['shards']))}"
        + f"\n## Metrics\n{_describe_metrics(run, info.step, weights_sha256)}"
        + f"\n## Recipe\n```yaml\n{recipe}```\n"
    )


def _describe_use(info: WeightsInfo, shape: BackboneConfig) -> str:
    """What opens the card; diffusers has no name for the task of drawing classes."""
    if info.text_encoder is None:
        return _HEAD.format(
            task="unconditional-image-generation",
            title=f"Images of {len(info.classes)} classes by a {shape.architecture}",
            prompt=info.classes[0],
        )
    return _HEAD.format(
        task="text-to-image",
        title=f"Text-to-image by a {shape.architecture}",
        prompt="two red circles above a blue square",
    )


def _describe_condition(info: WeightsInfo, shape: BackboneConfig) -> dict[str, object]:
    if info.text_encoder is None:
        return {"classes": ", ".join(info.classes)}
    encoder = f"{info.text_encoder.name}, sha256 {info.text_encoder.sha256}"
    if not isinstance(shape, FusionUViTConfig):
        return {"text encoder": encoder}
    return {
        "conditioning": f"{shape.conditioning}, {shape.num_image_blocks} image-only blocks a side, "
        f"{shape.num_text_blocks} text blocks",
        "text encoder": encoder,
    }


def _describe_data(shards: str) -> str:
    try:
        manifest = read_manifest(shards)
    except ShardError as error:
        return f"Shards `{shards}`, whose manifest could not be read ({error}).\n"
    return _table(
        {
            "shards": f"`{shards}`, {len(manifest.shards)} files",
            "images": manifest.num_samples,
            "captions": manifest.num_captions,
            "image size": manifest.image_size,
            "resize": manifest.resize,
            "standard deviation of the latents": manifest.latent_std,
            "VAE": manifest.vae.name,
        }
    )


def _describe_metrics(run: str, step: int, weights_sha256: str) -> str:
    """Every evaluation of these weights, by protocol and guidance scale."""
    evaluations = storage.join(run, "evaluation")
    found = ""
    for protocol in storage.list_names(evaluations):
        for scale in storage.list_names(storage.join(evaluations, protocol)):
            url = storage.join(evaluations, protocol, scale, f"{step_name(step)}.json")
            row = storage.read_json(url) if storage.exists(url) else {}
            if row.get("weights_sha256") == weights_sha256:
                found += f"\n### {protocol}, {scale}\n{_describe_row(row)}"
    return found or "These weights have not been evaluated.\n"


def _describe_row(row: Mapping[str, Any]) -> str:
    measured = {
        name: f"{entry['value']:.4f} ± {entry['standard_error']:.4f}"
        for name, entry in row.items()
        if isinstance(entry, dict) and "standard_error" in entry
    }
    protocol = {name: value for name, value in row["protocol"].items() if name != "sampling"}
    return _table(measured) + "\nProtocol:\n" + _table(protocol | row["protocol"]["sampling"])


def _table(rows: Mapping[str, object]) -> str:
    lines = (f"| {name} | {value} |\n" for name, value in rows.items())
    return "\n| | |\n|---|---|\n" + "".join(lines)


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
        card = describe_pipeline(folder, info, weights_sha256(backbone), backbone.config)
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
