"""A plain transformer over class, time and image tokens, without long skips unless asked for.

"Exploring Transformer Backbones for Image Diffusion Models" (arXiv 2212.14678); with long skips it
is class-conditional U-ViT (Bao et al. 2023), and with `conditioning: adaln` DiT (Peebles and Xie
2023) with a time token. Caption tokens may take the place of the class token.

Shapes: B batch, C latent channels, S latent size, L image tokens, M condition tokens, D width.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.models.backbone import EncodedCondition, PatchBackbone, add_signals, check_shape
from ifvit.models.config import TokenTransformerConfig
from ifvit.models.layers import repeat_rows, timestep_embedding


class TokenTransformer(PatchBackbone):
    """Self-attention over class | time | image, or caption | time | image, in all blocks."""

    config: TokenTransformerConfig

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913  diffusers writes config.json from these arguments
        self,
        *,
        latent_size: int,
        latent_channels: int = 4,
        num_classes: int | None = None,
        context_length: int | None = None,
        context_width: int | None = None,
        patch_size: int,
        width: int,
        num_heads: int,
        mlp_ratio: int = 4,
        init_std: float = 0.02,
        modulation: bool = False,
        architecture: str = "token_transformer",
        depth: int,
        long_skip: bool = False,
        conditioning: str = "tokens",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        config = self.config
        self._create_embedding(config.num_tokens)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, width)
        elif context_width is not None:
            self.context_embed = nn.Linear(context_width, width)
        self.time_embed = self._create_time_embed()
        if config.is_modulated:
            self.pooled_embed = nn.Linear(width, width)
        num_skips = depth // 2 if long_skip else 0
        self.in_blocks = self._create_blocks(depth - num_skips)
        self.out_blocks = self._create_blocks(num_skips, has_skip=True)
        self._create_head()
        self._initialise()

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Numbers (B,) of classes, or contexts (B, M, context_width), to the first tokens."""
        if self.config.context_shape is None:
            tokens = self.label_emb(condition)[:, None]
        else:
            check_shape("context", condition, self.config.context_shape)
            tokens = self.context_embed(condition.to(self.pos_embed.dtype))
        pooled = self.pooled_embed(tokens.mean(dim=1)) if self.config.is_modulated else None
        tokens = tokens[:, : self.config.num_condition_tokens]
        return EncodedCondition(tokens=tokens + self.pos_embed[:, : tokens.shape[1]], pooled=pooled)

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor | EncodedCondition
    ) -> Tensor:
        """As `Backbone` says. Raises UserError for latents or contexts of another shape."""
        encoded = self._encode_for(latents, condition)
        num_conditions = self.config.num_condition_tokens
        dtype = self.pos_embed.dtype
        time = self.time_embed(timestep_embedding(timesteps, self.config.width).to(dtype))
        image = self.patch_embed(latents.to(dtype))
        tokens = torch.cat([time[:, None], image], dim=1) + self.pos_embed[:, num_conditions:]
        tokens = repeat_rows(tokens, len(encoded.tokens))
        tokens = torch.cat([encoded.tokens, tokens], dim=1)
        signal = None if encoded.pooled is None else add_signals(time, encoded.pooled)
        skips: list[Tensor] = []
        for block in self.in_blocks:
            tokens = block(tokens, signal=signal)
            if self.config.long_skip:
                skips.append(tokens)
        # The last of in_blocks is the middle one, which nothing skips.
        for block, skip in zip(self.out_blocks, skips[-2::-1], strict=True):
            tokens = block(tokens, skip=skip, signal=signal)
        return self._read_noise(tokens[:, num_conditions + 1 :], signal)
