"""Blocks of the fusion transformer: one class per way in which text takes part.

Shapes: B batch, L image tokens with time and registers, M text tokens, D width. Where k captions
share the latents of one sample, text has k * B rows and image tokens have B: row i of the text
belongs to row i mod B of the image tokens. A block that sees text returns k * B rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ifvit.models.attention import Bias, attend_biased
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.layers import (
    Attention,
    CrossAttention,
    KeysValues,
    Mlp,
    SwiGLU,
    TextKeys,
    build_modulation,
    build_norm,
    modulate,
    repeat_rows,
)


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What a block takes beside the tokens (B, L, D); a block ignores what it does not use."""

    text: Tensor | None = None
    """(k * B, M, D): text tokens, which concat and dual_stream blocks update."""
    keys_values: KeysValues | None = None
    """Keys and values of the text for cross_attention and separate_cross_attention blocks."""
    skip: Tensor | None = None
    """(B, L, D): image tokens after the mirror block."""
    text_skip: Tensor | None = None
    """(k * B, M, D): text tokens after the mirror block, if both blocks update text."""
    visible: Tensor | None = None
    """(k * B, keys) bool: false for the padding among the keys of the attention that has keys of
    text; None if there is no padding."""
    vector: Tensor | None = None
    """Conditioning vector of a modulated block, (B, D), or (B, 6 D) after a shared projection."""
    rotation: Tensor | None = None
    """Cosines and sines of `rotation_table`."""
    bias: Bias | None = None
    """Addend to the logits of the attention in which image tokens attend to text."""


class Stream(nn.Module):
    """What the streams of all blocks begin with: the long skip, a norm, and its modulation.

    With modulation the norms have no weights of their own: shifts and scales take their place.
    """

    def __init__(
        self, config: FusionTransformerConfig, *, has_skip: bool, num_modulations: int
    ) -> None:
        super().__init__()
        width = config.width
        self.skip_linear = nn.Linear(2 * width, width) if has_skip else None
        self.norm1 = build_norm(config, affine=not num_modulations)
        self.modulation = build_modulation(config, num_modulations) if num_modulations else None

    def join_skip(self, tokens: Tensor, skip: Tensor | None) -> Tensor:
        """Join tokens (k * B, L, D) to the output of the mirror block, if there is a long skip.

        A skip (B, L, D) that k rows of tokens share is multiplied once.
        """
        if self.skip_linear is None:
            return tokens
        assert skip is not None
        if len(skip) == len(tokens):
            joined: Tensor = self.skip_linear(torch.cat([tokens, skip], dim=-1))
            return joined
        token_weight, skip_weight = self.skip_linear.weight.chunk(2, dim=1)
        shared = functional.linear(skip, skip_weight, self.skip_linear.bias)
        return functional.linear(tokens, token_weight) + repeat_rows(shared, len(tokens))

    def normalise(
        self, tokens: Tensor, vector: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return tokens, the same normalised, and the shifts, scales and gates of the block.

        `vector` is the conditioning vector of a modulated block. It may have more rows than the
        tokens, which are then repeated.
        """
        if self.modulation is None:
            return tokens, self.norm1(tokens), ()
        assert vector is not None
        tokens = repeat_rows(tokens, len(vector))
        modulation: tuple[Tensor, ...] = self.modulation(vector)
        return tokens, modulate(self.norm1(tokens), *modulation[:2]), modulation


class Block(Stream):
    """A pre-norm transformer block: `image`, `cross_attention` and `adaln` of a fusion map.

    Text keys and values make it the paper's cross-attention: one softmax over image and text, one
    set of weights. There the text is only normalised, not modulated, so that its keys and values
    do not depend on time and are computed once per prompt.
    """

    def __init__(
        self, config: FusionTransformerConfig, *, has_skip: bool, is_modulated: bool
    ) -> None:
        super().__init__(config, has_skip=has_skip, num_modulations=6 if is_modulated else 0)
        self.attn = Attention(config)
        self.norm2 = build_norm(config, affine=not is_modulated)
        mlp = SwiGLU if config.mlp == "swiglu" else Mlp
        self.mlp = mlp(config.width, config.mlp_ratio * config.width)

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) to the image tokens (B or k * B, L, D) and text after the block."""
        tokens = self.join_skip(tokens, inputs.skip)
        tokens, normalised, modulation = self.normalise(tokens, inputs.vector)
        attended = self.attn(
            normalised, inputs.keys_values, inputs.visible, inputs.bias, inputs.rotation
        )
        tokens = self.add_attention(tokens, attended, modulation)
        return self.add_mlp(tokens, modulation), inputs.text

    def add_attention(
        self, tokens: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]
    ) -> Tensor:
        """Add the gated output of attention, which may have more rows, to the tokens."""
        gated = modulation[2] * attended if modulation else attended
        return repeat_rows(tokens, len(attended)) + gated

    def add_mlp(self, tokens: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Add the gated output of the MLP to the tokens."""
        normalised = self.norm2(tokens)
        if modulation:
            normalised = modulate(normalised, *modulation[3:5])
        updated: Tensor = self.mlp(normalised)
        return tokens + (modulation[5] * updated if modulation else updated)

    def text_keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of the text tokens (B, M, D) for this block's attention."""
        return self.attn.keys_values(self.norm1(text))


class SeparateBlock(Block):
    """`separate_cross_attention`: self-attention, cross-attention to text, MLP (PixArt).

    The cross-attention has weights of its own, neither norm nor gate, and an output projection
    that starts at zero.
    """

    def __init__(
        self, config: FusionTransformerConfig, *, has_skip: bool, is_modulated: bool
    ) -> None:
        super().__init__(config, has_skip=has_skip, is_modulated=is_modulated)
        self.cross_attn = CrossAttention(config)

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) to the image tokens (k * B, L, D) and the unchanged text."""
        assert inputs.keys_values is not None
        tokens = self.join_skip(tokens, inputs.skip)
        tokens, normalised, modulation = self.normalise(tokens, inputs.vector)
        attended = self.attn(normalised, rotation=inputs.rotation)
        tokens = self.add_attention(tokens, attended, modulation)
        attended = self.cross_attn(tokens, inputs.keys_values, inputs.visible, inputs.bias)
        tokens = repeat_rows(tokens, len(attended)) + attended
        return self.add_mlp(tokens, modulation), inputs.text

    def text_keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of the text tokens (B, M, D) for the cross-attention."""
        return self.cross_attn.text.project(text)


