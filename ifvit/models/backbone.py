"""What engine and sampler see of every backbone, and what all backbones over patches share.

Shapes: B batch, C latent channels, S latent size, L image tokens, M condition tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ifvit.errors import UserError
from ifvit.models.attention import Backend, load_attention
from ifvit.models.config import (
    BackboneConfig,
    FusionUViTConfig,
    TokenTransformerConfig,
    restore_config,
)
from ifvit.models.layers import (
    Attention,
    Block,
    KeysValues,
    Modulation,
    PatchEmbed,
    modulate,
    repeat_rows,
)


@dataclass(frozen=True, kw_only=True)
class EncodedCondition:
    """All of a condition that depends on neither time nor latents; computed once per prompt."""

    tokens: Tensor
    """(B, M, D): text tokens after the text branch, or the class token."""
    keys_values: tuple[KeysValues | None, ...] = ()
    """Per fused block, in order of use; None where tokens join the sequence, or do not enter it."""
    pooled: Tensor | None = None
    """(B, D): what modulates blocks together with time, where they are modulated."""

    def expand(self, num_rows: int) -> "EncodedCondition":
        """Return the only row `num_rows` times, without a copy; as many rows stay as they are."""
        return _map_tensors(lambda x: x.expand(num_rows, *x.shape[1:]), self)

    def append(self, other: "EncodedCondition") -> "EncodedCondition":
        """Return these rows followed by those of `other`."""
        return _map_tensors(lambda *pair: torch.cat(pair), self, other)


def _map_tensors(function: Callable[..., Tensor], *encoded: EncodedCondition) -> EncodedCondition:
    """Apply `function` to the tensors of the same field and block."""

    def map_block(*blocks: KeysValues | None) -> KeysValues | None:
        keys_values = list(zip(*(block for block in blocks if block), strict=True))
        return (function(*keys_values[0]), function(*keys_values[1])) if keys_values else None

    pooled = [one.pooled for one in encoded if one.pooled is not None]
    return EncodedCondition(
        tokens=function(*(one.tokens for one in encoded)),
        keys_values=tuple(map(map_block, *(one.keys_values for one in encoded))),
        pooled=function(*pooled) if pooled else None,
    )


class Backbone(ModelMixin, ConfigMixin, ABC):  # type: ignore[misc]  # their config_name differs
    """Predicts the noise in latents, given a timestep and a caption or a class."""

    @cached_property
    def config(self) -> BackboneConfig:  # type: ignore[override]
        """The constructor's arguments, typed, in place of diffusers' dictionary of them."""
        return restore_config(self._internal_dict)  # type: ignore[has-type]

    @abstractmethod
    def encode_condition(self, condition: Tensor) -> EncodedCondition:
        """Contexts (B, M, context_width) of captions, or numbers (B,) of classes, encoded."""

    @abstractmethod
    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor | EncodedCondition
    ) -> Tensor:
        """Noise predicted in noisy latents (B, C, S, S) at timesteps (B,) in 0 ... 999.

        `condition` may hold k * B rows, row i meant for latents i mod B; so has the result then.
        """

    @abstractmethod
    def set_attention(self, backend: Backend) -> None:
        """Choose how attention is computed; raises UserError if this machine cannot."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts that are compiled, or computed again in the backward pass, one by one."""

    def _encode_for(
        self, latents: Tensor, condition: Tensor | EncodedCondition
    ) -> EncodedCondition:
        """The condition, encoded if it is not yet.

        Raises UserError for latents of another shape, or conditions that are no multiple of them.
        """
        size = self.config.latent_size
        check_shape("latents", latents, (self.config.latent_channels, size, size))
        if not isinstance(condition, EncodedCondition):
            condition = self.encode_condition(condition)
        if len(condition.tokens) % len(latents):
            raise UserError(
                f"{len(condition.tokens)} conditions cannot be shared out over "
                f"{len(latents)} latents; give a multiple"
            )
        return condition


class PatchBackbone(Backbone):
    """The first and the last layers of transformers over patches, with U-ViT's parameter names."""

    config: FusionUViTConfig | TokenTransformerConfig

    def set_attention(self, backend: Backend) -> None:
        """As `Backbone` says."""
        attend = load_attention(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def blocks(self) -> list[nn.Module]:
        """As `Backbone` says."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def _create_embedding(self, num_tokens: int) -> None:
        """Patches to tokens, and positions of `num_tokens` tokens."""
        config = self.config
        self.patch_embed = PatchEmbed(config.latent_channels, config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.width))

    def _create_head(self) -> None:
        """Tokens to noise."""
        channels = self.config.latent_channels
        is_modulated = self.config.is_modulated
        self.norm = nn.LayerNorm(self.config.width, elementwise_affine=not is_modulated)
        self.head_modulation = Modulation(self.config.width, 2) if is_modulated else None
        self.decoder_pred = nn.Linear(self.config.width, self.config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def _create_blocks(self, count: int, *, has_skip: bool = False) -> nn.ModuleList:
        return nn.ModuleList(self._create_block(has_skip=has_skip) for _ in range(count))

    def _create_block(self, *, has_skip: bool = False) -> Block:
        """A block on the way of the image tokens."""
        config = self.config
        return Block(
            config.width,
            config.num_heads,
            config.mlp_ratio,
            has_skip=has_skip,
            is_modulated=config.is_modulated,
        )

    def _create_time_embed(self) -> nn.Sequential:
        """Sinusoids of the timestep to a learned vector."""
        width = self.config.width
        return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def _initialise(self) -> None:
        """Normal(0, 0.02) positions, Normal(0, init_std) other weights, zero Linear biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)

    def _read_noise(self, image_tokens: Tensor, signal: Tensor | None) -> Tensor:
        """Image tokens (B, L, D) and, where modulated, the signal (B, D) to (B, C, S, S)."""
        patch, side = self.config.patch_size, self.config.latent_size // self.config.patch_size
        normalised = self.norm(image_tokens)
        if self.head_modulation is not None:
            assert signal is not None
            normalised = modulate(normalised, *self.head_modulation(signal))
        pixels = self.decoder_pred(normalised)
        pixels = pixels.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        noise: Tensor = self.final_layer(
            pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        )
        return noise


def add_signals(time: Tensor, pooled: Tensor) -> Tensor:
    """Of time (B, D) and of k * B conditions (k * B, D), what modulates the k * B rows."""
    return repeat_rows(time, len(pooled)) + pooled


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise UserError unless every row of `tensor` has the shape that a backbone was built for."""
    if tuple(tensor.shape[1:]) != expected:
        raise UserError(
            f"{name} of shape {tuple(tensor.shape[1:])} do not fit this backbone, "
            f"which was built for {expected}"
        )
