"""Load a trained backbone and the frozen encoders it was trained with, ready to generate images.

The verbs `generate`, `evaluate`, `export` and `analyze attention` and the sample grid of training
call this module. Encoders are opened where they were, or where the user says, and checked by hash.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from ifvit.conditions import Condition
from ifvit.diffusion.config import SolverConfig
from ifvit.diffusion.objectives import LatentScaler
from ifvit.diffusion.sampler import Sampler
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import build_scheduler
from ifvit.errors import UserError
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.backbone import Backbone
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.pretrained import place_of
from ifvit.models.text_encoders import TextEncoder, load_text_encoder
from ifvit.models.weights import WeightsInfo, find_weights, load_backbone, read_stored_weights
from ifvit.records import shorten
from ifvit.sampling.config import EncoderPlaces
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity
from ifvit.shards.reader import ShardReader


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained backbone on its device, with frozen parameters, and its provenance."""

    url: str
    backbone: Backbone
    info: WeightsInfo
    sha256: str
    """Hash of the file of the backbone's parameters, which weights.json states."""


def load_model(
    url: str, device: str, places: EncoderPlaces | None = None, *, compile: bool = False
) -> Model:
    """Load the weights at `url`: a run, a weights/step_… folder or a folder with config.json.

    `places` replace those of the encoders in `Model.info`. Raises UserError for missing or broken
    weights.
    """
    folder = find_weights(url)
    stored = read_stored_weights(folder)
    backbone = load_backbone(folder, stored)
    backbone.requires_grad_(False).to(device)  # type: ignore[arg-type]  # diffusers' decorator
    if compile:
        compile_backbone(backbone)
    info = _replace_places(stored.info, places or EncoderPlaces())
    return Model(url=url, backbone=backbone, info=info, sha256=stored.tensors_sha256)


def _replace_places(info: WeightsInfo, places: EncoderPlaces) -> WeightsInfo:
    if places.vae:
        info = replace(info, vae=replace(info.vae, name=place_of(places.vae)))
    if places.text_encoder:
        moved = replace(require_text_encoder(info), name=place_of(places.text_encoder))
        info = replace(info, text_encoder=moved)
    return info


def compile_backbone(backbone: Backbone) -> None:
    """Compile calls of the backbone; on a GPU into CUDA graphs, which avoid kernel launches."""
    backbone.compile(mode="reduce-overhead" if backbone.device.type == "cuda" else None)


def load_sampler(model: Model, null_condition: Condition, config: SolverConfig) -> Sampler:
    """Add the decoder to a model. `null_condition`, one row, stands for no prompt.

    Raises UserError for a solver that does not take the prediction of the model.
    """
    backbone, info = model.backbone, model.info
    schedule = schedule_of(info, backbone.device)
    build_scheduler(config.solver, schedule, config.shift)  # raises before a folder is claimed
    return Sampler(
        backbone=backbone,
        schedule=schedule,
        decode=load_decoder(info, str(backbone.device)),
        null_condition=null_condition,
    )


def schedule_of(info: WeightsInfo, device: torch.device | str = "cpu") -> NoiseSchedule:
    """Build the forward process and prediction of the training."""
    return NoiseSchedule(device, info.prediction, info.shift)


def load_decoder(info: WeightsInfo, device: str) -> Callable[[Tensor], Tensor]:
    """Load the decoder of scaled latents, `Sampler.decode`."""
    autoencoder, scaler = load_trained_autoencoder(info, device), LatentScaler(info.scaling, device)
    return lambda latents: autoencoder.decode(scaler.unscale(latents))


def load_trained_autoencoder(info: WeightsInfo, device: str) -> Autoencoder:
    """Load the autoencoder of the training. Raises UserError if its weights have changed."""
    autoencoder = load_autoencoder(info.vae.name, device)
    check_identity("vae", autoencoder.identity, info.vae)
    return autoencoder


