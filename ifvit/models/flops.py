"""Parameters and floating-point operations of a backbone, counted from its configuration alone."""

from dataclasses import dataclass

from ifvit.models.config import FusionUViTConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a backbone, and the work of one forward pass for one sample."""

    params: int
    """Trainable parameters."""
    layer_flops: int
    """Two per multiply-accumulate of Linear and Conv2d layers; the paper counts only these."""
    attention_flops: int
    """Two per multiply-accumulate of queries with keys and of weights with values."""

    @property
    def flops(self) -> int:
        """All matrix products."""
        return self.layer_flops + self.attention_flops


def count_cost(config: FusionUViTConfig) -> Cost:
    """Count `config` by the formulas below; tests hold them against the instantiated module.

    L image tokens and one time token run through every block, M text tokens through the text
    branch, and through fused blocks as full tokens (concat) or as keys and values only.
    """
    width, num_fused = config.width, config.num_fused_blocks
    image, text = 1 + config.num_image_tokens, config.context_length
    joint = image + text
    patch_values = config.patch_size**2 * config.latent_channels
    per_token = (4 + 2 * config.mlp_ratio) * width**2

    fused_tokens = joint if config.conditioning == "concat" else image
    text_keys_values = 0 if config.conditioning == "concat" else text * 2 * width**2
    num_plain, num_fused_skips = 2 * config.num_image_blocks, num_fused // 2
    layer_macs = (
        num_plain * image * per_token
        + num_fused * (fused_tokens * per_token + text_keys_values)
        + config.num_text_blocks * text * per_token
        + (num_fused_skips * fused_tokens + config.num_image_blocks * image) * 2 * width**2
        + text * config.context_width * width
        + 2 * config.num_image_tokens * patch_values * width
        + (config.latent_size * config.latent_channels) ** 2 * 9
    )
    pairs = (
        num_plain * image**2 + num_fused * fused_tokens * joint + config.num_text_blocks * text**2
    )
    return Cost(
        params=_count_params(config),
        layer_flops=2 * layer_macs,
        attention_flops=2 * 2 * width * pairs,
    )


def _count_params(config: FusionUViTConfig) -> int:
    width, hidden = config.width, config.mlp_ratio * config.width
    channels = config.latent_channels
    patch_values = config.patch_size**2 * channels
    norms = 2 * 2 * width
    attention = 4 * width**2 + width
    mlp = 2 * width * hidden + hidden + width
    skip = 2 * width**2 + width
    return (
        (config.depth + 1 + config.num_text_blocks) * (norms + attention + mlp)
        + config.depth // 2 * skip
        + (1 + config.context_length + config.num_image_tokens) * width
        + (patch_values + 1) * width
        + (config.context_width + 1) * width
        + 2 * width
        + (width + 1) * patch_values
        + (9 * channels + 1) * channels
    )
