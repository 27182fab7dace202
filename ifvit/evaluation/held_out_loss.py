"""Held-out loss: the squared error of predictions for fixed samples, noise and timesteps.

The cheapest and most sensitive comparison of two networks that predict the same. `ifvit train`
computes it while it trains, `ifvit evaluate` for stored weights.

Shapes: N samples, B samples of a chunk, C latent channels, H, W latent size.
"""

import numpy as np
import torch
from torch import Tensor

from ifvit.arrays import Array
from ifvit.conditions import Condition, move
from ifvit.diffusion.objectives import ConditionalPredictor, LatentScaler, sample_latents
from ifvit.distributed import ProcessGroup, show_progress
from ifvit.errors import UserError
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.weights import WeightsInfo
from ifvit.rng import Stream, normal
from ifvit.sampling.load import schedule_of
from ifvit.sampling.samples import batched

NUM_TIMES = 8
"""Timesteps at which each sample is predicted: (k + 1/2) / 8 of all timesteps for k = 0 … 7."""
_CHUNK_SIZE = 32
"""Samples of a forward pass. It is fixed, because rounding depends on the size of a batch."""


class HeldOutLoss:
    """Loss of networks on the first samples of held-out shards, each with its first caption.

    The posterior draw and the noise of sample n at timestep k are functions of (seed, n, k), so all
    weights of one training see the same noisy latents, on any number of processes. Errors are not
    weighted, whatever the loss of the training is.
    """

    def __init__(
        self,
        conditions: DatasetConditions,
        num_samples: int,
        info: WeightsInfo,
        device: torch.device | str,
        seed: int = 0,
    ) -> None:
        """Raise UserError when the shards of the conditions hold fewer samples."""
        reader = conditions.reader
        if num_samples > len(reader):
            raise UserError(
                f"{reader.url}: has {len(reader)} samples, but num_samples is {num_samples}; "
                "lower it"
            )
        self._conditions, self._device, self._seed = conditions, device, seed
        self._chunks = [np.array(chunk) for chunk in batched(range(num_samples), _CHUNK_SIZE)]
        self._schedule = schedule_of(info, device)
        self._scaler = LatentScaler(info.scaling, device)

    @torch.no_grad()
    def measure(self, predict: ConditionalPredictor, group: ProcessGroup | None = None) -> Array:
        """Return the losses (N, 8) float64; the processes of a group share the work."""
        if group is None:
            return np.concatenate([self._measure_chunk(predict, chunk) for chunk in self._chunks])
        rank, size = group.world.rank, group.world.size
        own = self._chunks[rank::size]
        shown = show_progress(own, sum(map(len, own)), "held-out loss", group.world)
        parts = group.gather([self._measure_chunk(predict, chunk) for chunk in shown])
        return np.concatenate([parts[n % size][n // size] for n in range(len(self._chunks))])

    def _measure_chunk(self, predict: ConditionalPredictor, samples: Array) -> Array:
        """Losses (B, 8) of these samples."""
        moments, condition = self._read(samples)
        positions = torch.from_numpy(samples).to(self._device)
        manifest = self._conditions.reader.manifest
        losses = []
        for k in range(NUM_TIMES):
            z = moments.float()
            if not manifest.deterministic:
                draw = normal(
                    self._seed, k, positions, Stream.HELD_OUT_POSTERIOR, manifest.latent_shape
                )
                z = sample_latents(moments, draw)
            x_0 = self._scaler.scale(z)
            noise = normal(self._seed, k, positions, Stream.HELD_OUT_NOISE, manifest.latent_shape)
            u = torch.full(positions.shape, (k + 0.5) / NUM_TIMES, device=self._device)
            timesteps = self._schedule.timesteps(u)
            x_t = self._schedule.add_noise(x_0, noise, timesteps)
            predicted = predict(x_t, timesteps, condition)
            errors = self._schedule.squared_errors(predicted, x_0, noise, timesteps)
            losses.append(errors.cpu().double().numpy())
        return np.stack(losses, axis=1)

    def _read(self, samples: Array) -> tuple[Tensor, Condition]:
        """Moments (B, 2C, H, W) and conditions of these samples, on the device.

        Contexts have their largest length. Rounding depends on it, and a sample's loss would depend
        on the other samples of its chunk.
        """
        reader = self._conditions.reader
        moments = np.empty((len(samples), *reader.manifest.moments_shape), reader.dtype)
        reader.read_moments(samples, moments)
        condition = self._conditions.read(samples, np.zeros_like(samples), full_length=True)
        return torch.from_numpy(moments).to(self._device), move(condition, self._device)
