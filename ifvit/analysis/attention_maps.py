"""Records the attention of image tokens during sampling, averages it by block, and stores it.

`analyze attention` records and writes the maps; `report` reads them.

Shape letters: B prompts of a batch, H heads, E channels of a head, Q queries, K keys, L image
tokens, P image tokens inside the trimmed border, M text tokens.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifvit import storage
from ifvit.analysis.run_analysis import RunAnalysis
from ifvit.arrays import parse_npz
from ifvit.errors import UserError
from ifvit.evaluation.rows import Settings
from ifvit.models.attention import Attend, logits_of
from ifvit.models.config import TEXT_KEYS, FusionTransformerConfig, parse_fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.layers import Attention, CrossAttention
from ifvit.records import NonNegativeFloat, NonNegativeInt, PositiveInt, Sha256, record

Floats = NDArray[np.float64]

NUM_SINGULAR_VALUES = 10

Watch = Callable[[int, bool, Tensor, Tensor, Tensor | None], None]
"""Called with the number of the block, whether the keys are text alone, queries (B, Q, H, E), keys
(B, K, H, E), and which keys are visible (B, K), or None for all."""


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
class TextSpectrum:
    """Spectrum of each prompt's own attention from the image tokens of one block to text.

    NAME.npz has the mean map of all prompts, whose rank falls as prompts are added.
    """

    singular_values: tuple[PromptMean, ...]
    """The largest singular values, at most 10."""
    effective_rank: PromptMean
    """From all singular values."""

    def __post_init__(self) -> None:
        """Raise UserError for values that cannot be plotted."""
        if not 1 <= len(self.singular_values) <= NUM_SINGULAR_VALUES:
            raise UserError(
                f"{len(self.singular_values)} singular values; expected 1 to {NUM_SINGULAR_VALUES}"
            )
        if not self.singular_values[0].value > 0:
            raise UserError("the largest singular value is 0")


@record
class LayerNumbers:
    """Shares of what the image tokens attend to in one block; the shares sum to 1."""

    name: str
    """Number and entry of the block in the fusion map, such as `4 cross_attention`."""
    time_share: PromptMean
    """Attention to the time token and the registers."""
    image_share: PromptMean
    """Attention to all image tokens, including those in the trimmed border."""
    text_share: PromptMean | None
    """None for separate_cross_attention: its second softmax is over text alone, and the other two
    shares are those of its self-attention."""
    text: TextSpectrum | None
    """None for a block whose image tokens attend to no text."""


@record
class AttentionNumbers(RunAnalysis):
    """Content of NAME.json: the attention of one checkpoint in the conditional half of guidance."""

    protocol: AttentionProtocol
    layers: tuple[LayerNumbers, ...]
    """One per block of the fusion map."""
    maps_sha256: Sha256 | None = None
    """Hash of NAME.npz; None until `write_attention` has written it."""

    def __post_init__(self) -> None:
        """Raise UserError unless the layers are the blocks of the map, and one has text."""
        if [layer.name for layer in self.layers] != layer_names(self.fusion):
            raise UserError(f"layers: expected the blocks of fusion {self.fusion}")
        if not any(layer.text for layer in self.layers):
            raise UserError("layers: none attends to text")


@dataclass(frozen=True, kw_only=True)
class AttentionSummary(AttentionNumbers):
    """What the image tokens of one checkpoint attend to: numbers, and maps by block."""

    image_maps: Floats
    """(N, P, P) for N blocks: mean attention of image token (row) to image token (column)."""
    text_maps: Mapping[int, Floats]
    """Number of the block => (M, P): attention of image token p to text token m, for the tokens of
    the longest prompt. In separate_cross_attention it is that of the cross-attention. Means are
    over the prompts that have a token m, NFE and heads."""


def layer_names(fusion: str) -> list[str]:
    """Return the names of the blocks of a fusion map: "image concat" => "0 image", "1 concat"."""
    return [f"{number} {entry}" for number, entry in enumerate(parse_fusion(fusion))]


def effective_rank(singular_values: NDArray[np.floating]) -> Floats:
    """Return exp(entropy(s / sum(s))): (..., K) => (...), in 1 ... K (Roy and Vetterli 2007)."""
    shares = singular_values / singular_values.sum(axis=-1, keepdims=True)
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    rank: Floats = np.exp(-(shares * logarithms).sum(axis=-1))
    return rank


def write_attention(url: str, summary: AttentionSummary) -> None:
    """Write the maps, as float32, to NAME.npz, then the numbers to `url`, which is NAME.json."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        image=summary.image_maps.astype(np.float32),
        text=np.stack([*summary.text_maps.values()]).astype(np.float32),
    )
    storage.write_bytes(_maps_url(url), buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    numbers = {one.name: getattr(summary, one.name) for one in fields(AttentionNumbers)}
    stored = AttentionNumbers(**numbers | {"maps_sha256": digest})
    storage.write_sealed(url, asdict(stored))


def read_attention(url: str) -> AttentionSummary:
    """Read the summary that `write_attention` wrote to `url`.

    Raises UserError if there is no such file, or if it is not an analysis of attention.
    """
    numbers = storage.read_sealed(AttentionNumbers, url)
    data = storage.read_bytes(_maps_url(url))
    if numbers.maps_sha256 != hashlib.sha256(data).hexdigest():
        raise UserError(f"{_maps_url(url)}: belongs to another analysis; analyze again")
    arrays = parse_npz(data, _maps_url(url))
    images, texts = (arrays.get(name, np.zeros(0)) for name in ("image", "text"))
    with_text = [number for number, layer in enumerate(numbers.layers) if layer.text]
    num_tokens = images.shape[-1:]
    is_whole = images.shape == (len(numbers.layers), *num_tokens, *num_tokens)
    is_whole &= texts.ndim == 3 and texts.shape[::2] == (len(with_text), *num_tokens)
    if not (is_whole and texts.size and np.isfinite(images).all() and np.isfinite(texts).all()):
        raise UserError(
            f"{_maps_url(url)}: its maps are not finite or not those of the layers; analyze again"
        )
    return AttentionSummary(
        **vars(numbers),
        image_maps=images.astype(np.float64),
        text_maps=dict(zip(with_text, texts.astype(np.float64), strict=True)),
    )


def _maps_url(url: str) -> str:
    return url.removesuffix(".json") + ".npz"


@contextmanager
def watch_attention(backbone: FusionTransformer, watch: Watch) -> Iterator[None]:
    """Call `watch` whenever a block of the fusion map computes attention.

    Blocks of separate_cross_attention call it twice: for image tokens, then for text alone.
    """
    layers = [
        (number, module)
        for number, block in enumerate(backbone.blocks)
        for module in block.modules()
        if isinstance(module, Attention | CrossAttention)
    ]
    plain = [layer.attend for _, layer in layers]
    for number, layer in layers:
        watch_layer = partial(watch, number, isinstance(layer, CrossAttention))
        layer.attend = partial(_watch_and_attend, watch_layer, layer.attend)
    try:
        yield
    finally:
        for (_, layer), attend in zip(layers, plain, strict=True):
            layer.attend = attend


def _watch_and_attend(
    watch: Callable[[Tensor, Tensor, Tensor | None], None],
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
) -> Tensor:
    watch(query, key, visible)
    return attend(query, key, value, visible)


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

    def __init__(self, config: FusionTransformerConfig, num_prompts: int, inside: Tensor) -> None:
        """Record the attention of the image tokens with the indices `inside` (P,)."""
        self._num_prompts = num_prompts
        self._queries = config.first_image_token + inside
        self._num_tokens = config.num_tokens
        self._num_text_tokens = config.num_text_tokens
        self._sums: dict[int, Tensor] = {}
        self._num_evaluations = 0

    def __call__(
        self, number: int, is_text_alone: bool, query: Tensor, key: Tensor, visible: Tensor | None
    ) -> None:
        """Add one attention; under guidance its first rows are the conditional ones."""
        query = query[: self._num_prompts, self._queries.to(query.device)]
        visible = None if visible is None else visible[: self._num_prompts]
        rows = attention_rows(query, key[: self._num_prompts], visible)
        if number not in self._sums:
            self._sums[number] = rows.new_zeros(*rows.shape[:2], self._num_tokens)
        first = self._num_tokens - self._num_text_tokens if is_text_alone else 0
        self._sums[number][:, :, first : first + rows.shape[2]] += rows
        self._num_evaluations += number == 0 and not is_text_alone

    def means(self) -> Iterator[Floats]:
        """Yield the means over NFE and heads (B, P, time + registers + L + M), block by block.

        Rows sum to 1; in blocks of separate_cross_attention the columns of text do so, too. Columns
        of padding are zero.
        """
        for rows in self._sums.values():
            yield rows.cpu().double().numpy() / self._num_evaluations


def attention_rows(
    query: Tensor, key: Tensor, visible: Tensor | None = None, max_logits: int = 2**23
) -> Tensor:
    """Return the mean attention over heads (B, Q, K) in float32; chunks of B bound the memory."""
    at_once = max(1, max_logits // (query.shape[1] * query.shape[2] * key.shape[1]))
    chunks = [slice(first, first + at_once) for first in range(0, len(query), at_once)]
    means = []
    for rows in chunks:
        hidden = None if visible is None else visible[rows]
        means.append(logits_of(query[rows], key[rows], hidden).softmax(dim=-1).mean(dim=1))
    return torch.cat(means)


@dataclass(frozen=True, kw_only=True)
class LayerMeans:
    """Numbers and maps of one block; `text_map` is zero for a block without text."""

    numbers: LayerNumbers
    image_map: Floats
    """(P, P)"""
    text_map: Floats
    """(M, P) for the M tokens of the longest prompt."""


class LayerSums:
    """Accumulates the attention of one block over prompts, and at most 14 numbers per prompt."""

    def __init__(self, config: FusionTransformerConfig, number: int, inside: Tensor) -> None:
        """Expect rows of the image tokens with the indices `inside` (P,)."""
        self._name = layer_names(config.fusion)[number]
        self._entry = config.blocks[number]
        first = config.first_image_token
        self._edges = [first, first + config.num_image_tokens]
        self._inside = inside.numpy()
        self._rows: Floats = np.zeros(1)
        self._num_prompts_with = np.zeros(config.num_text_tokens, np.int64)
        self._numbers: list[Floats] = []

    def add(self, rows: Floats, lengths: NDArray[np.int64]) -> None:
        """Add the rows (B, P, K) of further prompts with these numbers (B,) of text tokens.

        K are time, registers, image and text.
        """
        self._rows = self._rows + rows.sum(axis=0)
        self._num_prompts_with += (np.arange(len(self._num_prompts_with)) < lengths[:, None]).sum(
            axis=0
        )
        parts = np.split(rows, self._edges, axis=2)
        numbers = [part.sum(axis=2).mean(axis=1)[:, None] for part in parts]
        if self._entry in TEXT_KEYS:
            # A map and its transpose have the same singular values.
            values = np.linalg.svd(parts[2], compute_uv=False)
            numbers += [effective_rank(values)[:, None], values[:, :NUM_SINGULAR_VALUES]]
        self._numbers.append(np.concatenate(numbers, axis=1))

    def finish(self) -> LayerMeans:
        """Return the means over all prompts, at least two."""
        numbers = np.concatenate(self._numbers)
        count = len(numbers)
        errors = numbers.std(axis=0, ddof=1) / math.sqrt(count)
        _, image_rows, text_rows = np.split(self._rows, self._edges, axis=1)
        longest = np.count_nonzero(self._num_prompts_with)
        time, image, text, *spectrum = (
            PromptMean(value=float(value), standard_error=float(error))
            for value, error in zip(numbers.mean(axis=0), errors, strict=True)
        )
        layer = LayerNumbers(
            name=self._name,
            time_share=time,
            image_share=image,
            text_share=None if self._entry == "separate_cross_attention" else text,
            text=TextSpectrum(effective_rank=spectrum[0], singular_values=tuple(spectrum[1:]))
            if spectrum
            else None,
        )
        return LayerMeans(
            numbers=layer,
            image_map=image_rows[:, self._inside] / count,
            text_map=(text_rows[:, :longest] / self._num_prompts_with[:longest]).T,
        )
