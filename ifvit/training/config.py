"""Fields of a training recipe; free of torch, so that `--help` is quick."""

import re
from dataclasses import field
from datetime import timedelta
from typing import Annotated, Literal

from ifvit.diffusion.config import (
    LatentScaling,
    ObjectiveConfig,
    Precision,
    RepresentationConfig,
    ScalingFactor,
    ShiftFactor,
)
from ifvit.errors import UserError
from ifvit.models.config import BackboneConfig, FusionTransformerConfig, NullContext, TextOptions
from ifvit.records import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rule,
    record,
)
from ifvit.shards import CacheConfig

Location = Annotated[
    str,
    Rule(
        "a path or URL without control characters", lambda text: text != "" and text.isprintable()
    ),
]
Branch = Annotated[
    str,
    Rule(
        "RUN@STEP, such as runs/base@5000 or runs/base@latest",
        lambda text: text.isprintable() and re.fullmatch(r".+@(\d{1,18}|latest)", text) is not None,
    ),
]
NumSamples = Annotated[int, Rule("from 1 to 16777216", lambda value: 1 <= value <= 2**24)]
Decay = Annotated[float, Rule("at least 0 and below 1", lambda value: 0 <= value < 1)]
Minutes = Annotated[float, Rule("above 0 and at most 10080", lambda value: 0 < value <= 10080)]
NumThreads = Annotated[int, Rule("from 1 to 256", lambda value: 1 <= value <= 256)]
NumSolverSteps = Annotated[int, Rule("from 2 to 999", lambda value: 2 <= value <= 999)]


@record
class OptimConfig:
    """The learning rate rises from 0, stays constant, and may fall to 0 at the end."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, at the same learning rate and weight decay, and
    AdamW for all else."""
    learning_rate: NonNegativeFloat = 2e-4
    """Learning rate after the warm-up."""
    weight_decay: NonNegativeFloat = 0.03
    """Decoupled weight decay."""
    decay_norms: bool = False
    """Apply the weight decay to the weights and biases of norms, too, as in U-ViT."""
    betas: tuple[Decay, Decay] = (0.9, 0.9)
    """Decay rates of AdamW's two moments."""
    warmup_steps: NonNegativeInt = 5000
    """Steps over which the learning rate rises; the first update has rate 0."""
    cooldown_steps: NonNegativeInt = 0
    """Last steps over which the learning rate falls to 0; 0: it stays constant, as in the paper."""
    max_grad_norm: PositiveFloat | None = None
    """Clip the norm of the global gradient to this value; unset: no clipping."""


