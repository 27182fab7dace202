"""Classifier-free guidance with real backbones, and the changes that alignment methods make."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from captioned_backbone import (
    CONTEXTS,
    MAPS,
    NULL,
    TEXT_KEY_MAPS,
    build_backbone,
    random_shape,
)
from made_backbone import SMALL_CLASSES, SMALL_UNET
from torch import Tensor

from ifvit.diffusion.config import Guidance, Prediction, SolverConfig, SolverName
from ifvit.diffusion.guidance import (
    AlignmentMethod,
    Change,
    FunctionEvaluation,
    GuidedPredictor,
)
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import build_scheduler, solve, solvers_for
from ifvit.errors import UserError
from ifvit.models.backbone import EncodedCondition
from ifvit.models.config import BackboneConfig
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import build_backbone as build

X_T = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(3))
TIMESTEPS = torch.full((5,), 400)
SCHEDULE = NoiseSchedule()
FUSIONS = pytest.mark.parametrize("fusion", MAPS)


def build_predictor(
    backbone: FusionTransformer,
    scale: float,
    method: AlignmentMethod | None = None,
    high: float = 999,
    schedule: NoiseSchedule = SCHEDULE,
) -> GuidedPredictor:
    null = backbone.encode_condition(NULL)
    methods = [method] if method else []
    return GuidedPredictor(backbone, schedule, CONTEXTS, null, Guidance(scale, high=high), methods)


@pytest.mark.parametrize("scale", [3.0, 0.5])
@FUSIONS
def test_guidance_is_its_equation(fusion: str, scale: float) -> None:
    backbone = build_backbone(fusion)
    with torch.no_grad():
        guided = build_predictor(backbone, scale)(X_T, TIMESTEPS)
        conditional = backbone(X_T, TIMESTEPS, CONTEXTS)
        unconditional = backbone(X_T, TIMESTEPS, NULL.expand_as(CONTEXTS))
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL_CLASSES, SMALL_UNET], ids=lambda config: type(config))
def test_class_guidance_steers_away_from_the_null_class(config: BackboneConfig) -> None:
    torch.manual_seed(0)
    backbone = build(replace(config, num_classes=3)).eval()
    latents, timesteps, numbers = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), [0, 2]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        null = backbone.encode_condition(torch.tensor([3]))
        predictor = GuidedPredictor(backbone, SCHEDULE, torch.tensor(numbers), null, Guidance(3.0))
        guided = predictor(latents, timesteps)
        conditional = backbone(latents, timesteps, torch.tensor(numbers))
        unconditional = backbone(latents, timesteps, torch.tensor([3, 3]))
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)


def test_noise_of_half_precision_is_guided_in_float32() -> None:
    backbone = build_backbone().to(torch.bfloat16)
    with torch.no_grad():
        guided = build_predictor(backbone, 3.0)(X_T, TIMESTEPS)
        both = backbone(X_T, TIMESTEPS, torch.cat([CONTEXTS, NULL.expand_as(CONTEXTS)]))
    conditional, unconditional = both.float().chunk(2)
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional))


@pytest.mark.parametrize("seed", range(60))
def test_a_guided_step_equals_two_separate_halves_for_any_map(seed: int) -> None:
    backbone = build_backbone(random_shape(seed))
    with torch.no_grad():
        guided = build_predictor(backbone, 3.0)(X_T, TIMESTEPS)
        # Without the cache, each half computes its own text, its keys and all blocks.
        conditional, unconditional = (
            backbone(X_T, TIMESTEPS, EncodedCondition(tokens=one.tokens, pooled=one.pooled))
            for one in map(backbone.encode_condition, (CONTEXTS, NULL.expand_as(CONTEXTS)))
        )
    expected = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, unconditional, rtol=1e-3, atol=1e-4)


@FUSIONS
def test_blocks_before_the_text_run_once_for_both_halves(fusion: str) -> None:
    backbone = build_backbone(fusion)
    rows: list[int] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda *call: rows.append(len(call[2][0])))
    build_predictor(backbone, 3.0)(X_T, TIMESTEPS)
    assert rows == [5, 10, 10, 10, 10]


def test_queries_of_the_first_block_with_text_are_computed_once() -> None:
    backbone = build_backbone()
    rows: list[int] = []
    for block in backbone.blocks:
        block.attn.qkv.register_forward_hook(lambda *call: rows.append(len(call[2])))
    build_predictor(backbone, 3.0)(X_T, TIMESTEPS)
    assert rows == [5, 5, 10, 10, 10]


def test_the_unconditional_half_runs_only_where_guidance_applies() -> None:
    backbone = build_backbone()
    rows: list[int] = []
    backbone.decoder_pred.register_forward_hook(lambda *call: rows.append(len(call[2])))
    null = backbone.encode_condition(NULL)
    predictor = GuidedPredictor(
        backbone, SCHEDULE, CONTEXTS, null, Guidance(2.0, low=100, high=800)
    )
    for t in (999, 801, 800, 100, 99, 0):
        predictor(X_T, torch.full((5,), t))
    build_predictor(backbone, 1.0)(X_T, TIMESTEPS)
    assert rows == [5, 5, 10, 10, 5, 5, 5]


def test_guidance_applies_everywhere_by_default_and_else_in_its_interval() -> None:
    for guidance in (SolverConfig().guidance, Guidance(2.0)):
        assert guidance.applies_at(0)
        assert guidance.applies_at(999)
    narrow = SolverConfig(guidance_low=5.0, guidance_high=7.0).guidance
    assert [t for t in range(10) if narrow.applies_at(t)] == [5, 6, 7]
    SolverConfig(guidance_low=5.0, guidance_high=5.0)
    with pytest.raises(ValueError, match=r"guidance_low 6\.0 is above guidance_high 5\.0"):
        SolverConfig(guidance_low=6.0, guidance_high=5.0)


def test_pure_noise_of_a_flow_belongs_to_an_interval_that_reaches_the_last_timestep() -> None:
    narrow = Guidance(2.0, low=500.0)
    assert [t for t in (0.0, 499.5, 500.0, 999.5, 1000.0) if narrow.applies_at(t)] == [
        500.0, 999.5, 1000.0,
    ]  # fmt: skip
    assert not Guidance(2.0, high=998.0).applies_at(1000.0)
    assert Guidance(2.0, low=600.0).applies_at(599.99994)  # how float32 holds 1000 x 0.6


class Oracle:
    """Knows the x_0 of each condition, and says it in the terms of its schedule."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        return EncodedCondition(tokens=condition)

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: EncodedCondition) -> Tensor:
        x_0 = condition.tokens
        times = timesteps[:1].expand(len(x_0))
        one, zero = torch.ones_like(x_0), torch.zeros_like(x_0)
        alpha = self.schedule.add_noise(one, zero, times)
        sigma = self.schedule.add_noise(zero, one, times)
        noise = (x_t.repeat(len(x_0) // len(x_t), 1, 1, 1) - alpha * x_0) / sigma
        return self.schedule.target(x_0, noise, times)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_networks_that_agree_on_x_0_agree_on_the_guided_one(
    prediction: Prediction, scale: float
) -> None:
    schedule = NoiseSchedule("cpu", prediction)
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 5, 4, 4, 4, generator=generator)
    method, oracle = Recorder(Change()), Oracle(schedule)
    null = EncodedCondition(tokens=unconditional)
    predictor = GuidedPredictor(
        oracle, schedule, conditional, null, Guidance(scale, low=300), [method]
    )
    expected = unconditional + scale * (conditional - unconditional)
    found = schedule.clean(X_T, predictor(X_T, TIMESTEPS), TIMESTEPS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Alignment methods see the same x_0.
    seen = method.seen[0].predict_clean(conditional)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def sample_on_meta(
    guidance: Guidance,
    fusion: str = "3*concat",
    prediction: Prediction = "epsilon",
    solver: SolverName = "dpm_solver_pp",
) -> Tensor:
    """Four steps on the meta device, which has no values: reading a value from it raises."""
    schedule = NoiseSchedule("cpu", prediction)
    with torch.device("meta"):
        backbone = build_backbone(fusion)
        contexts, noise = torch.empty(2, 6, 16), torch.empty(2, 4, 4, 4)
    with torch.no_grad():
        null = backbone.encode_condition(contexts[:1])
        predictor = GuidedPredictor(backbone, schedule, contexts, null, guidance)
    return solve(predictor, noise, build_scheduler(solver, schedule), 4)


@FUSIONS
def test_guided_steps_never_wait_for_the_device(fusion: str) -> None:
    assert sample_on_meta(Guidance(2.0), fusion).is_meta


@pytest.mark.parametrize("solver", solvers_for("flow"))
def test_guided_steps_of_a_flow_never_wait_for_the_device(solver: SolverName) -> None:
    assert sample_on_meta(Guidance(2.0), prediction="flow", solver=solver).is_meta


def test_only_an_interval_of_guidance_reads_the_timestep() -> None:
    assert sample_on_meta(Guidance(1.0, low=100.0)).is_meta
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        sample_on_meta(Guidance(2.0, low=100.0))


class Recorder:
    """A method that records the evaluations and returns the given changes."""

    def __init__(self, *changes: Change) -> None:
        self.changes = list(changes)
        self.seen: list[FunctionEvaluation] = []

    def before(self, evaluation: FunctionEvaluation) -> Change:
        self.seen.append(evaluation)
        return self.changes.pop(0)


@pytest.mark.parametrize(
    ("prediction", "high"), [("epsilon", 999.0), ("epsilon", 399.0), ("v", 999.0), ("flow", 999.0)]
)
@FUSIONS
def test_a_method_gets_clean_latents_with_a_gradient_to_the_context(
    fusion: str, prediction: Prediction, high: float
) -> None:
    method, schedule = Recorder(Change()), NoiseSchedule("cpu", prediction)
    backbone = build_backbone(fusion)
    predicted = build_predictor(backbone, 3.0, method, high, schedule)(X_T, TIMESTEPS)
    # A method that changes nothing leaves the prediction unchanged.
    plain = build_predictor(backbone, 3.0, None, high, schedule)(X_T, TIMESTEPS)
    assert torch.equal(predicted, plain)
    context = CONTEXTS.clone().requires_grad_()
    clean = method.seen[0].predict_clean(context)
    # x_t, taken apart into this x_0 and noise, has the target that the network predicted.
    zero = torch.zeros_like(X_T)
    sigma = schedule.add_noise(zero, torch.ones_like(X_T), TIMESTEPS)
    noise = (X_T - schedule.add_noise(clean, zero, TIMESTEPS)) / sigma
    target = schedule.target(clean, noise, TIMESTEPS)
    torch.testing.assert_close(target, predicted, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(clean[2].sum(), context)
    assert [bool(row.any()) for row in gradient] == [False, False, True, False, False]
    torch.nn.Module.to(backbone, torch.bfloat16)
    with pytest.raises(UserError, match=r"the backbone is torch\.bfloat16, .* use float32"):
        method.seen[0].predict_clean(context)


def test_a_changed_context_stays_until_the_next_change() -> None:
    backbone, method = build_backbone(), Recorder(Change(context=CONTEXTS.flip(0)), Change())
    predictor = build_predictor(backbone, 1.0, method)
    first, second = predictor(X_T, TIMESTEPS), predictor(X_T, TIMESTEPS)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, backbone(X_T, TIMESTEPS, CONTEXTS.flip(0)))
    assert [seen.index for seen in method.seen] == [0, 1]
    assert torch.equal(method.seen[1].context, CONTEXTS.flip(0))


def hide(num_hidden: int, query: Tensor, key: Tensor, visible: None = None) -> Tensor:
    """Remove all attention of image and time tokens to the last text tokens."""
    addend = torch.zeros(len(query), 2, query.shape[1], key.shape[1])
    addend[:, :, :5, -num_hidden:] = -torch.inf
    return addend


@pytest.mark.parametrize("fusion", TEXT_KEY_MAPS)
def test_biases_change_the_conditional_half_only(fusion: str) -> None:
    backbone = build_backbone(fusion)
    seen: list[tuple[Tensor, Tensor]] = []

    def bias(query: Tensor, key: Tensor, visible: None) -> Tensor:
        seen.append((query, key))
        return hide(5, query, key)  # all text tokens but the first

    change = Change(biases=dict.fromkeys(range(1, 4), bias))
    one = build_predictor(backbone, 1.0, Recorder(change))(X_T, TIMESTEPS)
    guided = build_predictor(backbone, 3.0, Recorder(change))(X_T, TIMESTEPS)
    unconditional = backbone(X_T, TIMESTEPS, NULL.expand_as(CONTEXTS))
    torch.testing.assert_close(guided, unconditional + 3.0 * (one - unconditional))
    torch.testing.assert_close(seen[3:], seen[:3])
    assert not torch.allclose(one, backbone(X_T, TIMESTEPS, CONTEXTS), atol=1e-3)


@pytest.mark.parametrize("fusion", [one for one in TEXT_KEY_MAPS if "separate" not in one])
def test_biases_reach_every_block_with_text_keys(fusion: str) -> None:
    change = Change(biases=dict.fromkeys(range(1, 4), partial(hide, 6)))
    predictor = build_predictor(build_backbone(fusion), 1.0, Recorder(change))
    hidden = predictor(X_T[:1].expand_as(X_T), TIMESTEPS)
    # Image tokens that see no text give the same noise for all captions.
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))
