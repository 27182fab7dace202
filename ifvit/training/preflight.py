"""Before the first step: do recipe, shards and run directory fit together?"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import yaml

from ifvit.config import dump_config
from ifvit.errors import UserError
from ifvit.models.config import BackboneConfig, restore_config
from ifvit.models.flops import count_cost
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.shards import EncoderIdentity, ShardReader
from ifvit.storage import exists, is_remote, join, read_bytes, write_bytes
from ifvit.training.config import TrainConfig

MAY_CHANGE = frozenset(
    {
        *("run", "shards", "cache", "vae", "text_encoder", "engine", "sample_grid", "max_steps"),
        *("micro_batch_size", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
        *("keep_every", "keep_best", "resume"),
        *("tolerate_nonfinite", "trackers", "profile"),
    }
)
"""Fields that a resumed run may set anew; any other would make it a different run."""


def check_shapes(reader: ShardReader, config: TrainConfig) -> None:
    """Raise UserError when the backbone was not made for these shards' latents and context."""
    backbone = config.backbone
    moments, height, width = reader.manifest.moments_shape
    _require_shape(
        f"{config.shards}: latents",
        (moments // 2, height, width),
        (backbone.latent_channels, backbone.latent_size, backbone.latent_size),
        "backbone.latent_channels and backbone.latent_size",
    )
    if backbone.context_shape is None:
        _require_classes(config.shards, reader.manifest.classes, backbone)
        return
    _require_shape(
        f"{config.shards}: context",
        tuple(reader.text.context_shape),
        backbone.context_shape,
        "backbone.context_length and backbone.context_width",
    )


def check_encoders(reader: ShardReader, config: TrainConfig) -> None:
    """Raise UserError when the shards come from other encoders than the recipe names."""
    _require_encoder("vae", config.vae, reader.manifest.vae, config.shards)
    if config.text_encoder is not None:
        _require_encoder("text_encoder", config.text_encoder, reader.text.encoder, config.shards)


def check_recipe(config: TrainConfig) -> None:
    """Raise UserError when `config.run` holds a run of a recipe that differs in substance."""
    path = join(config.run, "config.yaml")
    if not exists(path):
        return
    before: dict[str, Any] = yaml.safe_load(read_bytes(path))
    # With the defaults of fields that are younger than the run.
    before["backbone"] = yaml.safe_load(dump_config(restore_config(before["backbone"])))
    now = yaml.safe_load(dump_config(config))
    for key in sorted(set(asdict(config)) - MAY_CHANGE):
        for name, old, new in differences(key, before.get(key), now[key]):
            raise UserError(
                f"{config.run}: started with {name}: {old}, the recipe now says {new}; restore "
                f"that value, or go on in a new run: --run NEW --resume {config.run}"
            )


def differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names of the fields that differ, `optim.learning_rate`, each with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            yield from differences(f"{name}.{key}", before.get(key), now[key])
    elif before != now:
        yield name, before, now


def claim_space(config: TrainConfig) -> None:
    """Write config.yaml, and raise UserError where the next checkpoint could not be written."""
    try:
        write_bytes(join(config.run, "config.yaml"), dump_config(config).encode())
    except OSError as error:
        raise UserError(
            f"{config.run}: cannot be written ({error}); choose another run directory"
        ) from None
    if is_remote(config.run):
        return
    # Parameters, two moments and averages; all but the moments once more in the exported weights.
    num_copies = (3 + len(config.ema_decays)) + (1 + len(config.ema_decays))
    needed = 4 * count_cost(config.backbone).params * num_copies
    free = shutil.disk_usage(config.run).free
    if free < needed:
        raise UserError(
            f"{config.run}: {free / 1e9:.1f} GB free, the next checkpoint takes "
            f"{needed / 1e9:.1f} GB; make room or choose another run directory"
        )


def manifest_sha256(shards: str) -> str:
    """Hash of the shards' manifest, which in turn holds the hash of every shard."""
    return hashlib.sha256(read_bytes(join(shards, "manifest.json"))).hexdigest()


def _require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], keys: str) -> None:
    if found != wanted:
        raise UserError(
            f"{what} are {'x'.join(map(str, found))}, but the backbone takes "
            f"{'x'.join(map(str, wanted))}; set {keys} to match, or encode again"
        )


def _require_classes(shards: str, classes: tuple[str, ...], backbone: BackboneConfig) -> None:
    if not classes:
        raise UserError(
            f"{shards}: holds captions, not classes; give backbone.context_length and "
            "backbone.context_width instead of num_classes"
        )
    if len(classes) != backbone.num_classes:
        raise UserError(
            f"{shards}: has {len(classes)} classes, the backbone {backbone.num_classes}; "
            "set backbone.num_classes to match"
        )


def _require_encoder(key: str, name: str | None, made_by: EncoderIdentity, shards: str) -> None:
    if name is None or name == made_by.name:
        return
    if identify(name, resolve_pretrained(name)).sha256 != made_by.sha256:
        raise UserError(
            f"{shards}: encoded with {key} {made_by.name}, the recipe names {name}; "
            f"encode again or change {key}"
        )
