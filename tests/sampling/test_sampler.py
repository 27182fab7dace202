"""Drawing with a real backbone: guidance, and images that do not know their neighbours."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from made_backbone import small_shape
from torch import Tensor

from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import (
    AlignmentMethod,
    Change,
    FunctionEvaluation,
    GuidedNoisePredictor,
)
from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images, sample_latents
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.errors import UserError
from ifvit.images import to_pixels
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.config import Conditioning
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.layers import Modulation
from ifvit.sampling.config import SamplingConfig
from ifvit.shards import EncoderIdentity

CONTEXTS = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
CONFIG = SamplingConfig(num_steps=4, guidance_scale=3.0, seed=7)


def build_backbone(conditioning: Conditioning = "cross_attention") -> FusionUViT:
    torch.manual_seed(0)
    config = small_shape(latent_size=4, conditioning=conditioning)
    backbone = FusionUViT(config).eval()
    for module in backbone.modules():
        if isinstance(module, Modulation):  # fresh ones let nothing of the condition through
            torch.nn.init.normal_(module.linear.weight, std=0.3)
    return backbone


def build_denoiser(
    backbone: FusionUViT, scale: float, method: AlignmentMethod | None = None, high: float = 999
) -> GuidedNoisePredictor:
    null_text = backbone.encode_condition(NULL[None])
    return GuidedNoisePredictor(
        backbone, CONTEXTS, null_text, Guidance(scale=scale, high=high), method
    )


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    identity = EncoderIdentity(name="random", sha256="0" * 64)
    autoencoder = Autoencoder(vae, identity)
    return Sampler(
        backbone=build_backbone(),
        decode=lambda latents: autoencoder.decode_unclamped(latents / 0.5),
        null_condition=NULL,
    )


def make_batches(positions: Sequence[int], batch_size: int) -> Iterator[ConditionBatch]:
    for chunk in torch.tensor(positions).split(batch_size):
        names = [f"caption {position}" for position in chunk.tolist()]
        yield ConditionBatch(positions=chunk, condition=CONTEXTS[chunk % 5], prompts=names)


@pytest.mark.parametrize("scale", [3.0, 0.5])
@pytest.mark.parametrize("conditioning", ["concat", "cross_attention", "adaln"])
def test_guidance_is_its_equation(conditioning: Conditioning, scale: float) -> None:
    backbone = build_backbone(conditioning)
    x_t, timesteps = torch.randn(5, 4, 4, 4), torch.full((5,), 400)
    with torch.no_grad():
        guided = build_denoiser(backbone, scale)(x_t, timesteps)
        conditional = backbone(x_t, timesteps, CONTEXTS)
        unconditional = backbone(x_t, timesteps, NULL.expand_as(CONTEXTS))
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


def test_noise_of_half_precision_is_guided_in_full() -> None:
    backbone = build_backbone().to(torch.bfloat16)
    x_t, timesteps = torch.randn(5, 4, 4, 4), torch.full((5,), 400)
    with torch.no_grad():
        guided = build_denoiser(backbone, 3.0)(x_t, timesteps)
        both = backbone(x_t, timesteps, torch.cat([CONTEXTS, NULL.expand_as(CONTEXTS)]))
    conditional, unconditional = both.float().chunk(2)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional))


def test_guidance_of_one_leaves_the_unconditional_half_out() -> None:
    backbone = build_backbone()
    rows: list[int] = []
    backbone.mid_block.register_forward_hook(lambda *call: rows.append(len(call[2])))
    for scale in (1.0, 2.0):
        build_denoiser(backbone, scale)(torch.randn(5, 4, 4, 4), torch.full((5,), 9))
    assert rows == [5, 10]


def test_what_both_halves_share_is_computed_once() -> None:
    """Up to the queries of the first fused block there is no text in anything."""
    backbone = build_backbone()
    rows: list[int] = []
    for block in (*backbone.in_blocks, backbone.mid_block):
        block.attn.qkv.register_forward_hook(lambda *call: rows.append(len(call[2])))
    denoiser = build_denoiser(backbone, 3.0)
    rows.clear()
    denoiser(torch.randn(5, 4, 4, 4), torch.full((5,), 400))
    assert rows == [5, 5, 10]


def test_guidance_ends_where_its_interval_does() -> None:
    backbone = build_backbone()
    rows: list[int] = []
    backbone.mid_block.register_forward_hook(lambda *call: rows.append(len(call[2])))
    guidance = Guidance(scale=2.0, low=100, high=800)
    denoiser = GuidedNoisePredictor(
        backbone, CONTEXTS, backbone.encode_condition(NULL[None]), guidance
    )
    for t in (999, 801, 800, 100, 99, 0):
        denoiser(torch.randn(5, 4, 4, 4), torch.full((5,), t))
    assert rows == [5, 5, 10, 10, 5, 5]


def test_guidance_is_everywhere_unless_it_is_told_otherwise() -> None:
    for guidance in (SamplingConfig().guidance, Guidance(scale=2.0)):
        assert guidance.applies_at(0)
        assert guidance.applies_at(999)
    narrow = SamplingConfig(guidance_low=5.0, guidance_high=7.0).guidance
    assert [t for t in range(10) if narrow.applies_at(t)] == [5, 6, 7]
    SamplingConfig(guidance_low=5.0, guidance_high=5.0)
    with pytest.raises(ValueError, match=r"guidance_low 6\.0 is above guidance_high 5\.0"):
        SamplingConfig(guidance_low=6.0, guidance_high=5.0)


class Recorder:
    """A method that writes down what it is asked and answers with the changes it was given."""

    def __init__(self, *changes: Change) -> None:
        self.changes = list(changes)
        self.seen: list[FunctionEvaluation] = []

    def before(self, evaluation: FunctionEvaluation) -> Change:
        self.seen.append(evaluation)
        return self.changes.pop(0)


def test_a_method_that_changes_nothing_leaves_the_noise_as_it_was() -> None:
    backbone, x_t, timesteps = build_backbone(), torch.randn(5, 4, 4, 4), torch.full((5,), 400)
    plain = build_denoiser(backbone, 3.0)(x_t, timesteps)
    assert torch.equal(plain, build_denoiser(backbone, 3.0, Recorder(Change()))(x_t, timesteps))


@pytest.mark.parametrize("high", [999.0, 399.0])
@pytest.mark.parametrize("conditioning", ["concat", "cross_attention", "adaln"])
def test_a_method_sees_the_clean_latents_and_a_gradient_to_the_context(
    conditioning: Conditioning, high: float
) -> None:
    backbone, x_t = build_backbone(conditioning), torch.randn(5, 4, 4, 4)
    method = Recorder(Change())
    noise = build_denoiser(backbone, 3.0, method, high)(x_t, torch.full((5,), 400))
    context = CONTEXTS.clone().requires_grad_()
    clean = method.seen[0].predict_clean(context)
    noised = NoiseSchedule().add_noise(clean, noise, torch.full((5,), 400))
    torch.testing.assert_close(noised, x_t, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(clean[2].sum(), context)
    assert [bool(row.any()) for row in gradient] == [False, False, True, False, False]


def test_a_changed_context_stays_until_the_next_change() -> None:
    backbone, x_t, timesteps = build_backbone(), torch.randn(5, 4, 4, 4), torch.full((5,), 400)
    method = Recorder(Change(context=CONTEXTS.flip(0)), Change())
    denoiser = build_denoiser(backbone, 1.0, method)
    first, second = denoiser(x_t, timesteps), denoiser(x_t, timesteps)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, backbone(x_t, timesteps, CONTEXTS.flip(0)))
    assert [seen.index for seen in method.seen] == [0, 1]
    assert torch.equal(method.seen[1].context, CONTEXTS.flip(0))


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
def test_biases_move_the_conditional_half_alone(conditioning: Conditioning) -> None:
    backbone, x_t = build_backbone(conditioning), torch.randn(5, 4, 4, 4)
    timesteps = torch.full((5,), 400)

    seen: list[tuple[Tensor, Tensor]] = []

    def hide_text(query: Tensor, key: Tensor) -> Tensor:
        """All that image and time see of the text is taken away."""
        seen.append((query, key))
        addend = torch.zeros(len(query), 2, query.shape[1], key.shape[1])
        addend[:, :, :5, 5:] = -torch.inf
        return addend

    change = Change(biases=dict.fromkeys(range(3), hide_text))
    one = build_denoiser(backbone, 1.0, Recorder(change))(x_t, timesteps)
    guided = build_denoiser(backbone, 3.0, Recorder(change))(x_t, timesteps)
    unconditional = backbone(x_t, timesteps, NULL.expand_as(CONTEXTS))
    torch.testing.assert_close(guided, unconditional + 3.0 * (one - unconditional))
    torch.testing.assert_close(seen[3:], seen[:3])
    # Without text all captions are one: so the bias has reached every fused block.
    hidden = build_denoiser(backbone, 1.0, Recorder(change))(x_t[:1].expand_as(x_t), timesteps)
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))


def test_text_is_encoded_once_per_caption_whatever_the_number_of_steps(sampler: Sampler) -> None:
    rows: list[int] = []
    hook = sampler.backbone.text_blocks[0].register_forward_hook(
        lambda *call: rows.append(len(call[2]))
    )
    config = dataclasses.replace(CONFIG, num_steps=6)
    list(generate_images(sampler, make_batches(range(5), 2), config))
    hook.remove()
    assert rows == [1, 2, 2, 1]


def test_latents_depend_on_position_and_not_on_the_batch() -> None:
    backbone = build_backbone()
    null_text = backbone.encode_condition(NULL[None])

    def draw(positions: list[int]) -> Tensor:
        (batch,) = make_batches(positions, 5)
        return sample_latents(backbone, batch, null_text, CONFIG)

    together, alone = draw([0, 1, 2, 3, 4]), draw([3])
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-4)
    assert float((together[3] - together[2]).abs().max()) > 0.1


def test_images_are_the_same_in_batches_of_any_size(sampler: Sampler) -> None:
    alone, some, many = (
        np.concatenate(list(generate_images(sampler, make_batches(range(32), size), CONFIG)))
        for size in (1, 7, 32)
    )
    assert many.shape == (32, 8, 8, 3)
    assert many.dtype == np.uint8
    # One unit: the last bit of a float sum may decide how a value rounds.
    assert np.abs(alone.astype(int) - many).max() <= 1
    assert np.abs(some.astype(int) - many).max() <= 1


def test_images_are_the_decoded_latents_without_their_scale(sampler: Sampler) -> None:
    null_text = sampler.backbone.encode_condition(NULL[None])
    (batch,) = make_batches(range(5), 5)
    latents = sample_latents(sampler.backbone, batch, null_text, CONFIG)
    with torch.no_grad():
        expected = to_pixels(sampler.decode(latents))
    (images,) = generate_images(sampler, [batch], CONFIG)
    np.testing.assert_array_equal(images, expected)


def test_methods_see_their_prompts_and_every_step(sampler: Sampler) -> None:
    seen: dict[tuple[str, ...], Recorder] = {}

    def build_method(prompts: Sequence[str]) -> AlignmentMethod:
        recorder = Recorder(*[Change()] * CONFIG.num_steps)
        return seen.setdefault(tuple(prompts), recorder)

    list(generate_images(sampler, make_batches([4, 1, 2], 2), CONFIG, build_method))
    assert {prompts: len(method.seen) for prompts, method in seen.items()} == {
        ("caption 4", "caption 1"): CONFIG.num_steps,
        ("caption 2",): CONFIG.num_steps,
    }


def test_seed_and_solver_change_the_image(sampler: Sampler) -> None:
    def draw(**changes: object) -> bytes:
        config = dataclasses.replace(CONFIG, **changes)
        return next(generate_images(sampler, make_batches(range(5), 5), config)).tobytes()

    pictures = [draw(), draw(seed=8), draw(solver="euler"), draw(guidance_scale=1.0)]
    assert len(set(pictures)) == 4
    assert draw() == pictures[0]


def test_images_that_are_no_numbers_are_refused_and_not_drawn_black(sampler: Sampler) -> None:
    overflowing = dataclasses.replace(CONFIG, guidance_scale=1e38)
    with pytest.raises(UserError, match="not finite numbers; lower guidance_scale"):
        list(generate_images(sampler, make_batches(range(2), 2), overflowing))
