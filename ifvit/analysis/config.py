"""Settings of the analysis verbs; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from ifvit.sampling.config import SamplingConfig

PlanPreset = Literal["small", "mid", "large", "huge", "1b", "8b"]


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """One kind of GPU and what joins it to others; the defaults are data-sheet values of an H200
    in nodes with NVLink and one 400 Gb/s adapter for each GPU."""

    flops_per_s: float = 989e12
    """Dense bf16 FLOP/s of a GPU."""
    efficiency: float = 0.5
    """Share of that which forward and backward reach on one GPU; an assumption to be replaced by
    the MFU of `ifvit bench train`."""
    memory_bytes: float = 141e9
    """Memory of a GPU."""
    bytes_per_s: float = 4.8e12
    """Its bandwidth."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    node_bytes_per_s: float = 450e9
    """NVLink of a GPU, each way."""
    network_bytes_per_s: float = 50e9
    """Network of a GPU, each way."""
    host_bytes_per_s: float = 50e9
    """From a GPU to host memory."""
    store_bytes_per_s: float = 2e9
    """From a node to where checkpoints are kept."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"hardware.{name} must be positive: {value}")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Plan training on many GPUs: memory, time of a step, communication, checkpoints, loading.

    The formulas and what they assume are in docs/performance.md.
    """

    presets: tuple[PlanPreset, ...] = ("1b", "8b")
    """Backbones: intermediate fusion by cross-attention, 32 x 32 latents."""
    width: int | None = None
    """With depth: plan a backbone of this width instead, 64 channels per head."""
    depth: int | None = None
    """Its blocks but for the middle one; a third of them on each side see no text."""
    gpus: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Numbers of GPUs, whole nodes or less than one."""
    batch_per_gpu: int = 32
    """Samples that a GPU trains on at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """As engine.precision of a training recipe."""
    activation_checkpointing: bool = True
    """As in a training recipe."""
    num_averages: int = 1
    """Averages of the weights (ema_decays)."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """The GPUs."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def __post_init__(self) -> None:
        if (self.width is None) != (self.depth is None):
            raise ValueError("give both width and depth, or neither")
        if self.batch_per_gpu < 1 or self.num_averages < 1 or min(self.gpus, default=0) < 1:
            raise ValueError("gpus, batch_per_gpu and num_averages must be at least 1")
        in_node = self.hardware.gpus_per_node
        for count in self.gpus:
            if count > in_node and count % in_node:
                raise ValueError(f"gpus: {count} are not whole nodes of {in_node}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Average what image tokens attend to while sampling, by layer (arXiv 2403.16530, Figure 8).

    Of the conditional half, by the plain method; maps, their singular values, a figure, a table.
    """

    runs: list[str]
    """Run or weights folders, for example of early and of intermediate fusion."""

    prompts: str | None = None
    """A text file with one prompt a line."""

    shards: str | None = None
    """Instead, held-out shards: the first caption of each of the first images."""

    num_prompts: int | None = None
    """The first of them; unset: all of the file, 64 of the shards. Memory does not grow with it."""

    output: str | None = None
    """Folder for everything; unset: analysis/attention in each run's folder."""

    trim: int = 1
    """Patches to leave out at each edge of the latent grid, where padding draws attention."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse a config without prompts, or one that the analysis is not about."""
        if (self.prompts is None) == (self.shards is None):
            raise ValueError("give either prompts (a text file) or shards (a folder)")
        if self.num_prompts is not None and self.num_prompts < 2:
            raise ValueError(f"num_prompts {self.num_prompts} gives no standard error; give 2")
        if self.trim < 0:
            raise ValueError(f"trim {self.trim} is negative")
        if self.sampling.method != "plain":
            raise ValueError(f"sampling.method {self.sampling.method}: attention is that of plain")
