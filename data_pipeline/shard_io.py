"""Shards as files: the threads that write them, and what reads them from front to back.

`encode` calls `write_shards` with the encoded batches. A thread writes a shard's tar while the
encoders work on the next batches; hashing, upload and the completion marker of a shard overlap with
the encoding of the next shard. Queues are short, so memory stays bounded: the encoders wait for a
slow disk or store. Random access for training is in `ifvit.shards.reader`.
"""

import contextlib
import hashlib
import json
import queue
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor
from webdataset import TarWriter

from data_pipeline.completion import (
    CompletionMarker,
    Failure,
    Job,
    LatentSums,
    Remark,
    sum_latents,
    sum_remarks,
    write_marker,
)
from data_pipeline.config import EncodeConfig
from data_pipeline.encoders import Batch
from data_pipeline.sources.base import CaptionedImage
from data_pipeline.units import OpenUnit
from ifvit import connections, storage
from ifvit.arrays import Array, npy_bytes, parse_npy
from ifvit.errors import UserError
from ifvit.images import DecodedImage
from ifvit.records import MAX_BYTES, shorten
from ifvit.shards.format import (
    FEATURE_DTYPE,
    IMAGE_ARRAYS,
    LatentSample,
    SampleMetadata,
    ShardEntry,
    ShardError,
    parse_metadata,
)
from ifvit.shards.index import index_bytes, index_tar, parse_label, read_tar

BUFFER_BYTES = 8 << 20
"""Size of one write. Files that were written in large blocks are read faster afterwards."""
SHARDS_AT_ONCE = 2
BATCHES_QUEUED = 2
TOO_LONG = "captions have more tokens than the text encoder reads; their ends have no effect"

_Batches = queue.Queue[Batch | None]
"""Batches of one shard on their way to its thread; None tells the thread to give up."""


def write_shards(
    batches: Iterable[Batch], config: EncodeConfig, job: Job, *, deterministic: bool = False
) -> list[CompletionMarker]:
    """Write the batches of all units in order, and return the markers once all are written.

    `deterministic` batches hold latents in place of moments.
    An error that ends the writing of a shard is raised at the next batch.
    """
    shards: list[Future[CompletionMarker]] = []
    current: _Batches | None = None  # queue of the shard that is being encoded
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        try:
            for batch in batches:
                if current is None:
                    current = queue.Queue(BATCHES_QUEUED)
                    samples = _Samples(batch.shard, current, config, job, deterministic)
                    shards.append(pool.submit(_write_shard, samples))
                _put(current, batch, shards)
                if batch.is_last:
                    current = None
        finally:
            if current is not None:
                with current.mutex:
                    current.queue.clear()  # its thread may have failed and left the queue full
                current.put(None)
    return [shard.result() for shard in shards]


def _put(batches: _Batches, batch: Batch, shards: list[Future[CompletionMarker]]) -> None:
    while True:
        for shard in shards:
            if shard.done():
                shard.result()  # raises the error of a shard that could not be written
        with contextlib.suppress(queue.Full):
            batches.put(batch, timeout=1.0)
            return


def _write_shard(samples: "_Samples") -> CompletionMarker:
    """Write one shard and then its marker; runs in a thread."""
    config = samples.config
    entry = write_shard(config.output, samples.name, samples)
    marker = CompletionMarker(
        job=samples.job,
        unit=samples.unit.identity(),
        shard=entry,
        failures=tuple(samples.failures),
        latent_sums=samples.latent_sums,
        remarks=sum_remarks(samples.remarks),
        size_limits=config.size_limits,
    )
    write_marker(config.output, marker)
    return marker


