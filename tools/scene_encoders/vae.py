"""Autoencoder for scenes: 8 times smaller, four latent channels (Rombach et al. 2022)."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from scene_encoders.data import build_optimizer, normalise, psnr

BATCH_SIZE = 16
# Without the whiteness term one or two channels hold nearly all variance, and a diffusion model
# learns the content of the other channels, mostly colours, very late.
KL_WEIGHT = 1e-4
L1_WEIGHT = 0.1
WHITENESS_WEIGHT = 0.02
LOSS = (
    f"MSE + {L1_WEIGHT} L1 + {KL_WEIGHT} KL, means over pixels and latents, + {WHITENESS_WEIGHT} "
    "(|Cov(latents) - I|^2 + |mean(latents)|^2), means over entries"
)


def build_vae() -> AutoencoderKL:
    """Build an autoencoder between 64 x 64 x 3 images and 8 x 8 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(images: Tensor, num_steps: int, generator: torch.Generator) -> AutoencoderKL:
    """Train an autoencoder with LOSS."""
    vae = build_vae()
    optimizer, scheduler = build_optimizer(vae, 2e-3, num_steps)
    progress = tqdm(range(num_steps), desc="train VAE", mininterval=2)
    for _ in progress:
        batch = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        pixels = normalise(images[batch])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        error = functional.mse_loss(decoded, pixels)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error + L1_WEIGHT * functional.l1_loss(decoded, pixels) + KL_WEIGHT * kl
        loss = loss + WHITENESS_WEIGHT * whiteness_error(posterior.mean.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(
            refresh=False, psnr=f"{psnr(error.item()):.1f} dB", kl=f"{kl.item():.2f}"
        )
    return vae.eval()


def whiteness_error(latents: Tensor) -> Tensor:
    """Mean squared distance of the channels of latents (B, C, H, W) from mean 0, covariance I."""
    channels = latents.transpose(0, 1).flatten(1)
    off_identity = torch.cov(channels) - torch.eye(len(channels))
    return off_identity.square().mean() + channels.mean(dim=1).square().mean()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, noise: float = 0.0) -> Tensor:
    """Encode and decode uint8 images; noise of `noise` times the latents' std is added between."""
    parts = []
    for batch in tqdm(images.split(64), "reconstruct", mininterval=2):
        latents = vae.encode(normalise(batch)).latent_dist.mode()
        latents = latents + noise * latents.std() * torch.randn_like(latents)
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        parts.append(((decoded + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)
