"""How counted objects are drawn and counted; imports no torch."""

from dataclasses import dataclass, field

from ifvit.sampling.config import SamplingConfig


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
