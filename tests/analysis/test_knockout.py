"""A network whose text is off in some blocks: what it predicts, whatever its mechanism."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from made_backbone import backbone_inputs, loud_backbone, made_captions, small_shape
from torch import Tensor

from ifvit.analysis.knockout import KnockedOut, blocks_without_text, list_windows
from ifvit.conditions import Condition, PaddedContext
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedPredictor
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.errors import UserError
from ifvit.models.blocks import BlockInputs
from ifvit.models.config import READS_TEXT, FusionTransformerConfig
from ifvit.models.fusion_transformer import FusionTransformer

MAPS = {
    "concat": "4*concat",
    "cross_attention": "4*cross_attention",
    "separate_cross_attention": "4*separate_cross_attention",
    "dual_stream": "4*dual_stream",
    "adaln": "4*adaln",
    "image first": "image concat image dual_stream image",
    "image last": "2*image cross_attention adaln image",
    "all": "adaln concat cross_attention separate_cross_attention dual_stream image",
}
OPTIONS = {
    "plain": {"long_skip": False, "num_text_blocks": 1},
    "modulated": {"modulation": "adaln_zero", "num_registers": 2},
    "shared modulation": {"modulation": "shared", "rotary": True, "long_skip": False},
    "classes": {"num_classes": 3, "context_length": None, "context_width": None},
}


def build(fusion: str, **options: object) -> FusionTransformer:
    """A small backbone in float64, so that rounding is far below every effect."""
    backbone = loud_backbone(small_shape(fusion=fusion, **{"num_text_blocks": 0} | options))
    assert isinstance(backbone, FusionTransformer)
    return backbone.double()


def make_inputs(config: FusionTransformerConfig) -> tuple[Tensor, Tensor, Condition, Condition]:
    """Latents, timesteps, conditions of two samples, and the null condition."""
    latents, timesteps, conditions = backbone_inputs(config, conditions=3)
    if config.num_classes is not None:
        return latents.double(), timesteps, conditions[:2], torch.tensor([config.num_classes])
    return latents.double(), timesteps, conditions[:2].double(), conditions[2:].double()


def expand(condition: Condition, count: int) -> Condition:
    """Repeat a condition of one row."""
    if isinstance(condition, PaddedContext):
        return PaddedContext(
            tokens=expand(condition.tokens, count), lengths=condition.lengths.expand(count)
        )
    return condition.expand(count, *condition.shape[1:])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fusion", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_text_is_all_there_all_gone_or_in_between(fusion: str, options: dict[str, object]) -> None:
    backbone = build(fusion, **options)
    latents, timesteps, caption, null = make_inputs(backbone.config)
    blocks = backbone.config.text_blocks
    with_text = backbone(latents, timesteps, caption)
    without = backbone(latents, timesteps, expand(null, 2))

    def predict(*off: int) -> Tensor:
        return KnockedOut(backbone, null, off)(latents, timesteps, caption)

    assert not torch.allclose(with_text, without)
    assert_equal(predict(), with_text)
    assert_equal(predict(*blocks), without)
    images = [n for n, entry in enumerate(backbone.config.blocks) if entry == "image"]
    assert_equal(predict(*images), with_text)
    for block in blocks:
        changed = predict(block)
        assert_equal(predict(block, *images), changed)
        assert not torch.allclose(changed, with_text)
        assert (len(blocks) == 1) == torch.allclose(changed, without)
    assert_equal(backbone(latents, timesteps, caption), with_text)  # nothing stays switched


@pytest.mark.parametrize("fusion", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_captions_may_have_any_length(fusion: str) -> None:
    backbone = build(fusion, num_text_blocks=1)
    latents, timesteps, *_ = make_inputs(backbone.config)
    captions = made_captions(backbone.config, [2, 5])
    captions = replace(captions, tokens=captions.tokens.double())
    null = made_captions(backbone.config, [1], filling=9)
    null = replace(null, tokens=null.tokens.double())
    for off, expected in ((), captions), (backbone.config.text_blocks, expand(null, 2)):
        found = KnockedOut(backbone, null, off)(latents, timesteps, captions)
        assert_equal(found, backbone(latents, timesteps, expected))


@pytest.mark.parametrize(
    "entry",
    ["concat", "cross_attention", "separate_cross_attention", "dual_stream", "adaln"],
)
@torch.no_grad()
def test_without_its_only_text_block_a_network_has_no_text(entry: str) -> None:
    backbone = build(f"image {entry} image")
    latents, timesteps, caption, null = make_inputs(backbone.config)
    found = KnockedOut(backbone, null, {1})(latents, timesteps, caption)
    assert_equal(found, backbone(latents, timesteps, expand(null, 2)))


@pytest.mark.parametrize(
    "entry", ["concat", "cross_attention", "separate_cross_attention", "dual_stream"]
)
@torch.no_grad()
def test_a_prediction_is_that_of_the_definition_block_by_block(entry: str) -> None:
    backbone = build(f"3*{entry}", long_skip=False)
    latents, timesteps, caption, null = make_inputs(backbone.config)
    sinusoids = backbone.time_proj(timesteps).double()
    for off in (off for count in (1, 2) for off in combinations(range(3), count)):
        tokens = backbone._embed_tokens(latents, sinusoids)
        texts = [backbone.encode_condition(one).tokens for one in (caption, expand(null, 2))]
        for number, block in enumerate(backbone.blocks):
            results = []
            for row, text in enumerate(texts):
                pair = block.text_keys_values(text) if entry in READS_TEXT else None
                result, texts[row] = block(tokens, BlockInputs(text=text, keys_values=pair))
                results.append(result)
            tokens = results[number in off]
        found = KnockedOut(backbone, null, off)(latents, timesteps, caption)
        assert_equal(found, backbone._predict(tokens, {}))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_guidance_keeps_its_unconditional_half(scale: float) -> None:
    backbone = build(MAPS["all"], modulation="adaln_zero")
    latents, _, caption, null = make_inputs(backbone.config)
    timesteps = torch.tensor([400, 400])
    knocked_out = KnockedOut(backbone, null, {1, 3})
    predictor = GuidedPredictor(
        knocked_out,
        NoiseSchedule(),
        caption,
        knocked_out.encode_condition(null),
        Guidance(scale=scale),
    )
    conditional = knocked_out(latents, timesteps, caption)
    unconditional = backbone(latents, timesteps, expand(null, 2))
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(predictor(latents, timesteps), expected.float())


def test_windows_reach_from_the_first_text_to_the_last() -> None:
    fusion = "image concat image adaln image"
    assert list_windows(fusion) == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)]
    assert list_windows(fusion, "blocks") == [(1, 1), (2, 2), (3, 3)]
    assert blocks_without_text(fusion, "off", (2, 3)) == {3}
    assert blocks_without_text(fusion, "only", (2, 3)) == {1}
    assert blocks_without_text(fusion, "off", (2, 2)) == set()
    with pytest.raises(UserError, match="no block sees text"):
        list_windows("4*image")
