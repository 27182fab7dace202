"""Settings of the rating verbs; imports neither torch nor the web framework."""

from dataclasses import dataclass, field

MAX_MODELS = 6
MAX_REPEAT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class CreateConfig:
    """Make a study from drawn images: questions, raters and their links.

    Each model is a name and the folder of its samples.jsonl, as `generate`, `evaluate` and
    `count-objects` write it: --preference.early FOLDER --preference.intermediate FOLDER. Images
    of the same prompt at the same position, drawn from the same noise, are shown together.
    """

    study: str
    """Local folder to make; it holds the whole study and can be copied elsewhere."""

    preference: dict[str, str] = field(default_factory=dict)
    """Models to rank, 2 to 6, as name and folder of samples."""

    counting: dict[str, str] = field(default_factory=dict)
    """Models whose objects are counted, as name and folder of samples."""

    counting_prompts: str = "paper"
    """What the prompts of `counting` ask for: `paper`, `scenes`, or a .jsonl, .csv or .yaml file of
    prompt, object and count, as `ifvit count-objects` takes it."""

    num_preference: int | None = None
    """Rankings to ask for, chosen at random; unset: every prompt that all models drew."""

    num_counting: int | None = None
    """Prompts to count on, chosen at random, with one image of each model; unset: all."""

    raters: int = 5
    """Links to make; `ifvit rate links STUDY --add N` makes more later."""

    repeat_share: float = 0.1
    """Share of the questions that a rater is asked twice, to see whether the answer stays."""

    seed: int = 0
    """Decides which prompts are chosen and every random order."""

    def __post_init__(self) -> None:
        """Refuse what makes no study."""
        if not self.preference and not self.counting:
            raise ValueError("give --preference.NAME FOLDER or --counting.NAME FOLDER")
        if self.preference and not 2 <= len(self.preference) <= MAX_MODELS:
            raise ValueError(f"preference needs 2 to {MAX_MODELS} models")
        if not 0 <= self.repeat_share <= MAX_REPEAT_SHARE:
            raise ValueError(f"repeat_share must lie between 0 and {MAX_REPEAT_SHARE}")
        for name in ("num_preference", "num_counting", "raters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is less than 1")


@dataclass(frozen=True, kw_only=True)
class LinksConfig:
    """Print the raters' links and how far each rater is; make more of them."""

    study: str
    """Folder that `ifvit rate create` made."""

    add: int = 0
    """Raters to add first."""

    url: str = "http://127.0.0.1:8000"
    """Where raters reach `ifvit rate serve`."""

    def __post_init__(self) -> None:
        """Refuse to take raters away."""
        if self.add < 0:
            raise ValueError(f"add {self.add} is negative")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a study to its raters until interrupted. Every answer is on disk when it is thanked."""

    study: str
    """Folder that `ifvit rate create` made."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""


@dataclass(frozen=True, kw_only=True)
class RateReportConfig:
    """Write STUDY/report.html and STUDY/results.json from the answers so far."""

    study: str
    """Folder that `ifvit rate create` made."""


@dataclass(frozen=True, kw_only=True)
class RateExportConfig:
    """Write every current answer as a table: one row per image that was shown."""

    study: str
    """Folder that `ifvit rate create` made."""

    output: str
    """FILE.csv or FILE.jsonl."""

    def __post_init__(self) -> None:
        """Refuse other formats."""
        if not self.output.endswith((".csv", ".jsonl")):
            raise ValueError(f"output {self.output}: name a file that ends in .csv or .jsonl")
