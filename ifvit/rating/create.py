"""The verb `rate create`: generated images => a study, and the links of its raters."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.evaluation.object_count import CountPrompt, read_count_prompts
from ifvit.images import ImageError, decode_png, encode_png
from ifvit.rating.answers import Store
from ifvit.rating.config import CreateConfig
from ifvit.rating.study import (
    Item,
    Kind,
    Model,
    Study,
    check_extent,
    image_name,
    read_study,
    shuffled,
    study_exists,
    write_study,
)
from ifvit.records import shorten
from ifvit.sampling.samples import read_samples, read_settings


@dataclass(frozen=True, order=True)
class _Sample:
    """Everything except the model that determines an image; seed is -1 without a settings.json."""

    position: int
    prompt: str
    seed: int


_Samples = dict[_Sample, str]
"""Sample => URL of its image, for one model."""


def create(config: CreateConfig) -> None:
    """Make the study unless it exists, add missing raters, and print all links with progress.

    Raises UserError when the folder holds a study with other settings, when a folder of samples is
    missing, or when the models have no prompt in common.
    """
    if connections.is_remote(config.study):
        raise UserError(f"study {config.study}: not a local folder, which SQLite needs; name one")
    is_new = not study_exists(config.study)
    if is_new:
        study = _build_study(config)
        store = Store.create(study.folder)
    else:
        study = read_study(config.study)
        _check_same(study, config)
        store = Store(study.folder)
    wanted = max(config.raters or (5 if is_new else 0), len(store.raters()))
    check_extent(study, wanted)
    store.add_raters(wanted - len(store.raters()))
    if is_new:
        write_study(study)
    for rater in store.raters():
        done, total = len(store.answered(rater.id)), len(study.tasks(rater.id))
        link = f"{config.url.rstrip('/')}/r/{rater.code}"
        sys.stdout.write(f"rater {rater.id}: {link} ({done} of {total} answered)\n")
    store.close()
    sys.stdout.write(f"serve the study with: ifvit rate serve {config.study}\n")


def _check_same(study: Study, config: CreateConfig) -> None:
    """Raise UserError when `config` names models and they are not those of the study."""
    models = _name_models(config)
    if models and (models, config.seed, config.repeat_share) != (
        study.models,
        study.seed,
        study.repeat_share,
    ):
        raise UserError(
            f"{config.study}: holds a study with other settings; choose another folder, or give "
            "only the folder to see its links"
        )


def _build_study(config: CreateConfig) -> Study:
    """Select the questions and copy their images; the caller writes study.json."""
    models = _name_models(config)
    if not models:
        raise UserError(
            f"{config.study}: no study; give --preference.NAME FOLDER or --counting.NAME FOLDER"
        )
    return Study(
        folder=Path(config.study),
        seed=config.seed,
        repeat_share=config.repeat_share,
        models=models,
        items=tuple(_select_items(config, {model.name: model.blind for model in models})),
    )


def _name_models(config: CreateConfig) -> tuple[Model, ...]:
    """List the models in the given order, with blind names M1, M2, … in a random order."""
    names = list({**config.preference, **config.counting})
    order = shuffled(names, config.seed)
    return tuple(
        Model(
            blind=f"M{order.index(name) + 1}",
            name=name,
            preference=config.preference.get(name),
            counting=config.counting.get(name),
        )
        for name in names
    )


def _select_items(config: CreateConfig, blind: Mapping[str, str]) -> list[Item]:
    """Make one ranking per prompt, then one count per prompt and model."""
    parts: tuple[tuple[Kind, Mapping[str, str], int | None], ...] = (
        ("preference", config.preference, config.num_preference),
        ("counting", config.counting, config.num_counting),
    )
    items: list[Item] = []
    for kind, folders, number in parts:
        samples = {name: _read_samples(folder) for name, folder in folders.items()}
        chosen = _choose(kind, samples, number, config.seed)
        asked = _find_counts(config, chosen) if kind == "counting" else {}
        for sample in chosen:
            urls = {blind[name]: urls[sample] for name, urls in samples.items()}
            pages = [urls] if kind == "preference" else [{name: urls[name]} for name in urls]
            for page in pages:
                item = Item(
                    number=len(items),
                    kind=kind,
                    prompt=sample.prompt,
                    position=sample.position,
                    images={name: _copy(url, config.study) for name, url in page.items()},
                    object=asked[sample].object if asked else None,
                    count=asked[sample].count if asked else None,
                )
                items.append(item)
    return items


def _find_counts(config: CreateConfig, chosen: Sequence[_Sample]) -> dict[_Sample, CountPrompt]:
    """Find what the prompts of the samples ask for. Raises UserError for an unknown prompt."""
    known = {prompt.prompt: prompt for prompt in read_count_prompts(config.counting_prompts)}
    for sample in chosen:
        if sample.prompt not in known:
            raise UserError(
                f"counting: `{shorten(sample.prompt)}` is not in the prompts "
                f"`{config.counting_prompts}`; give the list that the images were generated from "
                "with --counting_prompts"
            )
    return {sample: known[sample.prompt] for sample in chosen}


def _choose(
    kind: Kind, samples: Mapping[str, _Samples], number: int | None, seed: int
) -> list[_Sample]:
    """Select `number` random samples (None: all) of those that every model has."""
    if not samples:
        return []
    generated = set.union(*map(set, samples.values()))
    common = set.intersection(*map(set, samples.values()))
    if not common:
        raise UserError(
            f"{kind}: {', '.join(samples)} have no prompt of the same position and seed in common; "
            "generate their images from one list of prompts"
        )
    if len(common) < len(generated):
        sys.stdout.write(f"{kind}: all models have {len(common)} of {len(generated)} prompts\n")
    if number is not None and number > len(common):
        raise UserError(f"num_{kind} is {number}, but there are only {len(common)}; lower it")
    return sorted(shuffled(common, seed, kind)[:number])


def _read_samples(folder: str) -> _Samples:
    """Read FOLDER/samples.jsonl. Raises UserError when it is missing or not a list of samples."""
    rows, seed = read_samples(folder), read_settings(folder).get("seed", -1)
    if not isinstance(seed, int):
        raise UserError(f"{folder}/settings.json: seed is {shorten(seed)}; it must be an integer")
    if not rows:
        raise UserError(f"{folder}/samples.jsonl: no such file; give a folder of ifvit generate")
    return {
        _Sample(row.position, row.prompt, seed): storage.join_inside(folder, row.file)
        for row in rows
    }


def _copy(url: str, study: str) -> str:
    """Copy an image under a name that does not reveal its model, and return the name.

    The image is encoded again, because a PNG file may contain text about its origin.
    """
    try:
        data = encode_png(decode_png(storage.read_bytes(url)))
    except ImageError as error:
        raise UserError(f"{url}: {error}; generate it again") from None
    name = image_name(data)
    storage.write_bytes(storage.join(study, "images", name), data)
    return name
