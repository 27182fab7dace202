"""`ifvit bench generate`: all contenders predict the same noise, with different work."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.bench.config import BenchGenerateConfig
from ifvit.bench.sampling_speed import bench_generate, guide_plainly
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedPredictor
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.models.presets import PRESETS
from ifvit.models.weights import build_backbone


@torch.no_grad()
def test_sharing_changes_only_the_amount_of_work() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(PRESETS["small"]).eval()
    context, null_context = torch.randn(2, 77, 768)
    x_t, timesteps = torch.randn(1, 4, 32, 32), torch.tensor([500])
    predictors = [
        GuidedPredictor(
            backbone,
            NoiseSchedule(),
            context[None],
            backbone.encode_condition(null_context[None]),
            Guidance(scale=2.0),
        ),
        guide_plainly(backbone, context[None], null_context[None]),
    ]
    predicted, work = [], []
    for predictor in predictors:
        with FlopCounterMode(display=False) as counter:
            predicted.append(predictor(x_t, timesteps))
        work.append(counter.get_total_flops())
    torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-4)
    assert work[1] / work[0] > 1.23


def test_the_result_names_its_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    bench_generate(BenchGenerateConfig(backbone=PRESETS["tiny"], batch_size=2, rounds=1, json=True))
    result = json.loads(capsys.readouterr().out)
    assert list(result)[:2] == ["images_per_s", "vs_no_cache"]
    assert min(result["images_per_s"], result["vs_no_cache"]) > 0
    assert (result["fusion"], result["batch_size"]) == (PRESETS["tiny"].fusion, 2)
