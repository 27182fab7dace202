"""Settings of the benchmarks; imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BenchLoaderConfig:
    """Compare the loader with webdataset, with one file an array, and with a bare copy.

    Samples have the paper's size and lie in a temporary folder ($TMPDIR), in memory after their
    first reading.
    """

    num_samples: int | None = None
    """Images with five captions each, 0.6 MB an image, written twice and held in memory once;
    unset: 4000, with a store 800."""
    batch_size: int = 256
    """Samples in a batch."""
    num_workers: int = 2
    """Threads of the loader and of the copy, processes of the others."""
    rounds: int = 5
    """Repetitions, in turn; medians are compared."""
    seconds: float = 3.0
    """Length of one measurement."""
    store: str | None = None
    """s3://bucket/prefix: instead compare reading an epoch from there with downloading it."""
    json: bool = False
    """Print one JSON object: samples_per_s, vs_webdataset, vs_npy, vs_copy; with a store
    samples_per_s, vs_download."""

    @property
    def num_images(self) -> int:
        """`num_samples`, or what it is unset."""
        return self.num_samples or (4000 if self.store is None else 800)

    def __post_init__(self) -> None:
        if self.num_images < 2 * self.batch_size:
            raise ValueError("num_samples must be at least two batches of batch_size")


@dataclass(frozen=True, kw_only=True)
class BenchEncodeConfig:
    """Compare the whole encode job, files to manifest, with its two models alone.

    Images are drawn as JPEGs of COCO's usual 640 x 480 pixels, with five captions each.
    """

    vae: str = "scenes/vae"
    """Autoencoder: hub name, local folder, or scenes/vae."""
    text_encoder: str = "scenes/clip"
    """CLIP text encoder: hub name, local folder, or scenes/clip."""
    num_images: int = 128
    """Images in one measurement, two shards of them."""
    image_size: int = 256
    """Side in pixels of the square that is encoded."""
    batch_size: int = 16
    """Images that go through the models at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format in which the models compute."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; auto takes a GPU when there is one."""
    num_workers: int = 4
    """Threads that read and resize images ahead of the models."""
    rounds: int = 3
    """Repetitions, in turn; medians are compared."""
    json: bool = False
    """Print one JSON object: images_per_s, vs_models_alone, and what was measured on what."""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError("num_images must be at least 2")


@dataclass(frozen=True, kw_only=True)
class BenchCheckpointConfig:
    """Measure what checkpoints of the 48M-parameter preset cost the training loop."""

    run: str | None = None
    """Where to save, a folder or s3://bucket/prefix; unset: a temporary folder."""
    every: int = 20
    """Steps between saves."""
    num_steps: int = 40
    """Steps measured without and again with saves; a multiple of `every`."""
    batch_size: int = 4
    """Samples per step; the paper's 256 on a GPU."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1 or self.num_steps < self.every:
            raise ValueError("every and batch_size must be positive, num_steps at least every")
        if self.num_steps % self.every:
            raise ValueError(f"num_steps {self.num_steps} is not a multiple of every {self.every}")


@dataclass(frozen=True, kw_only=True)
class BenchGenerateConfig:
    """Compare guided sampling with the same untrained model, eager, without what it saves, and on a
    GPU with U-ViT (early fusion by concatenation) under eager fp16 autocast.

    Without: two passes a step, the text branch and the keys and values of the text in each.
    The decoder is left out everywhere.
    """

    preset: Literal["tiny", "small", "mid", "large", "huge"] = "small"
    """Size of the backbone: intermediate fusion by cross-attention, 32 x 32 latents from small on
    (256 x 256 pixels)."""
    num_steps: int = 50
    """Evaluations that an image takes."""
    timed_steps: int = 1
    """Evaluations that one measurement runs through; an image's time follows from them."""
    batch_size: int = 4
    """Images drawn together."""
    rounds: int = 11
    """Repetitions, in turn; medians are compared."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the weights."""
    compile: bool = False
    """Compile the backbone, on a GPU with CUDA graphs; the other side stays eager."""
    json: bool = False
    """Print one JSON object: images_per_s, vs_no_cache, vs_eager_fp16 (null without a GPU), and
    what was measured on what."""

    def __post_init__(self) -> None:
        if min(self.num_steps, self.timed_steps, self.batch_size, self.rounds) < 1:
            raise ValueError("num_steps, timed_steps, batch_size and rounds must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Compare training steps: the paper's four settings with each other and with U-ViT's recipe,
    the engine with a bare loop, all with what the device can do.

    One process, plain PyTorch, random data that need not be read.
    """

    preset: Literal["tiny", "small", "mid", "large", "huge"] = "small"
    """Size of the backbones; 32 x 32 latents from small on (256 x 256 pixels)."""
    batch_size: int = 4
    """Samples in a step; the paper's 256 on a GPU."""
    steps: int = 1
    """Steps in one measurement; more where a step takes milliseconds."""
    rounds: int = 7
    """Repetitions, in turn; medians are compared."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of matrix products; unset: bf16 on a GPU, fp32 elsewhere. U-ViT's recipe: fp16 on a GPU,
    fp32 elsewhere."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass; not in U-ViT's recipe."""
    compile: bool = False
    """Compile the blocks; not in U-ViT's recipe."""
    cuda_graphs: bool = False
    """Record the compiled blocks as CUDA graphs; not in U-ViT's recipe."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"] = "auto"
    """As engine.attention of a training recipe; U-ViT's recipe has sdpa."""
    json: bool = False
    """Print one JSON object: rows, intermediate_vs_early, engine_overhead, vs_uvit_recipe, and what
    was measured on what."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.steps, self.rounds) < 1:
            raise ValueError("batch_size, steps and rounds must be at least 1")
