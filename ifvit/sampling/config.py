"""Settings of the two methods that align images with their captions; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, SupportsFloat

Mass = Literal["preserve", "free"]
MethodName = Literal["plain", "date", "regulate", "both"]


@dataclass(frozen=True, kw_only=True)
class DateConfig:
    """Diffusion Adaptive Text Embedding (Na et al. 2025), by its released defaults."""

    clip: str | None = None
    """CLIP model whose score rises; unset: the one whose text tower encodes the prompts."""

    clip_weight: float = 1.0
    """Weight of the CLIP score in what rises; 0 leaves it out."""

    image_reward: str = "zai-org/ImageReward"
    """Folder or hub repository of ImageReward.pt and med_config.json; read when it has a weight."""

    image_reward_weight: float = 0.0
    """Weight of ImageReward in what rises; 0 leaves it out."""

    radius: float = 0.5
    """Length rho of every update, in the space of the text encoder's output."""

    every: int = 10
    """Update before the evaluations 0, every, 2 every, … of the backbone; a solver that takes
    three to a step has them moved to the start of its next step."""

    evaluations: tuple[int, ...] | None = None
    """Instead of `every`: the evaluations to update before, counted from 0."""

    start: Literal["latest", "original"] = "latest"
    """Embedding that each update starts from; `original` never leaves the ball of radius rho."""

    def __post_init__(self) -> None:
        """Refuse a frequency or a radius without meaning, and nothing to raise."""
        if self.every < 1:
            raise ValueError(f"date.every {self.every} is less than 1")
        if self.radius < 0:
            raise ValueError(f"date.radius {self.radius} is negative")
        if not (self.clip_weight or self.image_reward_weight):
            raise ValueError("date.clip_weight and date.image_reward_weight: at least one not 0")


@dataclass(frozen=True, kw_only=True)
class RegulationConfig:
    """Attention regulation (Zhang et al. 2024)."""

    targets: str | None = None
    """Words of the prompt to regulate, as in "bag apple"; unset: its nouns and numerals."""

    mass: Mass = "preserve"
    """Keep the attention that each image token pays to the text as a whole, or let it grow."""

    share_of_steps: float = 0.5
    """Regulate this first share of the evaluations of the backbone."""

    blocks: tuple[int, ...] | None = None
    """Fused blocks to regulate, counted from 0 on the way in; unset: the middle five."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.share_of_steps <= 1:
            raise ValueError(
                f"regulation.share_of_steps {self.share_of_steps} is not between 0 and 1"
            )


SolverName = Literal["dpm_solver_pp", "dpm_solver_pp_fast", "ddim", "euler", "unipc"]

_ACTS_IN = {"date": ("date", "both"), "regulation": ("regulate", "both")}
"""Settings of an alignment method, and the `method`s that use them."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """eps_uncond + scale (eps_cond - eps_uncond) at timesteps low ... high, eps_cond elsewhere."""

    scale: float
    low: float = 0.0
    high: float = 999.0

    def applies_at(self, timestep: SupportsFloat) -> bool:
        """Whether eps_uncond is needed at all at this timestep (0 ... 999).

        A tensor is read, for which the host waits for its device, only if the answer depends on it.
        """
        everywhere = self.low <= 0.0 and self.high >= 999.0
        return self.scale != 1.0 and (everywhere or self.low <= float(timestep) <= self.high)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Solver, guidance and seed: all that decides what an image looks like besides the weights."""

    solver: SolverName = "dpm_solver_pp"
    """ODE solver, all deterministic: DPM-Solver++ of order 2 (multistep), U-ViT's "fast" one of
    order 3 (singlestep), DDIM, Euler or UniPC."""

    num_steps: int = 50
    """Evaluations of the backbone per image (under guidance: of both halves together)."""

    guidance_scale: float = 2.0
    """w in eps = eps_uncond + w (eps_cond - eps_uncond); 1 turns guidance off. The scale s that
    the paper and U-ViT print is w - 1."""

    guidance_low: float = 0.0
    """Guidance is left out at timesteps below this one (0 … 999, 0 is clean); cheaper, and less
    saturated images (Kynkäänniemi et al. 2024)."""

    guidance_high: float = 999.0
    """Guidance is left out at timesteps above this one."""

    method: MethodName = "plain"
    """What brings image and prompt together while sampling: nothing, DATE, attention regulation
    or both."""

    date: DateConfig = field(default_factory=DateConfig)
    """Settings of DATE."""

    regulation: RegulationConfig = field(default_factory=RegulationConfig)
    """Settings of attention regulation."""

    seed: int = 0
    """With the position of an image in the run, decides its initial noise."""

    batch_size: int = 64
    """Images drawn together; changes speed and memory, not the images."""

    def __post_init__(self) -> None:
        """Refuse values that no solver can use."""
        if not 2 <= self.num_steps <= 999:
            raise ValueError(f"num_steps {self.num_steps} is not between 2 and 999")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is less than 1")
        if self.guidance_low > self.guidance_high:
            raise ValueError(
                f"guidance_low {self.guidance_low} is above guidance_high {self.guidance_high}"
            )

    @property
    def guidance(self) -> Guidance:
        """The three guidance settings in one."""
        return Guidance(scale=self.guidance_scale, low=self.guidance_low, high=self.guidance_high)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides an image besides weights, prompt and position, as JSON gives it back.

        Without the settings of alignment methods that do not act.
        """
        given = json.loads(json.dumps(asdict(self)))  # lists for tuples
        names = {field.name for field in fields(SamplingConfig)} - {"batch_size"}
        return _without_idle({name: given[name] for name in given if name in names})


def nest_settings(record: dict[str, Any]) -> dict[str, Any]:
    """A stored record whose field `sampling` is `SamplingConfig.settings`.

    Older records have these among their other fields, or with those of idle methods.
    """
    names = {field.name for field in fields(SamplingConfig)}
    others = {name: value for name, value in record.items() if name not in names}
    flat = {name: value for name, value in record.items() if name in names}
    settings = {"method": "plain"} | record.get("sampling", {}) | flat
    return others | {"sampling": _without_idle(settings)}


def flatten_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its settings of sampling among its other fields."""
    settings: dict[str, Any] = record.get("sampling", {})
    return {name: value for name, value in record.items() if name != "sampling"} | settings


