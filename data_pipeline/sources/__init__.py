"""Sources of captioned or labelled images; the recipe's `source` chooses one.

`base` defines the base class, and each other module implements it for one kind of image set.
"""

from collections.abc import Callable
from importlib import import_module

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import Source
from data_pipeline.sources.caption_files import CaptionTable, CocoCaptions
from data_pipeline.sources.folders import CaptionedFolder, ClassFolders
from data_pipeline.sources.parquet_images import ParquetImages
from data_pipeline.sources.tars import WebDatasetTars
from ifvit.errors import UserError

SOURCES: dict[str, Callable[[EncodeConfig], Source]] = {
    "coco": CocoCaptions,
    "folder": ClassFolders,
    "webdataset": WebDatasetTars,
    "table": CaptionTable,
    "parquet": ParquetImages,
    "captioned_folder": CaptionedFolder,
}
USERS = {
    "captions": ("coco", "table"),
    "caption_key": ("webdataset", "table", "parquet", "captioned_folder"),
}
"""Built-in sources that use a field of the recipe."""


def open_source(config: EncodeConfig) -> Source:
    """Open the image set of a recipe.

    Raises UserError when the source is neither built in nor a subclass of Source that is importable
    as `module:Class` and allowed by the flag --allow_plugins, and for a field that it does not use.
    """
    if config.source in SOURCES:
        _refuse_unused(config, "captions")
        _refuse_unused(config, "caption_key")
        source = SOURCES[config.source](config)
        source.caption_sources = config.caption_sources
        return source
    if ":" not in config.source:
        known = f"{', '.join(SOURCES)}, or package.module:Class"
        raise UserError(f"source: {config.source}; expected one of {known}")
    if not config.allow_plugins:
        raise UserError(
            f"source: {config.source} is code that would run here; if you trust it, allow it with "
            "the flag --allow_plugins"
        )
    _refuse_unused(config, "caption_key")
    return _find_class(config.source)(config.images, config.captions)  # type: ignore[call-arg]


def _refuse_unused(config: EncodeConfig, field: str) -> None:
    value = getattr(config, field)
    if value is not None and config.source not in USERS[field]:
        raise UserError(
            f"{field}: {value} is set, but source {config.source} has no use for it; it is for "
            f"{', '.join(USERS[field])}"
        )


def _find_class(name: str) -> type[Source]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"source: {name}: {error}; is its folder in PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise UserError(f"source: {name}: expected a subclass of data_pipeline.sources.base.Source")
    return found
