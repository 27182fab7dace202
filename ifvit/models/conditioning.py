"""Conditions of the samples of a dataset: class numbers, or contexts of captions.

Shards store contexts, or a text encoder computes them from the captions in the shards. Training,
the held-out loss, evaluation and analysis read conditions here. Shapes: B samples, M context
tokens, D context width.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifvit.arrays import Array
from ifvit.conditions import (
    Condition,
    PaddedContext,
    concatenate,
    pad_tokens,
    select_rows,
    tokens_of,
    with_tokens,
)
from ifvit.errors import UserError
from ifvit.models.config import NullContext
from ifvit.models.text_encoders import TextEncoder
from ifvit.records import shorten
from ifvit.shards.format import TextEncoderIdentity
from ifvit.shards.reader import ShardReader

LENGTH_STEP = 16
"""Contexts of a batch are padded to a multiple of this length, for which kernels are fast."""


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], *, pinned: bool = False) -> Tensor:
    """Allocate a tensor of a type of NumPy, in page-locked memory if `pinned`."""
    return torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=pinned)


class DatasetConditions:
    """Reads the conditions of samples; threads may share it.

    With a text encoder, contexts are computed from the captions on the encoder's device and rounded
    to the type of the dataset, as stored ones are. If `null_context` is zeros, the context of no
    caption is zeros, as many as the empty caption has tokens.
    """

    def __init__(
        self,
        reader: ShardReader,
        null_context: NullContext = "empty_caption",
        encoder: TextEncoder | None = None,
    ) -> None:
        self.reader = reader
        self._null_is_zero = null_context == "zeros"
        self._encoder, self._lock = encoder, threading.Lock()
        self._null = self._encode([""]) if encoder else None

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D): largest number of tokens of a context, and their width."""
        return self._encoder.context_shape if self._encoder else self.reader.text.context_shape

    @property
    def text_encoder(self) -> TextEncoderIdentity | None:
        """What makes contexts; None for classes."""
        if self._encoder:
            return self._encoder.identity
        stored = self.reader.manifest.text
        return stored.encoder if stored else None

    @property
    def null(self) -> Condition:
        """The condition of no caption or class, one row."""
        return self.read([0], [-1])

    def read(
        self,
        samples: Array | Sequence[int],
        captions: Array | Sequence[int],
        *,
        full_length: bool = False,
        pinned: bool = False,
    ) -> Condition:
        """Conditions of one caption of each of B samples; number -1 is no caption or class.

        Contexts of different lengths are padded to a multiple of 16, at most M, or to M if
        `full_length`. What shards store is on the CPU, in page-locked memory if `pinned`. Raises
        ShardError for damaged bytes, and UserError for a context that is not finite.
        """
        samples, captions = np.asarray(samples), np.asarray(captions)
        if self.reader.manifest.classes:
            labels = empty((len(samples),), np.dtype(np.int64), pinned=pinned)
            self.reader.read_labels(samples, captions < 0, labels.numpy())
            return labels
        if self._encoder:
            condition = self._compute(samples, captions, full_length)
        else:
            condition = self._read_stored(samples, captions, full_length, pinned)
        if self._null_is_zero:
            tokens_of(condition)[torch.from_numpy(captions < 0)] = 0
        return condition

    def _read_stored(
        self, samples: Array, captions: Array, full_length: bool, pinned: bool
    ) -> Condition:
        reader, keeps_padding = self.reader, self.reader.text.encoder.settings.keeps_padding
        lengths = None if keeps_padding else reader.context_lengths(samples, captions)
        length, width = self.context_shape
        if lengths is not None and not full_length:
            length = self._padded(int(lengths.max()))
        tokens = empty((len(samples), length, width), reader.dtype, pinned=pinned)
        reader.read_contexts(samples, captions, tokens.numpy())
        if lengths is None:
            return tokens
        given = torch.from_numpy(lengths)
        return PaddedContext(tokens=tokens, lengths=given.pin_memory() if pinned else given)

    def _compute(self, samples: Array, captions: Array, full_length: bool) -> Condition:
        """Contexts by the text encoder; equal captions are encoded once."""
        chosen = zip(samples.tolist(), captions.tolist(), strict=True)
        texts = ["" if c < 0 else self.reader.metadata(n).captions[c] for n, c in chosen]
        new = [text for text in dict.fromkeys(texts) if text]
        assert self._null is not None
        # One thread at a time: a tokenizer refuses two, and one batch after another needs less
        # memory.
        with self._lock:
            contexts = concatenate([self._null, *([self._encode(new)] if new else [])])
        row_of = {text: row for row, text in enumerate(["", *new])}
        rows = torch.tensor([row_of[text] for text in texts], device=tokens_of(contexts).device)
        condition = select_rows(contexts, rows)
        if isinstance(condition, Tensor):
            return condition
        longest = condition.tokens.shape[1]
        length = self.context_shape[0] if full_length else self._padded(longest)
        return with_tokens(condition, pad_tokens(condition.tokens, length))

    def _encode(self, captions: list[str]) -> Condition:
        """Contexts of captions in the type of the dataset."""
        assert self._encoder is not None
        contexts = self._encoder.encode(captions)
        dtype = getattr(torch, self.reader.dtype.name)
        tokens = tokens_of(contexts).to(dtype)
        is_finite = tokens.isfinite().flatten(1).all(dim=1)
        if not is_finite.all():
            caption = captions[int(is_finite.int().argmin())]
            raise UserError(
                f"text encoder: the context of caption {shorten(caption)} has values that "
                f"{self.reader.dtype} cannot hold; encode the shards with dtype: float32"
            )
        return with_tokens(contexts, tokens)

    def _padded(self, length: int) -> int:
        """Round a length up to a multiple of 16, at most M."""
        return min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.context_shape[0])
