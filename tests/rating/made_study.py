"""Makes small studies with tiny images, and answers to their questions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ifvit.rating.answers import Answer, Store
from ifvit.rating.config import CreateConfig
from ifvit.rating.create import create
from ifvit.rating.study import Study, Task, read_study
from ifvit.sampling.samples import SampleRow, claim_folder
from ifvit.sampling.samples import write_samples as list_samples

MODELS = ("early", "intermediate", "late")
COUNT_PROMPTS = [
    {"prompt": "two apples", "object": "apple", "count": 2},
    {"prompt": "a bus", "object": "bus", "count": 1},
]


def write_samples(folder: Path, prompts: list[str], colour: int, seed: object = 1) -> str:
    """Write a folder like `ifvit generate`; all images differ and name their model."""
    folder.mkdir(parents=True)
    rows = []
    for position, prompt in enumerate(prompts):
        pixels = np.full((16, 16, 3), (120 * colour % 256, 60 * position % 256, 99), np.uint8)
        note = PngImagePlugin.PngInfo()
        note.add_text("model", folder.name)
        Image.fromarray(pixels).save(folder / f"{position:05d}.png", pnginfo=note)
        rows.append(SampleRow(file=f"{position:05d}.png", prompt=prompt, position=position))
    list_samples(str(folder), rows)
    claim_folder(str(folder), {"seed": seed})
    return str(folder)


def make_study(folder: Path, num_preference: int = 4, raters: int = 3, **settings: object) -> Study:
    """Create a study with rankings of three models and counts of two, each prompt once."""
    prompts = [f"prompt {number}" for number in range(num_preference)]
    asked = folder / "asked.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text("".join(json.dumps(row) + "\n" for row in COUNT_PROMPTS))
    words = [str(row["prompt"]) for row in COUNT_PROMPTS]
    config = CreateConfig(
        study=str(folder / "study"),
        preference={
            name: write_samples(folder / name / "preference", prompts, colour)
            for colour, name in enumerate(MODELS)
        },
        counting={
            name: write_samples(folder / name / "counting", words, 100 + colour)
            for colour, name in enumerate(MODELS[:2])
        },
        counting_prompts=str(asked),
        raters=raters,
        **settings,  # type: ignore[arg-type]
    )
    create(config)
    return read_study(config.study)


def rank(task: Task, study: Study, order: tuple[str, ...]) -> str:
    """Return the form field that ranks models, given by name from best to worst."""
    blind = {name: blind for blind, name in study.names.items()}
    return ",".join(str(task.shown.index(blind[name])) for name in order)


def add(
    store: Store,
    task: Task,
    rater: int,
    value: int | tuple[str, ...] | None,
    skip_reason: str | None = None,
) -> None:
    """Record an answer as the server does."""
    store.add(
        Answer(
            rater=rater,
            item=task.item.number,
            repetition=task.repetition,
            shown=task.shown,
            value=value,
            skip_reason=skip_reason,
        )
    )
