"""Backbones, frozen encoders and their weights; importing this package loads no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifvit.models.published_weights import from_published_state_dict

__all__ = ["from_published_state_dict"]


def __getattr__(name: str) -> Any:
    """Import `from_published_state_dict` on first use, because its module needs torch."""
    if name == "from_published_state_dict":
        from ifvit.models.published_weights import from_published_state_dict

        return from_published_state_dict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
