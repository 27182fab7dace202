"""Properties of 240 random fusion maps with random block options, in float64."""

import functools
import random
from typing import get_args

import pytest
import torch
from made_backbone import backbone_inputs, loud_backbone, small_shape

from ifvit.models.blocks import build_block
from ifvit.models.config import Fusion, FusionTransformerConfig
from ifvit.models.fusion_transformer import FusionTransformer

ENTRIES = get_args(Fusion)
CAPTIONS = {"context_length": 3, "context_width": 5}


def random_config(seed: int) -> FusionTransformerConfig:
    """A map of 1 to 6 blocks; one in eight has no entry that sees text."""
    draw = random.Random(seed)
    entries = ["image"] if seed % 8 == 0 else ENTRIES
    fusion = " ".join(draw.choices(entries, k=draw.randint(1, 6)))
    sees_text = set(fusion.split()) != {"image"}
    return FusionTransformerConfig(
        fusion=fusion,
        num_text_blocks=draw.randint(0, 2) if sees_text else 0,
        long_skip=draw.random() < 0.6,
        latent_size=4,
        latent_channels=draw.choice([1, 4]),
        patch_size=2,
        width=16,
        num_heads=draw.choice([1, 2, 4]),
        mlp_ratio=draw.choice([2, 4]),
        mlp=draw.choice(["gelu", "swiglu"]),
        norm=draw.choice(["layer_norm", "rms_norm"]),
        qk_norm=draw.random() < 0.5,
        rotary=draw.random() < 0.5,
        num_registers=draw.choice([0, 0, 2]),
        modulation=draw.choice(["none", "adaln_zero", "shared"]),
        **(CAPTIONS if draw.random() < 0.6 else {"num_classes": 3}),
    )


CONFIGS = [random_config(seed) for seed in range(240)]


@functools.cache
def float64_backbone(config: FusionTransformerConfig) -> FusionTransformer:
    return loud_backbone(config).double()


def has_no_gradient(name: str, config: FusionTransformerConfig) -> bool:
    """Whether attention over a single key, that of a class token, leaves a parameter unused.

    The softmax over one key is 1, whatever query and key are.
    """
    attends_to_one = name.startswith("text_blocks.") or ".cross_attn." in name
    is_query_or_key = name.endswith(("cross_attn.q.weight", "norm_q.weight", "norm_k.weight"))
    return config.num_classes is not None and attends_to_one and is_query_or_key


@pytest.mark.parametrize("part", range(8))
def test_the_shape_is_that_of_latents_and_gradient_reaches_every_parameter(part: int) -> None:
    for config in CONFIGS[part::8]:
        backbone = float64_backbone(config)
        latents, timesteps, condition = backbone_inputs(config, batch=2)
        noise = backbone(latents, timesteps, condition)
        assert noise.shape == latents.shape
        noise.square().sum().backward()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None, (config, name)
            reached = parameter.grad.abs().max().item() > 1e-12
            assert reached != has_no_gradient(name, config), (config, name)


