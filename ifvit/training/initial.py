"""What a new run starts from: random weights, or those of another."""

from dataclasses import asdict

from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.build import build_backbone
from ifvit.models.weights import load_weights
from ifvit.shards import ShardReader
from ifvit.training.checkpoint import saved_steps
from ifvit.training.config import TrainConfig
from ifvit.training.preflight import differences


def initial_backbone(config: TrainConfig, reader: ShardReader) -> Backbone:
    """The backbone of step 0; a run that has checkpoints does not need `initial_weights` again.

    Raises UserError for weights of another shape, or for latents of another scale.
    """
    backbone = build_backbone(config.backbone)
    if config.initial_weights is None or saved_steps(config.run):
        return backbone
    loaded, info = load_weights(config.initial_weights)
    scale = config.scaling_factor or reader.manifest.scaling_factor
    theirs = {"backbone": asdict(loaded.shape), "scaling_factor": info.scaling_factor}
    ours = {"backbone": asdict(config.backbone), "scaling_factor": scale}
    for key, value in ours.items():
        for name, there, here in differences(key, theirs[key], value):
            raise UserError(
                f"{config.initial_weights}: has {name}: {there}, the recipe {here}; set it alike"
            )
    backbone.load_state_dict(loaded.state_dict())
    return backbone
