"""Recipes of `ifvit evaluate`: what is sampled and how it is measured. Imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.records import NonNegativeInt, PlainName, PositiveInt, Rule, record
from ifvit.sampling.config import EncoderPlaces, MethodName, SamplingConfig


@record
class ObjectCountConfig:
    """Prompts that ask for a number of objects, and the detector that counts them."""

    prompts: str | None = None
    """`paper` (bus, sheep, person, apple, 1 to 5 of each), `scenes` (circle, square, triangle), or
    a .jsonl or .csv file of prompt, object and count; unset: no objects are counted."""

    detector: str = "facebook/detr-resnet-101"
    """Object detector of transformers, as a local folder or hub name, or `scenes`, exact analysis
    of the pixels of scenes."""

    threshold: Annotated[float, Rule("at least 0 and below 1", lambda x: 0 <= x < 1)] | None = None
    """Boxes with a higher score count. Unset: 0.9 for a detector of fixed classes (GenEval's), 0.3
    for one that takes any words."""

    def __post_init__(self) -> None:
        """Raise UserError for a threshold with `scenes`."""
        if self.threshold is not None and self.detector == "scenes":
            raise UserError("threshold: the detector scenes gives no scores; leave it unset")


@record
class ProtocolConfig:
    """What is sampled, and the metrics it is measured by."""

    name: PlainName = "custom"
    """Folder of its rows in RUN/evaluation; a label that decides no number."""

    num_samples: Annotated[int, Rule("at least 2", lambda value: value >= 2)] = 30_000
    """Images to generate and measure: one per held-out image, from the first on. With
    `object_count`, the same number for each of its prompts."""

    caption_rule: Literal["first", "random"] = "first"
    """Which caption of a held-out image is the prompt; random: chosen by seed and position."""

    score_caption: Literal["same", "first"] = "same"
    """Caption that a sample is scored against: its prompt, or the first of the held-out image."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance, alignment method and seed."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP of CLIP Score, retrieval, Fréchet distance and CMMD."""

    inception: str | None = None
    """Inception of FID and KID: `inception-2015-12-05`, which is downloaded once, its file, or a
    .safetensors file with the tensors of pytorch-fid's network; unset: no FID and KID."""

    paper_prefix: str = "A photo depicts "
    """Text before the captions in the paper's CLIP Score. Leave it empty for a CLIP whose tokenizer
    does not know these words, such as scenes/clip."""

    scenes: bool = False
    """Captions come from `ifvit scenes`: score count, colour, kind and relation exactly."""

    object_count: ObjectCountConfig = field(default_factory=ObjectCountConfig)
    """Count objects instead: its prompts replace the held-out captions and its scores all other
    metrics."""


@record
class EvaluationSettings(EncoderPlaces):
    """What is measured on weights: held-out captions or object counts, under a protocol."""

    shards: str | None = None
    """Folder of held-out shards, whose captions are the prompts; needed unless objects are
    counted."""

    images: str | None = None
    """Folder of real images for the distances; without it and `reference`, there are none."""

    reference: str | None = None
    """Instead of `images`, the .npz file that `ifvit evaluate --make_reference` made of them."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """A file or, by its name, one of configs/protocol; single fields override it."""

    steps: list[NonNegativeInt] | Literal["all"] | None = None
    """Saved steps of the run that `weights` names, a row for each; unset: the newest one."""

    guidance_scales: list[float] | None = None
    """Guidance scales, a row for each; unset: that of the protocol."""

    methods: list[MethodName] = field(default_factory=list, metadata={"each": "methods"})
    """Alignment methods, as in --methods plain date; a row for each, and a comparison with the
    first of them on the same prompts and noise. Unset: the method of the protocol."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that contradict each other."""
        if self.images and self.reference:
            raise UserError("give images or reference, not both")
        if not (self.shards or self.protocol.object_count.prompts):
            raise UserError("shards is not set; give the folder of held-out shards")


@record
class EvaluateConfig(EvaluationSettings):
    """Generate images for held-out captions and measure them; run it again to continue."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""

    output: str | None = None
    """Folder for rows and samples; unset: `evaluation` in the run folder of the weights."""

    num_tasks: PositiveInt = 1
    """Number of jobs that generate the images; with more than one, a last run with 1 measures."""

    task: NonNegativeInt = 0
    """Number of this job, from 0."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that contradict each other."""
        super().__post_init__()
        if self.task >= self.num_tasks:
            raise UserError(f"task {self.task} is not one of num_tasks {self.num_tasks}")


@record
class MakeReferenceConfig:
    """Write the features of real images to a file, for `ifvit evaluate --reference FILE`."""

    output: str
    """The .npz file or s3:// URL to write."""

    images: str
    """Folder of real images, all of which are used."""

    image_size: PositiveInt = 256
    """Pixels to which they are cropped and resized: the image size of the shards."""

    image_rules: ImageRules = field(default_factory=ImageRules)
    """How the shards' images were read, as their manifest says."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Only its fields clip, inception and sampling.batch_size are read."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""
