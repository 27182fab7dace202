"""Completion markers: proof that one output shard is done, by which job, and what it left out.

A marker is written after its shard. So the state of a whole encode job, however many processes
share it and however they died, is the set of markers in `OUTPUT/completed`.
"""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shard_io import remove_leftovers
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import ShardEntry, ShardError
from ifvit.shards.format import COMPLETED, Array, build_record, read_sealed, write_sealed

_LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers and U-ViT clamp it before drawing from the posterior


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the numbers of a dataset; shards of two jobs never share a folder.

    Not what only decides how sums round: batch size, device, version of torch. Whoever ran out of
    memory goes on with smaller batches.
    """

    source_sha256: str
    vae_sha256: str
    text_encoder_sha256: str | None
    image_size: int
    dtype: str
    precision: str
    samples_per_shard: int
    flip: bool


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image that was left out, and why."""

    image_id: int | str
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """Sums over the elements of z = mean + std * eps, from which mean and deviation follow."""

    count: int = 0
    first: float = 0.0
    second: float = 0.0

    def __add__(self, other: "LatentSums") -> "LatentSums":
        """Sums over both."""
        return LatentSums(
            count=self.count + other.count,
            first=self.first + other.first,
            second=self.second + other.second,
        )

    @property
    def mean(self) -> float:
        """E[z] = E[mean]."""
        return self.first / self.count

    @property
    def std(self) -> float:
        """sqrt(E[mean^2] + E[var] - E[mean]^2)."""
        return float(np.sqrt(self.second / self.count - self.mean**2))


@dataclass(frozen=True, kw_only=True)
class CompletionMarker:
    """One finished shard: made by `job`, without `failures`."""

    job: Job
    shard: ShardEntry
    failures: tuple[Failure, ...]
    latent_sums: LatentSums


def sum_latents(moments: Array) -> LatentSums:
    """Moments (B, 2C, H, W) as stored => float64 sums of z and of z squared (its expectation)."""
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    second = float((mean**2 + np.exp(logvar.clip(*_LOGVAR_RANGE))).sum())
    return LatentSums(count=mean.size, first=float(mean.sum()), second=second)


def write_marker(output: str, marker: CompletionMarker) -> None:
    """Write `output/completed/NAME.json`; from then on the shard is done."""
    if not storage.is_remote(output):
        remove_leftovers(Path(output, COMPLETED), marker.shard.name)
    write_sealed(marker_url(output, marker.shard.name), asdict(marker))


def read_marker(output: str, name: str) -> CompletionMarker:
    """Read a shard's marker. Raises UserError when it is missing, ShardError when damaged."""
    where = marker_url(output, name)
    value = read_sealed(where)
    value["job"] = build_record(Job, value["job"], where)
    value["shard"] = build_record(ShardEntry, value["shard"], where)
    value["failures"] = tuple(build_record(Failure, entry, where) for entry in value["failures"])
    value["latent_sums"] = build_record(LatentSums, value["latent_sums"], where)
    marker = build_record(CompletionMarker, value, where)
    if marker.shard.name != name:
        raise ShardError(f"{where}: the marker of {marker.shard.name}; encode again")
    return marker


def marker_url(output: str, name: str) -> str:
    """Where the marker of shard `name` lies."""
    return storage.join(output, COMPLETED, f"{name}.json")


def list_markers(output: str) -> set[str]:
    """Names of the shards that have a marker, whole or damaged."""
    names = storage.list_names(storage.join(output, COMPLETED))
    return {name.removesuffix(".json") for name in names}


def check_same_job(output: str, existing: Job, job: Job) -> None:
    """Raise UserError naming what differs when `output` holds shards of another job."""
    differences = [
        f"{field.name} is {_short(getattr(existing, field.name))} there, "
        f"{_short(getattr(job, field.name))} now"
        for field in fields(Job)
        if getattr(existing, field.name) != getattr(job, field.name)
    ]
    if differences:
        raise UserError(
            f"{output}: holds shards of another encode job ({'; '.join(differences)}); "
            "choose another output folder"
        )


def is_intact(output: str, entry: ShardEntry) -> bool:
    """Whether the shard's tar has its size and its index has its hash."""
    index = storage.join(output, f"{entry.name}.index.npz")
    return (
        storage.file_size(storage.join(output, f"{entry.name}.tar")) == entry.num_bytes
        and storage.exists(index)
        and hashlib.sha256(storage.read_bytes(index)).hexdigest() == entry.index_sha256
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
