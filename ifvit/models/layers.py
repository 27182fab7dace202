"""Layers of the transformer backbones: patch and time embedding, attention, MLP, adaLN, block.

Shapes: B batch, L tokens, M text tokens, D width, H heads, E = D / H channels per head.
Where k captions share the latents of one sample, text has k * B rows and image tokens have B:
row i of the text belongs to row i mod B of the image tokens.
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
    """Repeat x (B, ...) as a whole until it has `count` rows, a multiple of B."""
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
        """Tokens (B, L, D) to (B, L, D), by one softmax over all keys, with the text's keys last.

        Text of k * B rows gives k * B rows: queries, keys and values of the tokens are repeated.
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
        """Keys and values of tokens (B, M, D), computed with this layer's weights."""
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
    """Shifts, scales and gates from a conditioning vector: adaLN-Zero (Peebles and Xie 2023).

    All of them are 0 before training, so that a block starts as the identity.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Conditioning vector (B, D) to `count` tensors (B, 1, D)."""
        outputs: Tensor = self.linear(functional.silu(vector))
        return outputs[:, None].chunk(self.count, dim=-1)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale normalised tokens (B, L, D) by 1 + scale, then shift them; both are (B, 1, D)."""
    return tokens * (1 + scale) + shift


class Block(nn.Module):
    """A pre-norm transformer block; with `has_skip`, it also takes the output of its mirror block.

    With `is_modulated` the norms have no weights of their own. Shifts, scales and gates from the
    conditioning vector take their place for the block's own tokens. Keys and values of the text
    are normalised only, so that they do not depend on time and can be computed once per prompt.
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
        vector: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D).

        `skip` (B, L, D) is the output of the mirror block, `vector` (B, D) the conditioning vector
        of a modulated block. Tokens and skip may have fewer rows than text and vector; they are
        repeated here, at the first block that needs it.
        """
        if self.skip_linear is not None:
            assert skip is not None
            tokens = self._join(self.skip_linear, tokens, skip)
        updated: Tensor
        if self.modulation is None:
            attended = self.attn(self.norm1(tokens), text, bias)
            tokens = repeat_rows(tokens, len(attended)) + attended
            updated = tokens + self.mlp(self.norm2(tokens))
        else:
            assert vector is not None
            tokens = repeat_rows(tokens, len(vector))
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector)
            attended = self.attn(modulate(self.norm1(tokens), shift1, scale1), text, bias)
            tokens = tokens + gate1 * attended
            updated = tokens + gate2 * self.mlp(modulate(self.norm2(tokens), shift2, scale2))
        return updated

    @staticmethod
    def _join(linear: nn.Linear, tokens: Tensor, skip: Tensor) -> Tensor:
        """Apply `linear` to [tokens, skip]; a skip shared by several rows is multiplied once."""
        if len(skip) == len(tokens):
            joined: Tensor = linear(torch.cat([tokens, skip], dim=-1))
            return joined
        token_weight, skip_weight = linear.weight.chunk(2, dim=1)
        shared = functional.linear(skip, skip_weight, linear.bias)
        return functional.linear(tokens, token_weight) + repeat_rows(shared, len(tokens))

    def text_keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of the text tokens (B, M, D) for this block's attention."""
        return self.attn.keys_values(self.norm1(tokens))
