"""Backbones with fresh weights, and the weights/ folders that everybody but the trainer loads.

A folder has config.json and diffusion_pytorch_model.safetensors, which diffusers reads, and
weights.json, which holds the provenance of the weights and the sha256 of both files. weights.json
is written last and thus marks a complete folder.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor

from ifvit.diffusion.config import (
    LatentScaling,
    Prediction,
    ScalingFactor,
    Shift,
    ShiftFactor,
)
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import (
    BackboneConfig,
    FusionTransformerConfig,
    NullContext,
    restore_config,
    without_representation,
)
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.pretrained import read_shapes, reading, require_shapes
from ifvit.records import Fraction, NonNegativeInt, Sha256, parse_json, record
from ifvit.shards.cache import local_copy
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity
from ifvit.storage import (
    exists,
    join,
    list_names,
    read_bytes,
    read_sealed,
    remove,
    sha256_of,
    upload,
    write_sealed,
)

Kind = Literal["ema", "raw"]

_CONFIG = "config.json"
_TENSORS = "diffusion_pytorch_model.safetensors"
_INFO = "weights.json"


@record
class WeightsInfo:
    """Provenance of weights: what sampling and evaluation must know about their training."""

    step: NonNegativeInt
    """Optimizer steps that the weights were trained for."""
    ema_decay: Fraction | None
    """Decay of the EMA weights; None for raw weights."""
    scaling_factor: ScalingFactor
    """Factor by which the autoencoder's latents were multiplied in training."""
    shift_factor: ShiftFactor = 0.0
    """What was subtracted from the latents before."""
    vae: EncoderIdentity
    """The autoencoder whose latents the backbone was trained on."""
    text_encoder: TextEncoderIdentity | None
    """The text encoder whose context the backbone was trained on; None for classes."""
    null_context: NullContext = "empty_caption"
    """What stands for no caption in training: the context of "", or zeros."""
    prediction: Prediction = "epsilon"
    """What the backbone predicts."""
    shift: Shift = 1.0
    """Shift of the training's timesteps, by which solvers of flows space their steps."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by number."""
    recipe_sha256: Sha256
    """Hash of the recipe that trained it; for imported weights, of the imported file."""

    @property
    def target(self) -> str:
        """What the backbone predicts, and of which latents."""
        return f"{self.prediction} of vae {self.vae.sha256[:12]} x {self.scaling}"

    @property
    def scaling(self) -> LatentScaling:
        """The two factors as one record."""
        return LatentScaling(scale=self.scaling_factor, shift=self.shift_factor)

    def __post_init__(self) -> None:
        """Raise UserError for weights of neither captions nor classes, or of both."""
        if (self.text_encoder is None) == (not self.classes):
            raise UserError("expected either a text_encoder or classes")


@record
class StoredWeights:
    """Content of weights.json."""

    info: WeightsInfo
    config_sha256: Sha256
    """Hash of config.json."""
    tensors_sha256: Sha256
    """Hash of diffusion_pytorch_model.safetensors, which names the weights in all results."""


def build_backbone(config: BackboneConfig, seed: int = 0) -> Backbone:
    """Build a backbone with fresh float32 weights, a function of the configuration and the seed."""
    initial = initial_weights(config, seed)
    names = [name for name, _ in describe_backbone(config).named_parameters()]
    backbone = restore_backbone(config, {name: initial(name) for name in names}, copy=False)
    return backbone.train()


