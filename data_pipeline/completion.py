"""Completion markers of the encode job: one small file per finished shard.

A marker is written after its shard. It holds the job that made the shard, the images that were left
out, and sums over the latents. The markers in `OUTPUT/completed` are the whole state of a job: any
number of processes may work on the job and be killed at any time. `encode` reads and removes
markers, the threads of `shard_io` write them.
"""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from data_pipeline.config import SizeLimits
from data_pipeline.sources.base import REQUESTS_AT_ONCE
from ifvit import connections, storage
from ifvit.arrays import Array
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.records import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Sha256,
    parse_value,
    record,
)
from ifvit.shards.format import (
    COMPLETED,
    FORMAT_VERSION,
    FormatVersion,
    Precision,
    ShardEntry,
    ShardError,
    TextSettings,
)


@record
class Job:
    """Everything that decides the numbers of a dataset; an output folder holds shards of one job.

    Batch size, device and torch version are missing because they only change how results are
    rounded. After running out of memory you can therefore continue with smaller batches.
    """

    source_sha256: Sha256
    vae_sha256: Sha256
    text_encoder_sha256: Sha256 | None
    text: TextSettings | None
    int8_context: bool
    caption_sources: tuple[str, ...]
    image_encoder_sha256: Sha256 | None = None
    image_size: PositiveInt
    dtype: Literal["float16", "float32"]
    precision: Precision
    samples_per_shard: PositiveInt
    flip: bool
    image_rules: ImageRules


@record
class UnitIdentity:
    """What the shard of a unit was made from.

    `files_sha256` stands for the sizes and times, or ETags, of the input files, `images_sha256` for
    the content of the images that could be read, `texts_sha256` for keys, captions and labels.
    """

    files_sha256: Sha256
    images_sha256: Sha256
    texts_sha256: Sha256


@record
class Failure:
    """An image, or `num_images` images of one file, that were left out, and the reason."""

    image_id: int | str
    file: str
    reason: str
    num_images: PositiveInt = 1


@record
class Remark:
    """What was changed or left out in some images of a shard: how many, and the first of them."""

    text: str
    num_images: PositiveInt
    first: str


@record
class LatentSums:
    """Sums of z and z^2 over `count` elements of each channel of the latents z."""

    count: NonNegativeInt = 0
    first: tuple[float, ...] = ()
    second: tuple[NonNegativeFloat, ...] = ()

    def __add__(self, other: "LatentSums") -> "LatentSums":
        """Add the sums over two sets of latents; a set without latents has no channels."""
        pairs = (
            zip_longest(getattr(self, name), getattr(other, name), fillvalue=0.0)
            for name in ("first", "second")
        )
        first, second = (tuple(map(sum, channels)) for channels in pairs)
        return LatentSums(count=self.count + other.count, first=first, second=second)

    def statistics(self) -> dict[str, Any]:
        """Return the manifest's E[z] and sqrt(E[z^2] - E[z]^2), of all channels and of each."""
        first, second = np.array(self.first) / self.count, np.array(self.second) / self.count
        # Rounding may make the variance of equal numbers negative.
        channel_std = np.sqrt((second - first**2).clip(0.0))
        return {
            "latent_mean": float(first.mean()),
            "latent_std": float(np.sqrt(second.mean() - first.mean() ** 2)),
            "channel_mean": tuple(first.tolist()),
            "channel_std": tuple(channel_std.tolist()),
        }


def sum_latents(moments: Array, *, deterministic: bool) -> LatentSums:
    """Sum z and the expectation of z^2 over stored moments, in float64.

    These are moments (B, 2C, H, W) of z = mean + std * noise, or deterministic z (B, C, H, W).
    The log-variance is clamped to [-30, 20], as diffusers and U-ViT do before they sample.
    """
    # The order of the values in memory decides how their sum is rounded.
    z, variance = moments.astype(np.float64, order="C"), np.zeros(())
    if not deterministic:
        z, logvar = np.split(z, 2, axis=1)
        variance = np.exp(logvar.clip(-30.0, 20.0))
    first, second = (values.sum(axis=(0, 2, 3)).tolist() for values in (z, z**2 + variance))
    return LatentSums(count=z[:, 0].size, first=tuple(first), second=tuple(second))


