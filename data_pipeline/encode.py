"""The verb `encode`: captioned or labelled images => shards of VAE moments and embeddings.

Any number of processes work on one job without communication. Each encodes the shards of its
partition and writes a completion marker for each finished shard. A process that finds the markers
of all shards writes the manifest (`finish`).
"""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.completion import (
    CompletionMarker,
    Job,
    LatentSums,
    UnitIdentity,
    is_complete,
    list_marked,
    marker_url,
    read_markers,
    remove_leftovers,
    sum_remarks,
    write_marker,
)
from data_pipeline.config import EncodeConfig
from data_pipeline.encoders import (
    Batch,
    Encoders,
    decode_batches,
    decode_mean,
    load_encoders,
    one_thread,
)
from data_pipeline.shard_io import open_shard, read_samples, to_stored, write_shards
from data_pipeline.sources import open_source
from data_pipeline.sources.base import REQUESTS_AT_ONCE, Source, Unit
from data_pipeline.units import FileStates, identify, open_unit, read_or_fail
from ifvit import storage
from ifvit.arrays import npy_bytes
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels
from ifvit.models.autoencoders import Autoencoder
from ifvit.records import printable, shorten
from ifvit.shards.format import (
    COMPLETED,
    IMAGE_ARRAYS,
    MANIFEST,
    NULL_CONTEXT,
    Manifest,
    ShardEntry,
    TextEncoding,
    write_manifest,
)

Item = TypeVar("Item")

MAX_NAMED = 3
MAX_KINDS = 6
MAX_ROUND_TRIPS = 8


@one_thread()
def encode(config: EncodeConfig) -> Manifest | None:
    """Encode the unfinished shards of this process's partition, then finish the job if possible.

    Returns None while shards of other partitions are missing. Raises UserError when more images
    than `config.tolerate` are unreadable. By then all readable images are encoded, but the manifest
    is not written.
    """
    partition = find_partition(config, World.from_environment())
    source = open_source(config)
    if partition.number == 0:
        sys.stdout.write(source.report() + "\n")
    encoders = load_encoders(config, has_classes=bool(source.classes))
    job = _describe_job(config, source, encoders)
    units = source.units(config.samples_per_shard)
    _check_output(config.output, units)
    own = partition.of(units)
    states = FileStates()
    markers, earlier = find_finished(config, own, job, states)
    todo = [unit for unit in own if unit.name not in markers]
    _clean(config.output, todo, partition)
    with _open_progress(len(todo), partition) as progress:
        decoded = _reuse_images(decode_batches(todo, config, states), config.output, earlier)
        batches = _encode_batches(decoded, encoders, progress)
        written = write_shards(batches, config, job, deterministic=encoders.vae.deterministic)
    markers |= {marker.shard.name: marker for marker in written}
    names = {unit.name for unit in units}
    missing = names - list_marked(config.output)
    if not missing:  # only then, because reading the markers of others takes a request for each
        markers |= read_markers(config.output, names - markers.keys(), job)
        missing = names - markers.keys()
    if missing:
        sys.stdout.write(
            f"partition {partition.number} of {partition.size} is finished; "
            f"{len(missing):,} of {len(units):,} shards are missing, "
            "the process that finishes the last one writes the manifest\n"
        )
        return None
    return finish(config, source, [markers[unit.name] for unit in units], encoders)


def _describe_job(config: EncodeConfig, source: Source, encoders: Encoders) -> Job:
    """All that decides the content of the shards, except the images and captions themselves."""
    text, image = encoders.text, encoders.image
    return Job(
        source_sha256=source.sha256,
        vae_sha256=encoders.vae.identity.sha256,
        text_encoder_sha256=text.identity.sha256 if text else None,
        text=text.identity.settings if text else None,
        int8_context=config.int8_context,
        caption_sources=source.caption_sources,
        image_encoder_sha256=image.encoding.encoder.sha256 if image else None,
        image_size=config.image_size,
        dtype=config.dtype,
        precision=config.precision,
        samples_per_shard=config.samples_per_shard,
        flip=config.flip,
        image_rules=config.image_rules,
    )


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition `number` of a job that is divided into `size` partitions."""

    number: int
    size: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every `size`-th item from `number` on; partitions take about equal time."""
        return items[self.number :: self.size]


def find_partition(config: EncodeConfig, world: World) -> Partition:
    """Find the partition of this process; every process of every task has one.

    The recipe or the SLURM array defines the tasks. Raises UserError when there are several tasks
    and the number of this task is unknown or too large.
    """
    task, num_tasks = config.task, config.num_tasks
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        names = ("ID", "MIN", "STEP", "COUNT")
        number, first, step, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
        task = (number - first) // step if task is None else task
        num_tasks = num_tasks or count
    num_tasks = num_tasks or 1
    if task is None and num_tasks > 1:
        raise UserError(f"num_tasks is {num_tasks}, but task is not set; set it, from 0")
    task = task or 0
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of {num_tasks}; it must be 0 to {num_tasks - 1}")
    return Partition(number=task * world.size + world.rank, size=num_tasks * world.size)


