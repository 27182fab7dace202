"""The U-Net of latent diffusion (Rombach et al. 2022), what transformers are compared with.

Diffusers builds it; the condition enters by cross-attention in both of its forms, as in the paper
and its class-conditional ImageNet models: tokens of the caption, or one token of the class.

Shapes: B batch, C latent channels, S latent size, M condition tokens, D their width.
"""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.models.attention import Attend, Backend, load_attention
from ifvit.models.backbone import Backbone, EncodedCondition, check_shape
from ifvit.models.config import UNetConfig
from ifvit.models.layers import repeat_rows


class UNet(Backbone):
    """Residual blocks at falling resolutions, with transformer blocks in the coarsest of them."""

    config: UNetConfig

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913  diffusers writes config.json from these arguments
        self,
        *,
        latent_size: int,
        latent_channels: int = 4,
        num_classes: int | None = None,
        context_length: int | None = None,
        context_width: int | None = None,
        architecture: str = "unet",
        channels: tuple[int, ...],
        num_attention_levels: int,
        blocks_per_level: int = 2,
        head_width: int = 64,
        class_width: int = 512,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        has_attention = [
            level >= len(channels) - num_attention_levels for level in range(len(channels))
        ]
        if num_classes is not None:
            self.class_embed = nn.Embedding(num_classes + 1, class_width)
        self.unet: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=channels,
            layers_per_block=blocks_per_level,
            attention_head_dim=tuple(count // head_width for count in channels),
            cross_attention_dim=context_width or class_width,
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention
            ),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if attends else "UpBlock2D"
                for attends in reversed(has_attention)
            ),
        )
        self.set_attention("sdpa")

    def set_attention(self, backend: Backend) -> None:
        """As `Backbone` says."""
        self.unet.set_attn_processor(_Processor(load_attention(backend)))

    def blocks(self) -> list[nn.Module]:
        """As `Backbone` says: the resolutions on the way down, the middle, those on the way up."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Numbers (B,) of classes => tokens (B, 1, D); contexts (B, M, D) stay what they are."""
        if self.config.context_shape is None:
            return EncodedCondition(tokens=self.class_embed(condition)[:, None])
        check_shape("context", condition, self.config.context_shape)
        return EncodedCondition(tokens=condition.to(self.dtype))

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor | EncodedCondition
    ) -> Tensor:
        """As `Backbone` says. Raises UserError for latents or contexts of another shape."""
        tokens = self._encode_for(latents, condition).tokens
        latents, timesteps = (repeat_rows(x, len(tokens)) for x in (latents, timesteps))
        noise: Tensor = self.unet(latents.to(tokens.dtype), timesteps, tokens).sample
        return noise


class _Processor:
    """How diffusers' attention layers compute, by our own function."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D); keys and values of the condition, if it is given."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (layer.to_q(hidden_states), layer.to_k(source), layer.to_v(source))
        query, key, value = (x.unflatten(-1, (layer.heads, -1)) for x in projected)
        attended: Tensor = layer.to_out[0](self._attend(query, key, value).flatten(2))
        return attended
