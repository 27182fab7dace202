"""Conditions => latents => images, each image a function of seed and position alone.

Shapes: B batch, C latent channels, S latent size, H, W image; a condition is contexts (B, M, D) of
captions or numbers (B,) of classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ifvit.errors import UserError
from ifvit.images import Pixels, to_pixels
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.backbone import Backbone, EncodedCondition
from ifvit.rng import Stream, normal
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.guidance import GuidedNoisePredictor
from ifvit.sampling.method import AlignmentMethod, MethodOf
from ifvit.sampling.solvers import solve

ConditionOf = Callable[[Tensor], Tensor]
"""Positions (B,) int64 => conditions (B, ...); `conditions.__getitem__` of a tensor (N, ...)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The frozen models that drawing needs; `null_condition` (M, D) or () is "nothing"."""

    backbone: Backbone
    autoencoder: Autoencoder
    null_condition: Tensor
    scaling_factor: float


@torch.no_grad()
def sample_latents(
    backbone: Backbone,
    condition: Tensor,
    null_condition: EncodedCondition,
    positions: Tensor,
    config: SamplingConfig,
    method: AlignmentMethod | None = None,
) -> Tensor:
    """Scaled latents (B, C, S, S) for conditions (B, ...) and positions (B,) int64.

    `null_condition` is "nothing" alone, batch 1. The noise depends on seed and position only,
    so neither batch size nor the number of processes changes an image.
    """
    size = backbone.config.latent_size
    shape = (backbone.config.latent_channels, size, size)
    noise = normal(config.seed, 0, positions, Stream.SAMPLING, shape).to(backbone.device)
    denoiser = GuidedNoisePredictor(backbone, condition, null_condition, config.guidance, method)
    return solve(denoiser, noise, config.solver, config.num_steps)


@torch.no_grad()
def generate_images(
    sampler: Sampler,
    condition_of: ConditionOf,
    positions: Sequence[int],
    config: SamplingConfig,
    method_of: MethodOf | None = None,
) -> Iterator[Pixels]:
    """Draw the image of every position, in order and in batches uint8 (B, H, W, 3).

    The null condition is encoded once, each other once for all solver steps. Methods of
    `method_of` take part in the sampling of one batch each. Raises UserError for images that are
    not finite.
    """
    latents = _generate_latents(sampler, condition_of, positions, config, method_of)
    with tqdm(total=len(positions), unit="image", desc="draw", leave=False) as progress:
        for images in _decode_behind(sampler, latents):
            yield images
            progress.update(len(images))


def _generate_latents(
    sampler: Sampler,
    condition_of: ConditionOf,
    positions: Sequence[int],
    config: SamplingConfig,
    method_of: MethodOf | None,
) -> Iterator[Tensor]:
    device = sampler.backbone.device
    null_condition = sampler.backbone.encode_condition(sampler.null_condition[None].to(device))
    for start in range(0, len(positions), config.batch_size):
        batch = torch.tensor(positions[start : start + config.batch_size])
        method = method_of(batch) if method_of else None
        condition = condition_of(batch).to(device)
        yield sample_latents(sampler.backbone, condition, null_condition, batch, config, method)


def _decode_behind(sampler: Sampler, batches: Iterable[Tensor]) -> Iterator[Pixels]:
    """Decode each batch while the next one is drawn: on a GPU, copy and rounding cost no time."""

    @torch.no_grad()  # which holds for one thread only
    def decode(latents: Tensor) -> Pixels:
        images = sampler.autoencoder.decode(latents / sampler.scaling_factor)
        if not images.isfinite().all():  # which as pixels would be black
            raise UserError(
                "drawn images are not finite numbers; lower guidance_scale or use other weights"
            )
        return to_pixels(images)

    with ThreadPoolExecutor(1) as thread:
        pending: Future[Pixels] | None = None
        for latents in batches:
            if pending:
                yield pending.result()
            pending = thread.submit(decode, latents)
        if pending:
            yield pending.result()
