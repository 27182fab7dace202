"""The methods at work in the sampling loop, on a real backbone with known stand-ins around it."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ifvit.diffusion.guidance import AlignmentMethod, Change, FunctionEvaluation
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.diffusion.solvers import SOLVERS
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.sampling.alignment import Date, Together, date_updates, middle_blocks
from ifvit.sampling.config import DateConfig, RegulationConfig, SamplingConfig
from ifvit.sampling.regulation import BlockBias, Regulation, TargetTokens

CONTEXTS = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
CONFIG = SamplingConfig(num_steps=6, guidance_scale=3.0, seed=7)
TARGETS = TargetTokens(
    positions=torch.tensor([[1, 3], [2, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)


def draw(
    backbone: FusionUViT,
    method: AlignmentMethod | None,
    positions: tuple[int, ...] = (0, 1, 2),
    config: SamplingConfig = CONFIG,
) -> Tensor:
    null_text = backbone.encode_condition(torch.zeros(1, 6, 16))
    rows = list(positions)
    batch = ConditionBatch(positions=torch.tensor(rows), condition=CONTEXTS[rows])
    return sample_latents(backbone, batch, null_text, config, method)


def brightness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """A score (B,) of images."""
    return images.flatten(1).tanh().mean(dim=1)


def date(score: object = brightness, **settings: object) -> Date:
    config = dataclasses.replace(CONFIG, date=DateConfig(**settings))
    return Date(config.date, date_updates(config), score, lambda latents: 0.5 * latents, [])


def regulation(num_evaluations: int = 3) -> Regulation:
    biases = {block: BlockBias(TARGETS, 4, "preserve") for block in (0, 2)}
    return Regulation(biases, num_evaluations)


class Recorder:
    """Passes on what a method says, and remembers it."""

    def __init__(self, method: AlignmentMethod) -> None:
        self.method = method
        self.seen: list[tuple[FunctionEvaluation, Change]] = []

    def before(self, evaluation: FunctionEvaluation) -> Change:
        change = self.method.before(evaluation)
        self.seen.append((evaluation, change))
        return change

    @property
    def updated_at(self) -> list[int]:
        return [seen.index for seen, change in self.seen if change.context is not None]


def test_date_with_radius_zero_is_the_baseline_bit_for_bit(backbone: FusionUViT) -> None:
    assert torch.equal(draw(backbone, date(radius=0.0, every=2)), draw(backbone, None))


@pytest.mark.parametrize("solver", SOLVERS)
def test_date_raises_the_score_of_the_drawn_images_in_every_solver(
    backbone: FusionUViT, solver: str
) -> None:
    config = dataclasses.replace(CONFIG, solver=solver)
    plain = brightness(draw(backbone, None, config=config))
    aligned = brightness(draw(backbone, date(radius=2.0, every=1), config=config))
    assert (aligned > plain).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"every": 4}, [0, 4]), ({"every": 4, "evaluations": (1, 5)}, [1, 5]), ({}, [0])],
)
def test_date_updates_when_it_is_told_to(
    backbone: FusionUViT, settings: dict[str, object], expected: list[int]
) -> None:
    recorder = Recorder(date(**settings))
    draw(backbone, recorder)
    assert recorder.updated_at == expected


def test_a_step_of_several_evaluations_sees_one_context() -> None:
    config = SamplingConfig(num_steps=50, solver="dpm_solver_pp_fast")
    assert date_updates(config) == (0, 12, 21, 30, 42)
    late = dataclasses.replace(config, date=DateConfig(evaluations=(2, 3, 49)))
    assert date_updates(late) == (3,)


@pytest.mark.parametrize(("start", "furthest"), [("original", 0.5), ("latest", 1.5)])
def test_updates_add_up_or_stay_in_the_ball(
    backbone: FusionUViT, start: str, furthest: float
) -> None:
    recorder = Recorder(date(every=2, start=start))
    draw(backbone, recorder)
    contexts = [change.context for _, change in recorder.seen if change.context is not None]
    distances = [(context - CONTEXTS).flatten(1).norm(dim=1).max() for context in contexts]
    assert len(distances) == 3
    assert 0.49 < distances[0] < 0.51
    assert distances[-1] <= furthest + 1e-3


def test_each_update_raises_the_predicted_score(backbone: FusionUViT) -> None:
    recorder = Recorder(date(every=1, radius=0.01))
    draw(backbone, recorder)
    for evaluation, change in recorder.seen:
        assert change.context is not None
        before, after = (
            brightness(0.5 * evaluation.predict_clean(context))
            for context in (evaluation.context, change.context)
        )
        assert (after > before).all()


def test_an_image_under_date_does_not_depend_on_its_neighbours(backbone: FusionUViT) -> None:
    together, alone = draw(backbone, date(every=2)), draw(backbone, date(every=2), (1,))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_regulation_changes_captions_with_targets_only(backbone: FusionUViT) -> None:
    plain, regulated = draw(backbone, None), draw(backbone, regulation())
    changed = (regulated - plain).flatten(1).abs().amax(dim=1)
    assert (changed[:2] > 1e-3).all()
    assert changed[2] < 1e-4


def test_regulation_ends_after_its_share(backbone: FusionUViT) -> None:
    assert torch.equal(draw(backbone, regulation(num_evaluations=0)), draw(backbone, None))
    recorder = Recorder(regulation(num_evaluations=3))
    draw(backbone, recorder)
    assert [len(change.biases) for _, change in recorder.seen] == [2, 2, 2, 0, 0, 0]


def test_sampling_leaves_no_graph_behind(backbone: FusionUViT) -> None:
    assert not draw(backbone, Together([date(every=2), regulation()])).requires_grad


def test_the_middle_five_fused_blocks_are_the_default() -> None:
    assert middle_blocks(13) == (4, 5, 6, 7, 8)
    assert middle_blocks(5) == (0, 1, 2, 3, 4)
    assert middle_blocks(3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (DateConfig, {"every": 0}, "date.every 0"),
        (DateConfig, {"radius": -1.0}, "date.radius -1"),
        (RegulationConfig, {"share_of_steps": 1.5}, "share_of_steps 1.5"),
    ],
)
def test_settings_without_meaning_are_refused(
    config: type[object], wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)
