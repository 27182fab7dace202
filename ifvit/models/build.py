"""Configuration => backbone, whatever its architecture."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig
from ifvit.models.token_transformer import TokenTransformer
from ifvit.models.unet import UNet
from ifvit.models.uvit import FusionUViT

_CLASSES: dict[str, type[Backbone]] = {
    "fusion_uvit": FusionUViT,
    "token_transformer": TokenTransformer,
    "unet": UNet,
}


def build_backbone(config: BackboneConfig) -> Backbone:
    """A backbone with fresh weights, drawn from torch's global generator."""
    return _CLASSES[config.architecture](**dataclasses.asdict(config))


def restore_backbone(config: BackboneConfig, state_dict: Mapping[str, Tensor]) -> Backbone:
    """A float32 backbone in eval mode that holds a copy of `state_dict`.

    Raises RuntimeError if keys or shapes differ from what `config` needs.
    """
    with torch.device("meta"):  # no time spent on weights that are replaced at once
        backbone = build_backbone(config)
    backbone.to_empty(device="cpu")
    backbone.load_state_dict(state_dict)
    backbone.eval()
    return backbone
