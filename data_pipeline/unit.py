"""One output shard's images => its samples: decoded ahead in threads, encoded in batches.

The unit of work is one output shard, decided from the sorted source alone. Batches never cross
its border, so its bytes do not depend on what was done before, or by whom.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data_pipeline.coco import CaptionedImage
from data_pipeline.config import EncodeConfig
from data_pipeline.receipts import Failure, LatentSums, sum_latents
from ifvit.errors import UserError
from ifvit.images import DecodedImage, read_square, to_model_range
from ifvit.models.autoencoder import Autoencoder
from ifvit.models.clip import TextEncoder
from ifvit.shards import LatentSample, SampleMetadata
from ifvit.shards.records import Array

BATCHES_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One output shard and the images it is made of."""

    name: str
    images: Sequence[CaptionedImage]


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models."""

    vae: Autoencoder
    text: TextEncoder


class UnitEncoder:
    """Iterates over one shard's samples; failures and latent sums are complete after that."""

    def __init__(
        self,
        unit: Unit,
        decoded: Iterator[DecodedImage | Failure],
        encoders: Encoders,
        config: EncodeConfig,
        progress: "tqdm[Any]",
    ) -> None:
        self.failures: list[Failure] = []
        self.latent_sums = LatentSums()
        self._unit = unit
        self._decoded = decoded
        self._encoders = encoders
        self._config = config
        self._progress = progress

    def __iter__(self) -> Iterator[LatentSample]:
        images, size = self._unit.images, self._config.batch_size
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            pairs = list(zip(batch, self._decoded, strict=False))
            yield from self._encode_batch(pairs)
            self._progress.update(len(batch))

    def _encode_batch(
        self, batch: list[tuple[CaptionedImage, DecodedImage | Failure]]
    ) -> Iterator[LatentSample]:
        readable = [(image, result) for image, result in batch if isinstance(result, DecodedImage)]
        for image, result in batch:
            if isinstance(result, Failure):
                self.failures.append(result)
                self._progress.write(f"{image.path}: {result.reason}", file=sys.stderr)
        if not readable:
            return
        moments = self._encode_images([decoded for _, decoded in readable])
        self.latent_sums = self.latent_sums.add(sum_latents(moments))
        contexts = self._encode_captions([image for image, _ in readable])
        for (image, decoded), sample_moments, context in zip(
            readable, moments, contexts, strict=True
        ):
            yield LatentSample(
                key=f"{image.image_id:012d}",
                moments=sample_moments,
                context=context,
                metadata=SampleMetadata(
                    image_id=image.image_id,
                    captions=image.captions,
                    width=decoded.width,
                    height=decoded.height,
                ),
            )

    def _encode_images(self, images: list[DecodedImage]) -> Array:
        """B images => moments (B, 2C, h, w) as stored."""
        pixels = to_model_range(np.stack([image.pixels for image in images]))
        return self._store(self._encoders.vae.encode(pixels))

    def _encode_captions(self, images: list[CaptionedImage]) -> list[Array]:
        """B images => B contexts (captions, M, D) as stored; equal captions are encoded once."""
        rows: dict[str, int] = {}
        for image in images:
            for caption in image.captions:
                rows.setdefault(caption, len(rows))
        contexts = self._store(self._encoders.text.encode(list(rows)))
        return [contexts[[rows[caption] for caption in image.captions]] for image in images]

    def _store(self, values: Tensor) -> Array:
        return to_stored(values, self._config.dtype, self._unit.name)


def read_or_fail(image: CaptionedImage, image_size: int) -> DecodedImage | Failure:
    """The square image, or why there is none."""
    try:
        return read_square(image.path, image_size)
    except Exception as error:  # a broken file can make a decoder raise anything; it is recorded
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        return Failure(image_id=image.image_id, file=image.path.name, reason=reason)


def decode_ahead(
    images: Iterable[CaptionedImage], config: EncodeConfig
) -> Iterator[DecodedImage | Failure]:
    """Decode in threads, some batches ahead of the encoders; results come in the given order."""
    pending: deque[Future[DecodedImage | Failure]] = deque()
    with ThreadPoolExecutor(config.num_workers) as pool:
        for image in images:
            pending.append(pool.submit(read_or_fail, image, config.image_size))
            if len(pending) > BATCHES_AHEAD * config.batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def to_stored(values: Tensor, dtype: str, name: str) -> Array:
    """Tensor => array in the shards' dtype. Raises UserError when that cannot hold a value."""
    with np.errstate(over="ignore"):
        stored: Array = values.cpu().numpy().astype(dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"{name}: an encoder gave values that {dtype} cannot hold; try float32")
    return stored
