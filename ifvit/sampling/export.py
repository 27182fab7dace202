"""The verb `export`: trained weights and encoders => a diffusers pipeline with a model card."""

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.diffusion.config import LatentScaling
from ifvit.diffusion.solvers import build_scheduler
from ifvit.models.config import BackboneConfig
from ifvit.models.pretrained import reading, upload_pretrained
from ifvit.models.weights import WeightsInfo, find_weights, run_of, step_name
from ifvit.records import NonNegativeFloat, parse_value, printable, record
from ifvit.sampling.config import ExportConfig
from ifvit.sampling.load import (
    load_model,
    load_trained_autoencoder,
    load_trained_text_encoder,
    schedule_of,
)
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.pipeline_files import INDEX_FILE

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
image = pipeline({prompt}, guidance_scale=2.0).images[0]
```
"""


@record
class _Estimate:
    """The part of a metric's estimate that the card shows."""

    value: float
    standard_error: NonNegativeFloat


def export(config: ExportConfig) -> None:
    """Write the pipeline to `output`. It is complete once model_index.json exists.

    Raises UserError for missing weights, for encoders other than those of the training, and if the
    hub refuses the upload.
    """
    weights = find_weights(config.weights, prefer=config.kind)
    model = load_model(weights, "cpu", config)
    info = model.info
    text_encoder = load_trained_text_encoder(info, "cpu") if info.text_encoder else None
    vae = load_trained_autoencoder(info, "cpu").vae
    _state_scaling(vae, info.scaling)
    pipeline = FusionPipeline(
        backbone=model.backbone,
        vae=vae,
        text_encoder=text_encoder.model if text_encoder else None,
        tokenizer=text_encoder.tokenizer if text_encoder else None,
        scheduler=build_scheduler("dpm_solver_pp", schedule_of(info)),
        classes=info.classes,
        null_context=info.null_context,
        prediction=info.prediction,
        text_settings=asdict(info.text_encoder.settings) if info.text_encoder else None,
        scaling_factor=info.scaling_factor,
        shift_factor=info.shift_factor,
    )
    with tempfile.TemporaryDirectory(prefix="ifvit-") as temporary:
        folder = Path(temporary)
        with reading(
            f"{folder}: cannot hold the pipeline; set TMPDIR to a folder on a larger disk"
        ):
            pipeline.save_pretrained(folder)
        card = format_card(weights, info, model.sha256, model.backbone.config)
        (folder / "README.md").write_text(card)
        # The index is uploaded last, so that a folder that can be loaded is complete.
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name != INDEX_FILE]
        for path in (*sorted(paths), folder / INDEX_FILE):
            name = path.relative_to(folder).as_posix()
            storage.upload(path, storage.join(config.output, name))
        if config.hub:
            upload_pretrained(folder, config.hub)
    sys.stdout.write(f"{config.output}\n")


def _state_scaling(vae: Any, scaling: LatentScaling) -> None:
    """State the scaling of the training in the autoencoder's config, where other programs read it.

    A scaling that the class has no keys for is in model_index.json only, which ifvit reads.
    """
    facts: dict[str, object]
    if isinstance(scaling.scale, tuple):
        stds = tuple(1.0 / scale for scale in scaling.scale)
        facts = {"latents_mean": scaling.shift, "latents_std": stds, "scaling_factor": 1.0}
        facts["shift_factor"] = None
    else:
        facts = {"scaling_factor": scaling.scale, "shift_factor": scaling.shift}
        facts |= {"latents_mean": None, "latents_std": None}
    facts = {key: value for key, value in facts.items() if value or key in vae.config}
    if facts.keys() <= vae.config.keys():
        vae.register_to_config(**facts)


def format_card(folder: str, info: WeightsInfo, sha256: str, config: BackboneConfig) -> str:
    """Format the model card, Markdown for README.md.

    Recipe and metrics come from the run that the weights in `folder` belong to. Metrics of weights
    with another `sha256` are left out.
    """
    if info.text_encoder:
        task, subject, prompt = "text-to-image", "Text-to-image", "two red circles above a square"
        condition = {
            "text encoder": f"{info.text_encoder.name}, {info.text_encoder.sha256}",
            **{f"text.{key}": value for key, value in vars(info.text_encoder.settings).items()},
            "null context": info.null_context,
        }
    else:
        # diffusers has no name for class-conditional generation.
        task, subject = "unconditional-image-generation", f"Images of {len(info.classes)} classes"
        prompt, condition = info.classes[0], {"classes": ", ".join(info.classes)}
    title = f"{subject} by a {config.architecture}"
    facts = {
        "weights": f"EMA, decay {info.ema_decay}" if info.ema_decay else "raw",
        "prediction": info.prediction,
        **({"shift": info.shift} if info.prediction == "flow" else {}),
        "optimizer steps": info.step,
        **condition,
        "VAE": f"{info.vae.name}, {info.vae.sha256}",
        "scaling factor of the latents": info.scaling,
        "sha256 of the backbone": sha256,
        "sha256 of the recipe": info.recipe_sha256,
    } | asdict(config)
    card = _HEAD.format(task=task, title=title, prompt=ascii(prompt)) + _format_table(facts)
    run = run_of(folder)
    recipe_url = storage.join(run, "config.yaml") if run else ""
    if run is None or not storage.exists(recipe_url):
        return card + "\nThe run that trained these weights is not available.\n"
    recipe = storage.read_bytes(recipe_url)
    return (
        card
        + f"\n## Metrics\n{_format_metrics(run, info.step, sha256)}"
        + f"\n## Recipe\n{_format_code(recipe.decode(errors='replace'), 'yaml')}"
    )


def _format_metrics(run: str, step: int, sha256: str) -> str:
    """Format every evaluation of these weights, by protocol and guidance scale."""
    evaluations = storage.join(run, "evaluation")
    found = ""
    for protocol in storage.list_names(evaluations):
        for scale in storage.list_names(storage.join(evaluations, protocol)):
            url = storage.join(evaluations, protocol, scale, f"{step_name(step)}.json")
            if not storage.exists(url):
                continue
            row = storage.read_sealed(dict[str, Any], url)
            if row.get("weights_sha256") != sha256:
                continue
            estimates = {
                name: parse_value(_Estimate, entry, f"{url}: {name}", ignore_unknown=True)
                for name, entry in row.items()
                if isinstance(entry, dict) and "standard_error" in entry
            }
            measured = {
                name: f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"
                for name, estimate in estimates.items()
            }
            facts = parse_value(dict[str, Any], row.get("protocol"), f"{url}: protocol")
            facts |= parse_value(dict[str, Any], facts.pop("sampling", {}), f"{url}: sampling")
            found += f"\n### {protocol}, {scale}\n{_format_table(measured)}"
            found += f"\nProtocol:\n{_format_table(facts)}"
    return found or "These weights have not been evaluated.\n"


def _format_table(rows: Mapping[str, object]) -> str:
    lines = (f"| {_escape(name)} | {_escape(value)} |\n" for name, value in rows.items())
    return "\n| | |\n|---|---|\n" + "".join(lines)


def _format_code(text: str, language: str) -> str:
    """Format a block of code whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = "".join(f"{printable(line)}\n" for line in text.splitlines())
    return f"{fence}{language}\n{lines}{fence}\n"


def _escape(value: object) -> str:
    """Return text of a file as Markdown that shows it: no HTML, link, code or further row."""
    text = printable(str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*|\[\]~$!])", r"\\\1", text)