def _without_idle(settings: dict[str, Any]) -> dict[str, Any]:
    idle = {name for name, methods in _ACTS_IN.items() if settings["method"] not in methods}
    return {name: value for name, value in settings.items() if name not in idle}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Prompts or classes and weights in, PNG files and samples.jsonl out."""

    weights: str
    """Run folder (its newest EMA weights), weights/step_… folder, or a folder with config.json."""

    prompt: str | None = None
    """What to draw."""

    prompts: str | None = None
    """Instead of one prompt: a text file with one prompt, or class, a line."""

    classes: list[str] = field(default_factory=list, metadata={"each": "class"})
    """Instead of prompts, for weights that draw classes: names or numbers, also as
    --class NAME NAME."""

    output: str = "samples"
    """Folder or s3:// URL for the PNG files and samples.jsonl."""

    num_images: int = 1
    """Images per prompt, each from its own noise."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    compile: bool = False
    """Compile the backbone first, on a GPU into CUDA graphs: minutes once, then faster."""

    def __post_init__(self) -> None:
        """Refuse a config without prompts or with two sources of them."""
        super().__post_init__()
        if [self.prompt is None, self.prompts is None, not self.classes].count(False) != 1:
            raise ValueError(
                "give either prompt (one text), prompts (a text file) or class (names)"
            )
        if self.num_images < 1:
            raise ValueError(f"num_images {self.num_images} is less than 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A trained backbone and its encoders in one folder that diffusers loads."""

    weights: str
    """Run folder (its newest weights), weights/step_… folder, or a folder with config.json."""

    output: str
    """Folder or s3:// URL for the pipeline."""

    kind: Literal["ema", "raw"] = "ema"
    """Averaged weights or those of the last step; the other kind where only that exists."""

    hub: str | None = None
    """Upload it also to this hub repository, ORGANISATION/NAME; needs a login there."""