def find_finished(
    config: EncodeConfig, units: Iterable[Unit], job: Job, states: FileStates
) -> tuple[dict[str, CompletionMarker], dict[str, ShardEntry]]:
    """Read the markers, by name, of the units that are finished, and of those with other captions.

    A unit is encoded again when its marker is missing or damaged, when its shard is incomplete,
    when its images or captions have changed, when the limits of sides are stricter now, or when an
    image that was left out can be read now. If only captions have changed, the moments of its shard
    are used again. Raises UserError when a marker belongs to another job.
    """
    output, files = config.output, storage.list_states(config.output)
    by_name = {unit.name: unit for unit in units}
    markers = read_markers(output, by_name, job)

    def update(marker: CompletionMarker) -> UnitIdentity | None:
        is_stricter = config.size_limits.leave_out_more_than(marker.size_limits)
        if is_stricter or not is_complete(files, marker.shard):
            return None
        return identify(by_name[marker.shard.name], marker, config, states)

    finished: dict[str, CompletionMarker] = {}
    earlier: dict[str, ShardEntry] = {}
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for marker, unit in zip(markers.values(), pool.map(update, markers.values()), strict=True):
            name = marker.shard.name
            if unit is None or unit.images_sha256 != marker.unit.images_sha256:
                continue
            if unit.texts_sha256 != marker.unit.texts_sha256:
                earlier[name] = marker.shard
                continue
            finished[name] = replace(marker, unit=unit)
            if unit != marker.unit:  # copied files: other times, equal contents
                write_marker(output, finished[name])
    return finished, earlier


def _check_output(output: str, units: Sequence[Unit]) -> None:
    """Raise UserError where the job would replace its input tars or files that it did not write."""
    manifest, completed = (storage.join(output, name) for name in (MANIFEST, COMPLETED))
    if storage.exists(manifest) and not storage.exists(completed):
        raise UserError(
            f"{output}: holds a {MANIFEST} that no encode job wrote there; choose another folder, "
            "or remove that file"
        )
    names = {f"{unit.name}.tar" for unit in units}
    for file in (file for unit in units for file in unit.files):
        folder, _, name = file.rpartition("/")
        if name in names and os.path.realpath(folder) == os.path.realpath(output):
            raise UserError(f"{file}: a shard would replace this input; choose another output")


def _clean(output: str, todo: list[Unit], partition: Partition) -> None:
    """Delete the manifest, completion markers of the shards to encode, and unfinished files."""
    suffixes = (".tar", ".index.npz", ".json")
    names = {f"{unit.name}{suffix}" for unit in todo for suffix in suffixes}
    if partition.size == 1:  # otherwise another process may be writing these files
        names |= {NULL_CONTEXT, MANIFEST}
    for folder in (output, storage.join(output, COMPLETED)):
        remove_leftovers(folder, names)
    if not todo:
        return
    # First, because without markers it would not count as ours if the job were killed here.
    storage.remove(storage.join(output, MANIFEST))
    for name in list_marked(output).intersection(unit.name for unit in todo):
        storage.remove(marker_url(output, name))
    storage.remove(storage.join(output, MANIFEST))  # another process may have written it since


def _open_progress(num_shards: int, partition: Partition) -> "tqdm[Any]":
    """A progress bar over the shards to encode; the images of an unopened tar are not counted."""
    return tqdm(
        total=num_shards,
        desc=f"encode {partition.number}/{partition.size}" if partition.size > 1 else "encode",
        bar_format="{l_bar}{bar}| {n:.1f}/{total} shards [{elapsed}<{remaining}{postfix}]",
        mininterval=0.1 if sys.stderr.isatty() else 30.0,  # few lines in a log file
        miniters=0,
    )


def _reuse_images(
    batches: Iterable[Batch], output: str, earlier: dict[str, ShardEntry]
) -> Iterator[Batch]:
    """Add moments and features of earlier shards to their batches, wherever the keys agree."""
    for name, shard in groupby(batches, key=lambda batch: batch.shard):
        if name not in earlier:
            yield from shard
            continue
        with open_shard(output, earlier[name]) as folder:
            tar = folder / f"{name}.tar"
            is_damaged = not tar.is_file() or storage.sha256_of(tar) != earlier[name].sha256
            samples = iter(()) if is_damaged else read_samples(tar)
            for batch in shard:
                stored = list(islice(samples, len(batch.readable)))
                if stored and [s.key for s in stored] == [image.key for image, _ in batch.readable]:
                    fields = [f for f in IMAGE_ARRAYS if getattr(stored[0], f) is not None]
                    arrays = {f: np.stack([getattr(s, f) for s in stored]) for f in fields}
                    encoded = {f: torch.from_numpy(array) for f, array in arrays.items()}
                    batch = replace(batch, encoded=encoded)
                yield batch


