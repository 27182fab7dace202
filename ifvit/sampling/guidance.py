"""Classifier-free guidance (Ho and Salimans 2022), both halves in one evaluation.

Shapes: B batch, C latent channels, S latent size; a condition is what a backbone's
`encode_condition` takes, contexts (B, M, D) of captions or numbers (B,) of classes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.models.attention import Bias
from ifvit.models.backbone import Backbone, EncodedCondition
from ifvit.models.layers import KeysValues
from ifvit.sampling.config import Guidance
from ifvit.sampling.method import AlignmentMethod, Change, Evaluation


class GuidedNoisePredictor:
    """eps = eps_uncond + w (eps_cond - eps_uncond) for B conditions; a `NoisePredictor`.

    Outside the interval of `guidance`, and at w = 1, eps_uncond is not evaluated at all.
    """

    def __init__(
        self,
        backbone: Backbone,
        condition: Tensor,
        null_condition: EncodedCondition,
        guidance: Guidance,
        method: AlignmentMethod | None = None,
    ) -> None:
        """`condition` (B, ...); `null_condition` of "no text" or "no class", of batch 1 or B."""
        self._backbone = backbone
        self._null = _expand(null_condition, len(condition))
        self._guidance = guidance
        self._method = method
        self._schedule = NoiseSchedule(backbone.device)
        self._num_evaluations = 0
        self.set_condition(condition)

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, S, S) at timesteps (B,), all equal => guided noise."""
        change = self._ask_method(x_t, timesteps)
        if change.context is not None:
            self.set_condition(change.context)
        if not self._guidance.applies_at(timesteps[0]):
            return self._predict(x_t, timesteps, self._encoded, change.biases)
        # The backbone evaluates its blocks before the text once for both halves.
        both = {
            block: partial(_bias_first, len(x_t), bias) for block, bias in change.biases.items()
        }
        halves = self._predict(x_t, timesteps, self._both, both)
        return self._guide(*halves.chunk(2))

    def _ask_method(self, x_t: Tensor, timesteps: Tensor) -> Change:
        if self._method is None:
            return Change()
        evaluation = Evaluation(
            index=self._num_evaluations,
            x_t=x_t,
            timesteps=timesteps,
            context=self._condition,
            predict_clean=partial(self._predict_clean, x_t, timesteps),
        )
        self._num_evaluations += 1
        return self._method.before(evaluation)

    def set_condition(self, condition: Tensor) -> None:
        """From now on be guided by another condition (B, ...)."""
        self._condition = condition
        self._encoded = self._backbone.encode_condition(condition)
        self._both = _append(self._encoded, self._null)

    def _predict_clean(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        encoded = self._backbone.encode_condition(context)
        noise = self._predict(x_t, timesteps, encoded, {})
        if self._guidance.applies_at(timesteps[0]):
            with torch.no_grad():
                unconditional = self._predict(x_t, timesteps, self._null, {})
            noise = self._guide(noise, unconditional)
        return self._schedule.remove_noise(x_t, noise, timesteps)

    def _predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        condition: EncodedCondition,
        biases: Mapping[int, Bias],
    ) -> Tensor:
        dtype = self._backbone.dtype
        shifts = (biases,) if biases else ()  # which fusion backbones alone take
        predicted: Tensor = self._backbone(x_t.to(dtype), timesteps, condition, *shifts)
        return predicted.float()

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return unconditional + self._guidance.scale * (conditional - unconditional)


def compile_backbone(backbone: Backbone) -> None:
    """Compile calls of the backbone; on a GPU into CUDA graphs, which spares its launches."""
    backbone.compile(mode="reduce-overhead" if backbone.device.type == "cuda" else None)


def _bias_first(count: int, bias: Bias, query: Tensor, key: Tensor) -> Tensor | None:
    """`bias` of the first `count` rows, the conditional ones."""
    return bias(query[:count], key[:count])


def _expand(one: EncodedCondition, count: int) -> EncodedCondition:
    """One condition `count` times, without copying it."""
    return _map(lambda x: x.expand(count, *x.shape[1:]), one)


def _append(one: EncodedCondition, more: EncodedCondition) -> EncodedCondition:
    """The conditions of both."""
    return _map(lambda *pair: torch.cat(pair), one, more)


def _map(function: Callable[..., Tensor], *encoded: EncodedCondition) -> EncodedCondition:
    """`function` of the tensors that stand in the same place."""

    def of_block(*pairs: KeysValues | None) -> KeysValues | None:
        keys_values = list(zip(*(pair for pair in pairs if pair), strict=True))
        return (function(*keys_values[0]), function(*keys_values[1])) if keys_values else None

    pooled = [one.pooled for one in encoded if one.pooled is not None]
    return EncodedCondition(
        tokens=function(*(one.tokens for one in encoded)),
        keys_values=tuple(map(of_block, *(one.keys_values for one in encoded))),
        pooled=function(*pooled) if pooled else None,
    )
