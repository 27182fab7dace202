"""The frozen models of the encode job: decoded batches => moments and contexts, on the device."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import EncodeConfig
from data_pipeline.decode import DecodedBatch, UnitInfo
from data_pipeline.receipts import Failure
from data_pipeline.sources.source import CaptionedImage
from ifvit.device import choose_device
from ifvit.errors import UserError
from ifvit.images import DecodedImage, Pixels, to_model_range, to_pixels
from ifvit.models.autoencoder import Autoencoder, load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.shards import LatentSample

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