class _Samples:
    """Iterates once over the samples of one shard.

    `unit`, `failures`, `remarks` and `latent_sums` are complete after the last sample.
    """

    unit: OpenUnit

    def __init__(
        self, name: str, batches: _Batches, config: EncodeConfig, job: Job, deterministic: bool
    ) -> None:
        self.failures: list[Failure] = []
        self.remarks: list[Remark] = []
        self.latent_sums = LatentSums()
        self.name, self.config, self.job = name, config, job
        self._batches, self._deterministic = batches, deterministic

    def __iter__(self) -> Iterator[LatentSample]:
        is_last = False
        while not is_last:
            batch = self._batches.get()
            if batch is None:
                raise InterruptedError(f"{self.name}: the encoders stopped before its last image")
            self.unit = batch.unit
            self.failures += batch.failures
            yield from self._convert(batch)
            is_last = batch.is_last

    def _convert(self, batch: Batch) -> Iterator[LatentSample]:
        if not batch.encoded:
            return
        arrays = {name: self._store(batch, name, values) for name, values in batch.encoded.items()}
        contexts = self._contexts(batch)
        self.latent_sums += sum_latents(arrays["moments"], deterministic=self._deterministic)
        for row, (image, decoded) in enumerate(batch.readable):
            too_long = [TOO_LONG] if batch.cut.intersection(image.captions) else []
            self.remarks += [
                Remark(text=text, num_images=1, first=image.name)
                for text in (*image.remarks, *decoded.remarks, *too_long)
            ]
            yield LatentSample(
                key=image.key,
                label=image.label,
                metadata=self._describe(image, decoded),
                **contexts[row],
                **{name: values[row] for name, values in arrays.items()},
            )

    def _describe(self, image: CaptionedImage, decoded: DecodedImage) -> SampleMetadata:
        """Content of the sample's json. Raises UserError for sources that have no names."""
        names = self.job.caption_sources
        if bool(names) != bool(image.sources) or any(n >= len(names) for n in image.sources):
            raise UserError(
                f"{image.name}: sources {shorten(image.sources)} are not numbers of the source's "
                f"caption_sources {shorten(names)}; correct the class of the source"
            )
        return SampleMetadata(
            image_id=image.image_id,
            captions=image.captions,
            sources=image.sources,
            width=decoded.width,
            height=decoded.height,
        )

    def _contexts(self, batch: Batch) -> list[dict[str, Array]]:
        """The arrays of the context tokens of each readable image, by field of LatentSample.

        Raises UserError that names the caption and image of a token that cannot be stored.
        """
        images = [image for image, _ in batch.readable]
        if batch.context is None:
            return [{} for _ in images]
        tokens, counts = batch.context.cpu().numpy(), np.array(batch.context_lengths, np.int32)
        with np.errstate(over="ignore"):
            stored = {"context": tokens.astype(self.config.dtype)}
        is_bad = ~np.isfinite(stored["context"]).all(axis=1)
        if is_bad.any():
            number = np.searchsorted(counts.cumsum(), is_bad.argmax(), side="right")
            image, caption = batch.captions[number]
            raise UserError(
                f"{self.name}: the text encoder gave {image.name} a context of the caption "
                f"{shorten(caption)} that {self.config.dtype} cannot hold; use --dtype float32"
            )
        if self.config.int8_context:
            stored = dict(zip(("context", "context_scale"), to_int8(tokens), strict=True))
        lengths = np.split(counts, np.cumsum([len(image.captions) for image in images])[:-1])
        ends = np.cumsum([each.sum() for each in lengths])
        rows = {name: np.split(values, ends[:-1]) for name, values in stored.items()}
        return [
            {"context_lengths": length, **{name: parts[n] for name, parts in rows.items()}}
            for n, length in enumerate(lengths)
        ]

    def _store(self, batch: Batch, field: str, values: Tensor) -> Array:
        """Convert to the stored dtype. Raises UserError that names the image of a bad feature."""
        if "features" not in field:
            return to_stored(values, self.config.dtype, self.name)
        bad = ~values.half().isfinite().flatten(1).all(dim=1)
        if bad.any():
            image, _ = batch.readable[int(bad.int().argmax())]
            raise UserError(
                f"{self.name}: the image encoder gave features of {image.name} that "
                f"{FEATURE_DTYPE} cannot hold; look at this image, or choose another image_encoder"
            )
        return to_stored(values, FEATURE_DTYPE, self.name)


