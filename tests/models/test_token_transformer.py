import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from slope import assert_gradient_is_slope
from uvit_oracle import Array, Layout, Oracle

from ifvit.errors import UserError
from ifvit.models.config import CLASS_PRESETS, TokenTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.fusion_transformer import TokenTransformer
from ifvit.models.weights import build_backbone

CLASSES = TokenTransformerConfig(
    latent_size=8, num_classes=3, patch_size=2, width=16, num_heads=2, depth=5
)
SKIPPING = dataclasses.replace(CLASSES, long_skip=True)
CAPTIONS = dataclasses.replace(CLASSES, num_classes=None, context_length=5, context_width=12)
CONFIGS = {
    "classes": CLASSES,
    "long skip": SKIPPING,
    "captions": CAPTIONS,
    "modulated": dataclasses.replace(CAPTIONS, modulation=True),
    "adaln": dataclasses.replace(CAPTIONS, conditioning="adaln", long_skip=True),
    "adaln classes": dataclasses.replace(CLASSES, conditioning="adaln"),
}


class TokenOracle(Oracle):
    """Class-conditional U-ViT as concat early fusion of a text of one token, the class embedding;
    without skips, the same U with no way out."""

    def __init__(self, weights: Mapping[str, Array], config: TokenTransformerConfig) -> None:
        num_skips = config.depth // 2 if config.long_skip else 0
        middle = config.depth - num_skips - 1
        layout = Layout(
            conditioning="adaln" if config.conditioning == "adaln" else "concat",
            positions=("text", "time", "image"),
            fused_in=[f"in_blocks.{i}" for i in range(middle)],
            fused_out=[f"out_blocks.{i}" for i in range(num_skips)],
            is_modulated=config.is_modulated,
        )
        renamed = {
            name.replace(f"in_blocks.{middle}.", "mid_block."): w for name, w in weights.items()
        }
        if "label_emb.weight" in weights:
            identity = np.eye(config.width)
            renamed |= {"context_embed.weight": identity, "context_embed.bias": identity[0] * 0}
        if config.conditioning == "adaln":  # whose condition has no place in the sequence
            nowhere = np.zeros((1, config.context_length or 1, config.width))
            renamed |= {"pos_embed": np.hstack([nowhere, weights["pos_embed"]])}
        super().__init__(renamed, layout, config.num_heads)

    def _embed_time(self, timestep: float) -> Array | None:
        return self._time(timestep) if self.layout.is_modulated else None

    def _add_pooled(self, time: Array | None, text: Array) -> Array | None:
        return super()._add_pooled(time, text - self.weights["pos_embed"][0, : len(text)])

    def _time(self, timestep: float) -> Array:
        hidden = self._linear("time_embed.0", super()._time(timestep)[None])
        return self._linear("time_embed.2", hidden / (1 + np.exp(-hidden)))[0]


def loud_backbone(config: TokenTransformerConfig) -> TokenTransformer:
    """Weights at which every path through the network matters."""
    torch.manual_seed(0)
    backbone = build_backbone(dataclasses.replace(config, init_std=0.25)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone  # type: ignore[return-value]


def inputs(config: TokenTransformerConfig, batch=2, conditions=None):
    generator = torch.Generator().manual_seed(3)
    count = conditions or batch
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(count, 5, 12, generator=generator)
    numbers = torch.arange(count) % 4  # 3 is the null class
    return latents, torch.arange(batch) * 400, numbers if config.num_classes else context


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_predicts_what_the_oracle_predicts(config):
    backbone = loud_backbone(config)
    weights = {name: value.double().numpy() for name, value in backbone.state_dict().items()}
    oracle = TokenOracle(weights, config)
    latents, timesteps, condition = inputs(config, batch=4)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, condition)
    contexts = condition.double().numpy()
    if config.num_classes:
        contexts = weights["label_emb.weight"][condition.numpy()][:, None]
    expected = [
        oracle.predict(x, t, c)
        for x, t, c in zip(latents.double().numpy(), timesteps.tolist(), contexts, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_conditions_encoded_once_and_several_for_one_latent_predict_as_if_alone(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = inputs(config, batch=2, conditions=4)
    with torch.no_grad():
        together = backbone(latents, timesteps, backbone.encode_condition(condition))
        alone = [backbone(latents, timesteps, half) for half in condition.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_reaches_every_parameter(config):
    backbone = loud_backbone(config)
    backbone(*inputs(config, batch=4)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_gradient_is_the_slope_of_the_loss(config):
    assert_gradient_is_slope(loud_backbone(config), inputs(config, batch=4))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_bfloat16_backbone_predicts_nearly_the_same(config):
    backbone = loud_backbone(config)
    with torch.no_grad():
        exact = backbone(*inputs(config))
        rounded = backbone.to(torch.bfloat16)(*inputs(config))
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).square().mean().sqrt()
    assert error < 0.1 * exact.std()


def test_fresh_classes_are_as_narrow_as_other_weights():
    torch.manual_seed(0)
    backbone = build_backbone(dataclasses.replace(CLASSES, num_classes=99, init_std=0.1))
    assert backbone.label_emb.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_blocks_are_all_of_them():
    assert len(build_backbone(SKIPPING).blocks()) == SKIPPING.depth


def test_the_null_class_is_one_of_its_own():
    backbone = loud_backbone(CLASSES)
    latents, timesteps, _ = inputs(CLASSES)
    with torch.no_grad():
        drawn = [backbone(latents, timesteps, torch.tensor([k, k])) for k in range(4)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 4


@pytest.mark.parametrize(
    ("preset", "depth", "width", "tokens", "classes"),
    [
        ("token_tiny", 7, 104, 18, 75),
        ("token_small", 12, 512, 258, 1000),
        ("token_base", 12, 768, 258, 1000),
        ("token_large", 24, 1024, 258, 1000),
    ],
)
def test_presets_have_the_parameters_of_the_formula(preset, depth, width, tokens, classes):
    block = 12 * width**2 + 4 * width + width + 5 * width  # weights, norms, proj, mlp biases
    time = 8 * width**2 + 5 * width
    ends = (16 + 1) * width + 2 * width + (width + 1) * 16 + 4 * 4 * 9 + 4
    expected = depth * block + time + ends + (tokens + classes + 1) * width
    config = CLASS_PRESETS[preset]
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == expected
    assert count_cost(config).params == expected


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path):
    backbone = loud_backbone(SKIPPING)
    backbone.save_pretrained(tmp_path)
    again = TokenTransformer.from_pretrained(tmp_path)
    assert again.config == backbone.config
    with torch.no_grad():
        assert torch.equal(again(*inputs(SKIPPING)), backbone(*inputs(SKIPPING)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"long_skip": True, "depth": 4}, "depth must be odd with long_skip"),
        ({"num_classes": None}, "give either num_classes or both .*, not nothing"),
        ({"context_length": 5}, "not num_classes and context_length"),
        ({"num_classes": None, "context_length": 5}, "not context_length"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_heads": 3}, "divisible by num_heads 3"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CLASSES, **change)
