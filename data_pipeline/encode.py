"""The encode job: captioned or labelled images => shards of VAE moments and embeddings.

Any number of processes share the units of a job without talking to each other: which are whose
follows from their number, what is done from the markers in the output. Whoever finds that
nothing is missing any more writes the manifest.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_pipeline.completion import (
    CompletionMarker,
    Job,
    LatentSums,
    check_same_job,
    is_intact,
    list_markers,
    marker_url,
    read_marker,
)
from data_pipeline.config import EncodeConfig
from data_pipeline.encoders import (
    Encoders,
    decode_batches,
    decode_mean,
    load_encoders,
    one_thread,
    read_or_fail,
)
from data_pipeline.shard_io import npy_bytes, open_shard, read_samples, remove_leftovers
from data_pipeline.sources import open_source
from data_pipeline.sources.base import Source, Unit
from data_pipeline.writer import ShardWriter, to_stored
from ifvit import storage
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels
from ifvit.models.autoencoders import Autoencoder
from ifvit.shards import Manifest, ShardError, TextEncoding, write_manifest
from ifvit.shards.format import MANIFEST, NULL_CONTEXT
from ifvit.storage import StoreError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Every `size`-th unit from `number` on."""

    number: int
    size: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this partition; interleaved, so that all partitions take about as long."""
        return items[self.number :: self.size]


def find_partition(config: EncodeConfig, world: World) -> Partition:
    """The tasks of the recipe or of the SLURM array, times the processes of each task.

    Raises UserError when a number of tasks comes without this one's place among them.
    """
    array = _slurm_array()
    num_tasks = config.num_tasks or (array.size if array else 1)
    task = config.task if config.task is not None else (array.number if array else None)
    if task is None:
        task = 0
        if num_tasks > 1:
            raise UserError(f"num_tasks is {num_tasks}, but task is not set; give 0 or more")
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of {num_tasks}; it must be 0 to {num_tasks - 1}")
    return Partition(number=task * world.size + world.rank, size=num_tasks * world.size)


def _slurm_array() -> Partition | None:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    names = ("ID", "MIN", "STEP", "COUNT")
    task, first, step, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    return Partition(number=(task - first) // step, size=count)


MOST_IMAGES = 8


def report_round_trip(
    config: EncodeConfig, source: Source, manifest: Manifest, vae: Autoencoder
) -> None:
    """Print the PSNR after image => shard => decoded posterior mean.

    Of one image in a hundred, but at least one and at most 8, the first ones of the first shard.
    """
    num_images = min(MOST_IMAGES, 1 + manifest.num_samples // 100)
    entry = next(entry for entry in manifest.shards if entry.num_samples)
    unit = next(u for u in source.units(config.samples_per_shard) if u.name == entry.name)
    originals = {image.key: image for image in unit.open()}
    values = []
    with open_shard(config.output, entry) as folder:
        for sample in islice(read_samples(folder / f"{entry.name}.tar"), num_images):
            original = read_or_fail(originals[sample.key], config.image_size)
            assert isinstance(original, DecodedImage), original
            values.append(psnr(decode_mean(vae, sample), original.pixels))
    sys.stdout.write(
        f"round trip of {len(values)} images: PSNR {np.mean(values):.1f} dB, "
        f"lowest {min(values):.1f} dB\n"
    )


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, 10 log10(255^2 / MSE)."""
    squares = (first.astype(np.float64) - second) ** 2
    return float(10 * np.log10(255**2 / squares.mean()))


NAMED_FAILURES = 3
REQUESTS_AT_ONCE = 16


def collect_markers(
    output: str, units: Sequence[Unit], own: dict[str, CompletionMarker], job: Job
) -> list[CompletionMarker]:
    """The markers of all units in order, without those that other processes still owe.

    Raises UserError when another job wrote one.
    """
    present = list_markers(output)

    def find(unit: Unit) -> CompletionMarker | None:
        if unit.name in own or unit.name not in present:
            return own.get(unit.name)
        try:
            marker = read_marker(output, unit.name)
        except StoreError:
            raise
        except UserError:  # damaged, or just taken back: its owner makes it again
            return None
        check_same_job(output, marker.job, job)
        return marker

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return [marker for marker in pool.map(find, units) if marker]


