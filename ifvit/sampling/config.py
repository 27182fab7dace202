"""Settings of the verbs `generate` and `export`, and of the alignment methods. Imports no torch."""

import json
from dataclasses import asdict, field, fields
from typing import Any, Literal

from ifvit.diffusion.config import SolverConfig
from ifvit.errors import UserError
from ifvit.records import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, record

MethodName = Literal["plain", "date", "regulate", "both"]


@record
class DateConfig:
    """DATE, Diffusion Adaptive Text Embedding (Na et al. 2025).

    Radius and frequency are those of the command in the authors' README; the defaults of their
    arguments are radius 0.1 at every step.
    """

    clip: str | None = None
    """CLIP model whose score DATE raises. Unset: the model whose text tower encodes
    the prompts, if it is a CLIP."""
    clip_weight: float = 1.0
    """Weight of the CLIP score in the objective; 0 removes it."""
    image_reward: str = "zai-org/ImageReward"
    """Folder or hub repository with ImageReward.pt and med_config.json."""
    image_reward_weight: float = 0.0
    """Weight of ImageReward in the objective; 0 removes it."""
    radius: NonNegativeFloat = 0.5
    """Length rho of every update, in the space of the text encoder's output."""
    every: PositiveInt = 10
    """Update before the function evaluations 0, every, 2 every, …. A solver with three evaluations
    per step updates at the start of its next step."""
    evaluations: tuple[NonNegativeInt, ...] | None = None
    """Function evaluations to update before, counted from 0; replaces `every`."""
    start: Literal["latest", "original"] = "latest"
    """Context that each update steps from, along the gradient at the latest context. `original`
    (the authors' --init_org) keeps the context within radius rho of the prompt's own."""

    def __post_init__(self) -> None:
        """Raise UserError for an empty objective."""
        if not (self.clip_weight or self.image_reward_weight):
            raise UserError("date.clip_weight and date.image_reward_weight are both 0; set one")


@record
class RegulationConfig:
    """Attention regulation (Zhang et al. 2024)."""

    targets: str | None = None
    """Words of the prompt to regulate, as in "bag apple". Unset: its nouns and numerals."""
    share_of_steps: Fraction = 0.5
    """Regulate this first fraction of the function evaluations."""
    blocks: tuple[NonNegativeInt, ...] | None = None
    """Numbers of blocks of the fusion map, from 0, in which image tokens attend to text. Unset: the
    middle five of them."""


@record
class SamplingConfig(SolverConfig):
    """Settings that decide an image, given weights, prompt and position; and the batch size."""

    method: MethodName = "plain"
    """Training-free alignment of images with their prompts: none, DATE, attention regulation or
    both."""
    date: DateConfig = field(default_factory=DateConfig)
    """Settings of DATE."""
    regulation: RegulationConfig = field(default_factory=RegulationConfig)
    """Settings of attention regulation."""
    batch_size: PositiveInt = 64
    """Images generated together. Changes speed and memory, not the images."""

    def __post_init__(self) -> None:
        """Raise UserError for a precision in which DATE's gradient is noise."""
        super().__post_init__()
        if self.method in ("date", "both") and self.precision in ("bf16", "fp16"):
            raise UserError(
                f"method {self.method}: precision {self.precision} rounds away the direction of "
                "DATE's gradient; use fp32 or tf32"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide an image, as JSON values; stored with images and metrics.

        The batch size, the settings of methods that are not used, a shift that is not set, and
        fp32, the precision of all images of earlier versions, are left out.
        """
        given = json.loads(json.dumps(asdict(self)))  # JSON has lists in place of tuples
        names = {field.name for field in fields(SamplingConfig)} - {"batch_size"}
        if self.method not in ("date", "both"):
            names.remove("date")
        if self.method not in ("regulate", "both"):
            names.remove("regulation")
        if self.shift is None:
            names.remove("shift")
        if self.precision == "fp32":
            names.remove("precision")
        return {name: value for name, value in given.items() if name in names}


@record
class EncoderPlaces:
    """Where the frozen encoders of the weights are; they must be those of the training."""

    vae: str | None = None
    """Autoencoder: hub name or folder. Unset: where the training found it."""
    text_encoder: str | None = None
    """Text encoder: hub name or folder. Unset: where the training found it."""


@record
class GenerateConfig(SamplingConfig, EncoderPlaces):
    """Generate images for prompts or classes: PNG files, samples.jsonl and a grid."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""
    prompt: str | None = None
    """Text of the image."""
    prompts: str | None = None
    """Text file with one prompt, or one class, per line; replaces `prompt`."""
    classes: list[str] = field(default_factory=list, metadata={"each": "class"})
    """Class names or numbers, for weights trained on classes; also as --class NAME NAME."""
    output: str = "samples"
    """Folder or s3:// URL for the images."""
    num_images: PositiveInt = 1
    """Images per prompt, each from its own noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto uses a GPU if there is one."""
    compile: bool = False
    """Compile the backbone first, on a GPU into CUDA graphs. Takes minutes once, then is faster."""

    def __post_init__(self) -> None:
        """Raise UserError unless there is exactly one source of prompts."""
        super().__post_init__()
        if [self.prompt is None, self.prompts is None, not self.classes].count(False) != 1:
            raise UserError("give one of prompt (a text), prompts (a text file) or class (names)")


@record
class ExportConfig(EncoderPlaces):
    """Write a trained backbone and its encoders to one folder that diffusers loads, with ifvit
    installed.
    """

    weights: str
    """Run folder (its newest weights), weights/step_… folder, or a folder with config.json."""
    output: str
    """Folder or s3:// URL for the pipeline."""
    kind: Literal["ema", "raw"] = "ema"
    """EMA weights or those of the last step. If one kind is missing, the other is exported."""
    hub: str | None = None
    """Also upload to this hub repository, ORGANISATION/NAME. Needs a login."""
