"""A run directory as its readers see it: studies and reports read all files of a run through here.

Nothing is written, and files that are missing stay missing.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from ifvit import storage
from ifvit.diffusion.config import ObjectiveConfig
from ifvit.errors import UserError
from ifvit.evaluation.rows import FOLDER, MetricsRow, TrainingRow, read_rows, read_training_rows
from ifvit.models.config import BackboneConfig
from ifvit.models.cost import Cost, count_cost
from ifvit.models.weights import newest_weights, read_backbone_config, read_stored_weights
from ifvit.records import PositiveInt, parse_value, parse_yaml, record


@record
class RecipeFacts:
    """What reports compute with; they show all other keys of a recipe as text."""

    global_batch_size: PositiveInt | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    validation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of one run directory; None or empty: there is no such file.

    `target` is what the backbone predicts, of which latents; losses of different targets do not
    compare. `curve` holds the rows of metrics.jsonl, `rows` all evaluations, sorted by protocol
    name, guidance scale and step. `training_grids` are (step, URL).
    """

    name: str
    url: str
    recipe: dict[str, Any] | None
    facts: RecipeFacts
    backbone: BackboneConfig | None
    target: str | None
    curve: list[TrainingRow]
    rows: list[MetricsRow]
    training_grids: list[tuple[int, str]]

    def locate(self, url: str) -> str:
        """Return `url`. Raises UserError if a link there leads out of the run's folder."""
        return storage.join_inside(self.url, url.removeprefix(f"{self.url}/"))

    @property
    def cost(self) -> Cost | None:
        """Parameters and operations, counted from the configuration of the weights."""
        return count_cost(self.backbone) if self.backbone else None

    @property
    def end(self) -> TrainingRow | None:
        """The last line of metrics.jsonl."""
        return self.curve[-1] if self.curve else None


def read_runs(urls: list[str]) -> list[Run]:
    """Read run folders. Raises UserError if one does not exist or is named twice."""
    return [read_run(url, name) for url, name in zip(urls, short_names(urls), strict=True)]


def read_run(url: str, name: str) -> Run:
    """Read one run folder. Raises UserError if it does not exist or a file in it is broken."""
    url = url.rstrip("/")
    if not storage.exists(url):
        raise UserError(f"{url}: no such run; give the folder that `ifvit train` wrote")
    recipe, facts = _read_recipe(storage.join_inside(url, "config.yaml"))
    backbone, target = _read_backbone(url)
    return Run(
        name=name,
        url=url,
        recipe=recipe,
        facts=facts,
        backbone=backbone,
        target=target,
        curve=read_training_rows(url),
        rows=list(read_rows(storage.join_inside(url, FOLDER)).values()),
        training_grids=step_files(storage.join(url, "samples"), ".png"),
    )


def _read_recipe(url: str) -> tuple[dict[str, Any] | None, RecipeFacts]:
    """The keys of config.yaml, None without the file, and those that reports compute with."""
    if not storage.exists(url):
        return None, RecipeFacts()
    stored = parse_yaml(storage.read_bytes(url), url)
    recipe: dict[str, Any] = parse_value(dict[str, Any], stored, url)
    known = {key: recipe[key] for key in vars(RecipeFacts()) if key in recipe}
    return recipe, parse_value(RecipeFacts, known, url)


def short_names(urls: list[str]) -> list[str]:
    """Last parts of the URLs, with as many parent folders as make them different."""
    parts = [url.rstrip("/").split("/") for url in urls]
    longest = max((len(part) for part in parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("runs: the same folder is given twice; name each run once")


def step_files(folder: str, suffix: str) -> list[tuple[int, str]]:
    """(step, URL) of the step_… files in a folder, the newest last."""
    pattern = re.compile(rf"step_([0-9]{{1,18}}){re.escape(suffix)}")
    found = [(name, pattern.fullmatch(name)) for name in storage.list_names(folder)]
    return sorted((int(match[1]), storage.join(folder, name)) for name, match in found if match)


def _read_backbone(run: str) -> tuple[BackboneConfig, str] | tuple[None, None]:
    """The configuration of the newest weights, EMA weights first, and what they predict."""
    folder = newest_weights(run)
    if folder is None:
        return None, None
    stored = read_stored_weights(folder)
    return read_backbone_config(folder, stored.config_sha256), stored.info.target
