"""Decoding of images in threads, and the frozen encoders; `encode` calls both batch by batch."""

import contextlib
import io
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from data_pipeline.completion import Failure
from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import CaptionedImage, Unit
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels, read_square, to_model_range, to_pixels
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.shards import LatentSample
from ifvit.storage import StoreError

BATCHES_AHEAD = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """B images of one shard; a result holds the pixels or the reason why they cannot be read.

    `repeated` are the captions that occur more than once in the shard.
    """

    shard: str
    repeated: frozenset[str]
    is_last: bool
    images: Sequence[CaptionedImage]
    results: Sequence[DecodedImage | Failure]

    @property
    def readable(self) -> list[tuple[CaptionedImage, DecodedImage]]:
        """The images that could be read, with their pixels."""
        pairs = zip(self.images, self.results, strict=True)
        return [(image, found) for image, found in pairs if isinstance(found, DecodedImage)]

    @property
    def failures(self) -> list[Failure]:
        """The images that could not be read."""
        return [found for found in self.results if isinstance(found, Failure)]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Moments (B, 2C, h, w) of the B readable images of a batch, and of their flips if asked.

    `captions` are the T captions that did not occur earlier in the shard, `contexts` (T, M, D) are
    their embeddings. Tensors stay on the device, so that the encoders need not wait for it.
    """

    decoded: DecodedBatch
    moments: Tensor | None
    flipped: Tensor | None
    captions: Sequence[str]
    contexts: Tensor | None


def decode_batches(units: Sequence[Unit], config: EncodeConfig) -> Iterator[DecodedBatch]:
    """Decode all images of all units in order; a unit without images gives one empty batch."""
    pending: deque[tuple[DecodedBatch, Iterator[DecodedImage | Failure]]] = deque()
    with ThreadPoolExecutor(config.num_workers) as pool:
        for unit, images in _open_units(units):
            counts = Counter(caption for image in images for caption in image.captions)
            repeated = frozenset(caption for caption, count in counts.items() if count > 1)
            for start in range(0, max(len(images), 1), config.batch_size):
                end = start + config.batch_size
                batch = DecodedBatch(
                    shard=unit.name,
                    repeated=repeated,
                    is_last=end >= len(images),
                    images=images[start:end],
                    results=(),
                )
                results = pool.map(read_or_fail, batch.images, repeat(config.image_size))
                pending.append((batch, results))
                if len(pending) > BATCHES_AHEAD:
                    batch, results = pending.popleft()
                    yield replace(batch, results=list(results))
        for batch, results in pending:
            yield replace(batch, results=list(results))


def _open_units(units: Sequence[Unit]) -> Iterator[tuple[Unit, Sequence[CaptionedImage]]]:
    """Open each unit while the previous one is in use, because opening may be a download."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(units[0].open) if units else None
        for number, unit in enumerate(units):
            assert following is not None
            images = following.result()
            if number + 1 < len(units):
                following = pool.submit(units[number + 1].open)
            yield unit, images


def read_or_fail(image: CaptionedImage, image_size: int) -> DecodedImage | Failure:
    """Read an image as a square, or return the reason why that fails.

    Raises StoreError when the object store fails, which is not the fault of the image.
    """
    try:
        return read_square(io.BytesIO(image.read()), image_size)
    except StoreError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken files
        return Failure(image_id=image.image_id, file=image.name, reason=_reason(error))


def _reason(error: Exception) -> str:
    """Describe an error without folders or memory addresses, so that markers are reproducible."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    text = str(error) or type(error).__name__
    return text.rpartition(": ")[2] if isinstance(error, UserError) else text


class Encoders:
    """The autoencoder and, for captioned images, the text encoder."""

    def __init__(self, vae: Autoencoder, text: TextEncoder | None, device: str, flip: bool) -> None:
        self.vae = vae
        self.text = text
        self.device = device
        self._flip = flip
        self._encoded: set[str] = set()  # repeated captions of the shard that are encoded already

    def encode(self, batch: DecodedBatch) -> EncodedBatch:
        """Encode the readable images, and the captions that are new in the shard."""
        readable = batch.readable
        moments = flipped = None
        if readable:
            stacked = np.stack([found.pixels for _, found in readable])
            pixels = to_model_range(stacked, self.device)
            moments = self.vae.encode(pixels)
            flipped = self.vae.encode(pixels.flip(-1)) if self._flip else None
        distinct = dict.fromkeys(caption for image, _ in readable for caption in image.captions)
        captions = [caption for caption in distinct if caption not in self._encoded]
        self._encoded |= batch.repeated.intersection(captions)
        if batch.is_last:
            self._encoded.clear()
        return EncodedBatch(
            decoded=batch,
            moments=moments,
            flipped=flipped,
            captions=captions,
            contexts=self.text.encode(captions) if self.text and captions else None,
        )


def load_encoders(config: EncodeConfig, *, has_classes: bool) -> Encoders:
    """Load the encoders onto this process's device.

    Raises UserError when captions have no text encoder, when the image size does not fit the VAE,
    or when the recipe names a GPU and there is none.
    """
    device = choose_device(config.device)
    dtype = PRECISIONS[config.precision]
    torch.backends.cudnn.deterministic = True  # all GPUs of one model make equal shards
    text = None
    if not has_classes:
        if config.text_encoder is None:
            raise UserError("text_encoder: not set; name one for the captions, hub name or folder")
        text = load_text_encoder(config.text_encoder, device, dtype)
    vae = load_autoencoder(config.vae, device, dtype)
    vae.latent_shape(config.image_size)  # raises UserError if the size does not fit
    return Encoders(vae, text, device, config.flip)


def decode_mean(vae: Autoencoder, sample: LatentSample) -> Pixels:
    """Decode the mean of a sample's posterior to a picture (H, W, 3)."""
    mean = np.split(sample.moments.astype(np.float32), 2)[0]
    with torch.no_grad():
        picture: Pixels = to_pixels(vae.decode(torch.from_numpy(mean)[None]))[0]
    return picture


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread inside the block.

    Sums are rounded differently with another number of threads, and launchers set that number by
    the processes per node, so shards would depend on it. Use more processes for more CPU cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
