"""What `ifvit analyze attention` found in one checkpoint, as a record and as files; no torch.

Everything is about image tokens as queries: their attention to image tokens is the image-to-image
map, their attention to text tokens, through which text guides the image, the text-to-image map.

Shapes: P image tokens inside the trimmed border, M text tokens.
"""

import hashlib
import io
from dataclasses import asdict, dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError
from ifvit.sampling.config import nest_settings

Floats = NDArray[np.float64]

NUM_SINGULAR_VALUES = 10
_DIGEST = "maps_sha256"


@dataclass(frozen=True, kw_only=True)
class PromptMean:
    """A mean over prompts, each of them a mean over evaluations, image queries and heads."""

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class AttentionProtocol:
    """What was drawn and recorded; summaries of different ones do not compare."""

    num_prompts: int
    prompts_sha256: str
    sampling: dict[str, Any]
    """`SamplingConfig.settings`."""
    trim: int
    """Patches that are left out at each edge of the latent grid."""


@dataclass(frozen=True, kw_only=True)
class TextAttention:
    """How the image tokens of one fused block attend to text."""

    map: Floats
    """(M, P): mean over prompts, evaluations and heads of what token m gives to image token p."""
    singular_values: tuple[float, ...]
    """The largest of `map`, at most 10."""
    effective_rank: float
    """Of `map`, from all its singular values."""
    prompt_singular_values: tuple[PromptMean, ...]
    """Mean over prompts of those of each prompt's own map."""
    prompt_effective_rank: PromptMean
    """Mean over prompts of that of each prompt's own map."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Where the attention of image tokens goes in one block; the three shares sum to 1."""

    name: str
    """in 0 ..., mid, out 0 ..., in order of use."""
    image_map: Floats
    """(P, P): mean attention of image token (row) to image token (column)."""
    time_share: PromptMean
    image_share: PromptMean
    """The trimmed border among the keys included."""
    text_share: PromptMean
    text: TextAttention | None
    """None for a block without text."""


@dataclass(frozen=True, kw_only=True)
class AttentionSummary:
    """The attention of one checkpoint, layer by layer; means of the conditional half alone."""

    weights: str
    weights_sha256: str
    step: int
    conditioning: str
    num_image_blocks: int
    num_text_blocks: int
    protocol: AttentionProtocol
    layers: tuple[LayerAttention, ...]


def effective_rank(singular_values: NDArray[np.floating]) -> Floats:
    """exp of the entropy of s / sum(s): (..., K) => (...), in 1 ... K (Roy and Vetterli 2007)."""
    shares = singular_values / singular_values.sum(axis=-1, keepdims=True)
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    rank: Floats = np.exp(-(shares * logarithms).sum(axis=-1))
    return rank


def write_attention(url: str, summary: AttentionSummary) -> None:
    """Write numbers to `url`, NAME.json, after the maps, float32, to NAME.npz beside it."""
    texts = [layer.text.map for layer in summary.layers if layer.text]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        image=np.stack([layer.image_map for layer in summary.layers]).astype(np.float32),
        text=np.stack(texts).astype(np.float32),
    )
    storage.write_bytes(_maps_url(url), buffer.getvalue())
    stored = asdict(summary)
    for layer in stored["layers"]:
        del layer["image_map"]
        if layer["text"]:
            del layer["text"]["map"]
    storage.write_json(url, stored | {_DIGEST: hashlib.sha256(buffer.getvalue()).hexdigest()})


def read_attention(url: str) -> AttentionSummary:
    """Read what `write_attention` wrote to `url`.

    Raises UserError when there is no such file, or it is something else.
    """
    stored = storage.read_json(url)
    maps = storage.read_bytes(_maps_url(url))
    try:
        if stored.pop(_DIGEST) != hashlib.sha256(maps).hexdigest():
            raise ValueError(f"{_maps_url(url)} belongs to another one")
        arrays = np.load(io.BytesIO(maps))
        texts = iter(arrays["text"].astype(np.float64))
        layers = tuple(
            _layer(layer, image_map, next(texts) if layer["text"] else None)
            for layer, image_map in zip(stored.pop("layers"), arrays["image"], strict=True)
        )
        protocol = AttentionProtocol(**nest_settings(stored.pop("protocol")))
        return AttentionSummary(**stored, protocol=protocol, layers=layers)
    except (KeyError, TypeError, AttributeError, ValueError, BadZipFile) as error:
        raise UserError(f"{url}: not an analysis of attention ({error}); analyze again") from None


def _maps_url(url: str) -> str:
    return url.removesuffix(".json") + ".npz"


def _layer(stored: dict[str, Any], image_map: Floats, text_map: Floats | None) -> LayerAttention:
    return LayerAttention(
        name=stored["name"],
        image_map=image_map.astype(np.float64),
        time_share=PromptMean(**stored["time_share"]),
        image_share=PromptMean(**stored["image_share"]),
        text_share=PromptMean(**stored["text_share"]),
        text=None if text_map is None else _text(stored["text"], text_map),
    )


def _text(stored: dict[str, Any], text_map: Floats) -> TextAttention:
    return TextAttention(
        map=text_map,
        singular_values=tuple(stored["singular_values"]),
        effective_rank=stored["effective_rank"],
        prompt_singular_values=tuple(PromptMean(**e) for e in stored["prompt_singular_values"]),
        prompt_effective_rank=PromptMean(**stored["prompt_effective_rank"]),
    )