@pytest.mark.parametrize("part", range(8))
def test_encoded_conditions_and_a_shared_prefix_change_nothing(part: int) -> None:
    for config in CONFIGS[part::8]:
        backbone = float64_backbone(config)
        latents, timesteps, conditions = backbone_inputs(config, batch=2, conditions=6)
        with torch.no_grad():
            encoded = backbone.encode_condition(conditions)
            together = backbone(latents, timesteps, encoded)
            alone = [backbone(latents, timesteps, one) for one in conditions.chunk(3)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_a_map_that_sees_no_text_ignores_the_condition_and_has_no_parameters_for_it() -> None:
    configs = [config for config in CONFIGS if not config.text_blocks]
    assert len(configs) >= 30
    for config in configs:
        backbone = float64_backbone(config)
        names = [name.split(".")[0] for name, _ in backbone.named_parameters()]
        assert not {"label_emb", "context_embed", "text_blocks", "pooled_embed"} & set(names)
        assert backbone.pos_embed.shape[1] == 1 + 4
        latents, timesteps, condition = backbone_inputs(config)
        with torch.no_grad():
            predicted = backbone(latents, timesteps, condition)
            assert torch.equal(backbone(latents, timesteps, condition.flip(0)), predicted)


def test_every_map_that_sees_text_follows_the_condition() -> None:
    for config in CONFIGS:
        if config.text_blocks:
            backbone = float64_backbone(config)
            latents, timesteps, condition = backbone_inputs(config)
            with torch.no_grad():
                predicted = backbone(latents, timesteps, condition)
                assert not torch.equal(backbone(latents, timesteps, condition.flip(0)), predicted)


def test_a_stored_backbone_is_loaded_by_diffusers_with_equal_weights(tmp_path) -> None:
    for number, config in enumerate(CONFIGS[::6]):
        backbone = loud_backbone(config)
        backbone.save_pretrained(tmp_path / str(number))
        again = FusionTransformer.from_pretrained(tmp_path / str(number))
        assert again.config == config
        assert again.dtype == torch.float32
        given = backbone_inputs(config)
        with torch.no_grad():
            assert torch.equal(again(*given), backbone(*given)), config


def attention_parameters(config: FusionTransformerConfig) -> int:
    """Query, key, value and output matrices, its bias, and two norms of heads."""
    head_norms = 2 * config.width // config.num_heads if config.qk_norm else 0
    return 4 * config.width**2 + config.width + head_norms


def norm_parameters(config: FusionTransformerConfig) -> int:
    return config.width if config.norm == "rms_norm" else 2 * config.width


def modulation_parameters(config: FusionTransformerConfig, count: int) -> int:
    """Tables where the projection is shared, a projection elsewhere."""
    d = config.width
    return count * d if config.modulation == "shared" else count * (d * d + d)


def stream_parameters(config: FusionTransformerConfig, *, modulated: bool, skip: bool) -> int:
    """Attention, MLP, two norms or six modulation vectors, and a long skip."""
    d, hidden = config.width, config.mlp_ratio * config.width
    mlp = 2 * d * hidden + hidden + d
    if config.mlp == "swiglu":
        mlp = 3 * d * max(8, 2 * hidden // 3 // 8 * 8)
    norms = modulation_parameters(config, 6) if modulated else 2 * norm_parameters(config)
    return attention_parameters(config) + mlp + norms + (2 * d * d + d if skip else 0)


def block_parameters(config: FusionTransformerConfig, number: int) -> int:
    d, entries, depth = config.width, config.blocks, len(config.blocks)
    entry, mirror = entries[number], entries[depth - 1 - number]
    skip = config.long_skip and number >= (depth + 1) // 2
    modulated = config.modulation != "none" or entry == "adaln"
    image = stream_parameters(config, modulated=modulated, skip=skip)
    if entry == "separate_cross_attention":
        return image + attention_parameters(config)
    if entry != "dual_stream":
        return image
    text_skip = skip and mirror in ("concat", "dual_stream")
    if not set(entries[number + 1 :]) <= {"image", "adaln"}:
        return image + stream_parameters(config, modulated=modulated, skip=text_skip)
    # The last block in which image tokens attend to text has keys and values of the text only.
    norm = modulation_parameters(config, 2) if modulated else norm_parameters(config)
    head_norm = d // config.num_heads if config.qk_norm else 0
    return image + 2 * d * d + head_norm + norm + (2 * d * d + d if text_skip else 0)


def modulation_inputs(config: FusionTransformerConfig, modulated: set[str]) -> int:
    """Embeddings of time and pooled text, and the shared projection."""
    d = config.width
    time = 8 * d * d + 5 * d if modulated else 0
    pooled = d * d + d if modulated - {"image"} else 0
    return time + pooled + (6 * d * d + 6 * d if config.modulation == "shared" else 0)


def num_parameters(config: FusionTransformerConfig) -> int:
    """Number of parameters by the formulas of each entry, written down apart from the network."""
    d, c, entries = config.width, config.latent_channels, config.blocks
    condition = 4 * d if config.context_shape is None else 5 * d + d
    num_text = 1 if config.context_shape is None else 3
    if set(entries) == {"image"}:
        condition = num_text = 0
    tokens = 1 + num_text + 4 + config.num_registers
    modulated = {entry for entry in entries if config.modulation != "none" or entry == "adaln"}
    text_branch = stream_parameters(config, modulated=False, skip=False) * config.num_text_blocks
    blocks = sum(block_parameters(config, number) for number in range(len(entries)))
    norm = norm_parameters(config)
    if entries[-1] in modulated:
        norm = modulation_parameters(config, 2)
    ends = (4 * c * d + d) + (d * 4 * c + 4 * c) + (9 * c * c + c)  # patches of 2 x 2
    return (
        ends
        + norm
        + tokens * d
        + condition
        + text_branch
        + blocks
        + modulation_inputs(config, modulated)
    )


def test_parameters_are_the_sum_of_formulas_of_the_entries() -> None:
    for config in CONFIGS:
        counted = sum(parameter.numel() for parameter in float64_backbone(config).parameters())
        assert counted == num_parameters(config), config


@pytest.mark.parametrize(
    ("fusion", "number", "plain", "modulated"),
    [
        ("image", 0, 12, 18),
        ("concat", 0, 12, 18),
        ("cross_attention", 0, 12, 18),
        ("separate_cross_attention", 0, 16, 22),
        ("2*dual_stream", 0, 24, 36),
        ("dual_stream", 0, 12 + 2, 18 + 2 + 2),
        ("image concat", 1, 12 + 2, 18 + 2),
        ("3*dual_stream", 1, 24, 36),
        ("concat dual_stream concat", 1, 24, 36),
        ("dual_stream concat dual_stream concat", 2, 24 + 2 + 2, 36 + 2 + 2),
        ("dual_stream image dual_stream concat", 2, 24 + 2, 36 + 2),
    ],
)
def test_matrices_of_a_block_have_as_many_weights_as_in_the_literature(
    fusion: str, number: int, plain: int, modulated: int
) -> None:
    for modulation, expected in (("none", plain), ("adaln_zero", modulated)):
        config = small_shape(fusion=fusion, modulation=modulation, num_text_blocks=0)
        block = build_block(config, number)
        weights = sum(one.numel() for one in block.parameters() if one.ndim == 2)
        assert weights == expected * config.width**2