class ConcatBlock(Block):
    """`concat`: image and text tokens are one sequence with one set of weights (U-ViT)."""

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) to the image tokens (k * B, L, D) and text after the block."""
        text, num_tokens = inputs.text, tokens.shape[1]
        assert text is not None
        tokens = self.join_skip(tokens, inputs.skip)
        if inputs.text_skip is not None:
            text = self.join_skip(text, inputs.text_skip)
        sequence = torch.cat([repeat_rows(tokens, len(text)), text], dim=1)
        sequence, normalised, modulation = self.normalise(sequence, inputs.vector)
        attended = self.attn(normalised, None, inputs.visible, inputs.bias, inputs.rotation)
        sequence = self.add_mlp(self.add_attention(sequence, attended, modulation), modulation)
        return sequence[:, :num_tokens], sequence[:, num_tokens:]


class TextKeysStream(Stream):
    """Text stream of the last `dual_stream` block: only its keys and values have an effect."""

    def __init__(
        self, config: FusionTransformerConfig, *, has_skip: bool, is_modulated: bool
    ) -> None:
        super().__init__(config, has_skip=has_skip, num_modulations=2 if is_modulated else 0)
        self.attn = TextKeys(config)


class DualStreamBlock(nn.Module):
    """`dual_stream`: image and text have weights of their own and one joint attention (SD3)."""

    def __init__(
        self,
        config: FusionTransformerConfig,
        *,
        has_skip: bool,
        has_text_skip: bool,
        is_modulated: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.image = Block(config, has_skip=has_skip, is_modulated=is_modulated)
        stream = TextKeysStream if is_last else Block
        self.text = stream(config, has_skip=has_text_skip, is_modulated=is_modulated)

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) to the image tokens (k * B, L, D) and text after the block."""
        assert inputs.text is not None
        image, vector, num_tokens = self.image, inputs.vector, tokens.shape[1]
        tokens = image.join_skip(tokens, inputs.skip)
        text = self.text.join_skip(inputs.text, inputs.text_skip)
        tokens, normalised, modulation = image.normalise(tokens, vector)
        text, text_normalised, text_modulation = self.text.normalise(text, vector)
        projected = image.attn.project(normalised, inputs.rotation)
        query, key, value = (repeat_rows(x, len(text)) for x in projected)
        # The last block's text has keys and values, but no queries.
        *text_query, text_key, text_value = self.text.attn.project(text_normalised)
        query = torch.cat([query, *text_query], dim=1)
        key = torch.cat([key, text_key], dim=1)
        value = torch.cat([value, text_value], dim=1)
        heads = attend_biased(
            image.attn.attend, inputs.bias, query, key, value, inputs.visible
        ).flatten(2)
        attended = image.attn.proj(heads[:, :num_tokens])
        tokens = image.add_mlp(image.add_attention(tokens, attended, modulation), modulation)
        if isinstance(self.text, Block):
            attended = self.text.attn.proj(heads[:, num_tokens:])
            text = self.text.add_attention(text, attended, text_modulation)
            text = self.text.add_mlp(text, text_modulation)
        return tokens, text


def build_block(
    config: FusionTransformerConfig, number: int
) -> Block | SeparateBlock | ConcatBlock | DualStreamBlock:
    """Build block `number` of the fusion map."""
    entry, has_skip = config.blocks[number], number in config.mirrors
    is_modulated = config.is_modulated(entry)
    if entry == "dual_stream":
        return DualStreamBlock(
            config,
            has_skip=has_skip,
            has_text_skip=config.has_text_skip(number),
            is_modulated=is_modulated,
            is_last=number == config.text_key_blocks[-1],
        )
    kinds = {"concat": ConcatBlock, "separate_cross_attention": SeparateBlock}
    return kinds.get(entry, Block)(config, has_skip=has_skip, is_modulated=is_modulated)
