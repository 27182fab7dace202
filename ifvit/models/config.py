"""Configurations of all backbones and their named presets, without torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ifvit.errors import UserError

Conditioning = Literal["concat", "cross_attention", "adaln"]


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """What goes into every backbone, and comes out."""

    latent_size: int
    """Height and width of the square latents."""
    latent_channels: int = 4
    """Channels of the latents."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        self._require_positive("latent_size", "latent_channels")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1: {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(LatentsConfig):
    """Transformer blocks over tokens, most of them patches of the latents."""

    patch_size: int
    """Side of the square of latent pixels that becomes one image token."""
    width: int
    """Channels of every token."""
    num_heads: int
    """Attention heads of every block."""
    mlp_ratio: int = 4
    """Hidden width of a block's MLP, in units of `width`."""
    init_std: float = 0.02
    """Standard deviation of Linear weights before training; U-ViT's value fits width 512 and up,
    narrow backbones learn faster with about width**-0.5."""
    modulation: bool = False
    """Also let time, and in blocks that see the condition the pooled condition too, shift, scale
    and gate every block: adaLN-Zero (Peebles and Xie 2023). `conditioning: adaln` always does."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        super().__post_init__()
        self._require_positive("patch_size", "width", "num_heads", "mlp_ratio")
        if self.latent_size % self.patch_size:
            raise UserError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.num_heads or self.width % 2:
            raise UserError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )
        if self.init_std <= 0:
            raise UserError(f"init_std must be positive: {self.init_std}")

    @property
    def num_image_tokens(self) -> int:
        """Patches of one sample's latents (L)."""
        return (self.latent_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class ConditionConfig(LatentsConfig):
    """Either classes or captions."""

    num_classes: int | None = None
    """Classes of the labelled images; one more, the last, stands for no class."""
    context_length: int | None = None
    """Instead of classes: text tokens per caption."""
    context_width: int | None = None
    """Instead of classes: channels of the text encoder's tokens."""

    def __post_init__(self) -> None:
        """Refuse both, and neither."""
        super().__post_init__()
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if given not in (["num_classes"], ["context_length", "context_width"]):
            raise UserError(
                "give either num_classes or both context_length and context_width, not "
                + (" and ".join(given) or "nothing")
            )
        self._require_positive(*given)

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(M, D) of a caption's context; None where the condition is a class."""
        if self.context_length is None or self.context_width is None:
            return None
        return self.context_length, self.context_width


_CONDITIONS = ("num_classes", "context_length", "context_width")


@dataclass(frozen=True, kw_only=True)
class FusionUViTConfig(PatchesConfig):
    """Everything that decides the parameters and the arithmetic of a `FusionUViT`.

    Early fusion is num_image_blocks = num_text_blocks = 0; the intermediate fusion of
    arXiv 2403.16530 is 4 and 1 at depth 12. Raises UserError for a shape that cannot be built.
    """

    num_classes: ClassVar[None] = None
    architecture: Literal["fusion_uvit"] = "fusion_uvit"
    """Or token_transformer, or unet, with the fields of those."""
    depth: int
    """Blocks before plus blocks after the middle block; the middle block comes on top."""
    context_length: int
    """Text tokens per caption."""
    context_width: int
    """Channels of the text encoder's tokens."""
    conditioning: Conditioning
    """How fused blocks see text: as tokens of one sequence, as extra keys and values, or not as
    tokens but by its mean, which modulates them (adaln)."""
    num_image_blocks: int
    """Blocks on each side of the U that see no text (N_image)."""
    num_text_blocks: int
    """Blocks of the text branch (N_text)."""
    timestep_offset: int = 0
    """Added to the timesteps 0 ... 999; U-ViT's own weights count from 1."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        super().__post_init__()
        if self.conditioning not in ("concat", "cross_attention", "adaln"):
            raise UserError(
                f"conditioning must be concat, cross_attention or adaln: {self.conditioning}"
            )
        self._require_positive("depth", "context_length", "context_width")
        if self.depth % 2:
            raise UserError(f"depth must be even, as many blocks in as out: {self.depth}")
        if not 0 <= self.num_image_blocks <= self.depth // 2:
            raise UserError(
                f"num_image_blocks must lie in 0 ... {self.depth // 2}, half the depth: "
                f"{self.num_image_blocks}"
            )
        if self.num_text_blocks < 0:
            raise UserError(f"num_text_blocks must not be negative: {self.num_text_blocks}")

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D) of a caption's context."""
        return self.context_length, self.context_width

    @property
    def num_tokens(self) -> int:
        """Of a sample: time, image and text."""
        return 1 + self.num_image_tokens + self.context_length

    @property
    def is_modulated(self) -> bool:
        """Whether blocks have adaptive norms."""
        return self.modulation or self.conditioning == "adaln"

    @property
    def num_fused_blocks(self) -> int:
        """Blocks that see both image and text, the middle one among them."""
        return self.depth - 2 * self.num_image_blocks + 1


@dataclass(frozen=True, kw_only=True)
class TokenTransformerConfig(PatchesConfig, ConditionConfig):
    """Everything that decides the parameters and the arithmetic of a `TokenTransformer`.

    Raises UserError for a shape that cannot be built.
    """

    architecture: Literal["token_transformer"] = "token_transformer"
    """Or fusion_uvit, or unet, with the fields of those."""
    depth: int
    """All blocks."""
    long_skip: bool = False
    """Connect first and last half of the blocks as U-ViT does; needs an odd depth."""
    conditioning: Literal["tokens", "adaln"] = "tokens"
    """Class or caption as tokens of the sequence, or only by modulation, as in DiT (adaln)."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        super().__post_init__()
        self._require_positive("depth")
        if self.conditioning not in ("tokens", "adaln"):
            raise UserError(f"conditioning must be tokens or adaln: {self.conditioning}")
        if self.long_skip and self.depth % 2 == 0:
            raise UserError(
                f"depth must be odd with long_skip, a middle block between halves: {self.depth}"
            )

    @property
    def is_modulated(self) -> bool:
        """Whether blocks have adaptive norms."""
        return self.modulation or self.conditioning == "adaln"

    @property
    def num_condition_tokens(self) -> int:
        """In the sequence: one for a class, M for a caption, none under adaln."""
        return 0 if self.conditioning == "adaln" else self.context_length or 1

    @property
    def num_tokens(self) -> int:
        """Of a sample: class or caption, time and image."""
        return self.num_condition_tokens + 1 + self.num_image_tokens


@dataclass(frozen=True, kw_only=True)
class UNetConfig(ConditionConfig):
    """The U-Net of latent diffusion (Rombach et al. 2022) as diffusers builds it, for comparison.

    The condition enters by cross-attention: a caption's tokens, or one token of the class.
    Raises UserError for a shape that cannot be built.
    """

    architecture: Literal["unet"] = "unet"
    """Or fusion_uvit, or token_transformer, with the fields of those."""
    channels: tuple[int, ...]
    """Channels at each resolution, from the latents' own down; each next one has half the side."""
    num_attention_levels: int
    """How many of them, the coarsest, also have transformer blocks."""
    blocks_per_level: int = 2
    """Residual blocks at each resolution on the way down; one more on the way up."""
    head_width: int = 64
    """Channels of an attention head."""
    class_width: int = 512
    """Channels of the class token."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        super().__post_init__()
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists only
        self._require_positive("blocks_per_level", "head_width", "class_width")
        num_levels = len(self.channels)
        if not 1 <= self.num_attention_levels <= num_levels:
            raise UserError(f"num_attention_levels must lie in 1 ... {num_levels}, all levels")
        if self.latent_size % 2 ** (num_levels - 1):
            raise UserError(
                f"latent_size {self.latent_size} cannot be halved {num_levels - 1} times"
            )
        if any(count < 1 or count % 32 or count % self.head_width for count in self.channels):
            raise UserError(
                f"channels {list(self.channels)} must be multiples of 32, the number of groups "
                f"of its norms, and of head_width {self.head_width}"
            )

    @property
    def num_tokens(self) -> int:
        """Of a sample: the pixels of its latents."""
        return self.latent_size**2


BackboneConfig = FusionUViTConfig | TokenTransformerConfig | UNetConfig
_BY_ARCHITECTURE: dict[str, type[BackboneConfig]] = {
    "fusion_uvit": FusionUViTConfig,
    "token_transformer": TokenTransformerConfig,
    "unet": UNetConfig,
}


def restore_config(stored: Mapping[str, Any]) -> BackboneConfig:
    """The configuration behind `dataclasses.asdict` of it, or behind a backbone's config.json.

    What lacks an architecture is a fusion backbone: once there was nothing else. Raises TypeError
    or ValueError for anything else.
    """
    name = stored.get("architecture", "fusion_uvit")
    if name not in _BY_ARCHITECTURE:
        raise UserError(f"architecture {name} is none of {', '.join(_BY_ARCHITECTURE)}")
    cls = _BY_ARCHITECTURE[name]
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in stored.items() if key in names})


# Widths, depths and heads of U-ViT (Bao et al. 2023, Table 1) on the paper's latents and context.


def _coco256(width: int, depth: int, num_heads: int) -> FusionUViTConfig:
    """A backbone for 4x32x32 latents (256 x 256 pixels) and CLIP ViT-L/14 context."""
    return FusionUViTConfig(
        latent_size=32,
        patch_size=2,
        width=width,
        depth=depth,
        num_heads=num_heads,
        context_length=77,
        context_width=768,
        conditioning="cross_attention",
        num_image_blocks=round(depth / 3),
        num_text_blocks=1,
    )


PRESETS: dict[str, FusionUViTConfig] = {
    "tiny": FusionUViTConfig(
        latent_size=8,
        patch_size=2,
        width=96,
        depth=6,
        num_heads=3,
        context_length=16,
        context_width=64,
        conditioning="cross_attention",
        num_image_blocks=1,
        num_text_blocks=1,
        init_std=0.1,
    ),
    "small": _coco256(width=512, depth=12, num_heads=8),
    "mid": _coco256(width=768, depth=16, num_heads=12),
    "large": _coco256(width=1024, depth=20, num_heads=16),
    "huge": _coco256(width=1152, depth=28, num_heads=16),
}


def _imagenet256(width: int, depth: int, num_heads: int) -> TokenTransformerConfig:
    """A class-conditional backbone for 4x32x32 latents (256 x 256 pixels) of ImageNet."""
    return TokenTransformerConfig(
        latent_size=32,
        num_classes=1000,
        patch_size=2,
        width=width,
        depth=depth,
        num_heads=num_heads,
    )


CLASS_PRESETS: dict[str, TokenTransformerConfig | UNetConfig] = {
    "token_tiny": TokenTransformerConfig(
        latent_size=8,
        num_classes=75,
        patch_size=2,
        width=104,
        depth=7,
        num_heads=4,
        init_std=0.1,
    ),
    "token_small": _imagenet256(width=512, depth=12, num_heads=8),
    "token_base": _imagenet256(width=768, depth=12, num_heads=12),
    "token_large": _imagenet256(width=1024, depth=24, num_heads=16),
    "unet_tiny": UNetConfig(
        latent_size=8,
        num_classes=75,
        channels=(32, 64),
        num_attention_levels=1,
        blocks_per_level=1,
        head_width=32,
        class_width=64,
    ),
    "unet_base": UNetConfig(
        latent_size=32,
        num_classes=1000,
        channels=(192, 384, 384),
        num_attention_levels=2,
        head_width=32,
    ),
}
"""For classes; each U-Net has about the parameters of the transformer of its size."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a run of the weights of U-ViT or its fusion fork, to draw with and to measure."""

    file: str
    """State dict of the backbone as those code bases save it, .pth or .safetensors, or a URL."""
    run: str
    """Folder or s3:// prefix of the run."""
    step: int = 1_000_000
    """Optimiser steps behind the weights."""
    ema_decay: float | None = 0.9999
    """Decay of the average that they are; null for raw weights."""
    scaling_factor: float = 0.23010
    """Autoencoder latents times this are what they were trained on."""
    vae: str = "CompVis/stable-diffusion-v1-4/vae"
    """The autoencoder they were trained with: hub name, local folder, or scenes/vae."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """The text encoder they were trained with: hub name, local folder, or scenes/clip."""
    num_heads: int | None = None
    """Attention heads, which no tensor shows; unset: of 64 channels, as in all published ones."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Print parameters and GFLOPs of every preset in every fusion setting."""

    json: bool = False
    """Print a list of JSON objects instead of a table."""