def _encode_batches(
    batches: Iterable[Batch], encoders: Encoders, progress: "tqdm[Any]"
) -> Iterator[Batch]:
    num_images = 0
    for batch in batches:
        for failure in batch.failures:
            progress.write(printable(f"{failure.file}: {failure.reason}"), file=sys.stderr)
        yield encoders.encode(batch)
        num_images += len(batch.images)
        rate = num_images / progress.format_dict["elapsed"]
        progress.set_postfix_str(f"{num_images:,} images, {rate:.1f} img/s", refresh=False)
        progress.update(len(batch.images) / len(batch.unit.images) if batch.images else 1)


def finish(
    config: EncodeConfig, source: Source, markers: list[CompletionMarker], encoders: Encoders
) -> Manifest:
    """Write the null context and, last, the manifest.

    Several processes may do this at the same time, because all write equal bytes. Raises UserError
    when more images were left out than the recipe tolerates.
    """
    _check_failures(config, markers)
    is_new = not storage.exists(storage.join(config.output, MANIFEST))
    sums = sum((marker.latent_sums for marker in markers), LatentSums())
    manifest = Manifest(
        vae=encoders.vae.identity,
        text=_write_null_context(config, encoders),
        classes=source.classes,
        caption_sources=source.caption_sources,
        image_size=config.image_size,
        image_rules=config.image_rules,
        flipped=config.flip,
        dtype=config.dtype,
        latent_shape=encoders.vae.latent_shape(config.image_size),
        deterministic=encoders.vae.deterministic,
        features=encoders.image.encoding if encoders.image else None,
        num_samples=sum(marker.shard.num_samples for marker in markers),
        num_captions=sum(marker.shard.num_captions for marker in markers),
        shards=tuple(marker.shard for marker in markers),
        **sums.statistics(),
    )
    write_manifest(config.output, manifest)
    sys.stdout.write(
        f"{config.output}: {manifest.contents} in {len(markers):,} shards; "
        f"latent std {manifest.latent_std:.4f}, scaling factor {manifest.scaling_factor:.5f}\n"
    )
    for remark in sum_remarks(remark for marker in markers for remark in marker.remarks):
        sys.stdout.write(
            f"note: {remark.num_images:,} images: {remark.text}; the first is "
            f"{shorten(remark.first)}\n"
        )
    if is_new:
        report_round_trip(config, source, manifest, encoders.vae)
    return manifest


def _check_failures(config: EncodeConfig, markers: list[CompletionMarker]) -> None:
    failures = [failure for marker in markers for failure in marker.failures]
    num_failed = sum(failure.num_images for failure in failures)
    num_readable = sum(marker.shard.num_samples for marker in markers)
    named = [f"{shorten(failure.file)} ({failure.reason})" for failure in failures[:MAX_NAMED]]
    text = (
        f"{num_failed:,} of {num_failed + num_readable:,} images could not be read: "
        f"{', '.join(named)}"
    )
    if len(failures) > MAX_NAMED:
        kinds = Counter(re.sub(r"\d[\d,.]*", "N", failure.reason) for failure in failures)
        counted = [f"{count:,} {reason}" for reason, count in kinds.most_common(MAX_KINDS)]
        text += f", … (all are listed in {COMPLETED}/*.json); by reason: {', '.join(counted)}"
    if num_failed > config.tolerate or not num_readable:
        raise UserError(f"{text}; repair them and run again, or leave them out with --tolerate")
    if failures:
        sys.stdout.write(f"warning: tolerated, {text}\n")


def _write_null_context(config: EncodeConfig, encoders: Encoders) -> TextEncoding | None:
    if encoders.text is None:
        return None
    data = npy_bytes(to_stored(encoders.text.null_context(), config.dtype, NULL_CONTEXT))
    storage.write_bytes(storage.join(config.output, NULL_CONTEXT), data)
    return TextEncoding(
        encoder=encoders.text.identity,
        context_shape=encoders.text.context_shape,
        dtype="int8" if config.int8_context else config.dtype,
        null_context_sha256=hashlib.sha256(data).hexdigest(),
    )


def report_round_trip(
    config: EncodeConfig, source: Source, manifest: Manifest, vae: Autoencoder
) -> None:
    """Decode the stored moments of a few images and print their PSNR to the original images.

    The images are the first of the first shard: one per hundred of the dataset, from 1 to 8.
    """
    num_images = min(MAX_ROUND_TRIPS, 1 + manifest.num_samples // 100)
    entry = next(entry for entry in manifest.shards if entry.num_samples)
    unit = next(u for u in source.units(config.samples_per_shard) if u.name == entry.name)
    originals = {image.key: image for image in open_unit(unit, config)}
    values = []
    with open_shard(config.output, entry) as folder:
        for sample in islice(read_samples(folder / f"{entry.name}.tar"), num_images):
            original = read_or_fail(originals[sample.key], config)
            if isinstance(original, DecodedImage):  # it may have been deleted since
                values.append(psnr(decode_mean(vae, sample), original.pixels))
    if not values:
        return
    sys.stdout.write(
        f"round trip of {len(values)} images: PSNR {np.mean(values):.1f} dB, "
        f"lowest {min(values):.1f} dB\n"
    )


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, 10 log10(255^2 / MSE)."""
    squares = (first.astype(np.float64) - second) ** 2
    return float(10 * np.log10(255**2 / squares.mean()))
