"""The fusion backbone: a U-shaped ViT that meets its text where the configuration says.

Shapes: B batch, C latent channels, S latent size, L image tokens, M text tokens, D width.
"""

from collections.abc import Mapping

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.models.attention import Bias
from ifvit.models.backbone import EncodedCondition, PatchBackbone, add_signals, check_shape
from ifvit.models.config import Conditioning, FusionUViTConfig
from ifvit.models.layers import Block, KeysValues, repeat_rows, timestep_embedding


class FusionUViT(PatchBackbone):
    """Predicts the noise in latents, given a timestep and a caption (arXiv 2403.16530).

    Early fusion under concat is U-ViT (Bao et al. 2023), with its parameter names and its
    positions in the order time, text, image. Modulated (adaLN-Zero), image-only blocks follow the
    time and fused blocks the time and the text branch's mean token.
    """

    config: FusionUViTConfig

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913  diffusers writes config.json from these arguments
        self,
        *,
        latent_size: int,
        latent_channels: int = 4,
        patch_size: int,
        width: int,
        num_heads: int,
        mlp_ratio: int = 4,
        init_std: float = 0.02,
        modulation: bool = False,
        architecture: str = "fusion_uvit",
        depth: int,
        context_length: int,
        context_width: int,
        conditioning: Conditioning,
        num_image_blocks: int,
        num_text_blocks: int,
        timestep_offset: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        config = self.config
        self._create_embedding(config.num_tokens)
        self.context_embed = nn.Linear(context_width, width)
        self.text_blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, has_skip=False) for _ in range(num_text_blocks)
        )
        if config.is_modulated:
            self.time_embed = self._create_time_embed()
            self.pooled_embed = nn.Linear(width, width)
        self.in_blocks = self._create_blocks(depth // 2)
        self.mid_block = self._create_block()
        self.out_blocks = self._create_blocks(depth // 2, has_skip=True)
        self._create_head()
        self._initialise()

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Text encoder output (B, M, context_width) to what the fused blocks need of it."""
        check_shape("context", condition, self.config.context_shape)
        tokens = self.context_embed(condition.to(self.pos_embed.dtype))
        tokens = tokens + self.pos_embed[:, 1 : 1 + self.config.context_length]
        for block in self.text_blocks:
            tokens = block(tokens)
        keys_values: tuple[KeysValues | None, ...] = (None,) * self.config.num_fused_blocks
        if self.config.conditioning == "cross_attention":
            keys_values = tuple(block.text_keys_values(tokens) for block in self._fused_blocks())
        pooled = self.pooled_embed(tokens.mean(dim=1)) if self.config.is_modulated else None
        return EncodedCondition(tokens=tokens, keys_values=keys_values, pooled=pooled)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor | EncodedCondition,
        biases: Mapping[int, Bias] | None = None,
    ) -> Tensor:
        """Noise predicted in noisy latents (B, C, S, S) at timesteps (B,) in 0 ... 999.

        `biases` shift attention logits, by index of the fused block in order of use; queries and
        keys stand as time, image, text (text among the queries under concat only).
        `condition` may hold k * B captions, caption i meant for latents i mod B: the blocks before
        the text are then computed once for all k, and the result has k * B rows (guidance).
        Raises UserError if latents or context do not have the configured shape.
        """
        text = self._encode_for(latents, condition)
        time = self._embed_time(timesteps)
        signal = self.time_embed(time) if self.config.is_modulated else None
        tokens = self._embed_tokens(latents, time)
        skips: list[Tensor] = []
        for block in self.in_blocks[: self.config.num_image_blocks]:
            tokens = block(tokens, signal=signal)
            skips.append(tokens)
        fused_signal = None
        if signal is not None and text.pooled is not None:
            fused_signal = add_signals(signal, text.pooled)
            signal = repeat_rows(signal, len(fused_signal))
        tokens = self._fuse(tokens, text, biases or {}, fused_signal)
        for block in self.out_blocks[self._num_fused_per_side :]:
            tokens = block(tokens, skip=skips.pop(), signal=signal)
        last = signal if self.config.num_image_blocks else fused_signal
        return self._read_noise(tokens[:, 1:], last)

    @property
    def _num_fused_per_side(self) -> int:
        return self.config.depth // 2 - self.config.num_image_blocks

    def _fused_blocks(self) -> list[Block]:
        """The blocks that see text, in order: in, middle, out."""
        into = self.in_blocks[self.config.num_image_blocks :]
        return [*into, self.mid_block, *self.out_blocks[: self._num_fused_per_side]]

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        """Sinusoids (B, D)."""
        offset = timesteps + self.config.timestep_offset
        return timestep_embedding(offset, self.config.width).to(self.pos_embed.dtype)

    def _embed_tokens(self, latents: Tensor, time: Tensor) -> Tensor:
        """Image branch input (B, 1 + L, D), the time token first."""
        patches = self.patch_embed(latents.to(self.pos_embed.dtype))
        image_positions = self.pos_embed[:, 1 + self.config.context_length :]
        return torch.cat([time[:, None] + self.pos_embed[:, :1], patches + image_positions], dim=1)

    def _fuse(
        self,
        tokens: Tensor,
        text: EncodedCondition,
        biases: Mapping[int, Bias],
        signal: Tensor | None,
    ) -> Tensor:
        """The middle of the U, where image tokens (B, 1 + L, D) meet the text."""
        num_tokens = tokens.shape[1]
        if self.config.conditioning == "concat":
            tokens = torch.cat([repeat_rows(tokens, len(text.tokens)), text.tokens], dim=1)
        skips: list[Tensor] = []
        for index, (block, keys_values) in enumerate(
            zip(self._fused_blocks(), text.keys_values, strict=True)
        ):
            skip = skips.pop() if index > self._num_fused_per_side else None
            tokens = block(tokens, keys_values, skip, biases.get(index), signal)
            if index < self._num_fused_per_side:
                skips.append(tokens)
        return tokens[:, :num_tokens]
