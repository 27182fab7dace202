"""The noise schedule against numbers from an independent computation."""

import pytest
import torch

from ifvit.diffusion.schedules import NoiseSchedule, alphas_cumprod

# Stable Diffusion's betas, float64 numpy; U-ViT counts its steps from 1, this schedule from 0.
GOLDEN = {
    1: 0.99915,
    2: 0.9982960278384514,
    250: 0.6754324137251241,
    500: 0.27766965045646763,
    750: 0.056623491598269717,
    1000: 0.004660098513077238,
}


@pytest.mark.parametrize(("n", "abar"), GOLDEN.items())
def test_alphas_are_stable_diffusions(n: int, abar: float) -> None:
    assert alphas_cumprod()[n - 1].item() == pytest.approx(abar, rel=1e-12)


def test_noising_preserves_variance_and_interpolates_data_and_noise() -> None:
    schedule = NoiseSchedule()
    x_0, noise = torch.ones(3, 4, 2, 2), torch.full((3, 4, 2, 2), 2.0)
    timesteps = torch.tensor([0, 499, 999])
    x_t = schedule.add_noise(x_0, noise, timesteps)
    abar = alphas_cumprod()[timesteps].view(3, 1, 1, 1)
    expected = abar.sqrt() + 2 * (1 - abar).sqrt()
    assert torch.allclose(x_t.double(), expected.expand_as(x_t), atol=1e-6)


@pytest.mark.parametrize("t", [0, 250, 998, 999])
def test_removing_the_noise_undoes_adding_it(t: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    schedule, timesteps = NoiseSchedule(), torch.full((3,), t)
    x_t = schedule.add_noise(x_0, noise, timesteps)
    assert torch.allclose(schedule.clean(x_t, noise, timesteps), x_0, atol=1e-4)


def test_between_integers_sigma_over_alpha_is_interpolated() -> None:
    times = torch.tensor([0.25, 500.5, 998.75], dtype=torch.float64)
    low = times.long()
    ratios = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()
    ratio = ratios[low] + (times - low) * (ratios[low + 1] - ratios[low])
    clean = NoiseSchedule().clean(torch.zeros(3, 1), torch.ones(3, 1), times)
    assert torch.allclose(clean[:, 0].double(), -ratio, rtol=1e-5)
