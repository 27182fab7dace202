"""Sources of captioned or labelled images; the recipe's `source` chooses one.

`base` defines the base class, and each other module implements it for one kind of image set.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import ReadLimits, Source
from data_pipeline.sources.captioned_folder import CaptionedFolder
from data_pipeline.sources.class_folders import ClassFolders
from data_pipeline.sources.coco import CocoCaptions
from data_pipeline.sources.parquet_images import ParquetImages
from data_pipeline.sources.table import CaptionTable
from data_pipeline.sources.tars import WebDatasetTars
from ifvit.errors import UserError
from ifvit.records import shorten

BYTES_PER_PIXEL = 4
NAMING_SOURCES = ("webdataset", "table", "parquet", "captioned_folder")
"""Sources for which `caption_key` names columns, suffixes or keys."""


def open_source(config: EncodeConfig) -> Source:
    """Open the image set of a recipe.

    Raises UserError when the source is neither built in nor a subclass of Source that is importable
    as `module:Class` and allowed by the flag --allow_plugins.
    """
    limits = ReadLimits(
        max_bytes=int(BYTES_PER_PIXEL * config.max_megapixels * 1_000_000),
        allow_links=config.allow_links,
        caption_names=_split(config.caption_key),
    )
    sources: dict[str, Callable[[str, str | None], Source]] = {
        "coco": partial(CocoCaptions, limits=limits),
        "folder": partial(ClassFolders, limits=limits),
        "webdataset": partial(WebDatasetTars, limits=limits, keys=config.tar_keys),
        "table": partial(CaptionTable, limits=limits),
        "parquet": partial(ParquetImages, limits=limits),
        "captioned_folder": partial(CaptionedFolder, limits=limits),
    }
    if config.caption_key and config.source not in NAMING_SOURCES:
        raise UserError(
            f"caption_key: {config.caption_key} is set, but source {config.source} has no use for "
            f"it; it is for {', '.join(NAMING_SOURCES)}"
        )
    if config.source in sources:
        return sources[config.source](config.images, config.captions)
    if ":" not in config.source:
        known = f"{', '.join(sources)}, or package.module:Class"
        raise UserError(f"source: {config.source}; expected one of {known}")
    if not config.allow_plugins:
        raise UserError(
            f"source: {config.source} is code that would run here; if you trust it, allow it with "
            "the flag --allow_plugins"
        )
    return _find_class(config.source)(config.images, config.captions)  # type: ignore[call-arg]


def _split(caption_key: str | None) -> tuple[str, ...]:
    """`" .cap, alt"` => `("cap", "alt")`."""
    if caption_key is None:
        return ()
    names = tuple(name.strip().lstrip(".") for name in caption_key.split(","))
    if not all(names):
        raise UserError(f"caption_key: {shorten(caption_key)!r} has an empty name; give names")
    return names


def _find_class(name: str) -> type[Source]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"source: {name}: {error}; is its folder in PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise UserError(f"source: {name}: expected a subclass of data_pipeline.sources.base.Source")
    return found
