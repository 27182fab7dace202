"""The background half of the encode job: encoded batches => shards, in threads.

A shard's tar is written while its batches come. Hashing, upload and marker of one shard go on
beside the models and the tar of the next. Queues are short, so memory stays bounded: a slow disk
or store makes the models wait.
"""

import contextlib
import queue
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from data_pipeline.completion import (
    CompletionMarker,
    Failure,
    Job,
    LatentSums,
    sum_latents,
    write_marker,
)
from data_pipeline.config import EncodeConfig
from data_pipeline.encoders import EncodedBatch
from data_pipeline.shard_io import write_shard
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import LatentSample, SampleMetadata, ShardEntry
from ifvit.shards.format import Array

SHARDS_AT_ONCE = 2
BATCHES_QUEUED = 2

_Batches = queue.Queue[EncodedBatch | None]


class ShardWriter:
    """Takes the batches of all units in order; leaving the block waits for the last marker."""

    def __init__(self, config: EncodeConfig, job: Job) -> None:
        self._config = config
        self._job = job
        self._pool = ThreadPoolExecutor(SHARDS_AT_ONCE)
        self._running: deque[Future[CompletionMarker]] = deque()
        self._open: _Batches | None = None
        self.markers: list[CompletionMarker] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open is not None:
            with contextlib.suppress(queue.Empty):  # a writer that has failed makes no more room
                while True:
                    self._open.get_nowait()
            self._open.put(None)
        self._pool.shutdown()
        if kind is None:
            self._collect()

    def put(self, batch: EncodedBatch) -> None:
        """Hand over the next batch. Raises what the writing of an earlier one raised."""
        if self._open is None:
            self._open = queue.Queue(BATCHES_QUEUED)
            self._running.append(self._pool.submit(self._write, batch.unit.name, self._open))
        while True:
            self._collect()
            with contextlib.suppress(queue.Full):
                self._open.put(batch, timeout=1.0)
                break
        if batch.is_last:
            self._open = None

    def _collect(self) -> None:
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            self.markers.append(future.result())

    def _write(self, name: str, batches: _Batches) -> CompletionMarker:
        samples = _Samples(name, batches, self._config.dtype)
        marker = CompletionMarker(
            job=self._job,
            shard=_write_anywhere(self._config.output, name, samples),
            failures=tuple(samples.failures),
            latent_sums=samples.latent_sums,
        )
        write_marker(self._config.output, marker)
        return marker


def to_stored(values: Tensor, dtype: str, name: str) -> Array:
    """Tensor => array in the shards' dtype. Raises UserError when that cannot hold a value."""
    with np.errstate(over="ignore"):
        stored: Array = values.cpu().numpy().astype(dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"{name}: an encoder gave values that {dtype} cannot hold; try float32")
    return stored


class _Samples:
    """Iterates over one shard's samples; failures and latent sums are complete after that."""

    def __init__(self, name: str, batches: _Batches, dtype: str) -> None:
        self.failures: list[Failure] = []
        self.latent_sums = LatentSums()
        self._name = name
        self._batches = batches
        self._dtype = dtype
        self._repeated: dict[str, Array] = {}

    def __iter__(self) -> Iterator[LatentSample]:
        is_last = False
        while not is_last:
            batch = self._batches.get()
            if batch is None:
                raise InterruptedError(f"{self._name}: the models stopped before its last image")
            self.failures += batch.failures
            yield from self._convert(batch)
            is_last = batch.is_last

    def _convert(self, batch: EncodedBatch) -> Iterator[LatentSample]:
        if batch.moments is None:
            return
        moments = self._store(batch.moments)
        self.latent_sums += sum_latents(moments)
        flipped = None if batch.flipped is None else self._store(batch.flipped)
        contexts = self._contexts(batch)
        for row, (image, decoded) in enumerate(zip(batch.images, batch.decoded, strict=True)):
            yield LatentSample(
                key=image.key,
                moments=moments[row],
                flipped=None if flipped is None else flipped[row],
                context=None if image.label is not None else _rows(contexts, image.captions),
                label=image.label,
                metadata=SampleMetadata(
                    image_id=image.image_id,
                    captions=image.captions,
                    width=decoded.width,
                    height=decoded.height,
                ),
            )

    def _contexts(self, batch: EncodedBatch) -> dict[str, Array]:
        """Caption => embedding (M, D), of the batch's captions and of all that may come again."""
        if batch.contexts is None:
            return self._repeated
        rows = dict(zip(batch.captions, self._store(batch.contexts), strict=True))
        kept = {caption: rows[caption].copy() for caption in batch.unit.repeated.intersection(rows)}
        self._repeated |= kept  # copies: a view would keep the whole batch
        return self._repeated | rows

    def _store(self, values: Tensor) -> Array:
        return to_stored(values, self._dtype, self._name)


def _rows(contexts: dict[str, Array], captions: tuple[str, ...]) -> Array:
    return np.stack([contexts[caption] for caption in captions])


def _write_anywhere(output: str, name: str, samples: _Samples) -> ShardEntry:
    """Write a shard to a folder or, by way of a temporary one, to an object store."""
    if not storage.is_remote(output):
        return write_shard(Path(output), name, samples)
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        entry = write_shard(Path(folder), name, samples)
        for file in (f"{name}.index.npz", f"{name}.tar"):
            storage.upload(Path(folder, file), storage.join(output, file))
    return entry
