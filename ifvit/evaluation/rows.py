"""Rows of metrics: what an evaluation or training measured, and where the row is stored.

`ifvit evaluate` writes a `MetricsRow` for one checkpoint under one protocol to
RUN/evaluation/PROTOCOL/wSCALE/step_XXXXXXXX.json; its samples are in the folder of that name.
`ifvit train` writes each `TrainingRow` as a line of RUN/metrics.jsonl. All rows carry a seal (see
`ifvit.records`). Studies, reports and the status of jobs read them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Any, Literal

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate
from ifvit.records import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PlainName,
    PositiveFloat,
    PositiveInt,
    Rule,
    Sha256,
    parse_rows,
    parse_value,
    record,
)
from ifvit.sampling.config import SamplingConfig

FOLDER = "evaluation"
"""Folder of a run that holds its rows."""
TRAINING_FILE = "metrics.jsonl"
"""Name of the file in a run folder that holds the rows of training."""
_MAX_BYTES = 1 << 30
"""Largest file of training rows that is read; a million rows take 0.9 GB."""
_LABELS = {"name", "features", "inception"}


def _are_settings(value: dict[str, Any]) -> bool:
    """Whether readers find their keys. Raises UserError for settings that no solver can have."""
    parse_value(SamplingConfig, value, "settings")
    return {"guidance_scale", "method"} <= value.keys()


Settings = Annotated[dict[str, Any], Rule("settings of images", _are_settings)]
"""`SamplingConfig.settings` as files hold them."""


@record
class Protocol:
    """What was sampled and how it was measured; stored with every row.

    `name`, `features` and `inception` are labels; every other field decides the numbers.
    Hashes are SHA-256.
    """

    name: PlainName
    num_samples: PositiveInt
    prompts_sha256: Sha256
    """Hash of the image id and the prompt of every sample, in order."""
    caption_rule: Literal["first", "random"]
    """Caption of an image that is the prompt: `first`, or `random` (by seed and position)."""
    score_caption: Literal["same", "first"]
    """Caption that a sample is scored against: the `same`, or the `first` of the image."""
    sampling: Settings
    image_size: PositiveInt
    resize: str
    """How real images became square."""
    features: str
    """Name of the CLIP model behind all metrics except FID and KID."""
    features_sha256: Sha256
    paper_prefix: str
    inception: str | None
    """Name of the Inception network of FID and KID; None: neither was measured."""
    inception_sha256: Sha256 | None
    num_reference_images: PositiveInt | None
    reference_sha256: Sha256 | None
    """Hash of the real images' files, order and resize; None: no distance was measured."""

    @property
    def facts(self) -> dict[str, Any]:
        """All fields by name; the sampling settings are fields like the others."""
        own = {name: value for name, value in vars(self).items() if name != "sampling"}
        return own | self.sampling

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the samples."""
        scale: float = self.sampling["guidance_scale"]
        return scale


@record
class MetricsRow:
    """Metrics of one checkpoint under one protocol; None: not measured.

    `frechet_distance` and `cmmd` (x 1000) use CLIP features, `fid` and `kid` Inception features.
    `clip_score` is the raw cosine, `clip_score_paper` is 2.5 max(cos, 0) with the prefix.
    """

    weights: str
    weights_sha256: Sha256
    step: NonNegativeInt
    ema_decay: Fraction | None
    protocol: Protocol
    frechet_distance: Estimate | None
    clip_score: Estimate
    clip_score_paper: Estimate
    retrieval_at_16: Estimate | None
    fid: Estimate | None = None
    kid: Estimate | None = None
    cmmd: Estimate | None = None
    count_accuracy: Estimate | None = None
    colour_accuracy: Estimate | None = None
    kind_accuracy: Estimate | None = None
    relation_accuracy: Estimate | None = None
    scene_accuracy: Estimate | None = None
    empty_share: Estimate | None = None
    """Share of the images that show no object of a scene."""
    held_out_loss: Estimate | None = None
    target: str | None = None
    """What the held-out loss is the error of; losses compare only where it is equal."""
    seconds_per_image: NonNegativeFloat | None = None
    """Seconds of one process to generate an image and write its PNG file."""


def differences(first: Protocol, second: Protocol) -> list[str]:
    """Fields that make numbers of two protocols incomparable, in words; empty: comparable."""
    one, other = first.facts, second.facts
    pairs = {name: (one.get(name), other.get(name)) for name in one | other}
    return [
        f"{describe_field(name)} {describe_value(name, a)} against {describe_value(name, b)}"
        for name, (a, b) in pairs.items()
        if a != b and name not in _LABELS
    ]


def describe_field(name: str) -> str:
    """`guidance_scale` => `guidance scale`, `prompts_sha256` => `prompts hash`."""
    return name.replace("_", " ").replace("sha256", "hash")


def describe_value(name: str, value: object) -> str:
    """The value as text; a hash is shortened to 12 digits."""
    if value is None:
        return "none"
    return str(value)[:12] if name.endswith("sha256") else str(value)


def estimates_of(row: MetricsRow) -> dict[str, Estimate]:
    """The measured metrics of a row by field name."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, Estimate)}


