"""Where shards of object stores are kept on this machine."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Local disk for shards that are read from an object store; unused for a local folder."""

    folder: str | None = None
    """Shared by all processes of this machine; unset: ifvit-cache-UID in $TMPDIR or /tmp."""
    gigabytes: float = 100.0
    """Least recently used shards are removed beyond this; it must hold two shuffle windows."""

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise ValueError("cache.gigabytes must be positive")
