"""The fusion backbone: a U-shaped ViT that meets its text where the configuration says.

Shapes: B batch, C latent channels, S latent size, L image tokens, M text tokens, D width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ifvit.errors import UserError
from ifvit.models.attention import Backend, Bias, load_attention
from ifvit.models.config import Conditioning, FusionUViTConfig
from ifvit.models.layers import (
    Attention,
    Block,
    KeysValues,
    PatchEmbed,
    repeat_rows,
    timestep_embedding,
)


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """Everything of the captions that depends on neither time nor latents; once per prompt."""

    tokens: Tensor
    """(B, M, D): text tokens after the text branch."""
    keys_values: tuple[KeysValues | None, ...]
    """Per fused block, in order of use; None under concat, where text joins the sequence."""


class FusionUViT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # their config_name differs
    """Predicts the noise in latents, given a timestep and a caption (arXiv 2403.16530).

    Early fusion under concat is U-ViT (Bao et al. 2023), with its parameter names and its
    positions in the order time, text, image.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913  diffusers writes config.json from these arguments
        self,
        *,
        latent_size: int,
        latent_channels: int = 4,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int = 4,
        context_length: int,
        context_width: int,
        conditioning: Conditioning,
        num_image_blocks: int,
        num_text_blocks: int,
        init_std: float = 0.02,
        timestep_offset: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # register_to_config has stored the arguments already.
        fields = [field.name for field in dataclasses.fields(FusionUViTConfig)]
        self.shape = FusionUViTConfig(**{name: self.config[name] for name in fields})
        num_tokens = 1 + context_length + self.shape.num_image_tokens

        def blocks(count: int, *, has_skip: bool = False) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, num_heads, mlp_ratio, has_skip=has_skip) for _ in range(count)
            )

        self.patch_embed = PatchEmbed(latent_channels, patch_size, width)
        self.context_embed = nn.Linear(context_width, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.text_blocks = blocks(num_text_blocks)
        self.in_blocks = blocks(depth // 2)
        self.mid_block = Block(width, num_heads, mlp_ratio, has_skip=False)
        self.out_blocks = blocks(depth // 2, has_skip=True)
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * latent_channels)
        self.final_layer = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self._initialise()

    def set_attention(self, backend: Backend) -> None:
        """Choose how every block computes attention; raises UserError if this machine cannot."""
        attend = load_attention(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def encode_text(self, context: Tensor) -> TextContext:
        """Text encoder output (B, M, context_width) to what the fused blocks need of it."""
        expected = (self.shape.context_length, self.shape.context_width)
        _check_shape("context", context, expected)
        tokens = self.context_embed(context.to(self.pos_embed.dtype))
        tokens = tokens + self.pos_embed[:, 1 : 1 + self.shape.context_length]
        for block in self.text_blocks:
            tokens = block(tokens)
        if self.shape.conditioning == "concat":
            return TextContext(tokens=tokens, keys_values=(None,) * self.shape.num_fused_blocks)
        return TextContext(
            tokens=tokens,
            keys_values=tuple(block.text_keys_values(tokens) for block in self._fused_blocks()),
        )

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | TextContext,
        biases: Mapping[int, Bias] | None = None,
    ) -> Tensor:
        """Noise predicted in noisy latents (B, C, S, S) at timesteps (B,) in 0 ... 999.

        `biases` shift attention logits, by index of the fused block in order of use; queries and
        keys stand as time, image, text (text among the queries under concat only).
        `context` may hold k * B captions, caption i meant for latents i mod B: the blocks before
        the text are then computed once for all k, and the result has k * B rows (guidance).
        Raises UserError if latents or context do not have the configured shape.
        """
        size = self.shape.latent_size
        _check_shape("latents", latents, (self.shape.latent_channels, size, size))
        text = context if isinstance(context, TextContext) else self.encode_text(context)
        tokens = self._embed_latents(latents, timesteps)
        skips: list[Tensor] = []
        for block in self.in_blocks[: self.shape.num_image_blocks]:
            tokens = block(tokens)
            skips.append(tokens)

        if len(text.tokens) % len(tokens):
            raise UserError(
                f"{len(text.tokens)} captions cannot be shared out over "
                f"{len(tokens)} latents; give a multiple"
            )
        tokens = self._fuse(tokens, text, biases or {})
        for block in self.out_blocks[self._num_fused_per_side :]:
            tokens = block(tokens, skip=skips.pop())
        return self._read_noise(tokens)

    @property
    def _num_fused_per_side(self) -> int:
        return self.shape.depth // 2 - self.shape.num_image_blocks

    def _fused_blocks(self) -> list[Block]:
        """The blocks that see text, in order: in, middle, out."""
        into = self.in_blocks[self.shape.num_image_blocks :]
        return [*into, self.mid_block, *self.out_blocks[: self._num_fused_per_side]]

    def _embed_latents(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Image branch input (B, 1 + L, D), the time token first."""
        dtype = self.pos_embed.dtype
        time = timestep_embedding(timesteps + self.shape.timestep_offset, self.shape.width)
        patches = self.patch_embed(latents.to(dtype))
        image_positions = self.pos_embed[:, 1 + self.shape.context_length :]
        return torch.cat(
            [time.to(dtype)[:, None] + self.pos_embed[:, :1], patches + image_positions], dim=1
        )

    def _fuse(self, tokens: Tensor, text: TextContext, biases: Mapping[int, Bias]) -> Tensor:
        """The middle of the U, where image tokens (B, 1 + L, D) meet the text."""
        num_tokens = tokens.shape[1]
        if self.shape.conditioning == "concat":
            tokens = torch.cat([repeat_rows(tokens, len(text.tokens)), text.tokens], dim=1)
        skips: list[Tensor] = []
        for index, (block, keys_values) in enumerate(
            zip(self._fused_blocks(), text.keys_values, strict=True)
        ):
            skip = skips.pop() if index > self._num_fused_per_side else None
            tokens = block(tokens, keys_values, skip, biases.get(index))
            if index < self._num_fused_per_side:
                skips.append(tokens)
        return tokens[:, :num_tokens]

    def _read_noise(self, tokens: Tensor) -> Tensor:
        """Image branch output (B, 1 + L, D) to (B, C, S, S)."""
        patch, side = self.shape.patch_size, self.shape.latent_size // self.shape.patch_size
        pixels = self.decoder_pred(self.norm(tokens[:, 1:]))
        pixels = pixels.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        noise: Tensor = self.final_layer(
            pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        )
        return noise

    def _initialise(self) -> None:
        """Normal(0, 0.02) positions, Normal(0, init_std) Linear weights, zero Linear biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.shape.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def build_backbone(config: FusionUViTConfig) -> FusionUViT:
    """A backbone with fresh weights, drawn from torch's global generator."""
    backbone: FusionUViT = FusionUViT(**dataclasses.asdict(config))
    return backbone


def restore_backbone(config: FusionUViTConfig, state_dict: Mapping[str, Tensor]) -> FusionUViT:
    """A float32 backbone in eval mode that holds a copy of `state_dict`.

    Raises RuntimeError if keys or shapes differ from what `config` needs.
    """
    with torch.device("meta"):  # no time spent on weights that are replaced at once
        backbone = build_backbone(config)
    backbone.to_empty(device="cpu")
    backbone.load_state_dict(state_dict)
    backbone.eval()
    return backbone


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape[1:]) != expected:
        raise UserError(
            f"{name} of shape {tuple(tensor.shape[1:])} do not fit this backbone, "
            f"which was built for {expected}"
        )
