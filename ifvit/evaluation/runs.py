"""A run directory as the report reads it: files only, and what is missing stays missing."""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows, samples_url
from ifvit.models.config import BackboneConfig, FusionUViTConfig, restore_config
from ifvit.models.cost import Cost, count_cost

FUSIONS = {
    (False, False): "early",
    (True, True): "intermediate",
    (True, False): "image blocks only",
    (False, True): "text branch only",
}
"""Name of a setting by whether it has image-only blocks and a text branch."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One drawn caption; `real` is the photograph's URL, `scores` what is right about it."""

    prompt: str
    image_id: int | str
    image: str
    real: str | None
    scores: dict[str, bool | None] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run directory holds. None and empty mean: no such file.

    `curve` are the rows of metrics.jsonl, `rows` all evaluations, sorted by protocol name, guidance
    scale and step. `evaluations` are those of the protocol name and guidance scale that most rows
    have (of several: the first name, the smallest scale), from the first step to the last;
    `samples` belong to the last one. `training_grids` are (step, URL).
    """

    name: str
    url: str
    recipe: dict[str, Any] | None
    backbone: BackboneConfig | None
    curve: list[dict[str, float]]
    rows: list[MetricsRow]
    evaluations: list[MetricsRow]
    samples: list[Sample]
    training_grids: list[tuple[int, str]]

    @property
    def cost(self) -> Cost | None:
        """Parameters and operations, counted from the configuration of the weights."""
        return count_cost(self.backbone) if self.backbone else None

    @property
    def last(self) -> MetricsRow | None:
        """The evaluation of the latest step."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def fusion(self) -> str | None:
        """Which row of the paper's table the backbone is; None for one that fuses no text."""
        shape = self.backbone
        if not isinstance(shape, FusionUViTConfig):
            return None
        return FUSIONS[shape.num_image_blocks > 0, shape.num_text_blocks > 0]


def read_runs(urls: list[str]) -> list[Run]:
    """Read run folders. Raises UserError for one that does not exist."""
    return [read_run(url, name) for url, name in zip(urls, short_names(urls), strict=True)]


def read_run(url: str, name: str) -> Run:
    """Read one run folder. Raises UserError if there is none, or if a file in it is broken."""
    if not storage.exists(url):
        raise UserError(f"{url}: no such run; give the folder that `ifvit train` wrote")
    rows = read_rows(storage.join(url, FOLDER))
    evaluations = main_series(list(rows.values()))
    last = next((place for place, row in rows.items() if row is evaluations[-1]), None)
    return Run(
        name=name,
        url=url,
        recipe=_read_recipe(storage.join(url, "config.yaml")),
        backbone=_read_backbone(url),
        curve=_read_jsonl(storage.join(url, "metrics.jsonl")),
        rows=list(rows.values()),
        evaluations=evaluations,
        samples=read_samples(samples_url(last)) if last else [],
        training_grids=step_files(storage.join(url, "samples"), ".png"),
    )


def short_names(urls: list[str]) -> list[str]:
    """Last parts of the URLs, with as many folders before them as it takes to differ."""
    parts = [url.rstrip("/").split("/") for url in urls]
    longest = max((len(part) for part in parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("runs: the same folder is given twice; name each run once")


def step_files(folder: str, suffix: str) -> list[tuple[int, str]]:
    """(step, URL) of the step_… files in a folder, the newest last."""
    names = [
        name
        for name in storage.list_names(folder)
        if name.startswith("step_") and name.endswith(suffix)
    ]
    return sorted(
        (int(name.removeprefix("step_").removesuffix(suffix)), storage.join(folder, name))
        for name in names
    )


def _read_recipe(url: str) -> dict[str, Any] | None:
    if not storage.exists(url):
        return None
    recipe: dict[str, Any] = yaml.safe_load(storage.read_bytes(url))
    return recipe


def _read_backbone(run: str) -> BackboneConfig | None:
    folder = storage.join(run, "weights")
    steps = [name for name in storage.list_names(folder) if name.startswith("step_")]
    candidates = [
        storage.join(folder, step, kind, "config.json")
        for step in reversed(steps)
        for kind in ("ema", "raw")
    ]
    found = next((url for url in candidates if storage.exists(url)), None)
    if found is None:
        return None
    try:
        return restore_config(storage.read_json(found))
    except (TypeError, ValueError) as error:
        raise UserError(f"{found}: not the configuration of a backbone ({error})") from None


def _read_jsonl(url: str) -> list[dict[str, Any]]:
    if not storage.exists(url):
        return []
    lines = storage.read_bytes(url).decode().splitlines()
    try:
        # A run that is still being written may end in half a line.
        return [json.loads(line) for line in lines if line.endswith("}")]
    except json.JSONDecodeError as error:
        raise UserError(f"{url}: not one JSON object a line ({error})") from None


def read_samples(folder: str) -> list[Sample]:
    """What samples.jsonl in a folder of an evaluation lists; empty without that file."""
    return [
        Sample(
            prompt=row["prompt"],
            image_id=row["image_id"],
            image=storage.join(folder, row["file"]),
            real=storage.join(folder, row["real"]) if row["real"] else None,
            scores=row["scores"],
        )
        for row in _read_jsonl(storage.join(folder, "samples.jsonl"))
    ]
