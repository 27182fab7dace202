"""Configurations of the backbones and of the verbs `import` and `cost`, without torch.

A backbone's configuration decides its parameters and its arithmetic. Recipes, checkpoints and
weights/ store it; `ifvit.models.weights.build_backbone` turns it into a network.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any, Literal, get_args

from ifvit.errors import UserError
from ifvit.records import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rule,
    parse_value,
    record,
    shorten,
)
from ifvit.shards.format import NumTokens, Precision, State, Template

Fusion = Literal[
    "image", "concat", "cross_attention", "separate_cross_attention", "dual_stream", "adaln"
]
"""How text takes part in one block; `models/blocks.py` has a class for each."""
READS_TEXT: frozenset[Fusion] = frozenset({"cross_attention", "separate_cross_attention"})
"""Blocks whose image tokens attend to text tokens, which stay as they are."""
UPDATES_TEXT: frozenset[Fusion] = frozenset({"concat", "dual_stream"})
"""Blocks whose image tokens attend to text tokens, and after which the text has other values."""
TEXT_KEYS = READS_TEXT | UPDATES_TEXT
"""Blocks in which image tokens attend to text tokens."""

NullContext = Literal["empty_caption", "zeros"]
"""Context of samples without a caption: that of the caption "", or zeros."""

# The bounds of sizes let a network be described, without memory, in a second at most. Whether its
# parameters are those of a file is then checked before any is allocated.
Size = Annotated[int, Rule("from 1 to 65536", lambda value: 1 <= value <= 2**16)]
"""Number of channels, tokens or pixels."""
MAX_BLOCKS = 256
NumBlocks = Annotated[int, Rule("from 0 to 256", lambda value: 0 <= value <= MAX_BLOCKS)]
Ratio = Annotated[int, Rule("from 1 to 256", lambda value: 1 <= value <= 256)]
NumClasses = Annotated[int, Rule("from 1 to 16777216", lambda value: 1 <= value <= 2**24)]

_RUN = re.compile(r"(?:([1-9]\d{0,2})\*)?([a-z_]+)")


@lru_cache
def parse_fusion(text: str) -> tuple[Fusion, ...]:
    """Return the entries of a fusion map, one per block: "2*image concat" => image, image, concat.

    Raises UserError that names the part which is not N*ENTRY or ENTRY.
    """
    entries: list[Fusion] = []
    for part in text.split():
        match = _RUN.fullmatch(part)
        known: dict[str, Fusion] = {entry: entry for entry in get_args(Fusion)}
        if match is None or match[2] not in known:
            raise UserError(
                f'fusion: {shorten(part)} is not an entry like "image" or "4*image"; '
                f"entries are {', '.join(known)}"
            )
        entries += [known[match[2]]] * int(match[1] or 1)
    if not 1 <= len(entries) <= MAX_BLOCKS:
        raise UserError(f"fusion: {len(entries)} blocks; give 1 to {MAX_BLOCKS}")
    return tuple(entries)


def format_fusion(entries: Sequence[str]) -> str:
    """Return the compact notation of a fusion map: equal neighbours are written once."""
    runs = [(entry, len(list(group))) for entry, group in groupby(entries)]
    return " ".join(f"{count}*{entry}" if count > 1 else entry for entry, count in runs)


def symmetric_fusion(entry: Fusion, num_blocks: int, num_image_blocks: int) -> str:
    """Return the map with `entry` in all blocks but the first and last `num_image_blocks`."""
    images = ["image"] * num_image_blocks
    return format_fusion([*images, *[entry] * (num_blocks - 2 * num_image_blocks), *images])


def name_map(fusion: str, num_text_blocks: int) -> str:
    """Return a map and its text branch in words, such as "4*image 5*concat, 1 text block"."""
    plural = "" if num_text_blocks == 1 else "s"
    return fusion + (f", {num_text_blocks} text block{plural}" if num_text_blocks else "")


_CONDITIONS = ("num_classes", "context_length", "context_width")


@record
class ConditionConfig:
    """Latents, and the condition of a backbone that knows either classes or captions."""

    architecture: Literal["fusion_transformer", "unet"]
    """fusion_transformer or unet; the other fields depend on it."""
    latent_size: Size
    """Height and width of the square latents."""
    latent_channels: Size = 4
    """Channels of the latents."""
    num_classes: NumClasses | None = None
    """Number of classes. The network gets one more, the last, which means "no class"."""
    context_length: Size | None = None
    """For captions instead of classes: text tokens per caption."""
    context_width: Size | None = None
    """For captions instead of classes: channels of the text encoder's tokens."""

    def __post_init__(self) -> None:
        """Raise UserError unless classes or captions are configured, and not both."""
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
class FusionTransformerConfig(ConditionConfig):
    """Configuration of `FusionTransformer`: a fusion map, sizes, and options of the blocks.

    The options are off in the settings of arXiv 2403.16530. Raises UserError for a shape that
    cannot be built.
    """

    architecture: Literal["fusion_transformer"] = "fusion_transformer"
    """fusion_transformer or unet; the other fields depend on it."""
    fusion: str
    """The fusion map: how text takes part in each block, in order, such as
    "4*image 5*cross_attention 4*image". Entries are image, concat, cross_attention,
    separate_cross_attention, dual_stream and adaln (docs/fusion.md)."""
    num_text_blocks: NumBlocks = 0
    """Blocks of the text branch, in front of the first block that sees text (N_text)."""
    long_skip: bool = True
    """Join the output of block i to the input of its mirror, as in U-ViT."""
    patch_size: Size
    """Height and width of a patch in latent pixels."""
    width: Size
    """Channels of every token."""
    num_heads: Size
    """Attention heads of every block."""
    mlp_ratio: Ratio = 4
    """Hidden width of a block's MLP, as a multiple of `width`."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Kind of MLP. swiglu: two thirds of the hidden width, so that the size stays equal."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Norms of the blocks."""
    qk_norm: bool = False
    """Normalise queries and keys of each head by an affine RMSNorm, before the rotation."""
    rotary: bool = False
    """Rotate queries and keys of image tokens by row and column (RoPE); text is not rotated."""
    num_registers: NumBlocks = 0
    """Learned tokens that take part in every block beside the image tokens."""
    modulation: Literal["none", "adaln_zero", "shared"] = "none"
    """Modulate every block by time, and blocks that see text also by pooled text. adaln_zero: a
    projection per block (Peebles and Xie 2023). shared: one projection, and a table per block
    (PixArt). adaln blocks are modulated in any case."""
    init_std: PositiveFloat | Literal["auto"] = "auto"
    """Standard deviation of the initial Linear weights. auto: U-ViT's 0.02 from width 512 on,
    in inverse proportion to the width below, and at most width**-0.5."""
    timestep_offset: NonNegativeInt = 0
    """Added to the timesteps; U-ViT's published weights count from 1."""
    representation_block: NonNegativeInt | None = None
    """For representation alignment in training (REPA): number of the block, counted from 0, after
    which a projector maps image tokens to features of an image encoder. Exported weights lack the
    projector."""
    representation_width: Size | None = None
    """Channels of these features, which the shards hold; for DINOv2-B 768."""

    def __post_init__(self) -> None:
        """Write the map in compact notation. Raise UserError for a shape that cannot be built."""
        super().__post_init__()
        object.__setattr__(self, "fusion", format_fusion(parse_fusion(self.fusion)))
        if self.latent_size % self.patch_size:
            raise UserError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.num_heads or self.width % 2:
            raise UserError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )
        if self.rotary and self.head_width % 4:
            raise UserError(
                f"rotary: heads have {self.head_width} channels; "
                "choose num_heads so that they are a multiple of 4"
            )
        if self.num_text_blocks and not self.text_blocks:
            raise UserError("num_text_blocks: no block of the fusion map sees text; set it to 0")
        if (self.representation_block is None) != (self.representation_width is None):
            raise UserError("give both representation_block and representation_width, or neither")
        if (self.representation_block or 0) >= len(self.blocks):
            raise UserError(
                f"representation_block {self.representation_block} is not a block of the fusion "
                f"map; its blocks are 0 to {len(self.blocks) - 1}"
            )

    @property
    def blocks(self) -> tuple[Fusion, ...]:
        """The fusion map, one entry per block."""
        return parse_fusion(self.fusion)

    @property
    def text_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that see text."""
        return tuple(i for i, entry in enumerate(self.blocks) if entry != "image")

    @property
    def text_key_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks in which image tokens attend to text tokens."""
        return tuple(i for i, entry in enumerate(self.blocks) if entry in TEXT_KEYS)

    @property
    def mirrors(self) -> dict[int, int]:
        """Number of each block that takes a long skip => number of the block it comes from."""
        depth = len(self.blocks)
        return {depth - 1 - i: i for i in range(depth // 2)} if self.long_skip else {}

    def has_text_skip(self, number: int) -> bool:
        """Whether the text of this block takes a long skip: where both mirrors update text."""
        mirror = self.mirrors.get(number)
        return mirror is not None and {self.blocks[number], self.blocks[mirror]} <= UPDATES_TEXT

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.num_heads

    @property
    def num_patches_per_side(self) -> int:
        """Number of patches in a row or column of one sample's latents."""
        return self.latent_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Number of patches of one sample's latents."""
        return self.num_patches_per_side**2

    @property
    def first_image_token(self) -> int:
        """Number of tokens in front of the image tokens: time and registers."""
        return 1 + self.num_registers

    @property
    def num_text_tokens(self) -> int:
        """Tokens of the condition (M): those of a caption, 1 for a class, 0 if no block sees it."""
        return (self.context_length or 1) if self.text_blocks else 0

    @property
    def num_tokens(self) -> int:
        """Number of time, register, image and text tokens of one sample."""
        return self.first_image_token + self.num_image_tokens + self.num_text_tokens

    def is_modulated(self, entry: Fusion) -> bool:
        """Whether a block of this kind is modulated by a conditioning vector (adaLN)."""
        return self.modulation != "none" or entry == "adaln"


@record
class UNetConfig(ConditionConfig):
    """Configuration of `UNet`. Raises UserError for a shape that cannot be built."""

    architecture: Literal["unet"] = "unet"
    """fusion_transformer or unet; the other fields depend on it."""
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


BackboneConfig = FusionTransformerConfig | UNetConfig
_BY_ARCHITECTURE: dict[str, type[BackboneConfig]] = {
    "fusion_transformer": FusionTransformerConfig,
    "unet": UNetConfig,
}


def without_representation(config: BackboneConfig) -> BackboneConfig:
    """Return the configuration without the projector for representation alignment."""
    if isinstance(config, UNetConfig):
        return config
    return replace(config, representation_block=None, representation_width=None)


def restore_config(stored: Mapping[str, Any], where: str = "backbone") -> BackboneConfig:
    """Return the configuration that a recipe, a checkpoint or a backbone's config.json stores.

    Keys that begin with an underscore belong to diffusers. Raises UserError naming `where` and the
    key that is missing, unknown or of an impossible value.
    """
    name = stored.get("architecture", "fusion_transformer")
    if not isinstance(name, str) or name not in _BY_ARCHITECTURE:
        known = ", ".join(_BY_ARCHITECTURE)
        raise UserError(f"{where}: architecture is {shorten(name)}; expected one of {known}")
    own = {key: value for key, value in stored.items() if not key.startswith("_")}
    return parse_value(_BY_ARCHITECTURE[name], own, where)


@record
class TextOptions:
    """How a text encoder makes contexts; what is unset takes the default of the encoder's class."""

    state: State | None = None
    """Hidden state: last, penultimate, the mean over all layers, or the number of a layer, where 0
    are the embeddings. Default: last."""
    final_norm: bool | None = None
    """Apply the encoder's final norm to the state. Default: true."""
    max_length: NumTokens | None = None
    """Largest number of tokens. Default: 77 for CLIP, 256 for other encoders."""
    template: Template | None = None
    """Text around every caption, which stands for {}; the empty caption has none."""
    precision: Precision | None = None
    """Number format of the computation. Default: that of the images for CLIP, otherwise bf16."""


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
    null_context: NullContext | None = None
    """Context of samples without a caption in the training: of "" (empty_caption), as in U-ViT, or
    zeros, as the fork's script writes. Unset: zeros for tensors named as in the fork."""
    num_heads: Size | None = None
    """Attention heads, which the tensors do not show; unset: width / 64, as in all published
    weights."""


@record
class CostConfig:
    """Print parameters and GFLOPs of all presets, or of chosen fusion maps."""

    backbone: FusionTransformerConfig | None = None
    """Count this backbone only: a preset's name or a YAML file, then fields such as
    --backbone.fusion. Unset: all presets, with the settings of arXiv 2403.16530."""
    maps: list[str] = field(default_factory=list, metadata={"each": "maps"})
    """Count `backbone`, or the preset small, with each of these fusion maps, or of settings such
    as concat_early."""
    draw: str | None = None
    """PNG file for a drawing of the maps; without maps and backbone, of six examples."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def __post_init__(self) -> None:
        """Raise UserError for a drawing of another format."""
        if self.draw is not None and not self.draw.endswith(".png"):
            raise UserError(f"draw: {self.draw}; name a .png file")