def finish(
    config: EncodeConfig,
    source: Source,
    markers: list[CompletionMarker],
    encoders: Encoders,
    *,
    is_alone: bool,
) -> Manifest:
    """Write the null context and, last, the manifest; equal bytes whoever does it, how often.

    Raises UserError when more images were left out than the recipe tolerates.
    """
    _check_failures(config, markers)
    if is_alone and not storage.is_remote(config.output):
        for name in (NULL_CONTEXT, MANIFEST):  # of several, another might just be writing
            remove_leftovers(Path(config.output), name)
    is_new = not storage.exists(storage.join(config.output, MANIFEST))
    channels, height, width = encoders.vae.latent_shape(config.image_size)
    sums = sum((marker.latent_sums for marker in markers), LatentSums())
    manifest = Manifest(
        vae=encoders.vae.identity,
        text=_write_null_context(config, encoders),
        classes=source.classes,
        image_size=config.image_size,
        flipped=config.flip,
        dtype=config.dtype,
        moments_shape=(2 * channels, height, width),
        num_samples=sum(marker.shard.num_samples for marker in markers),
        num_captions=sum(marker.shard.num_captions for marker in markers),
        latent_mean=sums.mean,
        latent_std=sums.std,
        shards=tuple(marker.shard for marker in markers),
    )
    write_manifest(config.output, manifest)
    what = f"{manifest.num_captions:,} captions"
    if source.classes:
        what = f"{len(source.classes):,} classes"
    sys.stdout.write(
        f"{config.output}: {manifest.num_samples:,} images, {what} in {len(markers):,} shards; "
        f"latent std {manifest.latent_std:.4f}, scaling factor {manifest.scaling_factor:.5f}\n"
    )
    if is_new:
        report_round_trip(config, source, manifest, encoders.vae)
    return manifest


def _write_null_context(config: EncodeConfig, encoders: Encoders) -> TextEncoding | None:
    if encoders.text is None:
        return None
    data = npy_bytes(to_stored(encoders.text.null_context(), config.dtype, NULL_CONTEXT))
    storage.write_bytes(storage.join(config.output, NULL_CONTEXT), data)
    return TextEncoding(
        encoder=encoders.text.identity,
        context_shape=encoders.text.context_shape,
        null_context_sha256=hashlib.sha256(data).hexdigest(),
    )


def _check_failures(config: EncodeConfig, markers: list[CompletionMarker]) -> None:
    failures = [failure for marker in markers for failure in marker.failures]
    num_readable = sum(marker.shard.num_samples for marker in markers)
    named = [f"{failure.file} ({failure.reason})" for failure in failures[:NAMED_FAILURES]]
    if len(failures) > NAMED_FAILURES:
        named.append("… (all of them: failures in completed/*.json)")
    text = (
        f"{len(failures):,} of {len(failures) + num_readable:,} images could not be read: "
        f"{', '.join(named)}"
    )
    if len(failures) > config.tolerate or not num_readable:
        raise UserError(f"{text}; mend them and run again, or allow for them with --tolerate")
    if failures:
        sys.stdout.write(f"warning: tolerated, {text}\n")


def encode(config: EncodeConfig) -> Manifest | None:
    """Encode what has no marker yet of this partition; if no partition misses any, finish.

    Returns None while other partitions miss some. Raises UserError at the end, and writes no
    manifest, when more images than `config.tolerate` could not be read; everything else is
    encoded by then and kept.
    """
    with one_thread():
        return _encode_partition(config)


