"""The encode job: captioned or labelled images => shards of VAE moments and embeddings.

Any number of processes share the units of a job without talking to each other: which are whose
follows from their number, what is done from the receipts in the output. Whoever finds that
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
    Job,
    LatentSums,
    Receipt,
    check_same_job,
    is_intact,
    list_receipts,
    read_receipt,
    receipt_url,
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
from data_pipeline.sources.base import Source, Unit
from data_pipeline.sources.choose import open_source
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
class Share:
    """Every `size`-th unit from `number` on."""

    number: int
    size: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This share of the units; interleaved, so that shares end at about the same time."""
        return items[self.number :: self.size]


def find_share(config: EncodeConfig, world: World) -> Share:
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
    return Share(number=task * world.size + world.rank, size=num_tasks * world.size)


def _slurm_array() -> Share | None:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    names = ("ID", "MIN", "STEP", "COUNT")
    task, first, step, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    return Share(number=(task - first) // step, size=count)


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


def collect_receipts(
    output: str, units: Sequence[Unit], own: dict[str, Receipt], job: Job
) -> list[Receipt]:
    """The receipts of all units in order, without those that other processes still owe.

    Raises UserError when another job wrote one.
    """
    present = list_receipts(output)

    def find(unit: Unit) -> Receipt | None:
        if unit.name in own or unit.name not in present:
            return own.get(unit.name)
        try:
            receipt = read_receipt(output, unit.name)
        except StoreError:
            raise
        except UserError:  # damaged, or just taken back: its owner makes it again
            return None
        check_same_job(output, receipt.job, job)
        return receipt

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return [receipt for receipt in pool.map(find, units) if receipt]


def finish(
    config: EncodeConfig,
    source: Source,
    receipts: list[Receipt],
    encoders: Encoders,
    *,
    is_alone: bool,
) -> Manifest:
    """Write the null context and, last, the manifest; equal bytes whoever does it, how often.

    Raises UserError when more images were left out than the recipe tolerates.
    """
    _check_failures(config, receipts)
    if is_alone and not storage.is_remote(config.output):
        for name in (NULL_CONTEXT, MANIFEST):  # of several, another might just be writing
            remove_leftovers(Path(config.output), name)
    is_new = not storage.exists(storage.join(config.output, MANIFEST))
    channels, height, width = encoders.vae.latent_shape(config.image_size)
    sums = sum((receipt.latent_sums for receipt in receipts), LatentSums())
    manifest = Manifest(
        vae=encoders.vae.identity,
        text=_write_null_context(config, encoders),
        classes=source.classes,
        image_size=config.image_size,
        flipped=config.flip,
        dtype=config.dtype,
        moments_shape=(2 * channels, height, width),
        num_samples=sum(receipt.shard.num_samples for receipt in receipts),
        num_captions=sum(receipt.shard.num_captions for receipt in receipts),
        latent_mean=sums.mean,
        latent_std=sums.std,
        shards=tuple(receipt.shard for receipt in receipts),
    )
    write_manifest(config.output, manifest)
    what = f"{manifest.num_captions:,} captions"
    if source.classes:
        what = f"{len(source.classes):,} classes"
    sys.stdout.write(
        f"{config.output}: {manifest.num_samples:,} images, {what} in {len(receipts):,} shards; "
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


def _check_failures(config: EncodeConfig, receipts: list[Receipt]) -> None:
    failures = [failure for receipt in receipts for failure in receipt.failures]
    num_readable = sum(receipt.shard.num_samples for receipt in receipts)
    named = [f"{failure.file} ({failure.reason})" for failure in failures[:NAMED_FAILURES]]
    if len(failures) > NAMED_FAILURES:
        named.append("… (all of them: failures in receipts/*.json)")
    text = (
        f"{len(failures):,} of {len(failures) + num_readable:,} images could not be read: "
        f"{', '.join(named)}"
    )
    if len(failures) > config.tolerate or not num_readable:
        raise UserError(f"{text}; mend them and run again, or allow for them with --tolerate")
    if failures:
        sys.stdout.write(f"warning: tolerated, {text}\n")


def encode(config: EncodeConfig) -> Manifest | None:
    """Encode what has no receipt yet of this process's share; if no share misses any, finish.

    Returns None while other shares miss some. Raises UserError at the end, and writes no
    manifest, when more images than `config.tolerate` could not be read; everything else is
    encoded by then and kept.
    """
    with one_thread():
        return _encode_share(config)


def _encode_share(config: EncodeConfig) -> Manifest | None:
    share = find_share(config, World.from_environment())
    source = open_source(config)
    if share.number == 0:
        sys.stdout.write(source.report() + "\n")
    encoders = load_encoders(config, has_classes=bool(source.classes))
    job = _describe_job(config, source, encoders)
    units = source.units(config.samples_per_shard)
    own = share.of(units)
    done = find_receipts(config.output, own, job)
    todo = [unit for unit in own if unit.name not in done]
    _reopen(config.output, todo)
    with _open_progress(todo, own, share) as progress:
        fresh = _encode_units(todo, config, encoders, job, progress)
    done |= {receipt.shard.name: receipt for receipt in fresh}
    receipts = collect_receipts(config.output, units, done, job)
    if len(receipts) < len(units):
        num_missing = len(units) - len(receipts)
        sys.stdout.write(
            f"share {share.number} of {share.size} is done; {num_missing:,} of {len(units):,} "
            "shards are still out, whoever makes the last one writes the manifest\n"
        )
        return None
    return finish(config, source, receipts, encoders, is_alone=share.size == 1)


def find_receipts(output: str, units: Iterable[Unit], job: Job) -> dict[str, Receipt]:
    """The receipts of the units that need not be encoded (again), by name.

    A unit must be when there is no receipt or a damaged one, when the shard is not whole, or when
    an image that it left out can be read now. Raises UserError when another job wrote a receipt.
    """
    present = list_receipts(output)

    def find(unit: Unit) -> Receipt | None:
        try:
            receipt = read_receipt(output, unit.name)
        except ShardError as error:
            tqdm.write(f"warning: {error}; encoding {unit.name} again", file=sys.stderr)
            return None
        check_same_job(output, receipt.job, job)
        is_done = is_intact(output, receipt.shard) and not _is_mended(unit, receipt)
        return receipt if is_done else None

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        found = pool.map(find, [unit for unit in units if unit.name in present])
        return {receipt.shard.name: receipt for receipt in found if receipt}


def _is_mended(unit: Unit, receipt: Receipt) -> bool:
    if not (receipt.failures and unit.is_listed):
        return False
    failed = {failure.image_id for failure in receipt.failures}
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
    """Take back what says that these units are done: their receipts, then the manifest."""
    stale = list_receipts(output).intersection(unit.name for unit in todo)
    for name in stale:
        storage.remove(receipt_url(output, name))
    if todo:
        storage.remove(storage.join(output, MANIFEST))


def _encode_units(
    todo: list[Unit], config: EncodeConfig, encoders: Encoders, job: Job, progress: "tqdm[Any]"
) -> list[Receipt]:
    with ShardWriter(config, job) as writer:
        for batch in decode_batches(todo, config):
            encoded = encoders.encode(batch)
            for failure in encoded.failures:
                progress.write(f"{failure.file}: {failure.reason}", file=sys.stderr)
            writer.put(encoded)
            progress.update(len(batch.images))
    return writer.receipts


def _open_progress(todo: list[Unit], own: Sequence[Unit], share: Share) -> "tqdm[Any]":
    """A bar over the share's images with the time that is left, where sources count them."""
    counts = [unit.num_images for unit in own]
    total = None if None in counts else sum(count or 0 for count in counts)
    left = sum(unit.num_images or 0 for unit in todo)
    return tqdm(
        total=total,
        initial=total - left if total is not None else 0,
        desc=f"encode {share.number}/{share.size}" if share.size > 1 else "encode",
        unit="img",
        mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a log file needs no animation
    )