@record
class CompletionMarker:
    """A finished shard: the job that made it, its manifest entry, and the images left out.

    `remarks` concern the images that it holds; these are within `size_limits`.
    """

    format_version: FormatVersion = FORMAT_VERSION
    job: Job
    unit: UnitIdentity
    shard: ShardEntry
    failures: tuple[Failure, ...]
    latent_sums: LatentSums
    remarks: tuple[Remark, ...] = ()
    size_limits: SizeLimits

    @property
    def left_out(self) -> set[int | str]:
        """Ids of the images that were left out."""
        return {failure.image_id for failure in self.failures}


def sum_remarks(remarks: Iterable[Remark]) -> tuple[Remark, ...]:
    """Sum remarks of the same text; each keeps its first image."""
    counts: Counter[str] = Counter()
    first: dict[str, Remark] = {}
    for remark in remarks:
        counts[remark.text] += remark.num_images
        first.setdefault(remark.text, remark)
    return tuple(replace(first[text], num_images=count) for text, count in counts.items())


def remove_leftovers(url: str, names: Collection[str]) -> None:
    """Delete unfinished local files that a killed process left in folder `url`, by file name.

    The random ending of 8 digits that `storage` gives them tells them from files of the user.
    """
    if not connections.is_remote(url):
        for path in Path(url).glob(".*"):
            if re.fullmatch(r"\.[0-9a-f]{8}", path.suffix) and path.stem[1:] in names:
                path.unlink()


def write_marker(output: str, marker: CompletionMarker) -> None:
    """Write `output/completed/NAME.json`, which declares the shard finished."""
    storage.write_sealed(marker_url(output, marker.shard.name), marker)


class OtherFormatError(UserError):
    """A completion marker was written by another version of this program."""


def read_marker(output: str, name: str) -> CompletionMarker:
    """Read a shard's marker.

    Raises UserError when it is missing, ShardError when it is damaged, and OtherFormatError.
    """
    where = marker_url(output, name)
    content = storage.read_sealed(dict[str, Any], where, error=ShardError)
    if content.get("format_version") != FORMAT_VERSION:
        raise OtherFormatError(
            f"{where}: its shard has another format than {FORMAT_VERSION}, which this version of "
            f"ifvit writes; choose another output folder, or delete {output} to encode again"
        )
    marker = parse_value(CompletionMarker, content, where, error=ShardError)
    if marker.shard.name != name:
        raise ShardError(f"{where}: marker of {marker.shard.name}; delete it and encode again")
    return marker


def read_markers(output: str, names: Iterable[str], job: Job) -> dict[str, CompletionMarker]:
    """Read the markers of these shards by name; missing and damaged markers are left out.

    A damaged marker causes a warning. Raises UserError when a marker belongs to another job or
    format.
    """

    def read(name: str) -> CompletionMarker | None:
        try:
            marker = read_marker(output, name)
        except (StoreError, OtherFormatError):
            raise
        except ShardError as error:
            tqdm.write(f"warning: {error}; {name} counts as not encoded", file=sys.stderr)
            return None
        except UserError:  # another task deleted the marker after it was listed
            return None
        _check_same_job(output, marker.job, job)
        return replace(marker, job=job)  # one object for all, as there may be 100,000 markers

    present = list_marked(output)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        markers = pool.map(read, [name for name in names if name in present])
        return {marker.shard.name: marker for marker in markers if marker}


def marker_url(output: str, name: str) -> str:
    """Path of the completion marker of shard `name`."""
    return storage.join(output, COMPLETED, f"{name}.json")


def list_marked(output: str) -> set[str]:
    """Names of the shards that have a marker, intact or damaged."""
    names = storage.list_names(storage.join(output, COMPLETED))
    return {name.removesuffix(".json") for name in names}


def _check_same_job(output: str, existing: Job, job: Job) -> None:
    if existing == job:
        return
    before, now = _flat(existing), _flat(job)
    differences = [
        f"{name} is {str(before.get(name))[:12]} there, {str(now.get(name))[:12]} now"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"{output}: holds shards of another encode job ({'; '.join(differences)}); "
            "choose another output folder"
        )


def _flat(job: Job) -> dict[str, object]:
    values = asdict(job)
    rules, text = values.pop("image_rules"), values.pop("text") or {}
    values |= rules | {f"text.{name}": value for name, value in text.items()}
    return values


def is_complete(files: Mapping[str, storage.FileState | None], entry: ShardEntry) -> bool:
    """Whether `files` of the output have the tar, with the size of its entry, and the index."""
    tar = files.get(f"{entry.name}.tar")
    return bool(tar and tar.num_bytes == entry.num_bytes and files.get(f"{entry.name}.index.npz"))
