"""Classifier-free guidance (Ho and Salimans 2022), both halves in one evaluation.

Shapes: B batch, M text tokens, D context width.
"""

import torch
from torch import Tensor

from ifvit.models.uvit import FusionUViT, TextContext
from ifvit.sampling.solvers import Denoiser


def guide(
    backbone: FusionUViT, text: TextContext, null_text: TextContext, guidance_scale: float
) -> Denoiser:
    """A denoiser of eps = eps_uncond + w (eps_cond - eps_uncond), for B captions.

    `null_text` is the null context alone, batch 1. At w = 1 it is not evaluated at all.
    """
    dtype = backbone.dtype

    def predict(x_t: Tensor, timesteps: Tensor, context: TextContext) -> Tensor:
        predicted: Tensor = backbone(x_t.to(dtype), timesteps, context)
        return predicted.float()

    if guidance_scale == 1.0:
        return lambda x_t, timesteps: predict(x_t, timesteps, text)
    # The backbone evaluates its blocks before the text once for both halves.
    both = _append(text, null_text)

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        conditional, unconditional = predict(x_t, timesteps, both).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def _append(text: TextContext, null_text: TextContext) -> TextContext:
    """B captions, then the null context B times."""

    def join(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second.expand_as(first)])

    return TextContext(
        tokens=join(text.tokens, null_text.tokens),
        keys_values=tuple(
            (join(pair[0], null_pair[0]), join(pair[1], null_pair[1]))
            if pair is not None and null_pair is not None
            else None
            for pair, null_pair in zip(text.keys_values, null_text.keys_values, strict=True)
        ),
    )