def _encode_partition(config: EncodeConfig) -> Manifest | None:
    partition = find_partition(config, World.from_environment())
    source = open_source(config)
    if partition.number == 0:
        sys.stdout.write(source.report() + "\n")
    encoders = load_encoders(config, has_classes=bool(source.classes))
    job = _describe_job(config, source, encoders)
    units = source.units(config.samples_per_shard)
    own = partition.of(units)
    done = find_markers(config.output, own, job)
    todo = [unit for unit in own if unit.name not in done]
    _reopen(config.output, todo)
    with _open_progress(todo, own, partition) as progress:
        fresh = _encode_units(todo, config, encoders, job, progress)
    done |= {marker.shard.name: marker for marker in fresh}
    markers = collect_markers(config.output, units, done, job)
    if len(markers) < len(units):
        num_missing = len(units) - len(markers)
        sys.stdout.write(
            f"partition {partition.number} of {partition.size} is done; {num_missing:,} of "
            f"{len(units):,} shards are still out, whoever makes the last one writes the manifest\n"
        )
        return None
    return finish(config, source, markers, encoders, is_alone=partition.size == 1)


def find_markers(output: str, units: Iterable[Unit], job: Job) -> dict[str, CompletionMarker]:
    """The markers of the units that need not be encoded (again), by name.

    A unit must be when there is no marker or a damaged one, when the shard is not whole, or when
    an image that it left out can be read now. Raises UserError when another job wrote a marker.
    """
    present = list_markers(output)

    def find(unit: Unit) -> CompletionMarker | None:
        try:
            marker = read_marker(output, unit.name)
        except ShardError as error:
            tqdm.write(f"warning: {error}; encoding {unit.name} again", file=sys.stderr)
            return None
        check_same_job(output, marker.job, job)
        is_done = is_intact(output, marker.shard) and not _is_mended(unit, marker)
        return marker if is_done else None

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        found = pool.map(find, [unit for unit in units if unit.name in present])
        return {marker.shard.name: marker for marker in found if marker}


def _is_mended(unit: Unit, marker: CompletionMarker) -> bool:
    if not (marker.failures and unit.is_listed):
        return False
    failed = {failure.image_id for failure in marker.failures}
    left_out = [image for image in unit.open() if image.image_id in failed]
    return any(isinstance(read_or_fail(image, 1), DecodedImage) for image in left_out)


def _describe_job(config: EncodeConfig, source: Source, encoders: Encoders) -> Job:
    return Job(
        source_sha256=source.sha256,
        vae_sha256=encoders.vae.identity.sha256,
        text_encoder_sha256=encoders.text.identity.sha256 if encoders.text else None,
        image_size=config.image_size,
        dtype=config.dtype,
        precision=config.precision,
        samples_per_shard=config.samples_per_shard,
        flip=config.flip,
    )


def _reopen(output: str, todo: list[Unit]) -> None:
    """Take back what says that these units are done: their markers, then the manifest."""
    stale = list_markers(output).intersection(unit.name for unit in todo)
    for name in stale:
        storage.remove(marker_url(output, name))
    if todo:
        storage.remove(storage.join(output, MANIFEST))


def _encode_units(
    todo: list[Unit], config: EncodeConfig, encoders: Encoders, job: Job, progress: "tqdm[Any]"
) -> list[CompletionMarker]:
    with ShardWriter(config, job) as writer:
        for batch in decode_batches(todo, config):
            encoded = encoders.encode(batch)
            for failure in encoded.failures:
                progress.write(f"{failure.file}: {failure.reason}", file=sys.stderr)
            writer.put(encoded)
            progress.update(len(batch.images))
    return writer.markers


def _open_progress(todo: list[Unit], own: Sequence[Unit], partition: Partition) -> "tqdm[Any]":
    """A progress bar over the images of the partition, where its source counts them."""
    counts = [unit.num_images for unit in own]
    total = None if None in counts else sum(count or 0 for count in counts)
    left = sum(unit.num_images or 0 for unit in todo)
    return tqdm(
        total=total,
        initial=total - left if total is not None else 0,
        desc=f"encode {partition.number}/{partition.size}" if partition.size > 1 else "encode",
        unit="img",
        mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a log file needs no animation
    )
