"""Layers of the transformer blocks: patches, norms, rotary positions, attention, MLP, modulation.

Shapes: B batch, L image tokens with time and registers, M text tokens, D width, H heads,
E = D / H channels per head. Where k captions share the latents of one sample, text has k * B rows
and image tokens have B: row i of the text belongs to row i mod B of the image tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ifvit.models.attention import Bias, attend_biased, load_attention
from ifvit.models.config import FusionTransformerConfig

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text tokens for one block, each (B, M, H, E)."""


def repeat_rows(x: Tensor, count: int) -> Tensor:
    """Repeat x (B, ...) as a whole until it has `count` rows, a multiple of B."""
    copies = count // len(x)
    return x if copies == 1 else x.repeat(copies, *(1,) * (x.ndim - 1))


def mean_of_visible(tokens: Tensor, visible: Tensor | None) -> Tensor:
    """Mean (B, D) of the tokens (B, M, D) that are visible (B, M); of all tokens for None."""
    if visible is None:
        return tokens.mean(dim=1)
    hidden = tokens.masked_fill(~visible[..., None], 0)
    return hidden.sum(dim=1) / visible.sum(dim=1, keepdim=True)


def mark_length(*tensors: Tensor | None) -> None:
    """Let torch.compile make one variant for all sizes of the second dimension, from 2 on.

    The number of text tokens is that of the longest caption and differs from batch to batch.
    """
    if not torch.compiler.is_compiling():  # whoever compiles the whole network has dynamic sizes
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)


class PatchEmbed(nn.Module):
    """Latents (B, C, S, S) to one token per patch (B, L, D), row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)
        return tokens.flatten(2).transpose(1, 2)


def rotation_table(
    side: int, num_before: int, num_after: int, head_width: int, device: torch.device
) -> Tensor:
    """Cosines and sines (2, L + M, E / 2) of 2-D rotary positions (Su et al. 2021; theta 10,000).

    The first half of the angles follows an image token's row, the second half its column. The
    `num_before` tokens in front of the side x side image tokens, and the `num_after` tokens behind
    them, have angle 0.
    """
    channels = torch.arange(0, head_width // 2, 2, device=device)
    frequencies = 10_000.0 ** -(channels / (head_width // 2))
    angles = torch.arange(side, device=device)[:, None] * frequencies
    rows = angles[:, None].expand(side, side, -1)
    columns = angles[None].expand(side, side, -1)
    image = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    angles = functional.pad(image, (0, 0, num_before, num_after))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    """Rotate neighbouring channels of queries or keys (B, L, H, E) by the first L angles."""
    if rotation is None:
        return x
    cos, sin = rotation[:, : x.shape[1], None].unbind(0)  # float32, and so are the products
    first, second = x[..., ::2], x[..., 1::2]
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension (Zhang and Sennrich 2019); the type of its input stays."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast, weights of another type than the input would rule out the fused kernel.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


def build_norm(config: FusionTransformerConfig, *, affine: bool) -> nn.Module:
    """Build the configured norm over D channels, with or without weights.

    LayerNorm has the epsilon of U-ViT with weights, and of DiT, PixArt and SD3 without.
    """
    if config.norm == "rms_norm":
        return RMSNorm(config.width, eps=1e-6, elementwise_affine=affine)
    return nn.LayerNorm(config.width, eps=1e-5 if affine else 1e-6, elementwise_affine=affine)


def _build_head_norm(config: FusionTransformerConfig) -> nn.Module:
    """Build the norm of queries or keys (B, L, H, E) over E (QK-norm), if it is configured."""
    return RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else nn.Identity()


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves and, if given, to text keys and values."""

    def __init__(self, config: FusionTransformerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.norm_q, self.norm_k = _build_head_norm(config), _build_head_norm(config)
        self.proj = nn.Linear(config.width, config.width)
        self.attend = load_attention("sdpa")

    def forward(
        self,
        tokens: Tensor,
        text: KeysValues | None = None,
        visible: Tensor | None = None,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D), by one softmax over all keys, with the text's keys last.

        Text of k * B rows gives k * B rows: queries, keys and values of the tokens are repeated.
        `visible` (rows of the result, keys) is false for padding.
        """
        query, key, value = self.project(tokens, rotation)
        if text is not None:
            query, key, value = (repeat_rows(x, len(text[0])) for x in (query, key, value))
            key = torch.cat([key, text[0]], dim=1)
            value = torch.cat([value, text[1]], dim=1)
        heads = attend_biased(self.attend, bias, query, key, value, visible)
        attended: Tensor = self.proj(heads.flatten(2))
        return attended

    def project(
        self, tokens: Tensor, rotation: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, H, E) of tokens (B, L, D)."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return rotate(self.norm_q(query), rotation), rotate(self.norm_k(key), rotation), value

    def keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of text tokens (B, M, D), computed with this layer's weights."""
        projected = functional.linear(text, self.qkv.weight[self.width :])
        key, value = projected.view(*text.shape[:2], 2, self.num_heads, -1).unbind(2)
        return self.norm_k(key), value


class TextKeys(nn.Module):
    """Keys and values of text tokens, with weights of their own."""

    def __init__(self, config: FusionTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.norm_k = _build_head_norm(config)

    def project(self, text: Tensor) -> KeysValues:
        """Keys and values of text tokens (B, M, D)."""
        key, value = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.norm_k(key), value


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens to text alone, with weights of its own."""

    def __init__(self, config: FusionTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.norm_q = _build_head_norm(config)
        self.text = TextKeys(config)
        self.proj = nn.Linear(config.width, config.width)
        self.attend = load_attention("sdpa")

    def forward(
        self, tokens: Tensor, text: KeysValues, visible: Tensor | None, bias: Bias | None
    ) -> Tensor:
        """Tokens (B, L, D) and text of k * B rows to (k * B, L, D); `visible` is (k * B, M)."""
        query = self.norm_q(self.q(tokens).unflatten(-1, (self.num_heads, -1)))
        query = repeat_rows(query, len(text[0]))
        heads = attend_biased(self.attend, bias, query, *text, visible)
        attended: Tensor = self.proj(heads.flatten(2))
        return attended


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return hidden


class SwiGLU(nn.Module):
    """fc2(a * silu(b)) with (a, b) = fc1(x), without biases (Shazeer 2020).

    Its three matrices have as many weights as the two of `Mlp`: two thirds of the hidden width,
    rounded down to a multiple of 8 for tensor cores, but at least 8.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = max(8, 2 * hidden // 3 // 8 * 8)
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.fc1(tokens).chunk(2, dim=-1)
        hidden: Tensor = self.fc2(value * functional.silu(gate))
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


class SharedModulation(nn.Module):
    """Shifts, scales and gates of one block: a projection that all blocks share, plus a table.

    adaLN-single (PixArt, Chen et al. 2023): the table starts as normal numbers / sqrt(D).
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(count, width))

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The projected conditioning vector (B, 6 D) to tensors (B, 1, D), one per row."""
        shared = vector.view(len(vector), 6, -1)[:, : len(self.table)]
        return (shared + self.table)[:, :, None].unbind(1)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale normalised tokens (B, L, D) by 1 + scale, then shift them; both are (B, 1, D)."""
    return tokens * (1 + scale) + shift


def build_modulation(config: FusionTransformerConfig, count: int) -> nn.Module:
    """Build the modulation of one block, with `count` vectors."""
    kind = SharedModulation if config.modulation == "shared" else Modulation
    return kind(config.width, count)
