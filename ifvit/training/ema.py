"""Averaged weights: an exponential moving average of the parameters, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Shadow = decay x shadow + (1 - decay) x parameter, once a step, starting as a copy.

    fp32 throughout: at decay 0.9999 a bf16 average would round every update away.
    """

    def __init__(self, backbone: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(backbone.named_parameters())
        self._shadow = {
            name: parameter.detach().float().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters, all tensors in one pass."""
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), parameters, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return self._shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The backbone computes with the averaged weights inside, its own again after."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._shadow[name] = self._shadow[name], parameter.data
