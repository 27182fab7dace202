"""Settings of the `rate` verbs. Imports neither torch nor the web framework."""

from dataclasses import dataclass, field

MAX_MODELS = 6


@dataclass(frozen=True, kw_only=True)
class CreateConfig:
    """Make a study from generated images and print its raters' links.

    Each model is a name and a folder with samples.jsonl, as `ifvit generate` and `ifvit evaluate`
    write it: --preference.early FOLDER --preference.intermediate FOLDER. A question shows images
    of the same prompt, the same position and the same noise. Run it again with STUDY alone to see
    the links and each rater's progress, and with a larger --raters to add raters.
    """

    study: str
    """Local folder of the study; it holds all files and can be copied elsewhere."""

    preference: dict[str, str] = field(default_factory=dict)
    """Models to rank, 2 to 6: name and folder of samples."""

    counting: dict[str, str] = field(default_factory=dict)
    """Models whose objects are counted: name and folder of samples."""

    counting_prompts: str = "paper"
    """The list of prompts that `counting` was generated from: `paper`, `scenes`, or a .jsonl, .csv
    or .yaml file of prompt, object and count."""

    num_preference: int | None = None
    """Number of prompts to rank, chosen at random; unset: every prompt that all models have."""

    num_counting: int | None = None
    """Number of prompts to count on, chosen at random, with one image of each model; unset: all."""

    raters: int | None = None
    """Number of raters in total; unset: 5 in a new study. An existing study keeps its raters."""

    repeat_share: float = 0.1
    """Share of the questions that each rater sees twice, to measure consistency; at most 0.5."""

    seed: int = 0
    """Seed of the choice of prompts and of every random order."""

    url: str = "http://127.0.0.1:8000"
    """Address at which raters reach `ifvit rate serve`."""

    def __post_init__(self) -> None:
        if self.preference and not 2 <= len(self.preference) <= MAX_MODELS:
            raise ValueError(f"preference needs 2 to {MAX_MODELS} models")
        if not 0 <= self.repeat_share <= 0.5:
            raise ValueError(f"repeat_share is {self.repeat_share}, expected 0 to 0.5")
        for name in ("num_preference", "num_counting", "raters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RateReportConfig:
    """Write STUDY/report.html and STUDY/results.json from the answers so far."""

    study: str
    """Folder that `ifvit rate create` made."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RateReportConfig):
    """Serve a study to its raters until interrupted. Every answer is saved before the next page."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts other machines."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""


@dataclass(frozen=True, kw_only=True)
class RateExportConfig(RateReportConfig):
    """Write every current answer as a table with one row per image shown."""

    output: str
    """FILE.csv or FILE.jsonl."""

    def __post_init__(self) -> None:
        if not self.output.endswith((".csv", ".jsonl")):
            raise ValueError(f"output {self.output}: name a file that ends in .csv or .jsonl")
