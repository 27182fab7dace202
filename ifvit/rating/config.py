"""Configurations of the `rate` verbs. Imports neither torch nor the web framework."""

from dataclasses import field
from typing import Annotated

from ifvit.errors import UserError
from ifvit.records import PositiveInt, Rule, record

MAX_MODELS = 6
RepeatShare = Annotated[float, Rule("from 0 to 0.5", lambda value: 0 <= value <= 0.5)]
Port = Annotated[int, Rule("from 0 to 65535", lambda value: 0 <= value <= 65535)]
NumRaters = Annotated[int, Rule("from 1 to 10000", lambda value: 1 <= value <= 10_000)]


@record
class CreateConfig:
    """Make a study from generated images and print its raters' links.

    Each model is a name and a folder of samples that `ifvit generate` or `ifvit evaluate` wrote:
    --preference.early FOLDER --preference.intermediate FOLDER. All images of a question have the
    same prompt, position and noise. Run the verb again with STUDY alone to see the links and each
    rater's progress, or with a larger --raters to add raters.
    """

    study: str
    """Local folder of the study; it holds all files and can be copied elsewhere."""

    preference: dict[str, str] = field(default_factory=dict)
    """Models to rank, 2 to 6: name and folder of samples."""

    counting: dict[str, str] = field(default_factory=dict)
    """Models in whose images objects are counted: name and folder of samples."""

    counting_prompts: str = "paper"
    """Prompts that the images of `counting` were generated from: `paper`, `scenes`, or a .jsonl or
    .csv file of prompt, object and count."""

    num_preference: PositiveInt | None = None
    """Number of random prompts to rank; unset: every prompt that all models have."""

    num_counting: PositiveInt | None = None
    """Number of random prompts to count on, with one image of each model; unset: all."""

    raters: NumRaters | None = None
    """Total number of raters; unset: 5 in a new study, no further raters in an existing one."""

    repeat_share: RepeatShare = 0.1
    """Fraction of the questions that each rater sees twice, to measure consistency; at most 0.5."""

    seed: int = 0
    """Seed of the random prompts and of every random order."""

    url: str = "http://127.0.0.1:8000"
    """Address at which raters reach `ifvit rate serve`."""

    def __post_init__(self) -> None:
        if self.preference and not 2 <= len(self.preference) <= MAX_MODELS:
            raise UserError(f"preference needs 2 to {MAX_MODELS} models")


@record
class RateReportConfig:
    """Write STUDY/report.html and STUDY/results.json from the answers so far."""

    study: str
    """Folder that `ifvit rate create` made."""


@record
class ServeConfig(RateReportConfig):
    """Serve a study to its raters until interrupted. Each answer is saved before the next page."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts other machines."""

    port: Port = 8000
    """Port to listen on; 0: any free port."""


@record
class RateExportConfig(RateReportConfig):
    """Write all current answers as a table with one row per shown image."""

    output: str
    """FILE.csv or FILE.jsonl."""

    def __post_init__(self) -> None:
        if not self.output.endswith((".csv", ".jsonl")):
            raise UserError(f"output {self.output}: name a file that ends in .csv or .jsonl")
