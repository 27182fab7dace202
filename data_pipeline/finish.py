"""The end of an encode job: when every shard has its receipt, the manifest is written."""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.config import EncodeConfig
from data_pipeline.models import Encoders
from data_pipeline.receipts import (
    Job,
    LatentSums,
    Receipt,
    check_same_job,
    list_receipts,
    read_receipt,
)
from data_pipeline.round_trip import report_round_trip
from data_pipeline.sources.source import Source, Unit
from data_pipeline.write import npy_bytes, remove_leftovers
from data_pipeline.writer import to_stored
from ifvit import storage
from ifvit.errors import UserError
from ifvit.object_store import StoreError
from ifvit.shards import Manifest, TextEncoding, write_manifest
from ifvit.shards.records import MANIFEST, NULL_CONTEXT

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
