"""How a checkpoint is measured; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from ifvit.sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """What is drawn for held-out captions, and by what it is measured."""

    name: str = "custom"
    """Folder of its rows in RUN/evaluation; a label, not part of what decides the numbers."""

    num_samples: int = 30_000
    """Images to draw and measure: for the first held-out images."""

    caption_rule: Literal["first", "random"] = "first"
    """Which of an image's captions is drawn; random: by seed and position."""

    score_caption: Literal["same", "first"] = "same"
    """Which one the drawn image is scored against: the same, or the first of the image."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP of CLIP Score, retrieval, Fréchet distance and CMMD."""

    inception: str | None = None
    """TorchScript Inception of FID and KID: a file, an s3:// URL, or `inception-2015-12-05`, which
    is downloaded once; unset: no FID and KID."""

    paper_prefix: str = "A photo depicts "
    """Put before captions for the paper's CLIP Score; empty where the tokenizer cannot read it."""

    scenes: bool = False
    """Captions are those of `ifvit scenes`: score count, colour, kind and relation exactly."""

    def __post_init__(self) -> None:
        """Refuse a number of samples that gives no covariance, and a name that is no folder's."""
        if self.num_samples < 2:
            raise ValueError(f"num_samples {self.num_samples} is less than 2")
        if not self.name or "/" in self.name:
            raise ValueError(f"name {self.name!r} is not the name of a folder")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured against what."""

    shards: str
    """Folder of held-out shards, whose captions are drawn."""

    images: str | None = None
    """Folder of real images for the distances; without it and `reference`, there are none."""

    reference: str | None = None
    """Instead of `images`, what `ifvit evaluate --make_reference` made of them: an .npz file."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """A file or, by its name, one of configs/protocol; single fields go over it."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse two references."""
        if self.images and self.reference:
            raise ValueError("give images or reference, not both")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """Draw images for held-out captions and measure them; run it again to continue."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""

    steps: Literal["all"] | list[int] | None = None
    """Saved steps of the run that `weights` names, a row each; unset: the newest one."""

    guidance_scales: list[float] | None = None
    """Guidance scales, a row each; unset: that of the protocol."""

    output: str | None = None
    """Folder for rows and samples; unset: `evaluation` in the run folder of the weights."""

    num_tasks: int = 1
    """Jobs that share the drawing; with more than one, run once more without to measure."""

    task: int = 0
    """Which of them this is, from 0."""

    def __post_init__(self) -> None:
        """Refuse a task that is none."""
        super().__post_init__()
        if not 0 <= self.task < self.num_tasks:
            raise ValueError(f"task {self.task} is not one of num_tasks {self.num_tasks}")


@dataclass(frozen=True, kw_only=True)
class MakeReferenceConfig:
    """Keep the features of real images in a file, for `ifvit evaluate --reference FILE`."""

    output: str
    """The .npz file or s3:// URL to write."""

    images: str
    """Folder of real images; all of them count."""

    image_size: int = 256
    """Pixels to which they are cropped and resized: those of the shards they stand against."""

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Of a protocol its networks count: clip and inception."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MeasureConfig):
    """Draw the same captions from the same noise by every alignment method, and measure them."""

    runs: list[str]
    """Run or weights folders, for example of early and of intermediate fusion."""

    output: str = "comparison"
    """Folder for table.md, table.json, grid.png and every method's samples; rerun to continue."""


@dataclass(frozen=True, kw_only=True)
class ObjectCountConfig:
    """Draw prompts that ask for so many objects, count them, compare; rerun to continue."""

    runs: list[str]
    """Run or weights folders; of a run, its newest EMA weights."""

    detector: str
    """What counts: an object detector of transformers, as a local folder or hub name, or `scenes`,
    exact analysis of the pixels of scenes."""

    prompts: str = "paper"
    """`paper` (bus, sheep, person, apple, 1 to 5 of each), `scenes` (circle, square, triangle), or
    a .jsonl, .csv or .yaml file of prompt, object and count."""

    output: str | None = None
    """Folder or s3:// URL for figure, table, rows and images. Unset: rows and images go to
    evaluation/object_count of each run, the figure and its table to runs/object_count."""

    num_images: int = 10
    """Images per prompt, each from its own noise."""

    threshold: float | None = None
    """Boxes with a higher score count. Unset: 0.9 for a detector of fixed classes (GenEval's), 0.3
    for one that takes any words."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse what gives no interval, no counts, or a threshold where nothing is scored."""
        if self.num_images < 2:
            raise ValueError(f"num_images {self.num_images} is less than 2")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} is not between 0 and 1")
        if self.threshold is not None and self.detector == "scenes":
            raise ValueError("threshold: exact analysis has no scores; leave it out")
