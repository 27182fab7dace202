"""`FusionTransformer`: blocks over image tokens, and a fusion map of how text takes part in each.

Shapes: B batch, k * B conditions, C latent channels, S latent size, L image tokens, M text tokens
(1 for a class), D width.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # pipelines look for it here
from torch import Tensor, nn

from ifvit.conditions import Condition, padded_lengths, tokens_of
from ifvit.models.attention import Backend, Bias, load_attention
from ifvit.models.backbone import Backbone, EncodedCondition, check_context
from ifvit.models.blocks import Block, BlockInputs, build_block
from ifvit.models.config import READS_TEXT, TEXT_KEYS, UPDATES_TEXT, Fusion, FusionTransformerConfig
from ifvit.models.layers import (
    Attention,
    CrossAttention,
    KeysValues,
    PatchEmbed,
    build_modulation,
    build_norm,
    mark_length,
    mean_of_visible,
    modulate,
    repeat_rows,
    rotation_table,
)


class FusionTransformer(Backbone):
    """A stack of transformer blocks; `config.fusion` says for each how text takes part.

    With `long_skip` and `concat` in every block it is U-ViT (Bao et al. 2023); intermediate fusion
    is arXiv 2403.16530. Parameters have torch's own initial values until `initial_tensor` replaces
    them; `ifvit.models.weights.build_backbone` does so.
    """

    config: FusionTransformerConfig

    def __init__(self, config: FusionTransformerConfig) -> None:
        super().__init__(config)
        width, channels = config.width, config.latent_channels
        # Frequencies from 1 to 1/10000, cosines first, as in U-ViT (Vaswani et al. 2017, 3.5).
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.patch_embed = PatchEmbed(channels, config.patch_size, width)
        num_positions = 1 + config.num_text_tokens + config.num_image_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, width))
        if config.num_registers:
            self.registers = nn.Parameter(torch.zeros(1, config.num_registers, width))
        if config.text_blocks and config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes + 1, width)
        elif config.text_blocks and config.context_width is not None:
            self.context_embed = nn.Linear(config.context_width, width)
        self.text_blocks = nn.ModuleList(
            Block(config, has_skip=False, is_modulated=False) for _ in range(config.num_text_blocks)
        )
        self.time_embed = self.pooled_embed = self.shared_modulation = None
        modulated = [entry for entry in config.blocks if config.is_modulated(entry)]
        if modulated:
            self.time_embed = nn.Sequential(
                nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            )
        if set(modulated) - {"image"}:
            self.pooled_embed = nn.Linear(width, width)
        if config.modulation == "shared":
            self.shared_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(build_block(config, n) for n in range(len(config.blocks)))
        ends_modulated = config.is_modulated(config.blocks[-1])
        self.head_norm = build_norm(config, affine=not ends_modulated)
        self.head_modulation = build_modulation(config, 2) if ends_modulated else None
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        if config.representation_width is not None:
            # REPA's projector, whose 2048 channels are narrower here for small backbones.
            hidden = min(2048, 4 * width)
            self.representation_projector = nn.Sequential(
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, config.representation_width),
            )

    def set_attention(self, backend: Backend) -> None:
        """Choose the attention backend of all blocks."""
        attend = load_attention(backend)
        for module in self.modules():
            if isinstance(module, Attention | CrossAttention):
                module.attend = attend

    def parts(self) -> list[nn.Module]:
        """Return all blocks, those of the text branch first."""
        return [*self.text_blocks, *self.blocks]

    def initial_tensor(self, name: str, seed: int) -> Tensor:
        """Sample the initial value of a parameter on the CPU, a function of its name and the seed.

        Weights of Linear layers and embeddings are N(0, init_std) and biases 0. Positions,
        registers and, as in PixArt, the shared modulation are N(0, 0.02). Other modulation and
        the output of separate cross-attention start at zero; convolutions have torch's own
        distribution.
        """
        owner, _, kind = name.rpartition(".")
        module, parameter = self.get_submodule(owner), self.get_parameter(name)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        full = torch.zeros(parameter.shape)
        if isinstance(module, nn.Conv2d):
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            return full.uniform_(-bound, bound, generator=generator)
        if isinstance(module, nn.Linear | nn.Embedding):
            starts_at_zero = owner.endswith(("modulation.linear", "cross_attn.proj"))
            if kind == "bias" or starts_at_zero:
                return full
            # Gates as large as init_std makes them would multiply the tokens of narrow backbones.
            std = 0.02 if owner.startswith("shared_modulation") else self._init_std
            return nn.init.trunc_normal_(full, std=std, generator=generator)
        if kind == "table":
            return full.normal_(0, self.config.width**-0.5, generator=generator)
        if owner == "":
            return nn.init.trunc_normal_(full, std=0.02, generator=generator)
        return full if kind == "bias" else full.fill_(1.0)  # norms

    @property
    def _init_std(self) -> float:
        std, width = self.config.init_std, self.config.width
        return max(0.02, min(0.02 * 512 / width, width**-0.5)) if std == "auto" else float(std)

    def encode_condition(self, condition: Condition) -> EncodedCondition:
        """Run the text branch on contexts (B, M, context_width), or embed classes (B,).

        Keys and values of the text are computed here for the blocks before the first that updates
        text. The pooled condition is a mean over the tokens in front of the padding. A map without
        text gives tokens (B, 0, D).
        """
        config = self.config
        if config.context_shape is not None:
            check_context(condition, config.context_shape)
        if not config.text_blocks:
            return EncodedCondition(
                tokens=self.pos_embed.new_zeros(len(condition), 0, config.width)
            )
        if config.context_shape is None:
            tokens = self.label_emb(tokens_of(condition))[:, None]
        else:
            tokens = self.context_embed(tokens_of(condition).to(self.pos_embed.dtype))
        tokens = tokens + self.pos_embed[:, 1 : 1 + tokens.shape[1]]
        encoded = EncodedCondition(tokens=tokens, lengths=padded_lengths(condition))
        visible = encoded.visible_keys(0)
        for block in self.text_blocks:
            if visible is not None:
                mark_length(tokens, visible)
            tokens, _ = block(tokens, BlockInputs(visible=visible))
        keys_values: dict[int, KeysValues] = {}
        for number, entry in enumerate(config.blocks):
            if entry in UPDATES_TEXT:
                break
            if entry in READS_TEXT:
                keys_values[number] = cast(Block, self.blocks[number]).text_keys_values(tokens)
        pooled = None
        if self.pooled_embed is not None:
            pooled = self.pooled_embed(mean_of_visible(tokens, visible))
        return replace(encoded, tokens=tokens, keys_values=keys_values, pooled=pooled)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Condition | EncodedCondition,
        biases: Mapping[int, Bias] | None = None,
        *,
        with_features: bool = False,
    ) -> Any:
        """Predict noise, v or velocity from latents (B, C, S, S) at timesteps (B,), 0 to 1000.

        With `with_features`, the result is the pair of the prediction and the projected image
        tokens (B, L, F) after `config.representation_block`, for representation alignment.
        `biases` shift attention logits of the blocks with these numbers. Queries and keys are in
        the order time, registers, image, text; keys of separate_cross_attention are text alone.
        Tokens that do not depend on text are computed once and shared by all k conditions of a
        sample; they are repeated at the first block that sees text.
        Raises UserError for latents or contexts of another shape than the configured one.
        """
        config = self.config
        encoded = self._encode(latents, condition)
        sinusoids = self.time_proj(timesteps + config.timestep_offset).to(self.pos_embed.dtype)
        tokens, text = self._embed_tokens(latents, sinusoids), encoded.tokens
        vectors = self._conditioning_vectors(sinusoids, encoded.pooled)
        mirrors, rotation = config.mirrors, self._rotation(latents.device)
        visible = _visible_keys(encoded, tokens.shape[1])
        outputs: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        features: Tensor | None = None
        for number, (entry, block) in enumerate(zip(config.blocks, self.blocks, strict=True)):
            keys_values = self._keys_values(number, encoded, text)
            skip, text_skip = outputs.pop(mirrors.get(number), (None, None))
            if encoded.lengths is not None:
                mark_length(text, text_skip, visible.get(entry), *(keys_values or ()))
            inputs = BlockInputs(
                text=text,
                keys_values=keys_values,
                skip=skip,
                text_skip=text_skip if config.has_text_skip(number) else None,
                visible=visible.get(entry),
                vector=self._vector_for(entry, vectors, len(tokens)),
                rotation=rotation,
                bias=(biases or {}).get(number),
            )
            tokens, text = block(tokens, inputs)
            if encoded.lengths is not None:
                # After concat, both are views whose strides depend on the number of text tokens.
                tokens, text = tokens.contiguous(), text.contiguous()
            if number in mirrors.values():
                outputs[number] = tokens, text
            if with_features and number == config.representation_block:
                features = self.representation_projector(tokens[:, config.first_image_token :])
        predicted = repeat_rows(self._predict(tokens, vectors), len(encoded.tokens))
        return (predicted, features) if with_features else predicted

    def _embed_tokens(self, latents: Tensor, sinusoids: Tensor) -> Tensor:
        """Time, register and image tokens (B, 1 + R + L, D) at the first block."""
        image = self.patch_embed(latents.to(self.pos_embed.dtype))
        image = image + self.pos_embed[:, 1 + self.config.num_text_tokens :]
        tokens = [sinusoids[:, None] + self.pos_embed[:, :1], image]
        if self.config.num_registers:
            tokens.insert(1, self.registers.expand(len(latents), -1, -1))
        return torch.cat(tokens, dim=1)

    def _conditioning_vectors(self, sinusoids: Tensor, pooled: Tensor | None) -> dict[bool, Tensor]:
        """Conditioning vectors of modulated blocks, by whether the block sees text.

        Blocks without text follow the time embedding (B, D); blocks with text follow its sum with
        the pooled text (k * B, D). A shared projection makes 6 D channels of them.
        """
        if self.time_embed is None:
            return {}
        time = self.time_embed(sinusoids)
        vectors = {False: time}
        if pooled is not None:
            vectors[True] = repeat_rows(time, len(pooled)) + pooled
        if self.shared_modulation is not None:
            return {key: self.shared_modulation(vector) for key, vector in vectors.items()}
        return vectors

    def _vector_for(
        self, entry: Fusion, vectors: dict[bool, Tensor], num_rows: int
    ) -> Tensor | None:
        """Conditioning vector of a block of this kind; None if it is not modulated."""
        if not self.config.is_modulated(entry):
            return None
        return repeat_rows(vectors[False], num_rows) if entry == "image" else vectors[True]

    def _rotation(self, device: torch.device) -> Tensor | None:
        """Angles of the rotary positions of all tokens, if they are configured."""
        config = self.config
        if not config.rotary:
            return None
        return rotation_table(
            config.num_patches_per_side,
            config.first_image_token,
            config.num_text_tokens,
            config.head_width,
            device,
        )

    def _keys_values(
        self, number: int, encoded: EncodedCondition, text: Tensor
    ) -> KeysValues | None:
        """Keys and values of the text for a block that reads it, encoded before or now."""
        if number not in encoded.keys_values and self.config.blocks[number] in READS_TEXT:
            return cast(Block, self.blocks[number]).text_keys_values(text)
        return encoded.keys_values.get(number)

    def _predict(self, tokens: Tensor, vectors: dict[bool, Tensor]) -> Tensor:
        """Tokens (B, 1 + R + L, D) after the last block => prediction (B, C, S, S)."""
        normalised = self.head_norm(tokens[:, self.config.first_image_token :])
        if self.head_modulation is not None:
            vector = self._vector_for(self.config.blocks[-1], vectors, len(tokens))
            normalised = modulate(normalised, *self.head_modulation(vector))
        patch, side = self.config.patch_size, self.config.num_patches_per_side
        pixels = self.decoder_pred(normalised)
        pixels = pixels.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        pixels = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        predicted: Tensor = self.final_layer(pixels)
        return predicted


def _visible_keys(encoded: EncodedCondition, num_others: int) -> dict[Fusion, Tensor | None]:
    """Which keys are visible in each kind of block that has keys of text, (k * B, keys) or None.

    The text is behind `num_others` time, register and image tokens, or alone.
    """
    joint, alone = encoded.visible_keys(num_others), encoded.visible_keys(0)
    return {entry: alone if entry == "separate_cross_attention" else joint for entry in TEXT_KEYS}
