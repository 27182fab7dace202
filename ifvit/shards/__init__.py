"""Datasets of shards, and the settings of the disk cache for those of an object store."""

from ifvit.records import PositiveFloat, record


@record
class CacheConfig:
    """Disk cache for shards that are read from an object store; a local folder needs none."""

    folder: str | None = None
    """Folder that all processes of this machine share; default: ifvit-cache-UID in $TMPDIR."""
    gigabytes: PositiveFloat = 100.0
    """Size of the cache, at least two shuffle windows; the least recently used shards go first."""
