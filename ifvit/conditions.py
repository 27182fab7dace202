"""Conditions of a batch: class numbers, or contexts of captions with equal or different lengths.

Shapes: B batch, M context tokens, D context width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedContext:
    """Contexts of captions of different lengths, padded on the right; padding has no effect."""

    tokens: Tensor
    """(B, M, D); what the padding holds is finite."""
    lengths: Tensor
    """(B,) int64, from 1 to M: number of tokens of each caption."""

    def __len__(self) -> int:
        return len(self.tokens)


Condition = Tensor | PaddedContext
"""Class numbers (B,), contexts (B, M, D) whose tokens all count, or contexts with padding."""


def map_tensors(function: Callable[[Tensor], Tensor], condition: Condition) -> Condition:
    """Apply `function` to each tensor of a condition."""
    if isinstance(condition, Tensor):
        return function(condition)
    return PaddedContext(tokens=function(condition.tokens), lengths=function(condition.lengths))


def move(condition: Condition, device: torch.device | str) -> Condition:
    """Copy a condition to a device."""
    return map_tensors(lambda tensor: tensor.to(device), condition)


def select_rows(condition: Condition, rows: Tensor | slice) -> Condition:
    """Rows of a condition by their numbers; the padding of contexts stays."""
    return map_tensors(lambda tensor: tensor[rows], condition)


def tokens_of(condition: Condition) -> Tensor:
    """Class numbers (B,), or the tokens (B, M, D) of contexts with their padding."""
    return condition if isinstance(condition, Tensor) else condition.tokens


def padded_lengths(condition: Condition) -> Tensor | None:
    """(B,) int64 number of tokens of each context with padding; None for other conditions."""
    return condition.lengths if isinstance(condition, PaddedContext) else None


def with_tokens(condition: Condition, tokens: Tensor) -> Condition:
    """Return the condition with other tokens (B, M, D) of the same lengths."""
    if isinstance(condition, Tensor):
        return tokens
    return PaddedContext(tokens=tokens, lengths=condition.lengths)


def pad_tokens(tokens: Tensor, length: int) -> Tensor:
    """Pad tokens (B, M, ...) with zeros to (B, length, ...)."""
    return functional.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, length - tokens.shape[1]))


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Rows of all conditions in order; contexts are padded to the longest one."""
    if all(isinstance(condition, Tensor) for condition in conditions):
        return torch.cat([tokens_of(condition) for condition in conditions])
    longest = max(tokens_of(condition).shape[1] for condition in conditions)
    return PaddedContext(
        tokens=torch.cat([pad_tokens(tokens_of(one), longest) for one in conditions]),
        lengths=torch.cat([lengths_of(one) for one in conditions]),
    )


def rows_of(condition: Condition) -> list[Tensor]:
    """(M, D) tokens of each context, without padding."""
    if isinstance(condition, Tensor):
        return list(condition)
    pairs = zip(condition.tokens, condition.lengths.tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs]


def lengths_of(condition: Condition) -> Tensor:
    """(B,) int64 number of tokens of each context; M for contexts whose tokens all count."""
    if isinstance(condition, PaddedContext):
        return condition.lengths
    return torch.full(condition.shape[:1], condition.shape[1], device=condition.device)


def is_visible(lengths: Tensor, num_tokens: int) -> Tensor:
    """(B,) lengths => (B, num_tokens) bool, true for the tokens in front of the padding."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]
