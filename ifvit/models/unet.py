"""The U-Net of latent diffusion (Rombach et al. 2022), the control for the transformers.

Diffusers builds it. The condition enters by cross-attention, as in that paper's text-to-image and
class-conditional ImageNet models: the tokens of a caption, or one token of the class.

Shapes: B batch, C latent channels, S latent size, M condition tokens, D their width.
"""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.conditions import Condition, padded_lengths, tokens_of
from ifvit.models.attention import Attend, Backend, load_attention
from ifvit.models.backbone import Backbone, EncodedCondition, check_context
from ifvit.models.config import UNetConfig
from ifvit.models.layers import mark_length, repeat_rows


class UNet(Backbone):
    """Residual blocks at falling resolutions, with transformer blocks at the coarsest ones."""

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        if config.num_classes is not None:
            self.class_embed = nn.Embedding(config.num_classes + 1, config.class_width)
        num_attention = config.num_attention_levels
        num_plain = len(config.channels) - num_attention
        down = ["DownBlock2D"] * num_plain + ["CrossAttnDownBlock2D"] * num_attention
        up = ["CrossAttnUpBlock2D"] * num_attention + ["UpBlock2D"] * num_plain
        self.unet: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            sample_size=config.latent_size,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.channels,
            layers_per_block=config.blocks_per_level,
            attention_head_dim=tuple(count // config.head_width for count in config.channels),
            cross_attention_dim=config.context_width or config.class_width,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
        )
        self.set_attention("sdpa")

    def set_attention(self, backend: Backend) -> None:
        """Choose the attention backend of all transformer blocks."""
        self.unet.set_attn_processor(_Processor(load_attention(backend)))

    def parts(self) -> list[nn.Module]:
        """Return the resolutions on the way down, the middle, and those on the way up."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def encode_condition(self, condition: Condition) -> EncodedCondition:
        """Embed the numbers (B,) of classes as tokens (B, 1, D); pass contexts (B, M, D) on."""
        tokens, lengths = tokens_of(condition), padded_lengths(condition)
        if self.config.context_shape is None:
            return EncodedCondition(tokens=self.class_embed(tokens)[:, None])
        check_context(condition, self.config.context_shape)
        return EncodedCondition(tokens=tokens.to(self.dtype), lengths=lengths)

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Condition | EncodedCondition
    ) -> Tensor:
        """Predict noise, v or velocity from latents (B, C, S, S) at timesteps (B,), 0 to 1000.

        Raises UserError for latents or contexts of another shape than the configured one.
        """
        encoded = self._encode(latents, condition)
        tokens, visible = encoded.tokens, encoded.visible_keys(0)
        latents, timesteps = (repeat_rows(x, len(tokens)) for x in (latents, timesteps))
        options = None
        if visible is not None:
            mark_length(tokens, visible)
            options = {"visible": visible}
        predicted: Tensor = self.unet(
            latents.to(tokens.dtype), timesteps, tokens, cross_attention_kwargs=options
        ).sample
        return predicted


class _Processor:
    """Makes diffusers' attention layers use one of our attention functions."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D), with keys and values of the condition if it is given.

        `visible` (B, M) is false for the padding of the condition.
        """
        if encoder_hidden_states is None:
            source, visible = hidden_states, None
        else:
            source = encoder_hidden_states
        projected = (layer.to_q(hidden_states), layer.to_k(source), layer.to_v(source))
        query, key, value = (x.unflatten(-1, (layer.heads, -1)) for x in projected)
        attended: Tensor = layer.to_out[0](self._attend(query, key, value, visible).flatten(2))
        return attended
