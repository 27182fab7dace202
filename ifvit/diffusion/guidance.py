"""Classifier-free guidance (Ho and Salimans 2022), and where alignment methods take part in it.

The sampler and the diffusers pipeline call `GuidedPredictor` once per function evaluation.
Both halves of a guided evaluation run in one batch.

Shapes: B batch, M text tokens, D context width, C latent channels, S latent size. A condition is
what the backbone's `encode_condition` takes: contexts of captions or class numbers
(`ifvit.conditions`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ifvit.conditions import Condition, tokens_of, with_tokens
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.errors import UserError

Bias = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
"""Queries (B, Q, H, E), keys (B, J, H, E), visible => addend (B, H, Q, J) to the attention logits.

Visible (B, J) is false for padding among the keys, which attention hides in any case, and None
without padding.
"""


class EncodedCondition(Protocol):
    """A condition as the backbone encodes it, B rows; computed once per prompt."""

    def expand(self, num_rows: int) -> Self:
        """Repeat a single row `num_rows` times, without a copy."""

    def append(self, other: Self) -> Self:
        """Return these rows followed by those of `other`."""


class ConditionalBackbone(Protocol):
    """The part of a backbone that guidance and sampling use; this package imports no network."""

    @property
    def config(self) -> Any:
        """Configuration with `latent_channels` (C) and `latent_size` (S)."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""

    def encode_condition(self, condition: Condition) -> Any:
        """Encode the conditions of B rows as an `EncodedCondition`."""

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Any, *biases: Any) -> Any:
        """Predict noise, v or velocity from x_t (B, C, S, S) at timesteps (B,), 0 to 1000.

        An encoded condition may have k * B rows; row i belongs to latents i mod B, and the result
        has k * B rows, too. `biases` maps numbers of blocks to a `Bias`.
        """


@dataclass(frozen=True, kw_only=True)
class FunctionEvaluation:
    """The next evaluation of the backbone for one batch of prompts, as a method sees it."""

    index: int
    """Number of this evaluation, from 0. An image takes `SolverConfig.num_steps` of them."""
    x_t: Tensor
    """Noisy latents (B, C, S, S)."""
    timesteps: Tensor
    """(B,) from 0 to 1000."""
    context: Tensor
    """Text context (B, M, D) after the last change, with padding behind the tokens of a row."""
    predict_clean: Callable[[Tensor], Tensor]
    """Context (B, M, D) => the x_0 (B, C, S, S) that the guided prediction implies, scaled latents.

    Differentiable with respect to the context under `torch.enable_grad`; padding has no gradient.
    Raises UserError for such a context if the backbone has 16 bits, which round the direction of
    the gradient away.
    """


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a method changes before a function evaluation; the default changes nothing."""

    context: Tensor | None = None
    """(B, M, D): replaces the conditional context from this evaluation on."""
    biases: Mapping[int, Bias] = field(default_factory=dict)
    """Bias by number of the block, for this evaluation, and for the conditional half only."""


class AlignmentMethod(Protocol):
    """A training-free alignment method for one batch of prompts; it may keep state."""

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """Return the change to make; called once before each function evaluation."""


class GuidedPredictor:
    """uncond + w (cond - uncond) of the predictions for B conditions; a `Predictor` for `solve`.

    Outside the interval of `guidance`, and at w = 1, uncond is not evaluated. w means the same for
    every prediction, because each is linear in x_0 at a given x_t.
    """

    def __init__(
        self,
        backbone: ConditionalBackbone,
        schedule: NoiseSchedule,
        condition: Condition,
        null_condition: EncodedCondition,
        guidance: Guidance,
        methods: Sequence[AlignmentMethod] = (),
    ) -> None:
        """Take B conditions and an encoded null condition, "no prompt", of 1 or B rows.

        Methods do not see each other's changes: DATE looks ahead without biases.
        """
        self._backbone = backbone
        self._null = null_condition.expand(len(condition))
        self._guidance = guidance
        self._methods = methods
        self._schedule = schedule
        self._num_evaluations = 0
        self.set_condition(condition)

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, S, S) at timesteps (B,), all equal => prediction."""
        biases = self._ask_methods(x_t, timesteps)
        is_guided = self._guidance.applies_at(timesteps[0])
        condition = self._encoded
        if is_guided:
            # Both halves share x_t, so the backbone runs the blocks before the first text on B rows
            # and repeats the rows there (models/blocks.py).
            condition = self._both_conditions
            biases = {
                block: partial(_bias_conditional, len(x_t), bias) for block, bias in biases.items()
            }
        optional = (biases,) if biases else ()  # other backbones accept no biases
        dtype = self._backbone.dtype
        predicted: Tensor = self._backbone(x_t.to(dtype), timesteps, condition, *optional)
        predicted = predicted.float()
        return self._guide(*predicted.chunk(2)) if is_guided else predicted

    def set_condition(self, condition: Condition) -> None:
        """Replace the B conditions of the following evaluations."""
        self.condition = condition
        self._encoded = self._backbone.encode_condition(condition)
        self._both_conditions = self._encoded.append(self._null)

    def _ask_methods(self, x_t: Tensor, timesteps: Tensor) -> dict[int, Bias]:
        """Let the methods change the condition; return the biases of this evaluation."""
        evaluation = FunctionEvaluation(
            index=self._num_evaluations,
            x_t=x_t,
            timesteps=timesteps,
            context=tokens_of(self.condition),
            predict_clean=partial(self._predict_clean, x_t, timesteps),
        )
        self._num_evaluations += 1
        biases: dict[int, Bias] = {}
        for change in [method.before(evaluation) for method in self._methods]:
            if change.context is not None:
                self.set_condition(with_tokens(self.condition, change.context))
            biases |= change.biases
        return biases

    def _predict_clean(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if context.requires_grad and self._backbone.dtype != torch.float32:
            raise UserError(
                f"the backbone is {self._backbone.dtype}, which rounds away the direction of a "
                "method's gradient; use float32"
            )
        encoded = self._backbone.encode_condition(with_tokens(self.condition, context))
        predicted = self._predict(x_t, timesteps, encoded)
        if self._guidance.applies_at(timesteps[0]):
            with torch.no_grad():
                unconditional = self._predict(x_t, timesteps, self._null)
            predicted = self._guide(predicted, unconditional)
        return self._schedule.clean(x_t, predicted, timesteps)

    def _predict(self, x_t: Tensor, timesteps: Tensor, condition: EncodedCondition) -> Tensor:
        predicted: Tensor = self._backbone(x_t.to(self._backbone.dtype), timesteps, condition)
        return predicted.float()

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return unconditional + self._guidance.scale * (conditional - unconditional)


def _bias_conditional(
    num_rows: int, bias: Bias, query: Tensor, key: Tensor, visible: Tensor | None
) -> Tensor | None:
    """Evaluate `bias` on the first `num_rows` rows, which are the conditional half."""
    visible = None if visible is None else visible[:num_rows]
    return bias(query[:num_rows], key[:num_rows], visible)
