"""Transformer backbones over patches: `FusionUViT` for captions, `TokenTransformer` for classes.

Both have the parameter names of U-ViT (Bao et al. 2023), so that its published weights load.
Shapes: B batch, k * B conditions, C latent channels, S latent size, L image tokens, M text or
condition tokens, D width.
"""

from collections.abc import Mapping

import torch
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.models.attention import Backend, Bias, load_attention
from ifvit.models.backbone import Backbone, EncodedCondition, check_shape
from ifvit.models.config import FusionUViTConfig, TokenTransformerConfig
from ifvit.models.layers import (
    Attention,
    Block,
    KeysValues,
    Modulation,
    PatchEmbed,
    modulate,
    repeat_rows,
    timestep_embedding,
)


class PatchTransformer(Backbone):
    """The first and last layers, which both transformers have in common."""

    config: FusionUViTConfig | TokenTransformerConfig

    def set_attention(self, backend: Backend) -> None:
        """Choose the attention backend of all blocks."""
        attend = load_attention(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def blocks(self) -> list[nn.Module]:
        """Return all transformer blocks, those of the text branch included."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def _create_embedding(self) -> None:
        """Create the patch embedding and the positions."""
        config = self.config
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.width))

    def _create_time_embed(self) -> nn.Sequential:
        width = self.config.width
        return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def _create_blocks(self, count: int, *, has_skip: bool = False) -> nn.ModuleList:
        return nn.ModuleList(self._create_block(has_skip=has_skip) for _ in range(count))

    def _create_block(self, *, has_skip: bool = False) -> Block:
        """Create a block for image tokens."""
        config = self.config
        return Block(
            config.width,
            config.num_heads,
            config.mlp_ratio,
            has_skip=has_skip,
            is_modulated=config.is_modulated,
        )

    def _create_head(self) -> None:
        """Create the layers that turn image tokens into noise."""
        config = self.config
        width, channels = config.width, config.latent_channels
        self.norm = nn.LayerNorm(width, elementwise_affine=not config.is_modulated)
        self.head_modulation = Modulation(width, 2) if config.is_modulated else None
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def _initialise(self) -> None:
        """Draw positions from N(0, 0.02) and Linear weights from N(0, init_std); zero the biases.

        Modulation starts at zero (adaLN-Zero); convolutions keep torch's own initial weights.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)

    def _embed_sinusoids(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(timesteps, self.config.width).to(self.pos_embed.dtype)

    def _pool(self, tokens: Tensor) -> Tensor | None:
        """Pooled condition (B, D) of its tokens (B, M, D); None without modulation."""
        if not self.config.is_modulated:
            return None
        pooled: Tensor = self.pooled_embed(tokens.mean(dim=1))
        return pooled

    def _predict(self, image_tokens: Tensor, vector: Tensor | None) -> Tensor:
        """Image tokens (B, L, D) and the conditioning vector (B, D) to noise (B, C, S, S)."""
        patch, side = self.config.patch_size, self.config.latent_size // self.config.patch_size
        normalised = self.norm(image_tokens)
        if self.head_modulation is not None:
            assert vector is not None
            normalised = modulate(normalised, *self.head_modulation(vector))
        pixels = self.decoder_pred(normalised)
        pixels = pixels.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        noise: Tensor = self.final_layer(
            pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        )
        return noise


def conditioning_vector(time: Tensor, pooled: Tensor) -> Tensor:
    """Sum of the time embedding (B, D), repeated k times, and the pooled condition (k * B, D)."""
    return repeat_rows(time, len(pooled)) + pooled


class FusionUViT(PatchTransformer):
    """U-shaped ViT for captions; the configuration says which blocks see text (arXiv 2403.16530).

    Early fusion by concatenation is U-ViT (Bao et al. 2023). Positions are in the order time,
    text, image. With modulation, image-only blocks follow the time embedding; fused blocks follow
    the time embedding and the mean token of the text branch.
    """

    config: FusionUViTConfig

    def __init__(self, config: FusionUViTConfig) -> None:
        super().__init__(config)
        self._create_embedding()
        width = config.width
        self.context_embed = nn.Linear(config.context_width, width)
        self.text_blocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio, has_skip=False)
            for _ in range(config.num_text_blocks)
        )
        if config.is_modulated:
            self.time_embed = self._create_time_embed()
            self.pooled_embed = nn.Linear(width, width)
        self.in_blocks = self._create_blocks(config.depth // 2)
        self.mid_block = self._create_block()
        self.out_blocks = self._create_blocks(config.depth // 2, has_skip=True)
        self._create_head()
        self._initialise()

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Run the text branch on text encoder outputs (B, M, context_width)."""
        check_shape("context", condition, self.config.context_shape)
        tokens = self.context_embed(condition.to(self.pos_embed.dtype))
        tokens = tokens + self.pos_embed[:, 1 : 1 + self.config.context_length]
        for block in self.text_blocks:
            tokens = block(tokens)
        keys_values: tuple[KeysValues | None, ...] = (None,) * self.config.num_fused_blocks
        if self.config.conditioning == "cross_attention":
            keys_values = tuple(block.text_keys_values(tokens) for block in self._fused_blocks())
        return EncodedCondition(tokens=tokens, keys_values=keys_values, pooled=self._pool(tokens))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor | EncodedCondition,
        biases: Mapping[int, Bias] | None = None,
    ) -> Tensor:
        """Predict the noise in noisy latents (B, C, S, S) at timesteps (B,) in 0 ... 999.

        `biases` shift attention logits of fused blocks; the key is the block's index in order of
        use. Queries and keys are in the order time, image, text; only concat has text queries.
        Tokens that do not depend on text are computed once and shared by all k captions of a
        sample; they are repeated at the first block that sees text.
        Raises UserError for latents or contexts of another shape than the configured one.
        """
        text = self._encode(latents, condition)
        sinusoids = self._embed_sinusoids(timesteps + self.config.timestep_offset)
        vector = self.time_embed(sinusoids) if self.config.is_modulated else None
        tokens = self._embed_tokens(latents, sinusoids)
        skips: list[Tensor] = []
        for block in self.in_blocks[: self.config.num_image_blocks]:
            tokens = block(tokens, vector=vector)
            skips.append(tokens)
        fused_vector = None
        if vector is not None and text.pooled is not None:
            fused_vector = conditioning_vector(vector, text.pooled)
            vector = repeat_rows(vector, len(fused_vector))
        tokens = self._fuse(tokens, text, biases or {}, fused_vector)
        for block in self.out_blocks[self._num_fused_per_side :]:
            tokens = block(tokens, skip=skips.pop(), vector=vector)
        last_vector = vector if self.config.num_image_blocks else fused_vector
        return self._predict(tokens[:, 1:], last_vector)

    @property
    def _num_fused_per_side(self) -> int:
        return self.config.depth // 2 - self.config.num_image_blocks

    def _fused_blocks(self) -> list[Block]:
        """Return the blocks that see text, in order: in, middle, out."""
        into = self.in_blocks[self.config.num_image_blocks :]
        return [*into, self.mid_block, *self.out_blocks[: self._num_fused_per_side]]

    def _embed_tokens(self, latents: Tensor, sinusoids: Tensor) -> Tensor:
        """Input tokens (B, 1 + L, D) of the image branch, the time token first."""
        patches = self.patch_embed(latents.to(self.pos_embed.dtype))
        time = sinusoids[:, None] + self.pos_embed[:, :1]
        image_positions = self.pos_embed[:, 1 + self.config.context_length :]
        return torch.cat([time, patches + image_positions], dim=1)

    def _fuse(
        self,
        tokens: Tensor,
        text: EncodedCondition,
        biases: Mapping[int, Bias],
        vector: Tensor | None,
    ) -> Tensor:
        """Run the fused blocks on tokens (B, 1 + L, D) and text; returns (k * B, 1 + L, D)."""
        num_tokens = tokens.shape[1]
        if self.config.conditioning == "concat":
            tokens = torch.cat([repeat_rows(tokens, len(text.tokens)), text.tokens], dim=1)
        skips: list[Tensor] = []
        for index, (block, keys_values) in enumerate(
            zip(self._fused_blocks(), text.keys_values, strict=True)
        ):
            skip = skips.pop() if index > self._num_fused_per_side else None
            tokens = block(tokens, keys_values, skip, biases.get(index), vector)
            if index < self._num_fused_per_side:
                skips.append(tokens)
        return tokens[:, :num_tokens]


class TokenTransformer(PatchTransformer):
    """Self-attention over condition, time and image tokens in all blocks (arXiv 2212.14678).

    The condition is one class token, or the tokens of a caption. With `long_skip` this is
    class-conditional U-ViT (Bao et al. 2023). With `conditioning: adaln` it is near to DiT (Peebles
    and Xie 2023) and differs in: a time token in the sequence, no bias of qkv, learned instead of
    sin-cos positions, normal instead of Xavier initialisation, sinusoids of full width instead of
    256, a linear layer on the condition, exact instead of tanh GELU, and a head that does not start
    at zero.
    """

    config: TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__(config)
        self._create_embedding()
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes + 1, config.width)
        elif config.context_width is not None:
            self.context_embed = nn.Linear(config.context_width, config.width)
        self.time_embed = self._create_time_embed()
        if config.is_modulated:
            self.pooled_embed = nn.Linear(config.width, config.width)
        num_skips = config.depth // 2 if config.long_skip else 0
        self.in_blocks = self._create_blocks(config.depth - num_skips)
        self.out_blocks = self._create_blocks(num_skips, has_skip=True)
        self._create_head()
        self._initialise()

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Embed the numbers (B,) of classes, or contexts (B, M, context_width)."""
        if self.config.context_shape is None:
            tokens = self.label_emb(condition)[:, None]
        else:
            check_shape("context", condition, self.config.context_shape)
            tokens = self.context_embed(condition.to(self.pos_embed.dtype))
        pooled = self._pool(tokens)
        tokens = tokens[:, : self.config.num_condition_tokens]
        return EncodedCondition(tokens=tokens + self.pos_embed[:, : tokens.shape[1]], pooled=pooled)

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor | EncodedCondition
    ) -> Tensor:
        """Predict the noise in noisy latents (B, C, S, S) at timesteps (B,) in 0 ... 999.

        Raises UserError for latents or contexts of another shape than the configured one.
        """
        encoded = self._encode(latents, condition)
        num_conditions = self.config.num_condition_tokens
        time = self.time_embed(self._embed_sinusoids(timesteps))
        image = self.patch_embed(latents.to(self.pos_embed.dtype))
        tokens = torch.cat([time[:, None], image], dim=1) + self.pos_embed[:, num_conditions:]
        tokens = repeat_rows(tokens, len(encoded.tokens))
        tokens = torch.cat([encoded.tokens, tokens], dim=1)
        vector = None if encoded.pooled is None else conditioning_vector(time, encoded.pooled)
        skips: list[Tensor] = []
        for block in self.in_blocks:
            tokens = block(tokens, vector=vector)
            if self.config.long_skip:
                skips.append(tokens)
        # The last of in_blocks is the middle block, whose output no skip uses.
        for block, skip in zip(self.out_blocks, skips[-2::-1], strict=True):
            tokens = block(tokens, skip=skip, vector=vector)
        return self._predict(tokens[:, num_conditions + 1 :], vector)
