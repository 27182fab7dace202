"""Records the attention of image tokens during sampling, averages it by layer, and stores it.

`analyze attention` records and writes the maps; `report paper` reads them.

Shape letters: B prompts of a batch, H heads, E channels of a head, Q queries, K keys, P image
tokens inside the trimmed border, M text tokens.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifvit import storage
from ifvit.arrays import parse_npz
from ifvit.errors import UserError
from ifvit.evaluation.rows import Settings
from ifvit.models.attention import Attend, logits_of
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.records import NonNegativeFloat, NonNegativeInt, PositiveInt, Rule, Sha256, record

Floats = NDArray[np.float64]

NUM_SINGULAR_VALUES = 10
_MAX_LAYERS = 200
"""Columns of the figure; Matplotlib draws no image of 65,536 or more pixels."""

Watch = Callable[[int, Tensor, Tensor], None]
"""Called with the index of the block in order of use, queries (B, Q, H, E), keys (B, K, H, E)."""


@record
class PromptMean:
    """A mean over prompts of numbers that are means over NFE, image queries and heads."""

    value: NonNegativeFloat
    standard_error: NonNegativeFloat


@record
class AttentionProtocol:
    """How images were sampled and attention was recorded; only equal protocols can be compared."""

    num_prompts: PositiveInt
    prompts_sha256: Sha256
    sampling: Settings
    trim: NonNegativeInt
    """Number of patches left out at each edge of the latent grid."""


@record
class TextNumbers:
    """Spectrum of the attention from the image tokens of one fused block to text."""

    singular_values: tuple[NonNegativeFloat, ...]
    """The largest singular values of the mean map, at most 10."""
    effective_rank: NonNegativeFloat
    """Effective rank of the mean map, from all its singular values."""
    prompt_singular_values: tuple[PromptMean, ...]
    """Singular values of each prompt's own map, mean over prompts."""
    prompt_effective_rank: PromptMean
    """Effective rank of each prompt's own map, mean over prompts."""

    def __post_init__(self) -> None:
        """Raise UserError for values that cannot be plotted."""
        count = len(self.singular_values)
        if not 1 <= count <= NUM_SINGULAR_VALUES or count != len(self.prompt_singular_values):
            raise UserError(f"{count} singular values; expected 1 to {NUM_SINGULAR_VALUES}")
        if not self.singular_values[0] > 0:
            raise UserError("the largest singular value is 0")


@dataclass(frozen=True, kw_only=True)
class TextAttention(TextNumbers):
    """How the image tokens of one fused block attend to text."""

    map: Floats
    """(M, P): attention of image token p to text token m, mean over prompts, NFE and heads."""


