"""Units => batches of square pixels, read and decoded in threads some batches ahead.

The unit of work is one output shard, decided from the sorted source alone. Batches never cross
its border, so its bytes do not depend on what was done before, or by whom.
"""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import UnidentifiedImageError

from data_pipeline.config import EncodeConfig
from data_pipeline.receipts import Failure
from data_pipeline.sources.source import CaptionedImage, Unit
from ifvit.errors import UserError
from ifvit.images import DecodedImage, read_square
from ifvit.object_store import StoreError

BATCHES_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class UnitInfo:
    """What a batch must know of its unit; `repeated` captions occur in it more than once."""

    name: str
    num_images: int
    repeated: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """B images of one unit, each with its pixels or with why there are none."""

    unit: UnitInfo
    images: Sequence[CaptionedImage]
    results: Sequence[DecodedImage | Failure]
    is_last: bool


def decode_batches(units: Sequence[Unit], config: EncodeConfig) -> Iterator[DecodedBatch]:
    """The batches of all units in order; a unit without images gives one empty batch."""
    pending: deque[tuple[UnitInfo, Sequence[CaptionedImage], bool, list[_Result]]] = deque()
    size = config.batch_size
    with ThreadPoolExecutor(config.num_workers) as pool:
        for unit, images in _open_ahead(units):
            for start in range(0, max(len(images), 1), size):
                batch = images[start : start + size]
                futures = [pool.submit(read_or_fail, image, config.image_size) for image in batch]
                pending.append((unit, batch, start + size >= len(images), futures))
                if len(pending) > BATCHES_AHEAD:
                    yield _wait_for(*pending.popleft())
        while pending:
            yield _wait_for(*pending.popleft())


def read_or_fail(image: CaptionedImage, image_size: int) -> DecodedImage | Failure:
    """The square image, or why there is none. Raises StoreError: that is no image's fault."""
    try:
        return read_square(io.BytesIO(image.read()), image_size)
    except StoreError:
        raise
    except Exception as error:  # a broken file can make a decoder raise anything; it is recorded
        return Failure(image_id=image.image_id, file=image.name, reason=_reason(error))


def _reason(error: Exception) -> str:
    """What went wrong, in words that depend on no folder and no memory address: receipts repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    text = str(error) or type(error).__name__
    return text.rpartition(": ")[2] if isinstance(error, UserError) else text  # without the path


_Result = Future[DecodedImage | Failure]


def _open_ahead(units: Sequence[Unit]) -> Iterator[tuple[UnitInfo, Sequence[CaptionedImage]]]:
    """Open each unit while the one before it is used: a remote one takes its time."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(units[0].open) if units else None
        for number, unit in enumerate(units):
            assert upcoming is not None
            images = upcoming.result()
            if number + 1 < len(units):
                upcoming = pool.submit(units[number + 1].open)
            yield _describe(unit, images), images


def _describe(unit: Unit, images: Sequence[CaptionedImage]) -> UnitInfo:
    seen: set[str] = set()
    repeated: set[str] = set()
    for image in images:
        for caption in image.captions:
            (repeated if caption in seen else seen).add(caption)
    return UnitInfo(name=unit.name, num_images=len(images), repeated=frozenset(repeated))


def _wait_for(
    unit: UnitInfo, images: Sequence[CaptionedImage], is_last: bool, results: list[_Result]
) -> DecodedBatch:
    found = [result.result() for result in results]
    return DecodedBatch(unit=unit, images=images, results=found, is_last=is_last)
