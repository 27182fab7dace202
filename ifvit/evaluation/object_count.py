"""Object count (arXiv 2403.16530, section 4.2): does a prompt for three apples show three?

FOLDER/step_XXXXXXXX.json is the row of one checkpoint, FOLDER/step_XXXXXXXX/ has its images.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from tqdm import tqdm

from ifvit import storage
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.evaluation.config import ObjectCountConfig
from ifvit.evaluation.detectors import CountingRule, ObjectCounter
from ifvit.evaluation.estimates import Estimate, estimate_mean, estimate_share
from ifvit.evaluation.object_prompts import CountPrompt
from ifvit.models.weights import find_weights, run_of, step_name
from ifvit.sampling.generate import generate_prompts
from ifvit.sampling.load import load_model
from ifvit.sampling.samples import image_name, image_url, missing_images, read_images

_IMAGES_AT_ONCE = 8
"""Detectors enlarge images to about 800 pixels."""


@dataclass(frozen=True, kw_only=True)
class ObjectCountProtocol:
    """What was drawn and how it was counted; rows with different ones do not compare.

    `prompts_sha256` is that of prompts, objects and counts in order, `sampling` is
    `SamplingConfig.settings`.
    """

    prompts_sha256: str
    num_images: int
    sampling: dict[str, Any]
    rule: CountingRule


@dataclass(frozen=True, kw_only=True)
class CountedImage:
    """An image, what was asked for and how many the detector saw."""

    file: str
    prompt: str
    object: str
    asked: int
    counted: int


@dataclass(frozen=True, kw_only=True)
class CountScore:
    """Eq. 9 and 10 over the images of one object and one asked count; None: of all.

    `average_error` is the mean of |counted - asked|, `match_ratio` the share of images where both
    are equal.
    """

    object: str | None
    asked: int | None
    average_error: Estimate
    match_ratio: Estimate


@dataclass(frozen=True, kw_only=True)
class ObjectCountRow:
    """One checkpoint under one protocol: all scores, and every image they come from.

    `backbone` is the configuration that tells early from intermediate fusion.
    `scores` has one for all images, one per object, one per asked count, one per pair of both.
    """

    weights: str
    weights_sha256: str
    step: int
    ema_decay: float | None
    backbone: dict[str, Any]
    protocol: ObjectCountProtocol
    scores: tuple[CountScore, ...]
    images: tuple[CountedImage, ...]

    def score(self, object: str | None = None, asked: int | None = None) -> CountScore | None:
        """The score of an object, of an asked count, of both or of all; None without images."""
        return next(
            (one for one in self.scores if (one.object, one.asked) == (object, asked)), None
        )

    @property
    def objects(self) -> list[str]:
        """Their names, in the order of the prompts."""
        return list(dict.fromkeys(image.object for image in self.images))

    @property
    def asked_counts(self) -> list[int]:
        """Every count that was asked for, from the smallest."""
        return sorted({image.asked for image in self.images})


@dataclass(frozen=True, kw_only=True)
class DrawnObjects:
    """Where the images of one run lie; image k of prompt i is number k * num_prompts + i."""

    run: str
    images: str
    backbone: dict[str, Any]
    is_complete: bool
    """Whether other processes have drawn their share, too."""


def object_count_folder(run: str) -> str:
    """RUN/evaluation/object_count, of a run or of weights in one."""
    return storage.join(run_of(find_weights(run)) or run, "evaluation", "object_count")


def draw_objects(
    config: ObjectCountConfig, run: str, prompts: Sequence[CountPrompt], folder: str
) -> DrawnObjects:
    """Draw this process's share of what `folder` lacks.

    Raises UserError when it holds images of other settings, and whatever `generate` refuses.
    """
    model = load_model(run, choose_device(config.device))
    images = storage.join(folder, step_name(model.info.step))
    texts = [one.prompt for one in prompts]
    generate_prompts(model, texts, config.sampling, images, config.num_images)
    return DrawnObjects(
        run=run,
        images=images,
        backbone=asdict(model.backbone.config),
        is_complete=not missing_images(images, range(config.num_images * len(prompts))),
    )


def count_objects(
    config: ObjectCountConfig,
    drawn: DrawnObjects,
    prompts: Sequence[CountPrompt],
    counter: ObjectCounter,
) -> ObjectCountRow:
    """Count in every image, write the row beside the images' folder and return it."""
    counted = _count_images(drawn.images, list(prompts) * config.num_images, counter)
    settings = storage.read_json(storage.join(drawn.images, "settings.json"))
    listed = json.dumps([asdict(prompt) for prompt in prompts])
    row = ObjectCountRow(
        weights=drawn.run,
        weights_sha256=settings["weights_sha256"],
        step=settings["step"],
        ema_decay=settings["ema_decay"],
        backbone=drawn.backbone,
        protocol=ObjectCountProtocol(
            prompts_sha256=sha256(listed.encode()).hexdigest(),
            num_images=config.num_images,
            sampling=config.sampling.settings,
            rule=counter.rule,
        ),
        scores=score_counts(counted),
        images=tuple(counted),
    )
    write_object_count(f"{drawn.images}.json", row)
    return row


