"""Attention of image tokens while sampling: recorded, summed by layer, written to files."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import RunningStatistics
from ifvit.models.attention import Attend, logits_of
from ifvit.models.fusion_transformer import FusionUViT

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
        protocol = AttentionProtocol(**stored.pop("protocol"))
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
        text=None if text_map is None else _read_text(stored["text"], text_map),
    )


def _read_text(stored: dict[str, Any], text_map: Floats) -> TextAttention:
    return TextAttention(
        map=text_map,
        singular_values=tuple(stored["singular_values"]),
        effective_rank=stored["effective_rank"],
        prompt_singular_values=tuple(PromptMean(**e) for e in stored["prompt_singular_values"]),
        prompt_effective_rank=PromptMean(**stored["prompt_effective_rank"]),
    )


Watch = Callable[[int, Tensor, Tensor], None]
"""Number of the block in order of use, (B, Q, H, E) queries, (B, K, H, E) keys."""

_MAX_LOGITS = 2**23


@contextmanager
def watch_attention(backbone: FusionUViT, watch: Watch) -> Iterator[None]:
    """Show `watch` the queries and keys of every block outside the text branch, call by call."""
    layers = [block.attn for block in (*backbone.in_blocks, backbone.mid_block)]
    layers += [block.attn for block in backbone.out_blocks]
    plain = [layer.attend for layer in layers]
    for number, layer in enumerate(layers):
        layer.attend = _watched(layer.attend, watch, number)
    try:
        yield
    finally:
        for layer, attend in zip(layers, plain, strict=True):
            layer.attend = attend


def _watched(attend: Attend, watch: Watch, number: int) -> Attend:
    def attend_and_show(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        watch(number, query, key)
        return attend(query, key, value)

    return attend_and_show


def inner_tokens(side: int, trim: int) -> Tensor:
    """Numbers (P,) of the image tokens that are left of side x side without `trim` at each edge.

    Raises UserError when nothing is left.
    """
    if 2 * trim >= side:
        raise UserError(
            f"trim {trim} leaves nothing of {side} x {side} patches; lower it below {side / 2:g}"
        )
    inside = slice(trim, side - trim)
    return torch.arange(side * side).view(side, side)[inside, inside].flatten()


class PromptRows:
    """Attention rows of B prompts, over the evaluations of the backbone; a `Watch`."""

    def __init__(self, num_prompts: int, inside: Tensor) -> None:
        """`inside` (P,) are the image tokens that count as queries."""
        self._num_prompts = num_prompts
        self._queries = 1 + inside
        self._sums: list[Tensor] = []
        self._num_calls = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Add one evaluation; of more rows than prompts, the first are the conditional ones."""
        query = query[: self._num_prompts, self._queries.to(query.device)]
        rows = attention_rows(query, key[: self._num_prompts])
        if layer == len(self._sums):
            self._sums.append(rows)
        else:
            self._sums[layer] += rows
        self._num_calls += layer == 0

    def means(self) -> Iterator[Floats]:
        """Layer by layer (B, P, K): means over evaluations and heads; rows sum to 1."""
        for rows in self._sums:
            yield rows.cpu().double().numpy() / self._num_calls


def attention_rows(query: Tensor, key: Tensor) -> Tensor:
    """Softmax (B, Q, K) in float32, mean over heads; as many prompts at once as are small."""
    at_once = max(1, _MAX_LOGITS // (query.shape[1] * query.shape[2] * key.shape[1]))
    chunks = zip(torch.split(query, at_once), torch.split(key, at_once), strict=True)
    return torch.cat([logits_of(q, k).softmax(dim=-1).mean(dim=1) for q, k in chunks])


class LayerSums:
    """One layer's maps and numbers over any number of prompts; holds no prompt's own."""

    def __init__(self, name: str, num_image_tokens: int, inside: Tensor) -> None:
        """`inside` (P,) are the image tokens that the rows belong to."""
        self._name = name
        self._num_image_tokens = num_image_tokens
        self._inside = inside.numpy()
        self._image_map: Floats = np.zeros(1)
        self._text_map: Floats = np.zeros(1)
        self._numbers = RunningStatistics()

    def add(self, rows: Floats) -> None:
        """Rows (B, P, K) of further prompts."""
        parts = np.split(rows, [1, 1 + self._num_image_tokens], axis=2)
        self._image_map = self._image_map + parts[1][:, :, self._inside].sum(axis=0)
        self._text_map = self._text_map + parts[2].sum(axis=0).T
        shares = np.stack([part.sum(axis=2).mean(axis=1) for part in parts], axis=1)
        # Singular values do not care which side is which.
        values = np.linalg.svd(parts[2], compute_uv=False)
        largest = values[:, :NUM_SINGULAR_VALUES]
        ranks = effective_rank(values)[:, None] if values.shape[1] else largest
        self._numbers.add(np.concatenate([shares, ranks, largest], axis=1))

    def finish(self) -> LayerAttention:
        """The means over all prompts, at least two."""
        statistics = self._numbers.finish()
        count = statistics.num_samples
        errors = np.sqrt(statistics.covariance.diagonal() / count)
        time, image, text, *of_maps = (
            PromptMean(value=float(value), standard_error=float(error))
            for value, error in zip(statistics.mean, errors, strict=True)
        )
        return LayerAttention(
            name=self._name,
            image_map=self._image_map / count,
            time_share=time,
            image_share=image,
            text_share=text,
            text=_text(self._text_map / count, of_maps) if of_maps else None,
        )


def layer_names(depth: int) -> list[str]:
    """Of the blocks in order of use, as the backbone's parameters have them."""
    half = range(depth // 2)
    return [*(f"in {n}" for n in half), "mid", *(f"out {n}" for n in half)]


def _text(text_map: Floats, of_maps: list[PromptMean]) -> TextAttention:
    values = np.linalg.svd(text_map, compute_uv=False)
    return TextAttention(
        map=text_map,
        singular_values=tuple(map(float, values[:NUM_SINGULAR_VALUES])),
        effective_rank=float(effective_rank(values)),
        prompt_singular_values=tuple(of_maps[1:]),
        prompt_effective_rank=of_maps[0],
    )
