"""AdamW's first update, Muon against torch's Muon and an SVD, and the learning rate."""

import pytest
import torch
from made_backbone import SMALL_UNET, small_shape
from torch import Tensor, nn

from ifvit.models.layers import RMSNorm
from ifvit.models.weights import describe_backbone
from ifvit.training.config import OptimConfig
from ifvit.training.optimizers import (
    MOMENTUM,
    Muon,
    build_adamw,
    iterate,
    iterate_gram,
    learning_rate,
    orthogonalise,
)


def test_the_learning_rate_falls_linearly_to_zero_over_the_cooldown() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, cooldown_steps=4)
    rates = [learning_rate(step, 10, optim) for step in range(11)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("decay_norms", [False, True])
def test_the_first_update_is_adamws_and_norms_decay_only_by_recipe(decay_norms: bool) -> None:
    config = OptimConfig(weight_decay=0.2, betas=(0.7, 0.6), decay_norms=decay_norms)
    layers = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), RMSNorm(3), nn.GroupNorm(1, 3))
    optimizer = build_adamw(layers, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in layers.parameters():
        nn.init.constant_(parameter, 4.0)
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for name, parameter in layers.named_parameters():
        # Corrected for their zero start the moments are g and g^2, and their quotient is 1.
        decay = 0.2 if decay_norms or name.startswith("0.") else 0.0
        expected = (1 - 0.5 * decay) * 4.0 - 0.5
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))
        moments = optimizer.state[parameter]
        torch.testing.assert_close(moments["exp_avg"], torch.full_like(parameter, 0.3 * 3.0))
        torch.testing.assert_close(moments["exp_avg_sq"], torch.full_like(parameter, 0.4 * 9.0))


SHAPES = [(24, 8), (8, 24), (8, 8), (24, 8), (7, 20)]


def make_muon(seed: int = 0) -> tuple[Muon, list[nn.Parameter]]:
    """Muon at rate 0.1 and decay 0.5 for normal matrices with normal gradients."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for matrix in matrices:
        matrix.grad = 1e-3 * torch.randn(matrix.shape, generator=generator)
    muon = Muon(matrices, weight_decay=0.5)
    for group in muon.param_groups:
        group["lr"] = 0.1
    return muon, matrices


def test_muon_makes_the_updates_of_torchs_up_to_its_rounding() -> None:
    muon, matrices = make_muon()
    _, copies = make_muon()
    theirs = torch.optim.Muon(copies, 0.1, 0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [copy.detach().clone() for copy in copies]
        muon.step()
        theirs.step()
        for old, matrix, copy in zip(before, matrices, copies, strict=True):
            assert muon.state[matrix][MOMENTUM].equal(theirs.state[copy][MOMENTUM])
            # Muon of torch computes in bf16, which has 8 bits.
            assert (matrix - copy).norm() < 2**-5 * (copy - old).norm()
            with torch.no_grad():
                matrix.copy_(copy)
                matrix.grad = matrix.grad.roll(1, 0)  # type: ignore[union-attr]
                copy.grad = matrix.grad.clone()


def exact(x: Tensor) -> Tensor:
    """U p(S) V^T of each matrix U S V^T, for five times the polynomial p of Jordan et al. 2024."""
    u, s, v = torch.linalg.svd(x.double() / x.double().norm(dim=(1, 2), keepdim=True), False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[:, None] @ v


@pytest.mark.parametrize("size", [(32, 32), (32, 128)])
def test_every_singular_value_goes_through_the_polynomials_and_ends_near_one(
    size: tuple[int, int],
) -> None:
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    flat, steep = (u * torch.logspace(0, -decades, 32) @ v for decades in (1, 6))
    for matrices in (flat, steep, 1e-4 * flat):
        torch.testing.assert_close(
            orthogonalise(matrices).double(), exact(matrices), rtol=0, atol=2e-4
        )
    values = torch.linalg.svdvals(orthogonalise(flat))
    assert 0.6 < values.min() < values.max() < 1.3
    normalised = flat / flat.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(iterate_gram(normalised), iterate(normalised), rtol=0, atol=1e-4)
    rounded = iterate(normalised.bfloat16()).double()  # as on a GPU
    assert (rounded - exact(flat)).norm() < 2**-4 * exact(flat).norm()
    assert not orthogonalise(torch.zeros(1, *size)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_marked_as_not_finite_changes_nothing(value: float) -> None:
    muon, matrices = make_muon()
    muon.step()
    before = [tensor.detach().clone() for tensor in (*matrices, *momenta(muon, matrices))]
    matrices[1].grad[0, 0] = value  # type: ignore[index]
    muon.found_inf.fill_(1.0)
    muon.step()
    after = [*matrices, *momenta(muon, matrices)]
    assert all(old.equal(new) for old, new in zip(before, after, strict=True))


def momenta(muon: Muon, matrices: list[nn.Parameter]) -> list[Tensor]:
    return [muon.state[matrix][MOMENTUM] for matrix in matrices]


def test_muon_takes_the_linear_layers_of_blocks_that_do_not_modulate() -> None:
    entries = "image cross_attention separate_cross_attention dual_stream adaln image"
    shape = small_shape(fusion=entries, mlp="swiglu", qk_norm=True, modulation="adaln_zero")
    names = describe_backbone(shape).block_matrices()
    assert {name.split(".", 2)[2] for name in names} == {
        *(f"{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *(f"cross_attn.{layer}.weight" for layer in ("q", "text.kv", "proj")),
        *(f"image.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *("text.attn.kv.weight", "skip_linear.weight", "image.skip_linear.weight"),
    }
    assert {name.split(".")[0] for name in names} == {"blocks", "text_blocks"}
    others = ("time_emb_proj", "time_embedding", "conv", "class_embed")
    found = describe_backbone(SMALL_UNET).block_matrices()
    assert any("attn2.to_k" in name for name in found)
    assert not any(other in name for name in found for other in others)
