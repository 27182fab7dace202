"""DATE and regulation: the update, the settings, and both methods in the sampling loop."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from made_backbone import small_shape
from made_image_reward import write_image_reward
from torch import Tensor
from torch.nn import functional

from ifvit.config import read_config
from ifvit.diffusion.config import Prediction, SolverName
from ifvit.diffusion.guidance import AlignmentMethod, Change, FunctionEvaluation
from ifvit.diffusion.sampler import ConditionBatch, Sampler, sample_latents
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import solvers_for
from ifvit.errors import UserError
from ifvit.images import to_model_range
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.image_reward import load_image_reward
from ifvit.models.weights import WeightsInfo
from ifvit.sampling.alignment import (
    Date,
    build_methods,
    clip_score_of,
    date_updates,
    middle_blocks,
    update_context,
)
from ifvit.sampling.config import DateConfig, GenerateConfig, RegulationConfig, SamplingConfig
from ifvit.sampling.regulation import BlockBias, Regulation, TargetTokens
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity, TextSettings

CONFIG = SamplingConfig(num_steps=6, guidance_scale=3.0, seed=7)
CONTEXTS = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
GOAL = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))
TARGETS = TargetTokens(
    positions=torch.tensor([[1, 3], [2, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)


# The update of DATE, on scores whose gradient is known.


def closeness(context: Tensor) -> Tensor:
    """Minus the squared distance from GOAL, at very different scales: scores (3,)."""
    return -torch.tensor([1.0, 1e-4, 1e4]) * (context - GOAL).square().sum(dim=(1, 2))


def lengths(context: Tensor) -> Tensor:
    return context.flatten(1).norm(dim=1)


def test_every_sample_moves_by_the_radius_along_its_own_gradient() -> None:
    step = update_context(CONTEXTS, CONTEXTS, closeness, 0.5) - CONTEXTS
    torch.testing.assert_close(lengths(step), torch.full((3,), 0.5))
    towards = (GOAL - CONTEXTS) / lengths(GOAL - CONTEXTS)[:, None, None]
    torch.testing.assert_close(step, 0.5 * towards, rtol=1e-4, atol=1e-5)
    assert (
        closeness(update_context(CONTEXTS, CONTEXTS, closeness, 0.01)) > closeness(CONTEXTS)
    ).all()
    assert torch.equal(update_context(CONTEXTS, CONTEXTS, closeness, 0.0), CONTEXTS)


def test_a_sample_without_gradient_keeps_its_context() -> None:
    switch = torch.tensor([1.0, 0.0, 1.0])

    def score(context: Tensor) -> Tensor:
        return switch * closeness(context)

    updated = update_context(CONTEXTS, CONTEXTS, score, 0.5)
    torch.testing.assert_close(lengths(updated - CONTEXTS), 0.5 * switch)


# Methods in the sampling loop, on a real backbone with a known score.


def sample(
    backbone: FusionTransformer,
    *methods: AlignmentMethod,
    positions: tuple[int, ...] = (0, 1, 2),
    config: SamplingConfig = CONFIG,
    prediction: Prediction = "epsilon",
) -> Tensor:
    rows = list(positions)
    batch = ConditionBatch(positions=torch.tensor(rows), condition=CONTEXTS[rows])
    null = backbone.encode_condition(torch.zeros(1, 6, 16))
    schedule = NoiseSchedule("cpu", prediction)
    return sample_latents(backbone, schedule, batch, null, config, methods)


def brightness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    return images.flatten(1).tanh().mean(dim=1)


def date(config: SamplingConfig = CONFIG, **settings: object) -> Date:
    config = dataclasses.replace(config, date=DateConfig(**settings))
    return Date(config.date, date_updates(config), brightness, lambda latents: 0.5 * latents, [])


def regulation(backbone: FusionTransformer, num_evaluations: int = 3) -> Regulation:
    biases = {block: BlockBias(backbone.config, block, TARGETS) for block in (1, 3)}
    return Regulation(biases, num_evaluations)


class Recorder:
    """Passes on the changes of a method, and records them with their evaluations."""

    def __init__(self, method: AlignmentMethod) -> None:
        self.method = method
        self.seen: list[tuple[FunctionEvaluation, Change]] = []

    def before(self, evaluation: FunctionEvaluation) -> Change:
        change = self.method.before(evaluation)
        self.seen.append((evaluation, change))
        return change


EVERY_PREDICTION = pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])


@EVERY_PREDICTION
def test_date_with_radius_zero_changes_no_bit(
    backbone: FusionTransformer, prediction: Prediction
) -> None:
    unmoved = sample(backbone, date(radius=0.0, every=2), prediction=prediction)
    assert torch.equal(unmoved, sample(backbone, prediction=prediction))


@pytest.mark.parametrize("backbone", ["cross_attention"], indirect=True)
@pytest.mark.parametrize(
    ("prediction", "solver"),
    [
        (prediction, solver)
        for prediction in ("epsilon", "v", "flow")
        for solver in solvers_for(prediction)
    ],
)
def test_date_raises_the_score_of_the_images_with_every_solver(
    backbone: FusionTransformer, prediction: Prediction, solver: SolverName
) -> None:
    config = dataclasses.replace(CONFIG, solver=solver)
    every_step = date(config, radius=2.0, every=1)
    plain = brightness(sample(backbone, config=config, prediction=prediction))
    aligned = brightness(sample(backbone, every_step, config=config, prediction=prediction))
    assert (aligned > plain).all()


@EVERY_PREDICTION
def test_each_update_raises_the_predicted_score(
    backbone: FusionTransformer, prediction: Prediction
) -> None:
    recorder = Recorder(date(every=1, radius=0.01))
    sample(backbone, recorder, prediction=prediction)
    for evaluation, change in recorder.seen:
        assert change.context is not None
        before, after = (
            brightness(0.5 * evaluation.predict_clean(context))
            for context in (evaluation.context, change.context)
        )
        assert (after > before).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"every": 4}, (0, 4)), ({"every": 4, "evaluations": (1, 5)}, (1, 5)), ({}, (0,))],
)
def test_date_updates_before_the_configured_evaluations(
    settings: dict[str, object], expected: tuple[int, ...]
) -> None:
    assert date_updates(dataclasses.replace(CONFIG, date=DateConfig(**settings))) == expected


def test_a_step_of_several_evaluations_sees_one_context() -> None:
    config = SamplingConfig(num_steps=50, solver="dpm_solver_pp_fast")
    assert date_updates(config) == (0, 12, 21, 30, 42)
    heun = SamplingConfig(num_steps=9, solver="heun", date=DateConfig(every=3))
    assert date_updates(heun) == (0, 4, 6)
    late = dataclasses.replace(config, date=DateConfig(evaluations=(2, 3, 49)))
    assert date_updates(late) == (3,)


@pytest.mark.parametrize(("start", "furthest"), [("original", 0.5), ("latest", 1.5)])
def test_updates_add_up_or_stay_in_the_ball(
    backbone: FusionTransformer, start: str, furthest: float
) -> None:
    recorder = Recorder(date(every=2, start=start))
    sample(backbone, recorder)
    contexts = [change.context for _, change in recorder.seen if change.context is not None]
    distances = [lengths(context - CONTEXTS).max() for context in contexts]
    assert len(distances) == 3
    assert 0.49 < distances[0] < 0.51
    assert distances[-1] <= furthest + 1e-3


def test_an_update_from_the_original_follows_the_gradient_at_the_latest_context(
    backbone: FusionTransformer,
) -> None:
    # Equation of the authors' --init_org: c_original + rho g / |g| with g = grad h(c_latest).
    recorder = Recorder(date(every=2, start="original"))
    sample(backbone, recorder)
    updates = [pair for pair in recorder.seen if pair[1].context is not None]
    assert len(updates) == 3
    for evaluation, change in updates:
        assert change.context is not None
        latest = evaluation.context.clone().requires_grad_()
        with torch.enable_grad():
            score = brightness(0.5 * evaluation.predict_clean(latest)).sum()
            (gradient,) = torch.autograd.grad(score, latest)
        step = 0.5 * gradient / lengths(gradient)[:, None, None]
        torch.testing.assert_close(change.context, CONTEXTS + step, rtol=1e-4, atol=1e-5)
    assert not torch.equal(updates[1][0].context, CONTEXTS)


@EVERY_PREDICTION
def test_an_image_with_date_does_not_depend_on_its_batch(
    backbone: FusionTransformer, prediction: Prediction
) -> None:
    together, alone = (
        sample(backbone, date(every=2), prediction=prediction),
        sample(backbone, date(every=2), positions=(1,), prediction=prediction),
    )
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


@EVERY_PREDICTION
def test_regulation_changes_captions_with_targets_only_and_then_ends(
    backbone: FusionTransformer, prediction: Prediction
) -> None:
    recorder = Recorder(regulation(backbone, num_evaluations=3))
    plain = sample(backbone, prediction=prediction)
    regulated = sample(backbone, recorder, prediction=prediction)
    changed = (regulated - plain).flatten(1).abs().amax(dim=1)
    assert (changed[:2] > 1e-3).all()
    assert changed[2] < 1e-4
    assert [len(change.biases) for _, change in recorder.seen] == [2, 2, 2, 0, 0, 0]
    ended = sample(backbone, regulation(backbone, num_evaluations=0), prediction=prediction)
    assert torch.equal(ended, plain)
    both = sample(backbone, date(every=2), regulation(backbone), prediction=prediction)
    assert not both.requires_grad


# The objectives of DATE, on real scenes and the shipped CLIP.

SCENES = [render_sampled_scene(5, number) for number in range(4)]
CAPTIONS = [write_captions(rendered.scene)[0] for rendered in SCENES]
IMAGES = to_model_range(np.stack([rendered.image for rendered in SCENES]))


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return load_clip("scenes/clip")


def test_the_clip_score_is_the_cosine_of_image_and_caption(scorer: ClipScorer) -> None:
    score = clip_score_of(scorer)
    expected = (scorer.embed_images(IMAGES) * scorer.embed_texts(CAPTIONS)).sum(dim=1)
    torch.testing.assert_close(score(IMAGES, CAPTIONS), expected)
    assert (score(IMAGES, CAPTIONS) > score(IMAGES, CAPTIONS[::-1])).all()
    small = IMAGES[..., ::2, ::2]
    resized = functional.interpolate(small, IMAGES.shape[2:], mode="bilinear")
    torch.testing.assert_close(score(small, CAPTIONS), score(resized, CAPTIONS))


@pytest.mark.parametrize("size", [64, 32])
def test_every_pixel_has_a_gradient_even_outside_the_range_of_images(
    scorer: ClipScorer, size: int
) -> None:
    images = torch.full((4, 3, size, size), 1.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_score_of(scorer)(images, CAPTIONS).sum(), images)
    assert (gradient.abs().sum(dim=1) > 0).float().mean() > 0.99


# Settings become methods, with the shipped CLIP and its tokenizer.

PROMPTS = ["two red circles", "a blue square"]
CLIP = EncoderIdentity(name="scenes/clip", sha256="0" * 64)
INFO = WeightsInfo(
    step=0,
    ema_decay=None,
    scaling_factor=0.5,
    vae=CLIP,
    text_encoder=TextEncoderIdentity(name="scenes/clip", sha256="0" * 64),
    recipe_sha256="0" * 64,
)


@pytest.fixture
def sampler(backbone: FusionTransformer) -> Sampler:
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4)
    autoencoder = Autoencoder(vae.eval(), CLIP)
    return Sampler(
        backbone=backbone,
        schedule=NoiseSchedule(),
        decode=lambda latents: autoencoder.decode(latents / 0.5),
        null_condition=torch.zeros(1, 6, 16),
    )


def build(sampler: Sampler, **changes: object) -> AlignmentMethod:
    changes = {"num_steps": 4} | changes
    build = build_methods(dataclasses.replace(CONFIG, **changes), sampler, INFO)
    assert build is not None
    (method,) = build(PROMPTS)
    return method


def evaluation(index: int) -> FunctionEvaluation:
    """An evaluation whose clean latents are the context itself, reshaped."""
    return FunctionEvaluation(
        index=index,
        x_t=torch.zeros(2, 2, 8, 8),
        timesteps=torch.zeros(2),
        context=torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(index)),
        predict_clean=lambda context: context[:, :4, :].reshape(2, 1, 8, 8).expand(2, 2, 8, 8),
    )


@pytest.mark.parametrize("backbone", ["concat"], indirect=True)
def test_date_asks_for_a_clip_where_another_encoder_makes_the_contexts(sampler: Sampler) -> None:
    settings = TextSettings(keeps_padding=False)
    encoder = TextEncoderIdentity(name="t5-large", sha256="0" * 64, settings=settings)
    info = dataclasses.replace(INFO, text_encoder=encoder)
    config = dataclasses.replace(CONFIG, method="date")
    with pytest.raises(UserError, match=r"date\.clip: .* t5-large, is no CLIP; name the CLIP"):
        build_methods(config, sampler, info)


def test_plain_sampling_has_no_method(sampler: Sampler) -> None:
    assert build_methods(CONFIG, sampler, INFO) is None


def test_date_moves_the_context_and_regulation_biases_the_middle_blocks(sampler: Sampler) -> None:
    config = dataclasses.replace(CONFIG, method="both", num_steps=4, date=DateConfig(every=2))
    build_both = build_methods(config, sampler, INFO)
    assert build_both is not None
    moves, biases = (
        [method.before(evaluation(index)) for index in range(4)] for method in build_both(PROMPTS)
    )
    assert [change.context is None for change in moves] == [False, True, False, True]
    assert moves[0].context is not None
    step = lengths(moves[0].context - evaluation(0).context)
    torch.testing.assert_close(step, torch.full((2,), 0.5))
    assert [sorted(change.biases) for change in biases] == [[1, 2, 3], [1, 2, 3], [], []]
    some = build(sampler, method="regulate", regulation=RegulationConfig(blocks=(1,)))
    assert list(some.before(evaluation(0)).biases) == [1]


@pytest.mark.parametrize(
    ("solver", "num_steps", "share", "expected"),
    [
        ("dpm_solver_pp", 5, 0.5, 3),
        ("dpm_solver_pp", 8, 0.25, 2),
        ("dpm_solver_pp_fast", 8, 0.5, 6),  # the end of the current step
        ("heun", 7, 0.4, 4),
    ],
)
def test_regulation_applies_to_the_first_share_of_the_evaluations(
    sampler: Sampler, solver: str, num_steps: int, share: float, expected: int
) -> None:
    settings = RegulationConfig(share_of_steps=share)
    method = build(
        sampler, method="regulate", solver=solver, num_steps=num_steps, regulation=settings
    )
    regulated = [bool(method.before(evaluation(index)).biases) for index in range(num_steps)]
    assert regulated == [index < expected for index in range(num_steps)]


def test_regulation_uses_the_places_of_the_tokens_in_the_backbone(sampler: Sampler) -> None:
    shape = small_shape(latent_channels=2, patch_size=4)  # a map of 2 x 2 behind the time token
    coarse = dataclasses.replace(sampler, backbone=FusionTransformer(shape))
    query, key = torch.randn(2, 2, 11, 2, 16, generator=torch.Generator().manual_seed(0))
    addend = build(coarse, method="regulate").before(evaluation(0)).biases[1](query, key, None)
    assert addend is not None
    assert (addend[:, :, 1:5, 5:] != 0).any()
    addend[:, :, 1:5, 5:] = 0
    assert (addend == 0).all()


def test_prompts_without_targets_are_not_regulated(sampler: Sampler) -> None:
    method = build(sampler, method="regulate", regulation=RegulationConfig(targets=""))
    assert not method.before(evaluation(0)).biases


@pytest.mark.parametrize("backbone", ["concat"], indirect=True)
def test_a_custom_objective_scores_the_unclamped_images(sampler: Sampler) -> None:
    seen: list[Tensor] = []

    def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert prompts == PROMPTS
        seen.append(images)
        return images[:, 0].mean(dim=(1, 2))

    config = dataclasses.replace(CONFIG, method="date")
    build = build_methods(config, sampler, INFO, objective=redness)
    assert build is not None
    far = dataclasses.replace(evaluation(0), context=100 * evaluation(0).context)
    (method,) = build(PROMPTS)
    assert method.before(far).context is not None
    decoded = sampler.decode(far.predict_clean(far.context))
    assert decoded.abs().max() > 1
    torch.testing.assert_close(seen[0], decoded)


@pytest.mark.parametrize("backbone", ["concat"], indirect=True)
def test_date_adds_image_reward_to_the_clip_score(sampler: Sampler, tmp_path: Path) -> None:
    both = DateConfig(image_reward=write_image_reward(tmp_path), image_reward_weight=0.2)
    alone = dataclasses.replace(both, clip_weight=0.0)
    five_times = dataclasses.replace(both, clip_weight=5.0, image_reward_weight=1.0)
    small_step = dataclasses.replace(alone, radius=0.01)
    contexts = []
    for settings in (DateConfig(), both, alone, five_times, small_step):
        context = build(sampler, method="date", date=settings).before(evaluation(0)).context
        assert context is not None
        contexts.append(context)
    clip, summed, reward, scaled, after = contexts
    assert not torch.allclose(clip, summed)
    assert not torch.allclose(summed, reward)
    moved = summed - evaluation(0).context
    torch.testing.assert_close(scaled - evaluation(0).context, moved, rtol=1e-3, atol=1e-4)
    score = load_image_reward(both.image_reward).score
    before, now = (
        score(sampler.decode(evaluation(0).predict_clean(context)), PROMPTS)
        for context in (evaluation(0).context, after)
    )
    assert (now > before).all()


@pytest.mark.parametrize("backbone", ["concat"], indirect=True)
@pytest.mark.parametrize(
    ("fusion", "settings", "message"),
    [
        ("image concat 2*dual_stream", {"blocks": (0, 3)}, "attend to text in the blocks 1, 2, 3"),
        ("concat", {"targets": "circles"}, 'not in the prompt "a blue square"'),
        ("image 2*adaln", {}, "the image tokens of this backbone attend to no text"),
    ],
)
def test_regulation_that_fits_neither_backbone_nor_prompt_is_refused(
    sampler: Sampler, fusion: str, settings: dict[str, object], message: str
) -> None:
    shape = small_shape(latent_channels=2, fusion=fusion)
    sampler = dataclasses.replace(sampler, backbone=FusionTransformer(shape))
    with pytest.raises(UserError, match=message) as error:
        build(sampler, method="regulate", regulation=RegulationConfig(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["date", "regulate", "both"])
@pytest.mark.parametrize("backbone", ["concat"], indirect=True)
def test_no_method_aligns_a_backbone_that_sees_no_text(sampler: Sampler, method: str) -> None:
    shape = small_shape(latent_channels=2, fusion="2*image", num_text_blocks=0)
    sampler = dataclasses.replace(sampler, backbone=FusionTransformer(shape))
    with pytest.raises(UserError, match="no block of this backbone sees text; use plain"):
        build(sampler, method=method)


def test_the_middle_five_blocks_with_text_keys_are_the_default() -> None:
    assert middle_blocks(tuple(range(13))) == (4, 5, 6, 7, 8)
    assert middle_blocks(tuple(range(6))) == (0, 1, 2, 3, 4)
    # Not contiguous; an adaln block has no text keys.
    shape = small_shape(fusion="concat image adaln 4*dual_stream image 2*cross_attention")
    assert middle_blocks(shape.text_key_blocks) == (3, 4, 5, 6, 8)
    assert middle_blocks((2, 7)) == (2, 7)


def test_flags_choose_the_method_and_its_settings() -> None:
    flags = ["--weights", "x", "--prompt", "y", "--method", "both", "--date.radius", "1"]
    flags += ["--date.evaluations", "[0, 5]", "--regulation.targets", "two circles"]
    config = read_config(GenerateConfig, flags, prog="ifvit generate")
    assert (config.method, config.date.radius, config.date.evaluations) == ("both", 1.0, (0, 5))
    assert config.regulation.targets == "two circles"


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (DateConfig, {"every": 0}, "every is 0"),
        (DateConfig, {"radius": -1.0}, "radius is -1"),
        (DateConfig, {"clip_weight": 0.0}, "are both 0"),
        (RegulationConfig, {"share_of_steps": 1.5}, "share_of_steps is 1.5"),
    ],
)
def test_impossible_settings_are_refused(
    config: type[object], wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)