@record
class LayerNumbers:
    """Shares of what the image tokens attend to in one block; the three sum to 1."""

    name: str
    """`in 0` …, `mid`, `out 0` …, in order of use."""
    time_share: PromptMean
    image_share: PromptMean
    """Attention to all image tokens, including those in the trimmed border."""
    text_share: PromptMean
    text: TextNumbers | None
    """None for a block without text."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention(LayerNumbers):
    """What the image tokens attend to in one block."""

    image_map: Floats
    """(P, P): mean attention of image token (row) to image token (column)."""
    text: TextAttention | None


@record
class _Stored:
    """A summary in NAME.json; `maps_sha256` is the hash of NAME.npz, which holds its maps."""

    weights: str
    weights_sha256: Sha256
    step: NonNegativeInt
    conditioning: str
    num_image_blocks: NonNegativeInt
    num_text_blocks: NonNegativeInt
    protocol: AttentionProtocol
    layers: Annotated[
        tuple[LayerNumbers, ...],
        Rule(f"1 to {_MAX_LAYERS} layers", lambda value: 0 < len(value) <= _MAX_LAYERS),
    ]
    maps_sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class AttentionSummary:
    """The attention of one checkpoint, layer by layer, in the conditional half of guidance."""

    weights: str
    weights_sha256: str
    step: int
    conditioning: str
    num_image_blocks: int
    num_text_blocks: int
    protocol: AttentionProtocol
    layers: tuple[LayerAttention, ...]


def effective_rank(singular_values: NDArray[np.floating]) -> Floats:
    """Return exp(entropy(s / sum(s))): (..., K) => (...), in 1 ... K (Roy and Vetterli 2007)."""
    shares = singular_values / singular_values.sum(axis=-1, keepdims=True)
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    rank: Floats = np.exp(-(shares * logarithms).sum(axis=-1))
    return rank


def write_attention(url: str, summary: AttentionSummary) -> None:
    """Write the maps, as float32, to NAME.npz, then the numbers to `url`, which is NAME.json."""
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
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    storage.write_sealed(url, stored | {"maps_sha256": digest})


def read_attention(url: str) -> AttentionSummary:
    """Read the summary that `write_attention` wrote to `url`.

    Raises UserError if there is no such file, or if it is not an analysis of attention.
    """
    stored = storage.read_sealed(_Stored, url)
    data = storage.read_bytes(_maps_url(url))
    if stored.maps_sha256 != hashlib.sha256(data).hexdigest():
        raise UserError(f"{_maps_url(url)}: belongs to another analysis; analyze again")
    arrays = parse_npz(data, _maps_url(url))
    images, texts = (arrays.get(name, np.zeros(0)) for name in ("image", "text"))
    has_text = [layer.text is not None for layer in stored.layers]
    is_square = images.ndim == 3 and images.shape[1] == images.shape[2]
    is_same = texts.ndim == 3 and is_square and texts.shape[2] == images.shape[2]
    counts = (len(images), len(texts)) == (len(has_text), sum(has_text))
    if not (counts and is_same and images.size and texts.size):
        raise UserError(f"{_maps_url(url)}: its maps do not belong to the layers; analyze again")
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise UserError(f"{_maps_url(url)}: its maps are not finite; analyze again")
    rest = iter(texts.astype(np.float64))
    layers = tuple(
        _join(layer, image_map, next(rest) if layer.text else None)
        for layer, image_map in zip(stored.layers, images.astype(np.float64), strict=True)
    )
    own = {field.name: getattr(stored, field.name) for field in fields(AttentionSummary)}
    return AttentionSummary(**own | {"layers": layers})


def _maps_url(url: str) -> str:
    return url.removesuffix(".json") + ".npz"


def _join(layer: LayerNumbers, image_map: Floats, text_map: Floats | None) -> LayerAttention:
    """Numbers and maps of one layer."""
    text = None
    if layer.text is not None and text_map is not None:
        text = TextAttention(**vars(layer.text), map=text_map)
    return LayerAttention(**{**vars(layer), "text": text}, image_map=image_map)


@contextmanager
def watch_attention(backbone: FusionTransformer, watch: Watch) -> Iterator[None]:
    """Call `watch` whenever a block outside the text branch computes attention."""
    layers = [block.attn for block in (*backbone.in_blocks, backbone.mid_block)]
    layers += [block.attn for block in backbone.out_blocks]
    plain = [layer.attend for layer in layers]
    for number, layer in enumerate(layers):
        layer.attend = partial(_watch_and_attend, watch, number, layer.attend)
    try:
        yield
    finally:
        for layer, attend in zip(layers, plain, strict=True):
            layer.attend = attend


def _watch_and_attend(
    watch: Watch, number: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    watch(number, query, key)
    return attend(query, key, value)


def inner_tokens(side: int, trim: int) -> Tensor:
    """Return the indices (P,) of the image tokens at least `trim` patches from each edge.

    Raises UserError if there are none.
    """
    if 2 * trim >= side:
        raise UserError(
            f"trim {trim} leaves nothing of {side} x {side} patches; lower it below {side / 2:g}"
        )
    inside = slice(trim, side - trim)
    return torch.arange(side * side).view(side, side)[inside, inside].flatten()


class PromptRows:
    """A `Watch` that sums the attention of one batch of prompts over function evaluations."""

    def __init__(self, num_prompts: int, inside: Tensor) -> None:
        """Record the attention of the image tokens with the indices `inside` (P,)."""
        self._num_prompts = num_prompts
        self._queries = 1 + inside
        self._sums: list[Tensor] = []
        self._num_calls = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Add one function evaluation; under guidance its first rows are the conditional ones."""
        query = query[: self._num_prompts, self._queries.to(query.device)]
        rows = attention_rows(query, key[: self._num_prompts])
        if layer == len(self._sums):
            self._sums.append(rows)
        else:
            self._sums[layer] += rows
        self._num_calls += layer == 0

    def means(self) -> Iterator[Floats]:
        """Yield the means over NFE and heads (B, P, K), layer by layer; rows sum to 1."""
        for rows in self._sums:
            yield rows.cpu().double().numpy() / self._num_calls