def describe_backbone(config: BackboneConfig) -> Backbone:
    """Build a backbone on torch's meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return construct_backbone(config)


def initial_weights(config: BackboneConfig, seed: int) -> Callable[[str], Tensor]:
    """Return a function from the name of a parameter to its initial value, on the CPU.

    Parameters of one name and shape have equal values in all fusion transformers, so that runs that
    differ in other fields can be compared in pairs.
    """
    if isinstance(config, FusionTransformerConfig):
        return partial(cast(FusionTransformer, describe_backbone(config)).initial_tensor, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return construct_backbone(config).state_dict().__getitem__


def construct_backbone(config: BackboneConfig) -> Backbone:
    """Build a backbone on torch's default device, with torch's own initial values."""
    if isinstance(config, FusionTransformerConfig):
        return FusionTransformer(config)
    from ifvit.models.unet import UNet  # the import of diffusers' U-Nets takes a second

    return UNet(config)


def restore_backbone(
    config: BackboneConfig, state_dict: Mapping[str, Tensor], *, copy: bool = True
) -> Backbone:
    """Build a float32 backbone in eval mode with a copy of `state_dict`, or itself, as weights.

    Raises RuntimeError if keys or shapes differ from those of `config`.
    """
    backbone = describe_backbone(config)
    if copy:
        backbone.to_empty(device="cpu")
    backbone.load_state_dict(state_dict, assign=not copy)
    backbone.eval()
    return backbone


def exported_backbone(config: BackboneConfig, state_dict: Mapping[str, Tensor]) -> Backbone:
    """Build a backbone without the projector for representation alignment, as samplers load it.

    It shares the memory of the trained tensors in `state_dict`.
    """
    exported = without_representation(config)
    names = describe_backbone(exported).state_dict().keys()
    return restore_backbone(exported, {name: state_dict[name] for name in names}, copy=False)


def save_weights(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
    """Write a folder (local or s3://) that `load_weights` and diffusers' from_pretrained read."""
    with tempfile.TemporaryDirectory() as local:
        with reading(f"{local}: cannot hold the weights; set TMPDIR to a folder on a larger disk"):
            backbone.save_pretrained(local, max_shard_size="1TB")
        for name in (_TENSORS, _CONFIG):
            upload(Path(local, name), join(folder, name))
        stored = StoredWeights(
            info=info,
            config_sha256=sha256_of(Path(local, _CONFIG)),
            tensors_sha256=sha256_of(Path(local, _TENSORS)),
        )
    write_sealed(join(folder, _INFO), stored)


def remove_weights(folder: str) -> None:
    """Remove what `save_weights` wrote, the mark of a complete folder first."""
    for name in (_INFO, _CONFIG, _TENSORS):
        remove(join(folder, name))


def load_weights(url: str, *, prefer: Kind = "ema") -> tuple[Backbone, WeightsInfo]:
    """Load a float32 backbone in eval mode and the provenance of its weights.

    `url` is a folder of `save_weights`, a step's folder that contains ema/ or raw/, or a run
    directory, of which the newest step is loaded. Raises UserError as `load_backbone` does.
    """
    folder = find_weights(url, prefer=prefer)
    stored = read_stored_weights(folder)
    return load_backbone(folder, stored), stored.info


def read_stored_weights(folder: str) -> StoredWeights:
    """Read weights.json. Raises UserError if it is damaged or of another version."""
    return read_sealed(StoredWeights, join(folder, _INFO))


def load_backbone(folder: str, stored: StoredWeights) -> Backbone:
    """Load a float32 backbone in eval mode from a folder of `save_weights`.

    Raises UserError as `verify_weights` does.
    """
    config, path = verify_weights(folder, stored)
    return restore_backbone(config, safetensors.torch.load_file(path))


def verify_weights(folder: str, stored: StoredWeights) -> tuple[BackboneConfig, Path]:
    """Return the configuration of a folder of `save_weights`, and the local file of its tensors.

    Weights of an object store are kept in the cache folder. Raises UserError if a file has another
    hash than weights.json states, and if config.json describes other tensors than the file holds.
    """
    config = read_backbone_config(folder, stored.config_sha256)
    _check_numbers(folder, config, stored.info)
    path = local_copy(join(folder, _TENSORS), stored.tensors_sha256)
    check_sha256(path, stored.tensors_sha256)
    check_shapes(config, path)
    return config, path


def read_backbone_config(folder: str, sha256: str | None = None) -> BackboneConfig:
    """Read the config.json of a backbone.

    Raises UserError if it describes no backbone, or has another hash than the given one.
    """
    url = join(folder, _CONFIG)
    data = read_bytes(url)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url}: damaged, weights.json states another sha256; restore the file")
    return restore_config(parse_json(dict[str, Any], data, url), url)


def check_shapes(config: BackboneConfig, *paths: Path) -> None:
    """Raise UserError unless safetensors files together hold the tensors of the backbone.

    Only the headers of the files are read, and no memory is allocated for parameters.
    """
    found = {name: shape for path in paths for name, shape in read_shapes(path).items()}
    wanted = describe_backbone(config)
    require_shapes(str(paths[0]), wanted, found)


def check_sha256(path: Path, sha256: str) -> None:
    """Raise UserError unless a local file has this hash; a file is read once per process."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; restore it")
    status = path.stat()
    if _sha256_of(path, status.st_size, status.st_mtime_ns) != sha256:
        raise UserError(f"{path}: damaged, weights.json states another sha256; restore the file")


@lru_cache(maxsize=64)
def _sha256_of(path: Path, _size: int, _time: int) -> str:
    return sha256_of(path)


def _check_numbers(folder: str, config: BackboneConfig, info: WeightsInfo) -> None:
    """Raise UserError if weights.json has another number of classes or channels than a backbone."""
    if info.scaling.num_channels not in (None, config.latent_channels):
        raise UserError(
            f"{folder}: {_INFO} has a scaling_factor of {info.scaling.num_channels} channels, but "
            f"{_CONFIG} describes {config.latent_channels}; use files of the same training"
        )
    if (config.num_classes or 0) != len(info.classes):
        raise UserError(
            f"{folder}: {_INFO} names {len(info.classes)} classes, but {_CONFIG} describes "
            f"{config.num_classes or 0}; use files of the same training"
        )


def find_weights(url: str, *, prefer: Kind = "ema") -> str:
    """Return the folder that `load_weights(url)` reads. Raises UserError if there is none."""
    found = newest_weights(url, prefer=prefer)
    if found is None:
        raise UserError(f"{url}: no weights there or in its weights/step_* folders; train first")
    return found


def newest_weights(url: str, *, prefer: Kind = "ema") -> str | None:
    """Return the folder of the newest weights at `url`, as `load_weights` finds it, or None."""
    steps = [name for name in list_names(join(url, "weights")) if name.startswith("step_")]
    # By length first: names have 8 digits, but a run may take more steps than that.
    steps.sort(key=lambda name: (len(name), name), reverse=True)
    kinds = (prefer, "raw" if prefer == "ema" else "ema")
    for folder in (url, *(join(url, "weights", step) for step in steps)):
        for candidate in (folder, *(join(folder, kind) for kind in kinds)):
            if exists(join(candidate, _INFO)):
                return candidate
    return None


def step_name(step: int) -> str:
    """Return the folder name of a step, such as step_00000500, so that names sort like steps."""
    return f"step_{step:08d}"


def run_of(folder: str) -> str | None:
    """Return RUN for a folder RUN/weights/step_N; None for weights outside a run directory."""
    run, found, _ = folder.rpartition("/weights/step_")
    return run if found else None
