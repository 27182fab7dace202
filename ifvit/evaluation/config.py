"""How a checkpoint is measured; imports no torch."""

from dataclasses import dataclass, field

from ifvit.sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is drawn for held-out captions, and what it is measured by."""

    shards: str
    """Folder of held-out shards: the first caption of each of the first images is drawn."""

    images: str | None = None
    """Folder of real images for the Frechet distance; unset: no Frechet distance."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP model that scores and whose image embeddings are the Frechet distance's features."""

    num_samples: int = 30_000
    """Images to draw and measure."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    paper_prefix: str = "A photo depicts "
    """Put before captions for the paper's CLIP Score; empty where the tokenizer cannot read it."""

    scenes: bool = False
    """Captions are those of `ifvit scenes`: score count, colour, kind and relation exactly."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse a number of samples that gives no covariance."""
        if self.num_samples < 2:
            raise ValueError(f"num_samples {self.num_samples} is less than 2")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """Draw images for held-out captions and measure them; run it again to continue."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""

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
class CompareConfig(MeasureConfig):
    """Draw the same captions from the same noise by every alignment method, and measure them."""

    runs: list[str]
    """Run or weights folders, for example of early and of intermediate fusion."""

    output: str = "comparison"
    """Folder for table.md, table.json, grid.png and every method's samples; rerun to continue."""
