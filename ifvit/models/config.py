"""The shape of a fusion backbone, without torch."""

from dataclasses import dataclass
from typing import Literal

from ifvit.errors import UserError

Conditioning = Literal["concat", "cross_attention"]


@dataclass(frozen=True, kw_only=True)
class FusionUViTConfig:
    """Everything that decides the parameters and the arithmetic of a `FusionUViT`.

    Early fusion is num_image_blocks = num_text_blocks = 0; the intermediate fusion of
    arXiv 2403.16530 is 4 and 1 at depth 12. Raises UserError for a shape that cannot be built.
    """

    latent_size: int
    """Height and width of the square latents."""
    latent_channels: int = 4
    """Channels of the latents."""
    patch_size: int
    """Side of the square of latent pixels that becomes one image token."""
    width: int
    """Channels of every token."""
    depth: int
    """Blocks before plus blocks after the middle block; the middle block comes on top."""
    num_heads: int
    """Attention heads of every block."""
    mlp_ratio: int = 4
    """Hidden width of a block's MLP, in units of `width`."""
    context_length: int
    """Text tokens per caption."""
    context_width: int
    """Channels of the text encoder's tokens."""
    conditioning: Conditioning
    """How fused blocks see text: as tokens of one sequence, or as extra keys and values."""
    num_image_blocks: int
    """Blocks on each side of the U that see no text (N_image)."""
    num_text_blocks: int
    """Blocks of the text branch (N_text)."""
    init_std: float = 0.02
    """Standard deviation of Linear weights before training; U-ViT's value fits width 512 and up,
    narrow backbones learn faster with about width**-0.5."""
    timestep_offset: int = 0
    """Added to the timesteps 0 ... 999; U-ViT's own weights count from 1."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.conditioning not in ("concat", "cross_attention"):
            raise UserError(f"conditioning must be concat or cross_attention: {self.conditioning}")
        sizes = ("latent_size", "latent_channels", "patch_size", "width", "depth", "num_heads")
        for name in (*sizes, "mlp_ratio", "context_length", "context_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.latent_size % self.patch_size:
            raise UserError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.num_heads or self.width % 2:
            raise UserError(
                f"width {self.width} must be even and divisible by num_heads {self.num_heads}"
            )
        if self.depth % 2:
            raise UserError(f"depth must be even, as many blocks in as out: {self.depth}")
        if not 0 <= self.num_image_blocks <= self.depth // 2:
            raise UserError(
                f"num_image_blocks must lie in 0 ... {self.depth // 2}, half the depth: "
                f"{self.num_image_blocks}"
            )
        if self.init_std <= 0:
            raise ValueError(f"init_std must be positive: {self.init_std}")
        if self.num_text_blocks < 0:
            raise UserError(f"num_text_blocks must not be negative: {self.num_text_blocks}")

    @property
    def num_image_tokens(self) -> int:
        """Patches of one sample's latents (L)."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def num_fused_blocks(self) -> int:
        """Blocks that see both image and text, the middle one among them."""
        return self.depth - 2 * self.num_image_blocks + 1
