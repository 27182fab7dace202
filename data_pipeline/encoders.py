"""Images => moments and contexts: decoding in threads, and the frozen models of the encode job."""

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from data_pipeline.completion import Failure
from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import CaptionedImage, Unit
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels, read_square, to_model_range, to_pixels
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.process_group import choose_device
from ifvit.shards import LatentSample
from ifvit.storage import StoreError

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
    """What went wrong, in words that depend on no folder and no memory address: markers repeat."""
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


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """B readable images of one unit: moments (B, 2C, h, w), those of the mirrored images if asked.

    `captions` are the T that the unit had not met before, `contexts` (T, M, D) their embeddings.
    Tensors stay where the models left them, so that nobody has to wait for the device here.
    """

    unit: UnitInfo
    images: Sequence[CaptionedImage]
    decoded: Sequence[DecodedImage]
    failures: Sequence[Failure]
    moments: Tensor | None
    flipped: Tensor | None
    captions: Sequence[str]
    contexts: Tensor | None
    is_last: bool


class Encoders:
    """The autoencoder and, where images have captions, the text encoder."""

    def __init__(self, vae: Autoencoder, text: TextEncoder | None, device: str, flip: bool) -> None:
        self.vae = vae
        self.text = text
        self.device = device
        self._flip = flip
        self._met: set[str] = set()

    def encode(self, batch: DecodedBatch) -> EncodedBatch:
        """Encode the readable images of a batch and the captions that its unit has not met."""
        pairs = list(zip(batch.images, batch.results, strict=True))
        readable = [(image, found) for image, found in pairs if isinstance(found, DecodedImage)]
        moments = flipped = None
        if readable:
            stacked = np.stack([found.pixels for _, found in readable])
            pixels = to_model_range(stacked, self.device)
            moments = self.vae.encode(pixels)
            flipped = self.vae.encode(pixels.flip(-1)) if self._flip else None
        captions = self._new_captions([image for image, _ in readable], batch.unit)
        if batch.is_last:
            self._met.clear()
        return EncodedBatch(
            unit=batch.unit,
            images=[image for image, _ in readable],
            decoded=[found for _, found in readable],
            failures=[found for found in batch.results if isinstance(found, Failure)],
            moments=moments,
            flipped=flipped,
            captions=captions,
            contexts=self.text.encode(captions) if self.text and captions else None,
            is_last=batch.is_last,
        )

    def _new_captions(self, images: list[CaptionedImage], unit: UnitInfo) -> list[str]:
        captions = dict.fromkeys(caption for image in images for caption in image.captions)
        new = [caption for caption in captions if caption not in self._met]
        self._met |= unit.repeated.intersection(new)
        return new


def decode_mean(vae: Autoencoder, sample: LatentSample) -> Pixels:
    """The picture (H, W, 3) that the mean of a sample's posterior stands for."""
    mean = np.split(sample.moments.astype(np.float32), 2)[0]
    with torch.no_grad():
        picture: Pixels = to_pixels(vae.decode(torch.from_numpy(mean)[None]))[0]
    return picture


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread inside.

    Sums round differently on two, and launchers set that number by how many processes they start:
    shards would depend on it. More CPU cores are used by more processes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_encoders(config: EncodeConfig, *, has_classes: bool) -> Encoders:
    """Open the models on this process's device.

    Raises UserError when captions lack a text encoder, the image size does not fit the VAE, or
    there is no GPU though the recipe names one.
    """
    device = choose_device(config.device)
    dtype = PRECISIONS[config.precision]
    torch.backends.cudnn.deterministic = True  # equal shards, whichever GPU of a kind made them
    text = None
    if not has_classes:
        if config.text_encoder is None:
            raise UserError("text_encoder: not set; captions need one, a hub name or a folder")
        text = load_text_encoder(config.text_encoder, device, dtype)
    vae = load_autoencoder(config.vae, device, dtype)
    vae.latent_shape(config.image_size)  # raises UserError if it does not fit
    return Encoders(vae, text, device, config.flip)
