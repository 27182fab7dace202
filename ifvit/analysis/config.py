"""Configurations of the verbs `analyze` and `cost --plan`; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.models.config import FusionTransformerConfig
from ifvit.records import NonNegativeInt, PositiveFloat, PositiveInt, Rule, record
from ifvit.sampling.config import EncoderPlaces, SamplingConfig

Numbers = Annotated[tuple[PositiveInt, ...], Rule("one number or more", bool)]


@record
class HardwareConfig:
    """Speed, memory and connections of a GPU.

    The defaults are data-sheet values of an H200 in nodes with NVLink and one 400 Gb/s network
    adapter per GPU.
    """

    flops_per_s: PositiveFloat = 989e12
    """Dense bf16 FLOP/s of a GPU."""
    efficiency: PositiveFloat = 0.5
    """Fraction of flops_per_s that the forward and backward pass reach on one GPU. The default is
    an assumption; replace it by the MFU that `ifvit bench train` measures."""
    memory_bytes: PositiveFloat = 141e9
    """Memory of a GPU."""
    bytes_per_s: PositiveFloat = 4.8e12
    """Memory bandwidth of a GPU."""
    gpus_per_node: PositiveInt = 8
    """Number of GPUs that are connected by NVLink."""
    node_bytes_per_s: PositiveFloat = 450e9
    """NVLink bandwidth of a GPU, one way."""
    network_bytes_per_s: PositiveFloat = 50e9
    """Network bandwidth of a GPU, one way."""
    store_bytes_per_s: PositiveFloat = 2e9
    """Bandwidth from a node to the storage of checkpoints."""


@record
class PlanConfig:
    """Plan training on many GPUs: memory, step time, communication, checkpoints, loading.

    docs/log.md has the formulas and their assumptions.
    """

    backbone: FusionTransformerConfig | None = None
    """The backbone: a preset's name or a YAML file, then fields such as --backbone.fusion. Unset:
    the presets 1b and 3b."""
    gpus: Numbers = (64, 128, 256, 512, 1024)
    """Numbers of GPUs; each must be less than one node, or whole nodes."""
    batch_per_gpu: PositiveInt = 32
    """Samples per GPU in one forward pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """engine.precision of the training recipe."""
    activation_checkpointing: bool = True
    """activation_checkpointing of the training recipe."""
    num_ema: PositiveInt = 1
    """Number of EMA weights (ema_decays of the training recipe)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """optim.optimizer of the training recipe; muon excludes ZeRO."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """The GPUs and their connections."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def __post_init__(self) -> None:
        in_node = self.hardware.gpus_per_node
        for count in self.gpus:
            if count > in_node and count % in_node:
                raise UserError(f"gpus: {count} must be a multiple of {in_node}, whole nodes")


@record
class AttentionSettings:
    """Which captions are sampled, and how, while attention is recorded."""

    prompts: str | None = None
    """Text file with one prompt per line."""

    shards: str | None = None
    """Held-out shards; the prompts are the first captions of their first images."""

    num_prompts: Annotated[int, Rule("at least 2", lambda value: value >= 2)] | None = None
    """Number of prompts; a standard error needs at least 2. Unset: all prompts of the file, 64
    prompts of the shards."""

    text_encoder: str | None = None
    """Text encoder of the runs: hub name or folder. Unset: where the training found it."""

    trim: NonNegativeInt = 1
    """Patches left out at each edge of the latent grid, because padding attracts attention."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto uses the GPU if there is one."""

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.shards is None):
            raise UserError("give either prompts (a text file) or shards (a folder)")
        if self.sampling.method != "plain":
            raise UserError(
                f"sampling.method {self.sampling.method}: only the plain method is analysed; "
                "leave the option out"
            )


@record
class AttentionConfig(AttentionSettings):
    """Average the attention of image tokens while sampling, by layer (arXiv 2403.16530, Figure 8).

    Records the conditional half of guidance. Writes maps, singular values, a figure and a table.
    """

    runs: list[str]
    """Run or weights folders, for example of early and of intermediate fusion."""

    output: str | None = None
    """Folder for all files. Unset: analysis/attention in each run's folder."""


@record
class KnockoutSettings(EncoderPlaces):
    """In which blocks text is switched off, and how the effect is measured."""

    shards: str
    """Folder of held-out shards."""

    windows: Literal["all", "blocks"] = "all"
    """Windows of blocks, from the first block with text to the last: all of them, or single blocks
    only, for deep networks."""

    num_samples: Annotated[int, Rule("at least 2", lambda value: value >= 2)] = 256
    """Samples of the held-out loss, the first of the shards."""

    num_images: Annotated[int, Rule("0, or at least 2", lambda n: n == 0 or n >= 2)] = 64
    """Images for the alignment, generated without text in each single block; 0: none."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """How images are sampled and measured: a file or, by its name, one of configs/protocol. Read
    are sampling (its seed is that of the held-out loss, too), the captions, clip and scenes."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto uses the GPU if there is one."""

    def __post_init__(self) -> None:
        """Raise UserError for a protocol that does not measure the alignment with captions."""
        if self.protocol.sampling.method != "plain":
            raise UserError(
                f"protocol.sampling.method {self.protocol.sampling.method}: the knock-out "
                "changes what a network sees of its text; use plain"
            )
        if self.protocol.object_count.prompts:
            raise UserError(
                "protocol.object_count counts objects, but the knock-out measures the alignment "
                "with captions; use another protocol, such as matched"
            )


@record
class KnockoutConfig(KnockoutSettings):
    """Switch text off in blocks of trained networks, without training: where do they use text?

    Writes the changes of held-out loss and alignment for blocks and windows of blocks, a figure and
    a table.
    """

    runs: list[str]
    """Run or weights folders."""

    output: str | None = None
    """Folder for all files. Unset: analysis/knockout in each run's folder."""