def score_counts(images: Sequence[CountedImage]) -> tuple[CountScore, ...]:
    """Scores of all images, per object, per asked count and per pair; two images each at least."""
    objects = dict.fromkeys(image.object for image in images)
    counts = sorted({image.asked for image in images})
    pairs = sorted(
        {(image.object, image.asked) for image in images},
        key=lambda pair: (list(objects).index(pair[0]), pair[1]),
    )
    groups: list[tuple[str | None, int | None]] = [
        (None, None),
        *((name, None) for name in objects),
        *((None, count) for count in counts),
        *pairs,
    ]
    return tuple(_score(images, name, count) for name, count in groups)


def differences(first: ObjectCountProtocol, second: ObjectCountProtocol) -> list[str]:
    """Names of what keeps the two from being compared; empty when nothing does."""
    one, other = (
        {**protocol["sampling"], **protocol["rule"], **protocol}
        for protocol in (asdict(first), asdict(second))
    )
    names = one.keys() - {"sampling", "rule"}
    return sorted(name for name in names if one[name] != other.get(name))


def write_object_count(url: str, row: ObjectCountRow) -> None:
    """Write the row as JSON."""
    storage.write_json(url, asdict(row))


def read_object_count(url: str) -> ObjectCountRow:
    """Read what `write_object_count` wrote. Raises UserError when the file is something else."""
    stored: dict[str, Any] = storage.read_json(url)
    try:
        protocol = stored["protocol"]
        rule = CountingRule(**protocol["rule"])
        parts = {
            "protocol": ObjectCountProtocol(**{**protocol, "rule": rule}),
            "scores": tuple(map(_read_score, stored["scores"])),
            "images": tuple(CountedImage(**image) for image in stored["images"]),
        }
        return ObjectCountRow(**{**stored, **parts})
    except (KeyError, TypeError) as error:
        raise UserError(f"{url}: not a row of object counts ({error}); count again") from None


def _read_score(stored: dict[str, Any]) -> CountScore:
    estimates = {key: Estimate(**stored[key]) for key in ("average_error", "match_ratio")}
    return CountScore(**{**stored, **estimates})


def _count_images(
    folder: str, prompts: Sequence[CountPrompt], counter: ObjectCounter
) -> list[CountedImage]:
    """Image n shows prompts[n]."""
    counted: list[CountedImage] = []
    with tqdm(total=len(prompts), unit="image", desc="count", leave=False) as progress:
        for start in range(0, len(prompts), _IMAGES_AT_ONCE):
            batch = range(start, min(start + _IMAGES_AT_ONCE, len(prompts)))
            pixels = read_images(image_url(folder, position) for position in batch)
            counts = counter.count(pixels, [prompts[position].object for position in batch])
            counted += [
                CountedImage(
                    file=image_name(position),
                    prompt=prompts[position].prompt,
                    object=prompts[position].object,
                    asked=prompts[position].count,
                    counted=count,
                )
                for position, count in zip(batch, counts, strict=True)
            ]
            progress.update(len(batch))
    return counted


def _score(images: Sequence[CountedImage], name: str | None, asked: int | None) -> CountScore:
    errors = np.array(
        [
            abs(image.counted - image.asked)
            for image in images
            if name in (None, image.object) and asked in (None, image.asked)
        ]
    )
    return CountScore(
        object=name,
        asked=asked,
        average_error=estimate_mean(errors.astype(np.float64)),
        match_ratio=estimate_share(errors == 0),
    )
