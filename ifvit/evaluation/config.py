"""Recipes of `ifvit evaluate`: what is sampled and how it is measured. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from ifvit.sampling.config import MethodName, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ObjectCountConfig:
    """Prompts that ask for a number of objects, and the detector that counts them."""

    prompts: str | None = None
    """`paper` (bus, sheep, person, apple, 1 to 5 of each), `scenes` (circle, square, triangle), or
    a .jsonl or .csv file of prompt, object and count; unset: no objects are counted."""

    detector: str = "facebook/detr-resnet-101"
    """Object detector of transformers, as a local folder or hub name, or `scenes`, exact analysis
    of the pixels of scenes."""

    threshold: float | None = None
    """Boxes with a higher score count. Unset: 0.9 for a detector of fixed classes (GenEval's), 0.3
    for one that takes any words."""

    def __post_init__(self) -> None:
        """Raise ValueError for a threshold outside [0, 1), and for any with `scenes`."""
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} is not between 0 and 1")
        if self.threshold is not None and self.detector == "scenes":
            raise ValueError("threshold: the detector scenes gives no scores; leave it unset")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """What is sampled, and the metrics it is measured by."""

    name: str = "custom"
    """Folder of its rows in RUN/evaluation; a label that decides no number."""

    num_samples: int = 30_000
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
    """TorchScript Inception of FID and KID: a file, or `inception-2015-12-05`, which is downloaded
    once; unset: no FID and KID."""

    paper_prefix: str = "A photo depicts "
    """Text before the captions in the paper's CLIP Score. Leave it empty for a CLIP whose tokenizer
    does not know these words, such as scenes/clip."""

    scenes: bool = False
    """Captions come from `ifvit scenes`: score count, colour, kind and relation exactly."""

    object_count: ObjectCountConfig = field(default_factory=ObjectCountConfig)
    """Count objects instead: its prompts replace the held-out captions and its scores all other
    metrics."""

    def __post_init__(self) -> None:
        """Raise ValueError for fewer than 2 samples, or a name that cannot be one folder's name."""
        if self.num_samples < 2:
            raise ValueError(f"num_samples {self.num_samples} is less than 2")
        if not self.name or "/" in self.name:
            raise ValueError(f"name {self.name!r} is not the name of a folder")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Generate images for held-out captions and measure them; run it again to continue."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""

    shards: str | None = None
    """Folder of held-out shards, whose captions are the prompts; needed unless objects are
    counted."""

    images: str | None = None
    """Folder of real images for the distances; without it and `reference`, there are none."""

    reference: str | None = None
    """Instead of `images`, the .npz file that `ifvit evaluate --make_reference` made of them."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """A file or, by its name, one of configs/protocol; single fields override it."""

    steps: Literal["all"] | list[int] | None = None
    """Saved steps of the run that `weights` names, a row for each; unset: the newest one."""

    guidance_scales: list[float] | None = None
    """Guidance scales, a row for each; unset: that of the protocol."""

    methods: list[MethodName] = field(default_factory=list, metadata={"each": "methods"})
    """Alignment methods, as in --methods plain date; a row for each, and a comparison with the
    first of them on the same prompts and noise. Unset: the method of the protocol."""

    output: str | None = None
    """Folder for rows and samples; unset: `evaluation` in the run folder of the weights."""

    num_tasks: int = 1
    """Number of jobs that generate the images; with more than one, a last run with 1 measures."""

    task: int = 0
    """Number of this job, from 0."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        if self.images and self.reference:
            raise ValueError("give images or reference, not both")
        if not (self.shards or self.protocol.object_count.prompts):
            raise ValueError("shards is not set; give the folder of held-out shards")
        if not 0 <= self.task < self.num_tasks:
            raise ValueError(f"task {self.task} is not one of num_tasks {self.num_tasks}")


@dataclass(frozen=True, kw_only=True)
class MakeReferenceConfig:
    """Write the features of real images to a file, for `ifvit evaluate --reference FILE`."""

    output: str
    """The .npz file or s3:// URL to write."""

    images: str
    """Folder of real images, all of which are used."""

    image_size: int = 256
    """Pixels to which they are cropped and resized: the image size of the shards."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Only its fields clip, inception and sampling.batch_size are read."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""
