"""The verbs `rate create` and `rate links`: drawn images => a study and its raters' links."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import UnidentifiedImageError

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.object_prompts import read_count_prompts
from ifvit.images import decode_png, encode_png
from ifvit.rating.config import CreateConfig, LinksConfig
from ifvit.rating.store import Store
from ifvit.rating.study import (
    Item,
    Kind,
    Model,
    Study,
    read_study,
    shuffled,
    study_exists,
    write_study,
)


@dataclass(frozen=True, order=True)
class _Sample:
    """What decides a drawn image besides the model; seed is -1 where no settings.json names it."""

    position: int
    prompt: str
    seed: int


_Samples = dict[_Sample, str]
"""The URL of each image in one folder."""


def create(config: CreateConfig) -> None:
    """Write the study's folder, study.json last, and print the links.

    Raises UserError when the folder holds a study, when a folder of samples is none, or when the
    models have no prompt in common.
    """
    if storage.is_remote(config.study):
        raise UserError(f"study {config.study}: SQLite needs a local folder; name one")
    if study_exists(config.study):
        raise UserError(f"{config.study}: holds a study already; choose another folder")
    models = _name_models(config)
    blind = {model.name: model.blind for model in models}
    images = str(Path(config.study, "images"))
    items = _preference_items(config, blind, images) + _counting_items(config, blind, images)
    study = Study(
        folder=Path(config.study),
        seed=config.seed,
        repeat_share=config.repeat_share,
        models=models,
        items=tuple(replace(item, number=number) for number, item in enumerate(items)),
    )
    store = Store.create(study.folder)
    store.add_raters(config.raters)
    store.close()
    write_study(study)
    links(LinksConfig(study=config.study))


def links(config: LinksConfig) -> None:
    """Print each rater's link and progress, after adding raters if that is wanted."""
    study = read_study(config.study)
    store = Store(study.folder)
    store.add_raters(config.add)
    for rater in store.raters():
        done, total = len(store.answers(rater.id)), len(study.tasks(rater.id))
        link = f"{config.url.rstrip('/')}/r/{rater.code}"
        sys.stdout.write(f"rater {rater.id}: {link} ({done} of {total} answered)\n")
    store.close()
    sys.stdout.write(f"serve them with: ifvit rate serve {config.study}\n")


def _name_models(config: CreateConfig) -> tuple[Model, ...]:
    """All models as given, under blind names that do not follow the order in which they are."""
    names = list({**config.preference, **config.counting})
    blind = {name: f"M{number}" for number, name in enumerate(shuffled(names, config.seed), 1)}
    return tuple(
        Model(
            blind=blind[name],
            name=name,
            preference=config.preference.get(name),
            counting=config.counting.get(name),
        )
        for name in names
    )


def _preference_items(config: CreateConfig, blind: Mapping[str, str], images: str) -> list[Item]:
    """One item per chosen prompt, with every model's image of it."""
    samples = {name: _read_samples(folder) for name, folder in config.preference.items()}
    return [
        Item(
            number=0,
            kind="preference",
            prompt=sample.prompt,
            position=sample.position,
            images={blind[name]: _copy(urls[sample], images) for name, urls in samples.items()},
        )
        for sample in _choose("preference", samples, config.num_preference, config.seed)
    ]


def _counting_items(config: CreateConfig, blind: Mapping[str, str], images: str) -> list[Item]:
    """One item per chosen prompt and model."""
    samples = {name: _read_samples(folder) for name, folder in config.counting.items()}
    asked = {prompt.prompt: prompt for prompt in read_count_prompts(config.counting_prompts)}
    chosen = _choose("counting", samples, config.num_counting, config.seed)
    for sample in chosen:
        if sample.prompt not in asked:
            raise UserError(
                f"counting: `{sample.prompt}` is none of the prompts `{config.counting_prompts}`; "
                "name the list that was drawn with --counting_prompts"
            )
    return [
        Item(
            number=0,
            kind="counting",
            prompt=sample.prompt,
            position=sample.position,
            images={blind[name]: _copy(urls[sample], images)},
            object=asked[sample.prompt].object,
            count=asked[sample.prompt].count,
        )
        for sample in chosen
        for name, urls in samples.items()
    ]


def _choose(
    kind: Kind, samples: Mapping[str, _Samples], number: int | None, seed: int
) -> list[_Sample]:
    """`number` random samples, or all, of those that every model has; says what some lack."""
    if not samples:
        return []
    drawn = set.union(*map(set, samples.values()))
    common = set.intersection(*map(set, samples.values()))
    if not common:
        raise UserError(
            f"{kind}: {', '.join(samples)} have no prompt at the same position and of the same seed"
            " in common; draw them from one list of prompts"
        )
    if len(common) < len(drawn):
        sys.stdout.write(f"{kind}: {len(common)} of {len(drawn)} prompts are drawn by all models\n")
    if number is not None and number > len(common):
        raise UserError(f"num_{kind} {number}: there are only {len(common)}; lower it")
    return sorted(shuffled(common, seed, kind)[:number])


def _read_samples(folder: str) -> _Samples:
    """What samples.jsonl lists. Raises UserError when there is none, or it lists something else."""
    url = storage.join(folder, "samples.jsonl")
    if not storage.exists(url):
        raise UserError(f"{url}: no such file; give the folder of drawn images that holds one")
    settings = storage.join(folder, "settings.json")
    seed = storage.read_json(settings).get("seed", -1) if storage.exists(settings) else -1
    try:
        rows = [json.loads(line) for line in storage.read_bytes(url).decode().splitlines()]
        return {
            _Sample(position=row["position"], prompt=row["prompt"], seed=seed): storage.join(
                folder, row["file"]
            )
            for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url}: not a list of samples ({error!r}); draw them again") from None


def _copy(url: str, folder: str) -> str:
    """Copy an image under a name that tells nothing of its model; returns the name.

    It is encoded anew, because PNG files may carry text about their origin.
    """
    try:
        data = encode_png(decode_png(storage.read_bytes(url)))
    except UnidentifiedImageError:
        raise UserError(f"{url}: not an image; draw it again") from None
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    storage.write_bytes(storage.join(folder, name), data)
    return name
