"""Settings become methods, with the shipped CLIP and tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from made_backbone import small_shape
from made_image_reward import write_image_reward
from torch import Tensor

from ifvit.config import read_config
from ifvit.diffusion.guidance import AlignmentMethod, FunctionEvaluation
from ifvit.diffusion.sampler import Sampler
from ifvit.errors import UserError
from ifvit.models.attention import logits_of
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.image_reward import load_image_reward
from ifvit.models.weights import WeightsInfo
from ifvit.sampling.alignment import build_method
from ifvit.sampling.config import DateConfig, GenerateConfig, RegulationConfig, SamplingConfig
from ifvit.shards import EncoderIdentity

CAPTIONS = ["two red circles", "a blue square"]
CONFIG = SamplingConfig(num_steps=4)
CLIP = EncoderIdentity(name="scenes/clip", sha256="0" * 64)
INFO = WeightsInfo(
    step=0, ema_decay=None, scaling_factor=0.5, vae=CLIP, text_encoder=CLIP, recipe_sha256="0" * 64
)


@pytest.fixture
def sampler(backbone: FusionUViT) -> Sampler:
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4)
    autoencoder = Autoencoder(vae.eval(), CLIP)
    return Sampler(
        backbone=backbone,
        decode=lambda latents: autoencoder.decode_unclamped(latents / 0.5),
        null_condition=torch.zeros(6, 16),
    )


def build(sampler: Sampler, **changes: object) -> AlignmentMethod | None:
    config = dataclasses.replace(CONFIG, **changes)
    build = build_method(config, sampler, INFO)
    return build(CAPTIONS) if build else None


def evaluation(index: int) -> FunctionEvaluation:
    """Whose clean latents are the context itself, brought into their shape."""
    return FunctionEvaluation(
        index=index,
        x_t=torch.zeros(2, 2, 8, 8),
        timesteps=torch.zeros(2),
        context=torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(index)),
        predict_clean=lambda context: context[:, :4, :].reshape(2, 1, 8, 8).expand(2, 2, 8, 8),
    )


def test_plain_sampling_has_no_method(sampler: Sampler) -> None:
    assert build(sampler) is None


def test_date_follows_the_clip_score_of_what_the_vae_decodes(sampler: Sampler) -> None:
    method = build(sampler, method="date", date=DateConfig(every=2))
    assert method is not None
    changes = [method.before(evaluation(index)) for index in range(4)]
    moved = [change.context for change in changes]
    assert [context is None for context in moved] == [False, True, False, True]
    assert moved[0] is not None
    step = (moved[0] - evaluation(0).context).flatten(1).norm(dim=1)
    torch.testing.assert_close(step, torch.full((2,), 0.5))
    assert all(not change.biases for change in changes)


def test_regulation_biases_the_middle_blocks_in_the_first_half(sampler: Sampler) -> None:
    method = build(sampler, method="regulate")
    assert method is not None
    changes = [method.before(evaluation(index)) for index in range(4)]
    assert [sorted(change.biases) for change in changes] == [[0, 1, 2], [0, 1, 2], [], []]
    assert all(change.context is None for change in changes)


@pytest.mark.parametrize(
    ("solver", "num_steps", "share", "expected"),
    [
        ("dpm_solver_pp", 5, 0.5, 3),
        ("dpm_solver_pp", 8, 0.25, 2),
        ("dpm_solver_pp_fast", 8, 0.5, 6),  # the end of the step that is begun
    ],
)
def test_regulation_takes_its_share_of_the_evaluations(
    sampler: Sampler, solver: str, num_steps: int, share: float, expected: int
) -> None:
    method = build(
        sampler,
        method="regulate",
        solver=solver,
        num_steps=num_steps,
        regulation=RegulationConfig(share_of_steps=share),
    )
    assert method is not None
    regulated = [bool(method.before(evaluation(index)).biases) for index in range(num_steps)]
    assert regulated == [index < expected for index in range(num_steps)]


def test_regulation_knows_the_map_of_the_backbone_and_what_becomes_of_the_mass(
    sampler: Sampler,
) -> None:
    shape = small_shape(latent_channels=2, patch_size=4)  # a map of 2 x 2
    coarse = dataclasses.replace(sampler, backbone=FusionUViT(shape))
    query, key = torch.randn(2, 2, 11, 2, 16, generator=torch.Generator().manual_seed(0))
    sums = {}
    for mass in ("preserve", "free"):
        method = build(coarse, method="regulate", regulation=RegulationConfig(mass=mass))
        assert method is not None
        addend = method.before(evaluation(0)).biases[1](query, key)
        assert addend is not None
        attention = (logits_of(query, key) + addend).softmax(dim=-1)
        sums[mass] = attention[:, :, 1:5, 5:].sum(dim=-1)
    plain = logits_of(query, key).softmax(dim=-1)[:, :, 1:5, 5:].sum(dim=-1)
    torch.testing.assert_close(sums["preserve"], plain)
    assert not torch.allclose(sums["free"], plain)


def test_prompts_without_targets_are_not_regulated(sampler: Sampler) -> None:
    method = build(sampler, method="regulate", regulation=RegulationConfig(targets=""))
    assert method is not None
    assert not method.before(evaluation(0)).biases


def test_both_do_both(sampler: Sampler) -> None:
    method = build(sampler, method="both", regulation=RegulationConfig(blocks=(1,)))
    assert method is not None
    change = method.before(evaluation(0))
    assert change.context is not None
    assert list(change.biases) == [1]


def test_a_user_may_score_images_otherwise(sampler: Sampler) -> None:
    seen: list[Tensor] = []

    def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(images)
        return images[:, 0].mean(dim=(1, 2)) * len(prompts)

    method_of = build_method(
        dataclasses.replace(CONFIG, method="date"),
        sampler,
        INFO,
        objective=redness,
    )
    assert method_of is not None
    far = dataclasses.replace(evaluation(0), context=100 * evaluation(0).context)
    assert method_of(CAPTIONS).before(far).context is not None
    decoded = sampler.decode(far.predict_clean(far.context))
    assert decoded.abs().max() > 1
    torch.testing.assert_close(seen[0], decoded)


def test_date_raises_image_reward_beside_the_clip_score(sampler: Sampler, tmp_path: Path) -> None:
    both = DateConfig(image_reward=write_image_reward(tmp_path), image_reward_weight=0.2)
    five_times = dataclasses.replace(both, clip_weight=5.0, image_reward_weight=1.0)
    settings = (DateConfig(), both, dataclasses.replace(both, clip_weight=0.0), five_times)
    moved = []
    for date in settings:
        method = build(sampler, method="date", date=date)
        assert method is not None
        moved.append(method.before(evaluation(0)).context)
    clip, summed, reward, scaled = (context - evaluation(0).context for context in moved)  # type: ignore[operator]
    assert not torch.allclose(clip, summed)
    assert not torch.allclose(summed, reward)
    torch.testing.assert_close(scaled, summed, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="at least one not 0"):
        DateConfig(clip_weight=0.0)

    small_step = dataclasses.replace(settings[2], radius=0.01)
    method = build(sampler, method="date", date=small_step)
    assert method is not None
    after = method.before(evaluation(0)).context
    assert after is not None
    score = load_image_reward(both.image_reward).score_of(CAPTIONS)
    rewards = [
        score(sampler.decode(evaluation(0).predict_clean(context)))
        for context in (evaluation(0).context, after)
    ]
    assert (rewards[1] > rewards[0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RegulationConfig(blocks=(0, 3)), "expected fused blocks of this backbone, 0 ... 2"),
        (RegulationConfig(targets="circles"), 'not in the prompt "a blue square"'),
    ],
)
def test_settings_that_fit_neither_backbone_nor_prompt_are_refused(
    sampler: Sampler, settings: RegulationConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(sampler, method="regulate", regulation=settings)


def test_regulation_without_attention_to_text_is_refused(sampler: Sampler) -> None:
    shape = small_shape(latent_channels=2, conditioning="adaln")
    modulated = dataclasses.replace(sampler, backbone=FusionUViT(shape))
    with pytest.raises(UserError, match="with conditioning adaln no attention goes to text"):
        build(modulated, method="regulate")


def test_flags_choose_the_method_and_its_settings() -> None:
    flags = ["--weights", "x", "--prompt", "y", "--method", "both", "--date.radius", "1"]
    flags += ["--date.evaluations", "[0, 5]", "--regulation.targets", "two circles"]
    config = read_config(GenerateConfig, flags, prog="ifvit generate")
    assert (config.method, config.date.radius, config.date.evaluations) == ("both", 1.0, (0, 5))
    assert config.regulation.targets == "two circles"
