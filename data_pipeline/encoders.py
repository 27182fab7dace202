"""Decoding of images in threads, and the frozen encoders; `encode` calls both batch by batch."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, tee
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data_pipeline.completion import Failure
from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import CaptionedImage, Unit
from data_pipeline.units import FileStates, OpenUnit, open_with_identity, read_or_fail
from ifvit.conditions import rows_of
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels, to_model_range, to_pixels
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.image_encoders import ImageEncoder, load_image_encoder
from ifvit.models.text_encoders import (
    DTYPES,
    NotFiniteError,
    TextEncoder,
    load_text_encoder,
)
from ifvit.shards.format import LatentSample

BATCHES_AHEAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images of one shard on their way through the job, whose stages fill the fields.

    `results` has the pixels of each image, or the reason why it is unreadable. `encoded` holds the
    moments (B, 2C, h, w), or latents (B, C, h, w) of a deterministic autoencoder, and, if asked,
    `flipped`, `features` (B, G * G, F) and `flipped_features` of the B readable images, by field of
    LatentSample. `context` (T, D) are the context tokens of all captions, image after image, and
    `context_lengths` the number of tokens of each caption; `cut` are the captions of too many
    tokens. Tensors stay on the device, so the encoders need not wait for the copy to the CPU.
    """

    unit: OpenUnit
    is_last: bool
    images: Sequence[CaptionedImage]
    results: Sequence[DecodedImage | Failure] = ()
    encoded: Mapping[str, Tensor] = field(default_factory=dict)
    context: Tensor | None = None
    context_lengths: Sequence[int] = ()
    cut: frozenset[str] = frozenset()

    @property
    def shard(self) -> str:
        """Name of the shard."""
        return self.unit.name

    @property
    def readable(self) -> list[tuple[CaptionedImage, DecodedImage]]:
        """The images that could be read, with their pixels."""
        pairs = zip(self.images, self.results, strict=True)
        return [(image, found) for image, found in pairs if isinstance(found, DecodedImage)]

    @property
    def captions(self) -> list[tuple[CaptionedImage, str]]:
        """The captions of the readable images in order, each with its image."""
        return [(image, caption) for image, _ in self.readable for caption in image.captions]

    @property
    def failures(self) -> list[Failure]:
        """The images, or the whole unit, that could not be read."""
        problem = [self.unit.problem] if self.unit.problem else []
        return problem + [found for found in self.results if isinstance(found, Failure)]


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, num_ahead: int
) -> Generator[Result]:
    """Yield `function(item)` for every item in order; threads compute up to `num_ahead` ahead."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def decode_batches(
    units: Sequence[Unit], config: EncodeConfig, states: FileStates
) -> Iterator[Batch]:
    """Decode all images of all units in order; a unit without images gives one empty batch."""
    batches, ahead = tee(_divide(units, config, states))
    images = (image for batch in ahead for image in batch.images)
    read = partial(read_or_fail, config=config)
    results = map_ahead(read, images, config.num_workers, BATCHES_AHEAD * config.batch_size)
    for batch in batches:
        yield replace(batch, results=list(islice(results, len(batch.images))))


def _divide(units: Sequence[Unit], config: EncodeConfig, states: FileStates) -> Iterator[Batch]:
    """Divide the images of each unit into batches that are not decoded yet."""
    batch_size = config.batch_size
    # The next unit is opened while the current one is decoded: opening may be a download.
    open_one = partial(open_with_identity, config=config, states=states)
    for unit in map_ahead(open_one, units, num_threads=1, num_ahead=1):
        images = unit.images
        for start in range(0, max(len(images), 1), batch_size):
            yield Batch(
                unit=unit,
                is_last=start + batch_size >= len(images),
                images=images[start : start + batch_size],
            )


class Encoders:
    """The autoencoder, for captioned images the text encoder, and, if asked, an image encoder."""

    def __init__(
        self,
        vae: Autoencoder,
        text: TextEncoder | None,
        image: ImageEncoder | None,
        device: str,
        flip: bool,
    ) -> None:
        self.vae = vae
        self.text = text
        self.image = image
        self.device = device
        self._flip = flip
        self._kept: dict[str, Tensor] = {}  # contexts of this shard's repeated captions

    def encode(self, batch: Batch) -> Batch:
        """Encode the readable images and their captions, equal captions of a shard only once.

        Moments and features that the batch already has are kept.
        """
        if batch.readable and not batch.encoded:
            stacked = np.stack([found.pixels for _, found in batch.readable])
            pixels = to_model_range(stacked, self.device)
            encoded = {"moments": self.vae.encode(pixels)}
            if self.image:
                encoded["features"] = self.image.encode(pixels)
            if self._flip:
                flips = pixels.flip(-1)
                encoded["flipped"] = self.vae.encode(flips)
                if self.image:
                    encoded["flipped_features"] = self.image.encode(flips)
            batch = replace(batch, encoded=encoded)
        if batch.captions and self.text:
            batch = self._encode_captions(batch, self.text)
        if batch.is_last:
            self._kept = {}
        return batch

    def _encode_captions(self, batch: Batch, encoder: TextEncoder) -> Batch:
        captions = [caption for _, caption in batch.captions]
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        try:
            added = rows_of(encoder.encode(new)) if new else []
        except NotFiniteError as error:
            named = next(image.name for image, text in batch.captions if text == error.caption)
            raise UserError(f"{batch.shard}: {named}: {error}") from None
        contexts = self._kept | dict(zip(new, added, strict=True))
        for caption in batch.unit.repeated.intersection(new):
            self._kept[caption] = contexts[caption].clone()  # a view would keep the whole batch
        tokens = [contexts[caption] for caption in captions]
        return replace(
            batch,
            context=torch.cat(tokens),
            context_lengths=[len(each) for each in tokens],
            cut=encoder.find_cut(set(captions)),
        )


def load_encoders(config: EncodeConfig, *, has_classes: bool) -> Encoders:
    """Load the encoders onto this process's device.

    Raises UserError when the recipe lacks the text encoder of stored contexts or has one without
    use, when the image size does not fit the VAE, or when it names a GPU and there is none.
    """
    device = choose_device(config.device)
    dtype = DTYPES[config.precision]
    torch.backends.cudnn.deterministic = True  # all GPUs of one model make equal shards
    text = None
    if has_classes or config.context == "computed":
        _refuse_text_settings(config)
    elif config.text_encoder is None:
        raise UserError(
            "text_encoder: not set; name one for the captions, hub name or folder, or set "
            "context: computed to encode them while training"
        )
    else:
        text = load_text_encoder(config.text_encoder, device, config.text, config.precision)
    vae = load_autoencoder(config.vae, device, dtype)
    vae.latent_shape(config.image_size)  # raises UserError if the size does not fit
    image = None
    if config.image_encoder is not None:
        image = load_image_encoder(config.image_encoder, device, dtype)
    return Encoders(vae, text, image, device, config.flip)


def _refuse_text_settings(config: EncodeConfig) -> None:
    """Raise UserError for settings of contexts where none are stored."""
    if config.context == "computed" and config.text_encoder is not None:
        raise UserError(
            f"text_encoder: {config.text_encoder} is set, but context: computed stores captions "
            "only; name the text encoder in the recipe of the training"
        )
    if config.int8_context:
        raise UserError("int8_context: true, but no contexts are stored; leave it unset")


def decode_mean(vae: Autoencoder, sample: LatentSample) -> Pixels:
    """Decode the mean of a sample's posterior, or its latent, to a picture (H, W, 3)."""
    mean = sample.moments[: vae.vae.config.latent_channels].astype(np.float32)
    with torch.no_grad():
        picture: Pixels = to_pixels(vae.decode(torch.from_numpy(mean)[None]))[0]
    return picture


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread inside the block.

    The number of threads changes how sums are rounded, and launchers set it by the number of
    processes per node, so the bytes of shards would depend on it. To use more CPU cores, start more
    processes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
