"""Dynamic loss scaling, which keeps small fp16 gradients from rounding to zero."""

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
"""Finite updates in a row after which the scale doubles."""


@dataclass
class LossScale:
    """The loss is multiplied by `value` before the backward pass (Micikevicius et al. 2018, 3.2).

    A gradient that overflows halves the scale, down to 1.
    """

    value: float = 2.0**16
    finite_updates: int = 0
    """Finite updates since the scale last changed."""
    overflows: int = 0
    """Updates lost to a scale that was too large."""

    def adapt(self, finite: bool) -> bool:
        """Adapt to the last gradient => whether a smaller scale can mend it or it needs none."""
        if finite:
            self.finite_updates += 1
            if self.finite_updates == GROWTH_INTERVAL:
                self.value, self.finite_updates = 2 * self.value, 0
            return True
        if self.value == 1.0:
            return False
        self.value, self.finite_updates = self.value / 2, 0
        self.overflows += 1
        return True
