"""Configurations of the backbones, their presets, and the verbs `import` and `cost`, without torch.

A backbone's configuration decides its parameters and its arithmetic. Recipes, checkpoints and
weights/ store it; `ifvit.models.weights.build_backbone` turns it into a network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ifvit.errors import UserError
from ifvit.records import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rule,
    parse_value,
    parse_yaml,
    record,
    shorten,
)

Conditioning = Literal["concat", "cross_attention", "adaln"]

# The bounds of sizes let a network be described, without memory, in a second at most. Whether its
# parameters are those of a file is then checked before any is allocated.
Size = Annotated[int, Rule("from 1 to 65536", lambda value: 1 <= value <= 2**16)]
"""Number of channels, tokens or pixels."""
NumBlocks = Annotated[int, Rule("from 1 to 256", lambda value: 1 <= value <= 256)]
NumClasses = Annotated[int, Rule("from 1 to 16777216", lambda value: 1 <= value <= 2**24)]


@record
class LatentsConfig:
    """Input and output of every backbone: latents (latent_channels, latent_size, latent_size)."""

    latent_size: Size
    """Height and width of the square latents."""
    latent_channels: Size = 4
    """Channels of the latents."""

    def __post_init__(self) -> None:
        """Check relations between fields; there are none here."""


@record
class PatchesConfig(LatentsConfig):
    """Transformer blocks over tokens, one token per patch of the latents."""

    patch_size: Size
    """Height and width of a patch in latent pixels."""
    width: Size
    """Channels of every token."""
    num_heads: Size
    """Attention heads of every block."""
    mlp_ratio: NumBlocks = 4
    """Hidden width of a block's MLP, as a multiple of `width`."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial Linear weights. U-ViT's 0.02 fits width 512 and above;
    narrow backbones learn faster with about width**-0.5."""
    modulation: bool = False
    """Modulate every block by time, and blocks that see the condition also by the pooled
    condition: adaLN-Zero (Peebles and Xie 2023). Always on with `conditioning: adaln`."""

    def __post_init__(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        super().__post_init__()
        if self.latent_size % self.patch_size:
            raise UserError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.num_heads or self.width % 2:
            raise UserError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )

    @property
    def num_image_tokens(self) -> int:
        """Number of patches of one sample's latents (L)."""
        return (self.latent_size // self.patch_size) ** 2


_CONDITIONS = ("num_classes", "context_length", "context_width")


@record
class ConditionConfig(LatentsConfig):
    """The condition of a backbone that knows either classes or captions."""

    num_classes: NumClasses | None = None
    """Number of classes. The network gets one more, the last, which means "no class"."""
    context_length: Size | None = None
    """For captions instead of classes: text tokens per caption."""
    context_width: Size | None = None
    """For captions instead of classes: channels of the text encoder's tokens."""

    def __post_init__(self) -> None:
        """Raise UserError unless classes or captions are configured, and not both."""
        super().__post_init__()
        given = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if given not in (["num_classes"], ["context_length", "context_width"]):
            raise UserError(
                "give either num_classes or both context_length and context_width, not "
                + (" and ".join(given) or "nothing")
            )

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(M, D) of a caption's context; None if the condition is a class."""
        if self.context_length is None or self.context_width is None:
            return None
        return self.context_length, self.context_width


@record
class FusionUViTConfig(PatchesConfig):
    """Configuration of `FusionUViT`.

    Early fusion has num_image_blocks = num_text_blocks = 0. The intermediate fusion of
    arXiv 2403.16530 has 4 and 1 at depth 12. Raises UserError for a shape that cannot be built.
    """

    num_classes: ClassVar[None] = None
    architecture: Literal["fusion_uvit"] = "fusion_uvit"
    """fusion_uvit, token_transformer or unet; the other fields depend on it."""
    depth: NumBlocks
    """Blocks before and after the middle block, together; the middle block is not counted."""
    context_length: Size
    """Text tokens per caption."""
    context_width: Size
    """Channels of the text encoder's tokens."""
    conditioning: Conditioning
    """How fused blocks see text: as tokens of one sequence (concat), as additional keys and values
    (cross_attention), or through modulation by the mean text token (adaln)."""
    num_image_blocks: NonNegativeInt
    """Blocks on each side of the U that see no text (N_image)."""
    num_text_blocks: Annotated[int, Rule("from 0 to 256", lambda value: 0 <= value <= 256)]
    """Blocks of the text branch (N_text)."""
    timestep_offset: NonNegativeInt = 0
    """Added to the timesteps 0 ... 999; U-ViT's published weights count from 1."""

    def __post_init__(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        super().__post_init__()
        if self.depth % 2:
            raise UserError(f"depth must be even, half of it on each side: {self.depth}")
        if self.num_image_blocks > self.depth // 2:
            raise UserError(
                f"num_image_blocks must be in 0 ... {self.depth // 2}, half the depth: "
                f"{self.num_image_blocks}"
            )

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D) of a caption's context."""
        return self.context_length, self.context_width

    @property
    def num_tokens(self) -> int:
        """Number of positions: time, text and image tokens of one sample."""
        return 1 + self.num_image_tokens + self.context_length

    @property
    def is_modulated(self) -> bool:
        """Whether blocks are modulated by a conditioning vector (adaLN)."""
        return self.modulation or self.conditioning == "adaln"

    @property
    def num_fused_blocks(self) -> int:
        """Number of blocks that see both image and text, including the middle block."""
        return self.depth - 2 * self.num_image_blocks + 1


@record
class TokenTransformerConfig(PatchesConfig, ConditionConfig):
    """Configuration of `TokenTransformer`. Raises UserError for a shape that cannot be built."""

    architecture: Literal["token_transformer"] = "token_transformer"
    """fusion_uvit, token_transformer or unet; the other fields depend on it."""
    depth: NumBlocks
    """Number of blocks."""
    long_skip: bool = False
    """Connect block i with block depth - 1 - i by a long skip (U-ViT); needs an odd depth."""
    conditioning: Literal["tokens", "adaln"] = "tokens"
    """How blocks see the class or caption: as tokens of the sequence, or through modulation only,
    nearly as in DiT (adaln)."""

    def __post_init__(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        super().__post_init__()
        if self.long_skip and self.depth % 2 == 0:
            raise UserError(
                f"depth must be odd with long_skip, to have a middle block: {self.depth}"
            )

    @property
    def is_modulated(self) -> bool:
        """Whether blocks are modulated by a conditioning vector (adaLN)."""
        return self.modulation or self.conditioning == "adaln"

    @property
    def num_condition_tokens(self) -> int:
        """Condition tokens in the sequence: 1 for a class, M for a caption, 0 under adaln."""
        return 0 if self.conditioning == "adaln" else self.context_length or 1

    @property
    def num_tokens(self) -> int:
        """Number of positions: condition, time and image tokens of one sample."""
        return self.num_condition_tokens + 1 + self.num_image_tokens


@record
class UNetConfig(ConditionConfig):
    """Configuration of `UNet`. Raises UserError for a shape that cannot be built."""

    architecture: Literal["unet"] = "unet"
    """fusion_uvit, token_transformer or unet; the other fields depend on it."""
    channels: tuple[Size, ...]
    """Channels at each resolution, from the latents' own downwards; each halves the side."""
    num_attention_levels: PositiveInt
    """Number of resolutions, the coarsest ones, that also have transformer blocks."""
    blocks_per_level: Annotated[int, Rule("from 1 to 64", lambda value: 1 <= value <= 64)] = 2
    """Residual blocks at each resolution on the way down; the way up has one more."""
    head_width: Size = 64
    """Channels of an attention head."""
    class_width: Size = 512
    """Channels of the class token."""

    def __post_init__(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        super().__post_init__()
        num_levels = len(self.channels)
        if self.num_attention_levels > num_levels:
            raise UserError(
                f"num_attention_levels must be in 1 ... {num_levels}, the number of channels: "
                f"{self.num_attention_levels}"
            )
        if self.latent_size % 2 ** (num_levels - 1):
            raise UserError(
                f"latent_size {self.latent_size} cannot be halved {num_levels - 1} times"
            )
        if any(count % 32 or count % self.head_width for count in self.channels):
            raise UserError(
                f"channels {list(self.channels)} must be multiples of 32, the number of groups "
                f"of its norms, and of head_width {self.head_width}"
            )

    @property
    def num_tokens(self) -> int:
        """Number of pixels of one sample's latents."""
        return self.latent_size**2


BackboneConfig = FusionUViTConfig | TokenTransformerConfig | UNetConfig
_BY_ARCHITECTURE: dict[str, type[BackboneConfig]] = {
    "fusion_uvit": FusionUViTConfig,
    "token_transformer": TokenTransformerConfig,
    "unet": UNetConfig,
}


def restore_config(stored: Mapping[str, Any], where: str = "backbone") -> BackboneConfig:
    """Return the configuration that a recipe, a checkpoint or a backbone's config.json stores.

    Keys that begin with an underscore belong to diffusers. Raises UserError naming `where` and the
    key that is missing, unknown or of an impossible value.
    """
    name = stored.get("architecture", "fusion_uvit")
    if not isinstance(name, str) or name not in _BY_ARCHITECTURE:
        known = ", ".join(_BY_ARCHITECTURE)
        raise UserError(f"{where}: architecture is {shorten(name)}; expected one of {known}")
    own = {key: value for key, value in stored.items() if not key.startswith("_")}
    return parse_value(_BY_ARCHITECTURE[name], own, where)


def _read_presets(*names: str) -> dict[str, Any]:
    """Read configs/backbone/NAME.yaml, which recipes and `--backbone NAME` use as well."""
    folder = Path(__file__).parent.parent / "configs" / "backbone"
    files = {name: (folder / f"{name}.yaml").read_text() for name in names}
    return {name: restore_config(parse_yaml(text, name)) for name, text in files.items()}


PRESETS: dict[str, FusionUViTConfig] = _read_presets("tiny", "small", "mid", "large", "huge")
"""For captions: widths, depths and heads of U-ViT (Bao et al. 2023, Table 1); `small` is the
paper's size. All fuse by cross-attention in the middle third of the blocks."""
CLASS_PRESETS: dict[str, TokenTransformerConfig | UNetConfig] = _read_presets(
    "token_tiny", "token_small", "token_base", "token_large", "unet_tiny", "unet_base"
)
"""For classes; each U-Net has about as many parameters as the transformer of the same size."""


@record
class ImportConfig:
    """Make a run directory from published weights of U-ViT or its fusion fork."""

    file: str
    """Path or URL of the backbone's state dict as those code bases save it (.pth, .safetensors)."""
    run: str
    """Folder or s3:// prefix of the run."""
    step: NonNegativeInt = 1_000_000
    """Optimizer steps that the weights were trained for."""
    ema_decay: Fraction | None = 0.9999
    """Decay of the EMA weights; null if the file holds raw weights."""
    scaling_factor: PositiveFloat = 0.23010
    """Factor by which the autoencoder's latents were multiplied in training."""
    vae: str = "CompVis/stable-diffusion-v1-4/vae"
    """The autoencoder of the training: hub name, local folder, or scenes/vae."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """The text encoder of the training: hub name, local folder, or scenes/clip."""
    num_heads: Size | None = None
    """Attention heads, which the tensors do not show; unset: width / 64, as in all published
    weights."""


@record
class CostConfig:
    """Print parameters and GFLOPs of every preset with every kind of fusion."""

    json: bool = False
    """Print a list of JSON objects instead of a table."""
