"""The parts of a U-shaped ViT: patches, timestep token, attention, block.

Shapes: B batch, L tokens, M text tokens, D width, H heads, E = D / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ifvit.models.attention import Bias, attend_biased, load_attention

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text tokens for one block, each (B, M, H, E)."""


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids of timesteps (B,), cosines first, as float32 (B, width).

    Frequencies fall geometrically from 1 to 1/10000 (Vaswani et al. 2017, Section 3.5).
    """
    half = width // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def repeat_rows(x: Tensor, count: int) -> Tensor:
    """(B, ...) to (count, ...), all rows in turn; count is a multiple of B."""
    copies = count // len(x)
    return x if copies == 1 else x.repeat(copies, *(1,) * (x.ndim - 1))


class PatchEmbed(nn.Module):
    """Latents (B, C, S, S) to one token per patch (B, L, D), row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves and, if given, to text keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.width = width
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.attend = load_attention("sdpa")

    def forward(
        self, tokens: Tensor, text: KeysValues | None = None, bias: Bias | None = None
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D) under one softmax over all keys, those of the text last.

        k * B captions in `text` give k * B rows, as if the tokens were repeated k times.
        """
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if text is not None:
            query, key, value = (repeat_rows(x, len(text[0])) for x in (query, key, value))
            key = torch.cat([key, text[0]], dim=1)
            value = torch.cat([value, text[1]], dim=1)
        heads = attend_biased(self.attend, bias, query, key, value)
        attended: Tensor = self.proj(heads.flatten(2))
        return attended

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of tokens (B, M, D) by the block's own weights, without queries."""
        projected = functional.linear(tokens, self.qkv.weight[self.width :])
        key, value = projected.view(*tokens.shape[:2], 2, self.num_heads, -1).unbind(2)
        return key, value


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return hidden


class Modulation(nn.Module):
    """Shifts, scales and gates that follow a signal; all 0 before training.

    adaLN-Zero (Peebles and Xie 2023): a block that they gate starts as the identity.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, signal: Tensor) -> tuple[Tensor, ...]:
        """Signal (B, D) to `count` tensors (B, 1, D)."""
        vectors: Tensor = self.linear(functional.silu(signal))
        return vectors[:, None].chunk(self.count, dim=-1)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised tokens (B, L, D), scaled by 1 + scale and shifted, each (B, 1, D)."""
    return tokens * (1 + scale) + shift


class Block(nn.Module):
    """A pre-norm transformer block, with a long skip connection on the way out of the U.

    A modulated one has norms without weights of their own; a signal of time and condition gives
    them instead, for its own tokens, not for the keys and values of the text, which stay free of
    time.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: int,
        *,
        has_skip: bool,
        is_modulated: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not is_modulated)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not is_modulated)
        self.modulation = Modulation(width, 6) if is_modulated else None
        self.mlp = Mlp(width, mlp_ratio * width)
        self.skip_linear = nn.Linear(2 * width, width) if has_skip else None

    def forward(
        self,
        tokens: Tensor,
        text: KeysValues | None = None,
        skip: Tensor | None = None,
        bias: Bias | None = None,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D); `skip` is what the mirror block had put out, `signal`
        (B, D) what modulates.

        Of what k captions share, one row does for all: of the tokens before the first text, and
        of the skips from there. Text and signal then have k times their rows, and so has the
        result.
        """
        if self.skip_linear is not None:
            assert skip is not None
            tokens = self._join(tokens, skip)
        if self.modulation is not None:
            assert signal is not None
            return self._modulated(tokens, text, bias, signal)
        attended = self.attn(self.norm1(tokens), text, bias)
        tokens = repeat_rows(tokens, len(attended)) + attended
        updated: Tensor = tokens + self.mlp(self.norm2(tokens))
        return updated

    def _modulated(
        self, tokens: Tensor, text: KeysValues | None, bias: Bias | None, signal: Tensor
    ) -> Tensor:
        assert self.modulation is not None
        tokens = repeat_rows(tokens, len(signal))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal)
        attended = self.attn(modulate(self.norm1(tokens), shift1, scale1), text, bias)
        tokens = tokens + gate1 * attended
        updated: Tensor = tokens + gate2 * self.mlp(modulate(self.norm2(tokens), shift2, scale2))
        return updated

    def _join(self, tokens: Tensor, skip: Tensor) -> Tensor:
        """Linear of tokens and skip side by side; a skip that rows share is multiplied once."""
        assert self.skip_linear is not None
        if len(skip) == len(tokens):
            joined: Tensor = self.skip_linear(torch.cat([tokens, skip], dim=-1))
            return joined
        of_tokens, of_skip = self.skip_linear.weight.chunk(2, dim=1)
        shared = functional.linear(skip, of_skip, self.skip_linear.bias)
        return functional.linear(tokens, of_tokens) + repeat_rows(shared, len(tokens))

    def text_keys_values(self, tokens: Tensor) -> KeysValues:
        """What this block's attention sees of the text tokens (B, M, D)."""
        return self.attn.keys_values(self.norm1(tokens))