def to_stored(values: Tensor, dtype: str, name: str) -> Array:
    """Convert a tensor to the shards' dtype. Raises UserError when a value does not fit into it."""
    with np.errstate(over="ignore"):
        stored: Array = values.cpu().numpy().astype(dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"{name}: an encoder gave values that {dtype} cannot hold; use float32")
    return stored


def to_int8(tokens: Array) -> tuple[Array, Array]:
    """Tokens (T, D) => int8 (T, D) and float32 scales (T,), whose product is nearest to them.

    The scale of a token is max |x| / 127, so |x - product| is at most half of it.
    """
    scale = (np.abs(tokens).max(axis=1) / 127).astype(np.float32)
    steps = np.divide(tokens, scale[:, None], out=np.zeros_like(tokens), where=scale[:, None] > 0)
    return np.rint(steps).clip(-127, 127).astype(np.int8), scale


def write_shard(folder: str, name: str, samples: Iterable[LatentSample]) -> ShardEntry:
    """Write `NAME.tar` and `NAME.index.npz` into a folder or prefix, each whole or not at all.

    Each sample is written before the next one is taken, so a shard need not fit into memory. Equal
    samples give equal bytes, because owner and time of the members are constants.
    """
    with storage.write_file(storage.join(folder, f"{name}.tar")) as path:
        with (
            path.open("wb", BUFFER_BYTES) as file,
            TarWriter(file, user="", group="", mtime=0, encoder=False) as tar,
        ):
            for sample in samples:
                tar.write(pack_sample(sample))
        index = index_tar(path)
        data = index_bytes(index)
        storage.write_bytes(storage.join(folder, f"{name}.index.npz"), data)
        return ShardEntry(
            name=name,
            num_samples=len(index),
            num_captions=len(index.context),
            num_bytes=path.stat().st_size,
            sha256=storage.sha256_of(path),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )


def pack_sample(sample: LatentSample) -> dict[str, str | bytes]:
    """Convert a sample to webdataset's form: member suffix => bytes."""
    metadata = asdict(sample.metadata)
    if not sample.metadata.sources:
        del metadata["sources"]
    members: dict[str, str | bytes] = {
        "__key__": sample.key,
        "moments.npy": npy_bytes(sample.moments),
        "json": json.dumps(metadata, ensure_ascii=False).encode(),
    }
    for field in (*IMAGE_ARRAYS[1:], "context", "context_lengths", "context_scale"):
        array = getattr(sample, field)
        if array is not None:
            members[f"{field}.npy"] = npy_bytes(array)
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    return members


@contextlib.contextmanager
def open_shard(url: str, entry: ShardEntry) -> Iterator[Path]:
    """Provide a local folder with the shard's tar and index; downloads are deleted at the end.

    Only the sizes of downloads are bounded. Raises UserError for a file that is missing in a store.
    """
    if not connections.is_remote(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        tar, index = f"{entry.name}.tar", f"{entry.name}.index.npz"
        storage.download(storage.join(url, tar), Path(folder, tar), max_bytes=entry.num_bytes)
        storage.download(storage.join(url, index), Path(folder, index), max_bytes=MAX_BYTES)
        yield Path(folder)


def read_samples(path: Path) -> Iterator[LatentSample]:
    """Read the samples of a tar in order. Raises ShardError for a tar of anything else."""
    for key, members in read_tar(path):
        arrays = {
            suffix.removesuffix(".npy"): parse_npy(
                member.data, f"{path}: {key}.{suffix}", error=ShardError
            )
            for suffix, member in members.items()
            if suffix.endswith(".npy")
        }
        where = f"{path}: {key}"
        yield LatentSample(
            key=key,
            label=parse_label(members["cls"].data, f"{where}.cls") if "cls" in members else None,
            metadata=parse_metadata(members["json"].data, f"{where}.json"),
            **arrays,
        )
