"""Contexts => latents => images, each image a function of seed and position alone.

Shapes: B batch, M text tokens, D context width, C latent channels, S latent size, H, W image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ifvit.images import Pixels, to_pixels
from ifvit.models.autoencoder import Autoencoder
from ifvit.models.uvit import FusionUViT, TextContext
from ifvit.randomness import Stream, normal
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.guidance import GuidedDenoiser
from ifvit.sampling.method import AlignmentMethod, MethodOf
from ifvit.sampling.solvers import solve

ContextOf = Callable[[Tensor], Tensor]
"""Positions (B,) int64 => contexts (B, M, D); `contexts.__getitem__` of a tensor (N, M, D)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The frozen models that drawing needs; `null_context` (M, D) stands for "no text"."""

    backbone: FusionUViT
    autoencoder: Autoencoder
    null_context: Tensor
    scaling_factor: float


@torch.no_grad()
def sample_latents(
    backbone: FusionUViT,
    context: Tensor,
    null_text: TextContext,
    positions: Tensor,
    config: SamplingConfig,
    method: AlignmentMethod | None = None,
) -> Tensor:
    """Scaled latents (B, C, S, S) for contexts (B, M, D) of captions and positions (B,) int64.

    `null_text` is the null context alone, batch 1. The noise depends on seed and position only,
    so neither batch size nor the number of processes changes an image.
    """
    size = backbone.shape.latent_size
    shape = (backbone.shape.latent_channels, size, size)
    noise = normal(config.seed, 0, positions, Stream.SAMPLING, shape).to(backbone.device)
    denoiser = GuidedDenoiser(backbone, context, null_text, config.guidance, method)
    return solve(denoiser, noise, config.solver, config.num_steps)


@torch.no_grad()
def generate_images(
    sampler: Sampler,
    context_of: ContextOf,
    positions: Sequence[int],
    config: SamplingConfig,
    method_of: MethodOf | None = None,
) -> Iterator[Pixels]:
    """Draw the image of every position, in order and in batches uint8 (B, H, W, 3).

    The null context is encoded once, each caption once for all solver steps. Methods of
    `method_of` take part in the sampling of one batch each.
    """
    latents = _generate_latents(sampler, context_of, positions, config, method_of)
    with tqdm(total=len(positions), unit="image", desc="draw", leave=False) as progress:
        for images in _decode_behind(sampler, latents):
            yield images
            progress.update(len(images))


def _generate_latents(
    sampler: Sampler,
    context_of: ContextOf,
    positions: Sequence[int],
    config: SamplingConfig,
    method_of: MethodOf | None,
) -> Iterator[Tensor]:
    device = sampler.backbone.device
    null_text = sampler.backbone.encode_text(sampler.null_context[None].to(device))
    for start in range(0, len(positions), config.batch_size):
        batch = torch.tensor(positions[start : start + config.batch_size])
        method = method_of(batch) if method_of else None
        context = context_of(batch).to(device)
        yield sample_latents(sampler.backbone, context, null_text, batch, config, method)


def _decode_behind(sampler: Sampler, batches: Iterable[Tensor]) -> Iterator[Pixels]:
    """Decode each batch while the next one is drawn: on a GPU, copy and rounding cost no time."""

    @torch.no_grad()  # which holds for one thread only
    def decode(latents: Tensor) -> Pixels:
        return to_pixels(sampler.autoencoder.decode(latents / sampler.scaling_factor))

    with ThreadPoolExecutor(1) as thread:
        pending: Future[Pixels] | None = None
        for latents in batches:
            if pending:
                yield pending.result()
            pending = thread.submit(decode, latents)
        if pending:
            yield pending.result()
