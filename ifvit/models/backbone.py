"""The interface of all backbones, which training and sampling use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ifvit.conditions import Condition, PaddedContext, is_visible, lengths_of, pad_tokens, tokens_of
from ifvit.errors import UserError
from ifvit.models.attention import Backend
from ifvit.models.config import BackboneConfig, restore_config
from ifvit.models.layers import KeysValues


@dataclass(frozen=True, kw_only=True)
class EncodedCondition:
    """A condition after the layers that need neither time nor latents; computed once per prompt."""

    tokens: Tensor
    """(B, M, D): text tokens after the text branch, or the class token."""
    keys_values: Mapping[int, KeysValues] = field(default_factory=dict)
    """Keys and values of the text by number of the block; blocks that are missing here compute
    theirs, because the text has changed before them."""
    pooled: Tensor | None = None
    """(B, D): pooled condition for the conditioning vector; None without modulation."""
    lengths: Tensor | None = None
    """(B,) number of tokens in front of the padding; None if there is no padding."""

    def visible_keys(self, num_others: int) -> Tensor | None:
        """(B, num_others + M) bool for keys of `num_others` visible tokens in front of the text.

        False for padding; None if there is no padding.
        """
        if self.lengths is None:
            return None
        return is_visible(num_others + self.lengths, num_others + self.tokens.shape[1])

    def expand(self, num_rows: int) -> "EncodedCondition":
        """Repeat a single row `num_rows` times, without a copy; `num_rows` rows stay unchanged."""
        return _map_tensors(lambda x: x.expand(num_rows, *x.shape[1:]), self)

    def append(self, other: "EncodedCondition") -> "EncodedCondition":
        """Return these rows followed by those of `other`; the shorter text is padded."""
        longest = max(self.tokens.shape[1], other.tokens.shape[1])
        pair = [self, other]
        if self.lengths is not None or other.lengths is not None:
            pair = [replace(one, lengths=one._num_tokens()) for one in pair]

        def join(*rows: Tensor) -> Tensor:
            # Tokens, keys and values have a dimension of tokens; pooled conditions and lengths not.
            return torch.cat([pad_tokens(x, longest) if x.ndim > 2 else x for x in rows])

        return _map_tensors(join, *pair)

    def _num_tokens(self) -> Tensor:
        """(B,) number of tokens in front of the padding."""
        return lengths_of(self.tokens) if self.lengths is None else self.lengths


def _map_tensors(function: Callable[..., Tensor], *encoded: EncodedCondition) -> EncodedCondition:
    """Apply `function` to the tensors of the same field and block."""
    first = encoded[0]
    pooled = [one.pooled for one in encoded if one.pooled is not None]
    lengths = [one.lengths for one in encoded if one.lengths is not None]
    return EncodedCondition(
        tokens=function(*(one.tokens for one in encoded)),
        keys_values={
            block: (
                function(*(one.keys_values[block][0] for one in encoded)),
                function(*(one.keys_values[block][1] for one in encoded)),
            )
            for block in first.keys_values
        },
        pooled=function(*pooled) if pooled else None,
        lengths=function(*lengths) if lengths else None,
    )


class Backbone(ModelMixin, ConfigMixin, ABC):  # type: ignore[misc]  # their config_name differs
    """Predicts noise, v or velocity from latents, a timestep, and a caption or a class."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_to_config(**asdict(config))  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **unused: Any) -> Self:  # type: ignore[override]
        """Build the network that a config.json describes; diffusers' from_pretrained calls this."""
        return cls(restore_config(config))

    @cached_property
    def config(self) -> BackboneConfig:  # type: ignore[override]
        """The configuration as a dataclass, in place of diffusers' dictionary."""
        return restore_config(self._internal_dict)  # type: ignore[has-type]

    @abstractmethod
    def encode_condition(self, condition: Condition) -> EncodedCondition:
        """Encode the contexts (B, M, context_width) of captions, or the numbers (B,) of classes.

        Padding has no effect. Raises UserError for contexts of another shape.
        """

    @abstractmethod
    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Condition | EncodedCondition
    ) -> Tensor:
        """Predict noise, v or velocity from latents (B, C, S, S) at timesteps (B,), 0 to 1000.

        `condition` may have k * B rows, row i for latents i mod B; the result then has k * B rows.
        Raises UserError for latents or contexts of another shape than the configured one.
        """

    @abstractmethod
    def set_attention(self, backend: Backend) -> None:
        """Choose the attention backend. Raises UserError if this machine does not have it."""

    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """Return the parts that are compiled, or recomputed in the backward pass, one by one."""

    def block_matrices(self) -> dict[str, Tensor]:
        """Weights of the linear layers within `parts` by name, except those that modulate."""
        within = {module for part in self.parts() for module in part.modules()}
        return {
            f"{name}.weight": module.weight
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear)
            and module in within
            and not name.endswith(("modulation.linear", "time_emb_proj"))
        }

    def _encode(self, latents: Tensor, condition: Condition | EncodedCondition) -> EncodedCondition:
        """Check the latents, and encode the condition unless it is encoded already."""
        size = self.config.latent_size
        check_shape("latents", latents, (self.config.latent_channels, size, size))
        if not isinstance(condition, EncodedCondition):
            condition = self.encode_condition(condition)
        if len(condition.tokens) % len(latents):
            raise UserError(
                f"{len(condition.tokens)} conditions for {len(latents)} latents; "
                "give a multiple of the number of latents"
            )
        return condition


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise UserError unless the rows of `tensor` have the shape that the backbone expects."""
    if tuple(tensor.shape[1:]) != expected:
        raise UserError(
            f"{name} of shape {tuple(tensor.shape[1:])} do not fit this backbone, "
            f"which was built for {expected}"
        )


def check_context(condition: Condition, expected: tuple[int, int]) -> None:
    """Raise UserError unless contexts have the shape (M, D) that the backbone expects.

    Contexts with padding may have fewer tokens.
    """
    tokens, (length, width) = tokens_of(condition), expected
    if isinstance(condition, PaddedContext):
        length = min(length, tokens.shape[1])
    check_shape("context", tokens, (length, width))