def load_trained_text_encoder(info: WeightsInfo, device: str) -> TextEncoder:
    """Load the text encoder of the training.

    Raises UserError if its weights have changed and if the backbone was trained on classes.
    """
    trained_with = require_text_encoder(info)
    encoder = load_text_encoder(trained_with.name, device, trained_with.settings)
    check_identity("text encoder", encoder.identity, trained_with)
    return encoder


def require_text_encoder(info: WeightsInfo) -> TextEncoderIdentity:
    """Return the text encoder of the training. Raises UserError for class-conditional weights."""
    if info.text_encoder is None:
        raise UserError(
            f"the weights generate {len(info.classes)} classes, but alignment methods and text "
            "prompts need weights trained on captions; use --method plain and --class"
        )
    return info.text_encoder


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Converts prompts to the conditions that a backbone takes."""

    encode: Callable[[list[str]], Condition]
    """B captions => contexts, or B class names or numbers => class numbers (B,). The empty caption
    gives the null context of the training."""
    null: Condition
    """Condition of no prompt, one row."""


def load_conditions(info: WeightsInfo, device: str) -> Conditions:
    """Load the text encoder, or number the classes, whichever the backbone was trained on."""
    if info.text_encoder is None:
        # The number after the last class stands for no class.
        null = torch.tensor([len(info.classes)])
        return Conditions(encode=partial(number_classes, info.classes), null=null)
    encoder = load_trained_text_encoder(info, device)
    encode = partial(encoder.encode, null_context=info.null_context)
    return Conditions(encode=encode, null=encode([""]))


def open_dataset_conditions(
    info: WeightsInfo, reader: ShardReader, device: str
) -> DatasetConditions:
    """Conditions of a dataset for a trained backbone.

    Contexts that the shards store are read; without any, the text encoder of the training computes
    them. Raises UserError for shards of other classes, or of another text encoder or other settings
    of it.
    """
    manifest, encoder = reader.manifest, None
    if manifest.classes != info.classes:
        raise UserError(
            f"{reader.url}: holds {_describe_classes(manifest.classes)}, but the weights were "
            f"trained on {_describe_classes(info.classes)}; name held-out shards of those"
        )
    if manifest.text:
        trained_with = require_text_encoder(info)
        check_text_encoder(f"{reader.url}: text encoder", manifest.text.encoder, trained_with)
    elif not manifest.classes:
        encoder = load_trained_text_encoder(info, device)
    return DatasetConditions(reader, info.null_context, encoder)


def _describe_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes, such as {shorten(classes[0])}" if classes else "captions"


def number_classes(classes: tuple[str, ...], names: list[str]) -> Tensor:
    """Class names or numbers => class numbers (B,). Raises UserError for an unknown class."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in names if name not in numbers]:
        close = get_close_matches(unknown[0], classes) or classes[:3]
        raise UserError(
            f"class {unknown[0]}: expected one of the {len(classes)} class names, such as "
            f"{', '.join(close)}, or a number below {len(classes)}"
        )
    return torch.tensor([numbers[name] for name in names])


def check_identity(role: str, found: EncoderIdentity, trained_with: EncoderIdentity) -> None:
    """Raise UserError unless `found` has the weights that the backbone was trained with."""
    if found.sha256 != trained_with.sha256:
        name = "" if found.name == trained_with.name else f"{trained_with.name}, "
        raise UserError(
            f"{role} {found.name} has sha256 {found.sha256[:12]}…, but the weights were trained "
            f"with {name}sha256 {trained_with.sha256[:12]}…; use that encoder"
        )


def check_text_encoder(
    role: str, found: TextEncoderIdentity, trained_with: TextEncoderIdentity
) -> None:
    """Raise UserError unless `found` makes the contexts that the backbone was trained with.

    The number format of its computation may differ.
    """
    check_identity(role, found, trained_with)
    for name, value in vars(found.settings).items():
        wanted = getattr(trained_with.settings, name)
        if name != "precision" and value != wanted:
            raise UserError(
                f"{role} {found.name} has text.{name} {value}, but the weights were trained with "
                f"{wanted}; use that value"
            )