def read_rows(folder: str) -> dict[str, MetricsRow]:
    """All rows of metrics below `folder` by URL, sorted by protocol name, guidance scale and step.

    Rows of object counts are left out. Raises UserError for any other file in the place of a row,
    and for a row in the place of another.
    """
    rows = {
        url: parse_value(MetricsRow, stored, url)
        for url, stored in read_stored_rows(folder).items()
        if "images" not in stored
    }
    for url, row in rows.items():
        own = row_url(folder, row.protocol.name, row.protocol.guidance_scale, row.step)
        if own != url:
            raise UserError(f"{url}: is the row of {own}; move it there")
    return dict(sorted(rows.items(), key=lambda item: (*_series(item[1]), item[1].step)))


def read_stored_rows(folder: str) -> dict[str, dict[str, Any]]:
    """The sealed JSON objects in the places of rows below `folder`, by URL."""
    return {url: storage.read_sealed(dict[str, Any], url) for url in _find_row_urls(folder)}


def _find_row_urls(folder: str) -> list[str]:
    """URLs of all rows below `folder`, rows of object counts included."""
    return [
        storage.join(folder, protocol, scale, name)
        for protocol in storage.list_names(folder)
        for scale in storage.list_names(storage.join(folder, protocol))
        if re.fullmatch(r"w[0-9.e+-]+", scale)
        for name in storage.list_names(storage.join(folder, protocol, scale))
        if re.fullmatch(r"step_[0-9]+\.json", name)
    ]


def row_url(folder: str, protocol: str, guidance_scale: float, step: int) -> str:
    """`RUN/evaluation`, `scenes`, 1.5, 500 => `RUN/evaluation/scenes/w1.5/step_00000500.json`."""
    return storage.join(folder, protocol, f"w{guidance_scale:g}", f"step_{step:08d}.json")


def samples_url(row: str) -> str:
    """The folder of the samples behind the row at URL `row`."""
    return row.removesuffix(".json")


def main_series(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows of the protocol name and guidance scale that most rows have, in their order.

    Among equally frequent ones, the first name and the smallest scale win.
    """
    counts = Counter(map(_series, rows))
    main = min(counts, key=lambda series: (-counts[series], series), default=None)
    return [row for row in rows if _series(row) == main]


def _series(row: MetricsRow) -> tuple[str, float]:
    return row.protocol.name, row.protocol.guidance_scale


@record
class TrainingRow:
    """Training between the row before and this one; None: not measured, or not a finite number.

    `loss`, `loss_q0` to `loss_q3` (by quarter of the timesteps, the cleanest first),
    `representation_loss` (1 - mean cosine, not part of `loss`) and all speeds are means over these
    steps. `validation_loss` is the held-out loss of the EMA weights after the last step,
    `validation_loss_tK` its part at timestep (K + 1/2) / 8. `learning_rate` and `grad_norm` are
    those of the last step; counts and `seconds` include all steps of the run. `PHASE_seconds` are
    seconds per step.
    """

    step: PositiveInt
    samples_seen: NonNegativeInt
    loss: NonNegativeFloat | None
    loss_q0: NonNegativeFloat | None = None
    loss_q1: NonNegativeFloat | None = None
    loss_q2: NonNegativeFloat | None = None
    loss_q3: NonNegativeFloat | None = None
    representation_loss: float | None = None
    validation_loss: NonNegativeFloat | None = None
    validation_loss_t0: NonNegativeFloat | None = None
    validation_loss_t1: NonNegativeFloat | None = None
    validation_loss_t2: NonNegativeFloat | None = None
    validation_loss_t3: NonNegativeFloat | None = None
    validation_loss_t4: NonNegativeFloat | None = None
    validation_loss_t5: NonNegativeFloat | None = None
    validation_loss_t6: NonNegativeFloat | None = None
    validation_loss_t7: NonNegativeFloat | None = None
    learning_rate: NonNegativeFloat
    grad_norm: NonNegativeFloat | None
    nonfinite_steps: NonNegativeInt = 0
    samples_per_s: PositiveFloat
    tokens_per_s: NonNegativeFloat | None = None
    data_wait: Fraction
    """Share of the time that was spent waiting for batches."""
    seconds: NonNegativeFloat
    """Processor time of all threads of the main process in the training steps."""
    data_seconds: NonNegativeFloat | None = None
    forward_seconds: NonNegativeFloat | None = None
    backward_seconds: NonNegativeFloat | None = None
    optimizer_seconds: NonNegativeFloat | None = None
    ema_seconds: NonNegativeFloat | None = None
    validation_seconds: NonNegativeFloat | None = None
    log_seconds: NonNegativeFloat | None = None
    checkpoint_seconds: NonNegativeFloat | None = None
    samples_seconds: NonNegativeFloat | None = None
    loss_scale: NonNegativeFloat | None = None
    overflows: NonNegativeInt | None = None
    mfu: NonNegativeFloat | None = None
    peak_memory: NonNegativeInt | None = None
    """Bytes."""
    device: str


def read_training_rows(run: str, newest: int | None = None) -> list[TrainingRow]:
    """Read the rows of a run, or only its `newest` ones; [] before the first row.

    An unfinished last line is left out. Raises UserError that names a damaged line, and when steps
    do not rise.
    """
    url = storage.join(run, TRAINING_FILE)
    data = storage.read_bytes(url, _MAX_BYTES) if storage.exists(url) else b""
    if newest is not None:
        complete, _, _ = data.rpartition(b"\n")
        data = b"\n".join([*complete.split(b"\n")[-newest:], b""])
    rows = parse_rows(TrainingRow, data, url)
    for before, row in pairwise(rows):
        if row.step <= before.step:
            raise UserError(f"{url}: step {row.step} follows step {before.step}; restore the file")
    return rows
