"""Guidance and alignment methods sample captions of different lengths as each caption alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from made_backbone import SMALL_UNET, made_captions, small_shape, without_padding
from torch import Tensor

from ifvit.conditions import Condition
from ifvit.diffusion.guidance import AlignmentMethod, Change, FunctionEvaluation
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig, FusionTransformerConfig
from ifvit.models.weights import build_backbone
from ifvit.sampling.alignment import Date, date_updates
from ifvit.sampling.config import DateConfig, SamplingConfig
from ifvit.sampling.regulation import BlockBias, Regulation, TargetTokens

CONFIG = SamplingConfig(
    num_steps=4, guidance_scale=3.0, seed=7, date=DateConfig(every=2, radius=2.0)
)
FUSIONS = ("concat", "cross_attention", "separate_cross_attention", "dual_stream", "adaln")
CONFIGS: dict[str, BackboneConfig] = {
    entry: small_shape(fusion=f"image 2*{entry} image", context_length=64) for entry in FUSIONS
}
CONFIGS["unet"] = replace(SMALL_UNET, num_classes=None, context_length=64, context_width=16)
LENGTHS = (9, 1, 20)
TARGETS = TargetTokens(
    positions=torch.tensor([[1, 3], [0, 0], [19, 4]]),
    present=torch.tensor([[True, True], [True, False], [True, True]]),
)
"""All tokens of the second caption are targets."""


def quiet_backbone(config: BackboneConfig) -> Backbone:
    """Every parameter has an effect, but rounding errors do not grow from step to step."""
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def brightness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    return images.flatten(1).tanh().mean(dim=1)


def raise_last_token(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Draw attention to the last token of each caption.

    A smooth stand-in for `BlockBias`, whose optimum changes with the last bits of the logits.
    """
    is_last = torch.arange(key.shape[1]) == visible.sum(dim=1, keepdim=True) - 1
    return 3.0 * is_last[:, None, None].expand(-1, 2, query.shape[1], -1)


def sample(
    backbone: Backbone, name: str, condition: Condition, null: Condition, positions: list[int]
) -> Tensor:
    methods: list[AlignmentMethod] = []
    if name in ("date", "both"):
        methods.append(Date(CONFIG.date, date_updates(CONFIG), brightness, lambda x: 0.5 * x, []))
    if name in ("regulate", "both"):
        methods.append(Regulation(dict.fromkeys((1, 2), raise_last_token), num_evaluations=2))
    batch = ConditionBatch(positions=torch.tensor(positions), condition=condition)
    encoded = backbone.encode_condition(null)
    return sample_latents(backbone, NoiseSchedule(), batch, encoded, CONFIG, methods)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in CONFIGS
        for method in ("plain", "date", "regulate", "both")
        if method in ("plain", "date") or name not in ("adaln", "unet")
    ],
)
@pytest.mark.parametrize("null_length", [1, 30])
def test_each_caption_is_sampled_as_if_it_were_alone(
    name: str, method: str, null_length: int
) -> None:
    config = CONFIGS[name]
    backbone, null = quiet_backbone(config), made_captions(config, (null_length,))
    null = replace(null, tokens=-null.tokens)
    captions = made_captions(config, LENGTHS)
    alone = [sample(backbone, method, without_padding(captions, n), null, [n]) for n in range(3)]
    captions = made_captions(config, LENGTHS, 64, filling=10)
    found = sample(backbone, method, captions, null, [0, 1, 2])
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)
    if method != "plain":
        plain = sample(backbone, "plain", captions, null, [0, 1, 2])
        assert (found - plain).abs().amax() > 0.01


class Recorder:
    """Passes on the changes of a method, and records its contexts."""

    def __init__(self, method: AlignmentMethod) -> None:
        self.method = method
        self.seen: list[tuple[Tensor, Tensor]] = []

    def before(self, evaluation: FunctionEvaluation) -> Change:
        change = self.method.before(evaluation)
        if change.context is not None:
            self.seen.append((evaluation.context, change.context))
        return change


def test_date_moves_visible_tokens_by_its_radius_and_leaves_padding_alone() -> None:
    config = CONFIGS["concat"]
    backbone, captions = quiet_backbone(config), made_captions(config, LENGTHS, 24, filling=10)
    date = Date(CONFIG.date, date_updates(CONFIG), brightness, lambda x: 0.5 * x, [])
    recorder = Recorder(date)
    batch = ConditionBatch(positions=torch.arange(3), condition=captions)
    null = backbone.encode_condition(made_captions(config, (1,)))
    sample_latents(backbone, NoiseSchedule(), batch, null, CONFIG, [recorder])
    assert len(recorder.seen) == 2
    for before, after in recorder.seen:
        moved = (after - before).abs().amax(dim=2) > 0
        assert moved.sum(dim=1).tolist() == list(LENGTHS)
        start = captions.tokens if CONFIG.date.start == "original" else before
        lengths = (after - start).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((3,), 2.0))


@pytest.mark.parametrize("name", ["concat", "separate_cross_attention"])
def test_regulation_gives_hidden_tokens_no_weight(name: str) -> None:
    config = CONFIGS[name]
    assert isinstance(config, FusionTransformerConfig)
    before = 0 if name == "separate_cross_attention" else 17
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 17, 2, 16, generator=generator)
    key = torch.randn(3, before + 24, 2, 16, generator=generator)
    visible = torch.arange(before + 24) < before + torch.tensor(LENGTHS)[:, None]
    found = BlockBias(config, 1, TARGETS)(query, key, visible)
    assert found.isfinite().all()
    for n, length in enumerate(LENGTHS):
        rows, shown = slice(n, n + 1), before + length
        targets = TargetTokens(positions=TARGETS.positions[rows], present=TARGETS.present[rows])
        alone = BlockBias(config, 1, targets)(query[rows], key[rows, :shown], None)
        torch.testing.assert_close(found[rows, ..., :shown], alone, rtol=1e-3, atol=1e-3)
    # Attention of a caption whose tokens are all targets has nothing to move.
    assert found[1, ..., : before + 1].abs().max() < 1e-3
    assert found[0].abs().max() > 0.1
