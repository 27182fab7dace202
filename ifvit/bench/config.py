"""Configuration of the benchmarks; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from ifvit.diffusion.config import Precision
from ifvit.errors import UserError
from ifvit.models.config import FusionTransformerConfig
from ifvit.records import PositiveInt, Rule, record


@record
class BenchConfig:
    """Base of all benchmarks."""

    json: bool = False
    """Print one JSON object."""


@record
class BenchLoaderConfig(BenchConfig):
    """Compare the training loader with webdataset, and the layouts of contexts.

    The samples are random numbers, latents as in the paper. They are written to a temporary folder
    ($TMPDIR). The JSON object holds samples_per_s and its ratios vs_webdataset, vs_int8 and
    vs_padded to other readers and layouts, and the bytes per caption of the layouts; with `store`
    samples_per_s and vs_download.
    """

    context: Literal["clip", "gemma", "t5"] = "clip"
    """Size of the contexts: CLIP-L 77 x 768 with padding; Gemma-2-2B and T5-XXL, 2304 and 4096
    wide, stored without padding for captions of 8 to 25 tokens, mean 13."""
    num_samples: PositiveInt | None = None
    """Images with five captions each; all layouts of one take 1, 6 or 11 MB of disk. Default: 4000
    for clip, 800 with `store`, else 512."""
    batch_size: PositiveInt = 256
    """Samples per batch."""
    num_workers: PositiveInt = 2
    """Threads of the loader; processes of webdataset."""
    rounds: PositiveInt = 5
    """Interleaved repetitions; the medians are compared."""
    store: str | None = None
    """s3://bucket/prefix: compare reading an epoch from there with downloading its shards."""

    @property
    def num_images(self) -> int:
        """`num_samples` or its default."""
        default = 4000 if self.context == "clip" else 512
        return self.num_samples or (default if self.store is None else 800)

    def __post_init__(self) -> None:
        if self.num_images < 2 * self.batch_size:
            raise UserError(
                f"num_samples is {self.num_images}; it must be at least two batches "
                f"of batch_size {self.batch_size}"
            )


@record
class BenchCheckpointConfig(BenchConfig):
    """Measure how much the checkpoints of the 48M-parameter preset slow training down.

    The JSON object holds stall_share, slowdown, seconds and size of a save, and the conditions.
    """

    run: str | None = None
    """Empty folder or s3://bucket/prefix to save to. Default: a temporary folder."""
    every: PositiveInt = 20
    """Steps between saves."""
    num_steps: PositiveInt = 40
    """Steps measured without saves, and again with saves; a multiple of `every`."""
    batch_size: PositiveInt = 4
    """Samples per step; use the paper's 256 on a GPU."""

    def __post_init__(self) -> None:
        if self.num_steps % self.every:
            raise UserError(f"num_steps {self.num_steps} must be a multiple of every {self.every}")


@record
class BenchGenerateConfig(BenchConfig):
    """Compare guided sampling with plain guidance, which runs the whole backbone twice per step.

    Plain guidance computes the text branch and the keys and values of the text again in every step.
    The backbone is untrained, and no latents are decoded. The JSON object holds images_per_s,
    vs_no_cache and the conditions.
    """

    backbone: FusionTransformerConfig | None = None
    """The backbone, which takes captions: a preset's name or a YAML file, then fields such as
    --backbone.fusion. Unset: the preset small."""
    num_steps: PositiveInt = 50
    """Function evaluations (NFE) per image; one is measured and multiplied by this number."""
    batch_size: PositiveInt = 4
    """Images generated together."""
    rounds: PositiveInt = 11
    """Interleaved repetitions; the medians are compared."""
    precision: Precision = "fp32"
    """Number format of the matrix products, as in `ifvit generate`."""
    compile: bool = False
    """Compile the backbone, on a GPU with CUDA graphs; plain guidance stays eager."""


@record
class BenchQualityConfig(BenchConfig):
    """Measure how much sooner today's recipe reaches the quality of the paper's recipe.

    Both train the same fusion map on rendered scenes (configs/train/scenes.yaml and
    scenes_paper.yaml), and so does today's recipe without each of its ingredients. Run it again to
    continue. The JSON object holds time_ratio, ingredients, and cost and quality of both recipes.
    """

    folder: str = "runs/quality"
    """Output folder for scenes, runs and evaluations; 4 GB with three seeds."""
    seeds: PositiveInt = 3
    """Number of training seeds, 1, 2, …; the ratio is the median over them."""
    steps: PositiveInt = 1500
    """Optimizer steps of the paper's recipe."""
    share: Annotated[float, Rule("above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.5
    """Length of the other runs, as a share of the processor time of the paper's recipe. A ratio
    above it is not found."""
    processes: PositiveInt = 2
    """Runs at the same time, each on one core."""


@record
class BenchTrainConfig(BenchConfig):
    """Compare training steps with fusion maps of your choice, or with the paper's four settings.

    The paper's settings are also compared with U-ViT's recipe. One process trains with plain
    PyTorch on random data in memory. The JSON object holds rows, the ratios and the conditions.
    """

    backbone: FusionTransformerConfig | None = None
    """Size and options of the backbones, which take captions: a preset's name or a YAML file, then
    fields such as --backbone.long_skip. Unset: the preset small."""
    maps: list[str] = field(default_factory=list, metadata={"each": "maps"})
    """Fusion maps, or settings such as concat_early. Rows are relative to the first one."""
    batch_size: PositiveInt = 4
    """Samples per step; use the paper's 256 on a GPU."""
    steps: PositiveInt = 1
    """Steps per measurement; use more when a step takes only milliseconds."""
    rounds: PositiveInt = 7
    """Interleaved repetitions; the medians are compared."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of matrix products. Default: bf16 on a GPU, fp32 elsewhere. U-ViT's recipe uses
    fp16 on a GPU and fp32 elsewhere."""
    compile: bool = False
    """Compile the blocks; U-ViT's recipe stays eager."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"] = "auto"
    """Attention backend, as engine.attention of a training recipe; U-ViT's recipe uses sdpa."""
