"""Several datasets of the same encoders => one, shard files unchanged under new names."""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data_pipeline.config import MergeConfig
from data_pipeline.receipts import LatentSums
from data_pipeline.sources.listed import shard_name
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import Manifest, ShardEntry, read_manifest, write_manifest
from ifvit.shards.records import MANIFEST, NULL_CONTEXT

SAME = ("classes", "image_size", "resize", "flipped", "dtype", "moments_shape")


def merge(config: MergeConfig) -> None:
    """Copy all shards, each checked by its hash, and write the combined manifest last.

    Raises UserError for fewer than two datasets, different encoders or recipes, a shard that is
    there twice, and an output that is a dataset already.
    """
    if len(config.urls) < 2:
        raise UserError("urls: name at least two datasets to merge")
    if storage.exists(storage.join(config.output, MANIFEST)):
        raise UserError(f"{config.output}: is a dataset already; choose another output")
    manifests = [read_manifest(url) for url in config.urls]
    for url, manifest in zip(config.urls, manifests, strict=True):
        _check_alike(config.urls[0], manifests[0], url, manifest)
    sources = [
        (url, entry)
        for url, manifest in zip(config.urls, manifests, strict=True)
        for entry in manifest.shards
    ]
    _check_unique(sources)
    shards = []
    for number, (url, entry) in enumerate(tqdm(sources, desc="merge", unit="shard")):
        renamed = replace(entry, name=shard_name(number))
        for suffix, sha256 in ((".tar", entry.sha256), (".index.npz", entry.index_sha256)):
            old, new = f"{url}/{entry.name}{suffix}", f"{config.output}/{renamed.name}{suffix}"
            _copy(old, new, sha256)
        shards.append(renamed)
    if text := manifests[0].text:
        old, new = f"{config.urls[0]}/{NULL_CONTEXT}", f"{config.output}/{NULL_CONTEXT}"
        _copy(old, new, text.null_context_sha256)
    merged = _combine(manifests, shards)
    write_manifest(config.output, merged)
    sys.stdout.write(
        f"{config.output}: {merged.num_samples:,} images in {len(shards):,} shards of "
        f"{len(manifests)} datasets; latent std {merged.latent_std:.4f}\n"
    )


def _check_alike(first: str, expected: Manifest, url: str, manifest: Manifest) -> None:
    wrong = [key for key in SAME if getattr(manifest, key) != getattr(expected, key)]
    if manifest.vae.sha256 != expected.vae.sha256:
        wrong.append("vae")
    if _text_encoder(manifest) != _text_encoder(expected):
        wrong.append("text_encoder")
    elif _null_context(manifest) != _null_context(expected):
        wrong.append("null_context")  # the same encoder, computing in another precision
    if wrong:
        raise UserError(f"{url}: cannot join {first}, they differ in {', '.join(wrong)}")


def _text_encoder(manifest: Manifest) -> str | None:
    return manifest.text.encoder.sha256 if manifest.text else None


def _null_context(manifest: Manifest) -> str | None:
    return manifest.text.null_context_sha256 if manifest.text else None


def _check_unique(entries: list[tuple[str, ShardEntry]]) -> None:
    counts = Counter(entry.sha256 for _, entry in entries if entry.num_samples)
    twice = [f"{url}/{entry.name}.tar" for url, entry in entries if counts[entry.sha256] > 1]
    if twice:
        raise UserError(f"{twice[0]} and {twice[1]}: the same shard; its images would count twice")


def _copy(source: str, target: str, sha256: str) -> None:
    """Through a local file that is checked, so a damaged shard is never copied on."""
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        local = Path(folder, Path(source).name)
        storage.download(source, local, sha256)
        storage.upload(local, target)


def _combine(manifests: Sequence[Manifest], shards: list[ShardEntry]) -> Manifest:
    """The manifest of all shards, with the statistics of all latents together."""
    sums = LatentSums()
    for one in manifests:
        count = one.num_samples
        second = count * (one.latent_std**2 + one.latent_mean**2)
        sums += LatentSums(count=count, first=count * one.latent_mean, second=second)
    return replace(
        manifests[0],
        num_samples=sum(one.num_samples for one in manifests),
        num_captions=sum(one.num_captions for one in manifests),
        latent_mean=sums.mean,
        latent_std=sums.std,
        shards=tuple(shards),
    )