@record
class EngineConfig:
    """How a step runs on this hardware; it changes results only by rounding."""

    backend: Literal["auto", "plain", "deepspeed"] = "auto"
    """auto: DeepSpeed for several processes or for offload, otherwise plain PyTorch; with Muon
    always plain."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned among processes: 1 the moments, 2 also the gradients, 3 also the
    parameters and EMA weights, 0 nothing (PyTorch's DDP)."""
    offload_optimizer: bool = False
    """Keep the moments in host memory and update there; needs DeepSpeed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of matrix products; parameters, moments and EMA weights are fp32. fp16 scales the
    loss."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the blocks and the noise sampling with torch.compile."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"] = "auto"
    """Attention kernel. auto: xformers where it is installed with CUDA, otherwise sdpa, which lets
    torch choose among its kernels flash, cudnn, efficient and math."""
    timeout_minutes: Minutes = 120.0
    """Longest time that processes wait for each other, for example while one reads a checkpoint;
    after it they stop. A process that ends is noticed at once."""

    @property
    def timeout(self) -> timedelta:
        """Longest time that processes wait for each other."""
        return timedelta(minutes=self.timeout_minutes)

    def __post_init__(self) -> None:
        if self.backend == "deepspeed" and self.zero_stage == 0:
            raise UserError("engine.zero_stage: 0 partitions nothing; set engine.backend: plain")


@record
class SampleGridConfig:
    """Images that are generated during training, always from the same prompts and noise."""

    every: NonNegativeInt = 5000
    """Steps between grids; 0: no grids."""
    prompts: tuple[str, ...] = ()
    """Captions or class names; empty: the first captions or classes of the training set."""
    num_steps: NumSolverSteps = 25
    """Solver steps."""
    guidance_scale: NonNegativeFloat = 2.0
    """Weight w of the guidance, uncond + w (cond - uncond)."""
    precision: Precision = "fp32"
    """Number format of the matrix products, as in `ifvit generate`."""


VALIDATION_LOSS = "validation_loss"
"""Name of the held-out loss in rows of training, and for `keep_best`."""


@record
class ValidationConfig:
    """The loss of the EMA weights on held-out shards, always for the same samples and noise."""

    shards: Location | None = None
    """Folder of held-out shards, encoded as those of the training; unset: no validation."""
    every: PositiveInt = 1000
    """Steps between validations, a multiple of log_every."""
    num_samples: NumSamples = 256
    """Number of samples, from the first one on."""


@record
class CaptionConfig:
    """How often captions of one source are read, such as short or long ones."""

    weight: NonNegativeFloat = 1.0
    """Chance of this source, relative to those of the other sources that an image has."""
    dropout: Fraction | None = None
    """Fraction of these captions that is dropped; unset: caption_dropout."""


@record
class TrainConfig:
    """Train a backbone on pre-encoded shards; run the same command again to resume."""

    run: Location
    """Run directory: config, metrics, checkpoints, weights, samples."""
    shards: Location
    """Folder of the training shards, local or s3://; the one that holds manifest.json."""
    vae: str | None = None
    """The VAE that the shards must come from; unset: any."""
    text_encoder: str | None = None
    """The text encoder that the shards must come from, or that computes contexts; unset: that of
    the shards."""
    context: Literal["stored", "computed"] = "stored"
    """stored: read contexts from the shards. computed: compute them from the captions while
    training, with the same losses up to rounding."""
    text: TextOptions = field(default_factory=TextOptions)
    """How text_encoder computes contexts."""
    backbone: BackboneConfig
    """The network: a preset (`--backbone small`), a YAML file, or single fields."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network predicts, at which timesteps."""
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    """Alignment of image tokens with features, if `backbone.representation_block` is set."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Precision, attention kernels, DeepSpeed."""
    sample_grid: SampleGridConfig = field(default_factory=SampleGridConfig)
    """Images generated during training."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on held-out shards."""
    max_steps: PositiveInt = 1_000_000
    """Optimizer steps of the whole run."""
    global_batch_size: NumSamples = 256
    """Samples per optimizer step, over all processes."""
    micro_batch_size: NumSamples = 256
    """Samples per forward pass and process; smaller values accumulate gradients."""
    caption_dropout: Fraction = 0.1
    """Fraction of samples trained without their caption or class, for guidance."""
    captions: dict[str, CaptionConfig] = field(default_factory=dict)
    """Weights of caption sources, such as {short: {weight: 1}, long: {weight: 3, dropout: 0.2}}. An
    image's source is drawn by weight, then one of its captions from there; sources without a weight
    are not read. Unset: all captions of an image are equally likely."""
    null_context: NullContext = "empty_caption"
    """Context of samples without a caption: that of "" (empty_caption), or zeros."""
    scaling_factor: ScalingFactor | Literal["per_channel"] | None = None
    """Factor on the latents, for all channels or a list for each; per_channel: subtract mean and
    divide by standard deviation of each channel of the shards; unset: divide by the standard
    deviation of all."""
    shift_factor: ShiftFactor = 0.0
    """Subtract this from the latents before they are multiplied by a given scaling_factor."""
    ema_decays: tuple[Decay, ...] = (0.9999,)
    """Decays per step, one for each set of EMA weights; the first one is the default."""
    random_flip: bool = False
    """Read the flipped image in half of all visits; encode the shards with flip: true."""
    shuffle_window: PositiveInt | None = None
    """Number of shards whose samples are shuffled together; the shards come in random order.
    Unset: the whole dataset. s3:// shards need it, and two windows must fit into the cache."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where this machine keeps s3:// shards."""
    seed: int = 1234
    """Seed of all random numbers."""
    tolerate_nonfinite: NonNegativeInt = 0
    """Number of steps of the run that may be skipped because their gradient is not finite."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where else the metrics go; tensorboard needs a local run directory."""
    profile: bool = False
    """Trace a few steps with torch's profiler into profile/ of the run."""
    checkpoint_every: PositiveInt = 5000
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep the checkpoints of steps divisible by this number; 0: none."""
    keep_best: str | None = None
    """Also keep the checkpoint and the exported weights whose evaluation has the best value of this
    metric, such as frechet_distance or clip_score, or the lowest validation_loss; unset: none."""
    export_every: PositiveInt | None = None
    """Steps between exported weights, a multiple of checkpoint_every; unset: with each checkpoint.
    The weights of the last step are always exported."""
    keep_exports: PositiveInt = 5
    """Number of newest exported weights to keep."""
    branch: Branch | None = None
    """RUN@STEP: start from this checkpoint of another run and go on from its step with the same
    data, captions, noise and timesteps; RUN@latest: from its newest one."""
    initial_weights: str | None = None
    """Start step 0 from the weights of this run or of a folder in its weights/; unset: random
    weights."""
    num_workers: NumThreads = 2
    """Threads that read batches ahead."""

    @property
    def given_scaling(self) -> LatentScaling | None:
        """Scaling of the latents; None if it depends on the statistics of the shards."""
        if self.scaling_factor is None or self.scaling_factor == "per_channel":
            return None
        return LatentScaling(scale=self.scaling_factor, shift=self.shift_factor)

    @property
    def active_representation(self) -> RepresentationConfig | None:
        """Representation alignment of this backbone; None if it has no projector."""
        backbone = self.backbone
        if not isinstance(backbone, FusionTransformerConfig):
            return None
        return None if backbone.representation_block is None else self.representation

    def _check_scaling(self) -> None:
        scaling = self.given_scaling
        if scaling is None and self.shift_factor != 0.0:
            raise UserError(
                "shift_factor: belongs to a scaling_factor that is a number; set it, too"
            )
        if scaling and scaling.num_channels not in (None, self.backbone.latent_channels):
            raise UserError(
                f"scaling_factor: has {scaling.num_channels} numbers for the "
                f"{self.backbone.latent_channels} backbone.latent_channels; give one for each"
            )

    def __post_init__(self) -> None:
        self._check_captions()
        self._check_scaling()
        if self.active_representation is None and self.representation != RepresentationConfig():
            raise UserError("representation: has no effect; set backbone.representation_block")
        if len(set(self.ema_decays)) != len(self.ema_decays) or not self.ema_decays:
            raise UserError("ema_decays must name at least one decay, each once")
        if self.export_every is not None and self.export_every % self.checkpoint_every:
            raise UserError(
                f"export_every {self.export_every} is not a multiple of checkpoint_every "
                f"{self.checkpoint_every}; weights are exported from checkpoints"
            )
        if self.validation.shards is not None and self.validation.every % self.log_every:
            raise UserError(
                f"validation.every {self.validation.every} is not a multiple of log_every "
                f"{self.log_every}; its losses go to the rows of metrics.jsonl"
            )
        if self.keep_best == VALIDATION_LOSS and (
            self.validation.shards is None or self.checkpoint_every % self.validation.every
        ):
            raise UserError(
                f"keep_best: {VALIDATION_LOSS} needs validation.shards, and checkpoint_every a "
                "multiple of validation.every"
            )
        engine = self.engine
        wants_zero = engine.backend == "auto" and engine.zero_stage > 1  # 1 is the default
        if self.optim.optimizer == "muon" and (
            engine.backend == "deepspeed" or engine.offload_optimizer or wants_zero
        ):
            raise UserError(
                "optim.optimizer: muon needs engine.backend: plain without offload_optimizer; "
                "ZeRO shards matrices, which Muon needs whole"
            )

    def _check_captions(self) -> None:
        if self.backbone.num_classes is not None and self.null_context == "zeros":
            raise UserError("null_context: the backbone knows classes, not captions; remove it")
        if self.backbone.num_classes is not None and self.context == "computed":
            raise UserError("context: the backbone knows classes, not captions; remove it")
        if self.text != TextOptions() and (self.context == "stored" or self.text_encoder is None):
            raise UserError(
                "text: has an effect only beside context: computed and text_encoder; set both"
            )
        if self.captions and not any(source.weight for source in self.captions.values()):
            raise UserError("captions: all weights are 0; give one of the sources a weight")


MAY_CHANGE = {
    *("run", "shards", "cache", "vae", "text_encoder", "engine", "sample_grid", "max_steps"),
    *("micro_batch_size", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("keep_every", "keep_best", "export_every", "keep_exports", "tolerate_nonfinite"),
    *("trackers", "profile", "validation", "context", "text"),
}
"""Fields that a resumed run may change; a change of any other field would make another run. Of
validation, only `every` may change once there are held-out shards. `resume` checks that `text` and
`text_encoder` make the same contexts."""


@record
class ReplayConfig:
    """Compute a failed training step again; a failed run leaves its file in failures/."""

    file: str
    """The file that the error message names."""
