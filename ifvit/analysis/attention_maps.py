"""Recording what image tokens attend to while the ordinary sampler draws.

Each block's own attention function is asked to show its queries and keys and computes the heads
as always, so images do not change by a bit; the softmax is then repeated for the image tokens.
Tokens stand as time, image, text, and no text in image blocks.

Shapes: B prompts, L image tokens, P of them inside the trimmed border, M text tokens, Q queries,
K keys (1 + L or 1 + L + M), H heads, E channels per head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ifvit.analysis.attention import (
    NUM_SINGULAR_VALUES,
    Floats,
    LayerAttention,
    PromptMean,
    TextAttention,
    effective_rank,
)
from ifvit.errors import UserError
from ifvit.evaluation.frechet import RunningStatistics
from ifvit.models.attention import Attend, logits_of
from ifvit.models.uvit import FusionUViT

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
