"""The encode job: captioned or labelled images => shards of VAE moments and embeddings.

Any number of processes share the units of a job without talking to each other: which are whose
follows from their number, what is done from the receipts in the output. Whoever finds that
nothing is missing any more writes the manifest.
"""

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from data_pipeline.config import EncodeConfig
from data_pipeline.decode import decode_batches, read_or_fail
from data_pipeline.finish import collect_receipts, finish
from data_pipeline.models import Encoders, load_encoders, one_thread
from data_pipeline.receipts import (
    Job,
    Receipt,
    check_same_job,
    is_intact,
    list_receipts,
    read_receipt,
    receipt_url,
)
from data_pipeline.share import Share, find_share
from data_pipeline.sources.choose import open_source
from data_pipeline.sources.source import Source, Unit
from data_pipeline.writer import ShardWriter
from ifvit import storage
from ifvit.distributed import World
from ifvit.images import DecodedImage
from ifvit.shards import Manifest, ShardError
from ifvit.shards.records import MANIFEST

REQUESTS_AT_ONCE = 16


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
