"""The encode job: captioned images => shards of VAE moments and caption embeddings."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.coco import CaptionedImage, CocoCaptions
from data_pipeline.config import EncodeConfig
from data_pipeline.receipts import (
    Job,
    Receipt,
    check_same_job,
    is_intact,
    merge_sums,
    read_receipt,
    receipt_url,
    write_receipt,
)
from data_pipeline.unit import Encoders, Unit, UnitEncoder, decode_ahead, read_or_fail, to_stored
from data_pipeline.write import npy_bytes, remove_leftovers, write_shard
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import DecodedImage
from ifvit.models.autoencoder import load_autoencoder
from ifvit.models.clip import load_text_encoder
from ifvit.shards import Manifest, ShardError, TextEncoding, write_manifest
from ifvit.shards.records import MANIFEST, NULL_CONTEXT

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMED_FAILURES = 3


def encode(config: EncodeConfig) -> Manifest:
    """Encode what has no receipt yet, then write the manifest.

    Raises UserError at the end, and writes no manifest, when more images than `config.tolerate`
    could not be read; everything else is encoded by then and kept.
    """
    if storage.is_remote(config.output):
        raise UserError(f"{config.output}: shards are written to a local folder; copy them later")
    source = CocoCaptions(config.images, config.captions)
    sys.stdout.write(source.report() + "\n")
    encoders = _load_encoders(config)
    job = Job(
        source_sha256=source.sha256,
        vae_sha256=encoders.vae.identity.sha256,
        text_encoder_sha256=encoders.text.identity.sha256,
        image_size=config.image_size,
        dtype=config.dtype,
        precision=config.precision,
        samples_per_shard=config.samples_per_shard,
    )
    units = split_units(list(source), config.samples_per_shard)
    done = {unit.name: receipt for unit in units if (receipt := find_receipt(config, unit, job))}
    todo = [unit for unit in units if unit.name not in done]
    if todo:
        Path(config.output, MANIFEST).unlink(missing_ok=True)
    for receipt in _encode_units(todo, config, encoders, job, len(source)):
        done[receipt.shard.name] = receipt
    receipts = [done[unit.name] for unit in units]
    _check_failures(receipts, config.tolerate, len(source))
    return _finish(config, encoders, receipts)


def split_units(images: Sequence[CaptionedImage], samples_per_shard: int) -> list[Unit]:
    """Cut the sorted source into output shards."""
    starts = range(0, len(images), samples_per_shard)
    return [
        Unit(name=f"shard-{number:05d}", images=images[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def find_receipt(config: EncodeConfig, unit: Unit, job: Job) -> Receipt | None:
    """The unit's receipt, or None if the unit must be encoded (again).

    It must be when there is no receipt or a damaged one, when the shard is not whole, or when an
    image that it left out can be read now. Raises UserError when another job wrote the receipt.
    """
    if not storage.exists(receipt_url(config.output, unit.name)):
        return None
    try:
        receipt = read_receipt(config.output, unit.name)
    except ShardError as error:
        tqdm.write(f"warning: {error}; encoding {unit.name} again", file=sys.stderr)
        return None
    check_same_job(config.output, receipt.job, job)
    failed = {failure.image_id for failure in receipt.failures}
    left_out = [image for image in unit.images if image.image_id in failed]
    is_mended = any(isinstance(read_or_fail(image, 1), DecodedImage) for image in left_out)
    if is_mended or not is_intact(Path(config.output), receipt.shard):
        return None
    return receipt


def _load_encoders(config: EncodeConfig) -> Encoders:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = PRECISIONS[config.precision]
    encoders = Encoders(
        vae=load_autoencoder(config.vae, device, dtype),
        text=load_text_encoder(config.text_encoder, device, dtype),
    )
    encoders.vae.latent_shape(config.image_size)  # raises UserError if it does not fit
    return encoders


def _encode_units(
    units: list[Unit], config: EncodeConfig, encoders: Encoders, job: Job, num_images: int
) -> Iterator[Receipt]:
    images = [image for unit in units for image in unit.images]
    decoded = decode_ahead(images, config)
    done = num_images - len(images)
    progress: tqdm[Any] = tqdm(total=num_images, initial=done, desc="encode", unit="img")
    with progress:
        for unit in units:
            samples = UnitEncoder(unit, decoded, encoders, config, progress)
            shard = write_shard(Path(config.output), unit.name, samples)
            receipt = Receipt(
                job=job,
                shard=shard,
                failures=tuple(samples.failures),
                latent_sums=samples.latent_sums,
            )
            write_receipt(config.output, receipt)
            yield receipt


def _check_failures(receipts: list[Receipt], tolerate: int, num_images: int) -> None:
    failures = [failure for receipt in receipts for failure in receipt.failures]
    if not failures:
        return
    named = [f"{failure.file} ({failure.reason})" for failure in failures[:NAMED_FAILURES]]
    if len(failures) > NAMED_FAILURES:
        named.append("… (all of them: failures in receipts/*.json)")
    text = f"{len(failures)} of {num_images} images could not be read: {', '.join(named)}"
    if len(failures) > tolerate or len(failures) == num_images:
        raise UserError(f"{text}; mend them and run again, or allow for them with --tolerate")
    sys.stdout.write(f"warning: tolerated, {text}\n")


def _finish(config: EncodeConfig, encoders: Encoders, receipts: list[Receipt]) -> Manifest:
    """Write the null context and, last, the manifest."""
    for name in (NULL_CONTEXT, MANIFEST):
        remove_leftovers(Path(config.output), name)
    null_context = npy_bytes(to_stored(encoders.text.null_context(), config.dtype, NULL_CONTEXT))
    storage.write_bytes(storage.join(config.output, NULL_CONTEXT), null_context)
    channels, height, width = encoders.vae.latent_shape(config.image_size)
    sums = merge_sums(receipts)
    manifest = Manifest(
        vae=encoders.vae.identity,
        text=TextEncoding(
            encoder=encoders.text.identity,
            context_shape=encoders.text.context_shape,
            null_context_sha256=hashlib.sha256(null_context).hexdigest(),
        ),
        image_size=config.image_size,
        dtype=config.dtype,
        moments_shape=(2 * channels, height, width),
        num_samples=sum(receipt.shard.num_samples for receipt in receipts),
        num_captions=sum(receipt.shard.num_captions for receipt in receipts),
        latent_mean=sums.mean,
        latent_std=sums.std,
        shards=tuple(receipt.shard for receipt in receipts),
    )
    write_manifest(config.output, manifest)
    sys.stdout.write(
        f"{config.output}: {manifest.num_samples:,} images, {manifest.num_captions:,} captions in "
        f"{len(receipts):,} shards; latent std {manifest.latent_std:.4f}, "
        f"scaling factor {manifest.scaling_factor:.5f}\n"
    )
    return manifest