def attention_rows(query: Tensor, key: Tensor, max_logits: int = 2**23) -> Tensor:
    """Return the mean attention over heads (B, Q, K) in float32; chunks of B bound the memory."""
    at_once = max(1, max_logits // (query.shape[1] * query.shape[2] * key.shape[1]))
    chunks = zip(torch.split(query, at_once), torch.split(key, at_once), strict=True)
    return torch.cat([logits_of(q, k).softmax(dim=-1).mean(dim=1) for q, k in chunks])


class LayerSums:
    """Accumulates the maps of one layer over prompts, and at most 14 numbers per prompt."""

    def __init__(self, name: str, num_image_tokens: int, inside: Tensor) -> None:
        """Expect rows of the image tokens with the indices `inside` (P,)."""
        self._name = name
        self._num_image_tokens = num_image_tokens
        self._inside = inside.numpy()
        self._image_map: Floats = np.zeros(1)
        self._text_map: Floats = np.zeros(1)
        self._numbers: list[Floats] = []

    def add(self, rows: Floats) -> None:
        """Add the rows (B, P, K) of further prompts."""
        parts = np.split(rows, [1, 1 + self._num_image_tokens], axis=2)
        self._image_map = self._image_map + parts[1][:, :, self._inside].sum(axis=0)
        self._text_map = self._text_map + parts[2].sum(axis=0).T
        shares = np.stack([part.sum(axis=2).mean(axis=1) for part in parts], axis=1)
        # A map and its transpose have the same singular values. A block without text has none.
        values = np.linalg.svd(parts[2], compute_uv=False)
        largest = values[:, :NUM_SINGULAR_VALUES]
        ranks = effective_rank(values)[:, None] if values.shape[1] else largest
        self._numbers.append(np.concatenate([shares, ranks, largest], axis=1))

    def finish(self) -> LayerAttention:
        """Return the means over all prompts, at least two."""
        numbers = np.concatenate(self._numbers)
        count = len(numbers)
        errors = numbers.std(axis=0, ddof=1) / math.sqrt(count)
        # `spectrum` is the effective rank and the singular values of the prompts' own maps.
        time, image, text, *spectrum = (
            PromptMean(value=float(value), standard_error=float(error))
            for value, error in zip(numbers.mean(axis=0), errors, strict=True)
        )
        attention = None
        if spectrum:
            text_map = self._text_map / count
            values = np.linalg.svd(text_map, compute_uv=False)
            attention = TextAttention(
                map=text_map,
                singular_values=tuple(map(float, values[:NUM_SINGULAR_VALUES])),
                effective_rank=float(effective_rank(values)),
                prompt_singular_values=tuple(spectrum[1:]),
                prompt_effective_rank=spectrum[0],
            )
        return LayerAttention(
            name=self._name,
            image_map=self._image_map / count,
            time_share=time,
            image_share=image,
            text_share=text,
            text=attention,
        )


def layer_names(depth: int) -> list[str]:
    """Return the names of the blocks in order of use, like those of the backbone's parameters."""
    half = range(depth // 2)
    return [*(f"in {n}" for n in half), "mid", *(f"out {n}" for n in half)]
