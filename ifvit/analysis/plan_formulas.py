"""Memory, traffic and time of training on N GPUs, one process each; see docs/performance.md.

P parameters, a averages; sizes in bytes of one GPU, times in seconds of one step, unless said.
"""

from typing import Literal

from ifvit.analysis.plan_config import HardwareConfig
from ifvit.models.config import FusionUViTConfig

VALUE = 4
"""Bytes of a parameter, gradient, moment or average: the engine keeps them all in fp32."""
BUCKET_VALUES = 500_000_000
"""Gradients that DeepSpeed collects before it reduces them (its default)."""
LIVE_VALUES = 1_000_000_000
"""Parameters that its stage 3 keeps gathered at most (its default)."""

Precision = Literal["fp32", "bf16", "fp16"]


def state_bytes(params: int, gpus: int, stage: int, averages: int) -> float:
    """Parameters, gradients, two moments, averages, and what DDP or DeepSpeed's stages add."""
    whole = VALUE * params
    if stage == 0:
        return whole * (4 + averages + (gpus > 1))  # DDP's buckets are another set of gradients
    # DeepSpeed has a second copy of the parameters that a process updates.
    partitioned = {1: 3, 2: 4, 3: 5 + averages}[stage]
    kept = 5 + averages - partitioned
    gathered = VALUE * min(params, LIVE_VALUES) if stage == 3 else 0
    return whole * (kept + partitioned / gpus) + VALUE * BUCKET_VALUES + gathered


def cast_bytes(params: int, precision: Precision) -> int:
    """The parameters once more in 16 bits, which autocast keeps until the forward pass ends."""
    return 0 if precision == "fp32" else 2 * params


def activation_bytes(
    shape: FusionUViTConfig, batch: int, precision: Precision, *, checkpointing: bool
) -> int:
    """What the forward pass keeps for the backward pass, with an attention kernel that is fused.

    With checkpointing: the input of every block, and all that one of them keeps.
    """
    width, value = shape.width, 4 if precision == "fp32" else 2
    image, text = 1 + shape.num_image_tokens, shape.context_length
    crosses = shape.conditioning == "cross_attention"
    fused = image if crosses else image + text
    num_fused_skips = shape.num_fused_blocks // 2
    # Residual stream before either norm in fp32; both norms' results, queries, keys and values,
    # the result of attention, and the hidden layer before and after GELU.
    per_token = 8 + (6 + 2 * shape.mlp_ratio) * value
    # Keys and values of image and text side by side, and the normed text that they come from.
    per_fused = (2 * (image + text) + text) * value if crosses else 0
    inputs = 4 * (
        2 * shape.num_image_blocks * image
        + shape.num_fused_blocks * fused
        + shape.num_text_blocks * text
    )
    if checkpointing:
        keys_values = 3 * text * value if crosses else 0
        one = fused * per_token + per_fused + 2 * fused * value
        kept = inputs + shape.num_fused_blocks * keys_values + one
    else:
        skips = 2 * value * (num_fused_skips * fused + shape.num_image_blocks * image)
        kept = inputs // 4 * per_token + shape.num_fused_blocks * per_fused + skips
    ends = image * (4 + value) * width + text * (value * shape.context_width + 4 * width)
    return batch * (kept * width + ends)


def update_bytes(params: int, gpus: int, stage: int, averages: int) -> float:
    """Read and written by the update: parameters, gradients and moments; averages."""
    adamw = 2 * VALUE * params * 4 / (gpus if stage else 1)
    return adamw + 2 * VALUE * params * averages / (gpus if stage == 3 else 1)


def num_collectives(stage: int) -> int:
    """Passes over all values: gradients summed and results spread; stage 3 gathers twice."""
    return 3 if stage == 3 else 2


def network_bytes(whole: float, gpus: int, hardware: HardwareConfig) -> float:
    """Through a GPU's adapter, one way, when `whole` bytes are gathered or scattered once.

    Within a node first or last, so that every adapter carries its GPU's share alone.
    """
    in_node = min(gpus, hardware.gpus_per_node)
    nodes = gpus / in_node
    return whole / in_node * (nodes - 1) / nodes


def collective_seconds(whole: float, gpus: int, hardware: HardwareConfig) -> float:
    """One gathering or scattering of `whole` bytes, by bandwidths alone."""
    in_node = min(gpus, hardware.gpus_per_node)
    by_node = whole * (in_node - 1) / in_node / hardware.node_bytes_per_s
    return by_node + network_bytes(whole, gpus, hardware) / hardware.network_bytes_per_s


def stall_seconds(
    params: int, gpus: int, stage: int, averages: int, hardware: HardwareConfig
) -> float:
    """For which a checkpoint stops the steps: what is partitioned is gathered, each GPU's share of
    all is copied to its host."""
    whole = VALUE * params
    gathered = {0: 0, 1: 2, 2: 2, 3: 3 + averages}[stage] * whole
    copied = whole * (3 + averages) / gpus
    return collective_seconds(gathered, gpus, hardware) + copied / hardware.host_bytes_per_s


def sample_bytes(shape: FusionUViTConfig) -> int:
    """Of a sample in the shards, float16: moments, and the context of one caption."""
    moments = 2 * shape.latent_channels * shape.latent_size**2
    return 2 * (moments + shape.context_length * shape.context_width)
