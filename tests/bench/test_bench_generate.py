"""`ifvit bench generate`: both sides predict the same noise, and one of them works less for it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.bench.config import BenchGenerateConfig
from ifvit.bench.generate import _guide_plainly, bench_generate
from ifvit.models.presets import PRESETS
from ifvit.models.build import build_backbone
from ifvit.sampling.config import Guidance
from ifvit.sampling.guidance import GuidedDenoiser


@torch.no_grad()
def test_sharing_changes_nothing_but_the_work() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(PRESETS["small"]).eval()
    context, null_context = torch.randn(2, 77, 768)
    x_t, timesteps = torch.randn(1, 4, 32, 32), torch.tensor([500])
    denoisers = [
        GuidedDenoiser(
            backbone, context[None], backbone.encode_condition(null_context[None]), Guidance(scale=2.0)
        ),
        _guide_plainly(backbone, context[None], null_context[None]),
    ]
    predicted, work = [], []
    for denoiser in denoisers:
        with FlopCounterMode(display=False) as counter:
            predicted.append(denoiser(x_t, timesteps))
        work.append(counter.get_total_flops())
    torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-4)
    assert work[1] / work[0] > 1.23


def test_it_prints_what_it_measured_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    bench_generate(
        BenchGenerateConfig(preset="tiny", timed_steps=1, batch_size=2, rounds=1, json=True)
    )
    result = json.loads(capsys.readouterr().out)
    assert list(result)[:2] == ["images_per_s", "vs_no_cache"]
    assert min(result["images_per_s"], result["vs_no_cache"]) > 0
    assert (result["preset"], result["batch_size"]) == ("tiny", 2)
