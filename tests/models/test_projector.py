"""The projector for representation alignment: part of training, absent from exported weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_backbone import backbone_inputs, loud_backbone, small_shape

from ifvit.errors import UserError
from ifvit.models.config import FusionTransformerConfig, without_representation
from ifvit.models.cost import count_cost
from ifvit.models.weights import build_backbone, describe_backbone, exported_backbone

MIXED = "image concat cross_attention separate_cross_attention dual_stream adaln"


def shape(block: int = 2, **changes: object) -> FusionTransformerConfig:
    return small_shape(representation_block=block, representation_width=6, **changes)


@pytest.mark.parametrize("block", range(6))
def test_tokens_of_every_kind_of_block_are_projected(block: int) -> None:
    config = shape(block, fusion=MIXED, num_registers=2)
    backbone = loud_backbone(config)
    prediction, features = backbone(*backbone_inputs(config), with_features=True)
    assert features.shape == (2, 16, 6)
    assert features.std(dim=1).min() > 0
    assert torch.equal(backbone(*backbone_inputs(config)), prediction)


def test_the_projector_changes_neither_initial_weights_nor_predictions() -> None:
    config = shape()
    aligned, plain = build_backbone(config, 3), build_backbone(without_representation(config), 3)
    weights = aligned.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(weights.pop(name), tensor)
    assert {name.split(".")[0] for name in weights} == {"representation_projector"}
    assert torch.equal(aligned(*backbone_inputs(config)), plain(*backbone_inputs(config)))


@pytest.mark.parametrize("long_skip", [False, True])
@pytest.mark.parametrize("block", [0, 2])
def test_the_gradient_reaches_the_projector_and_blocks_up_to_the_chosen_one(
    long_skip: bool, block: int
) -> None:
    backbone = loud_backbone(shape(block, long_skip=long_skip)).train()
    _, features = backbone(*backbone_inputs(backbone.config), with_features=True)
    features.square().sum().backward()
    reached = {name for name, one in backbone.named_parameters() if one.grad is not None}
    blocks = {int(name.split(".")[1]) for name in reached if name.startswith("blocks.")}
    assert blocks == set(range(block + 1))
    assert sum(name.startswith("representation_projector.") for name in reached) == 6
    assert not any(name.startswith(("head_norm", "decoder_pred", "final")) for name in reached)


def test_exported_weights_lack_the_projector(tmp_path: Path) -> None:
    config = shape()
    trained = loud_backbone(config)
    exported = exported_backbone(config, trained.state_dict())
    assert exported.config == without_representation(config)
    assert torch.equal(exported(*backbone_inputs(config)), trained(*backbone_inputs(config)))
    assert count_cost(config) == count_cost(exported.config)
    assert count_cost(config).params == sum(one.numel() for one in exported.parameters())


def test_the_projectors_hidden_width_is_repas_in_large_backbones() -> None:
    for width, hidden in ((32, 128), (512, 2048), (768, 2048)):
        projector = describe_backbone(shape(width=width)).representation_projector
        assert [tuple(one.shape) for one in projector.parameters() if one.ndim == 2] == [
            (hidden, width),
            (hidden, hidden),
            (6, hidden),
        ]


def test_an_impossible_projector_is_an_error() -> None:
    with pytest.raises(UserError, match=r"representation_block 5 is not a block .* are 0 to 4"):
        shape(5)
    with pytest.raises(UserError, match="both representation_block and representation_width"):
        replace(shape(), representation_width=None)
