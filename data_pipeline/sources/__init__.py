"""Sources of captioned or labelled images; the recipe's `source` chooses one.

`base` defines the protocol, and each other module implements it for one kind of image set.
"""

from collections.abc import Callable
from importlib import import_module

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import Source
from data_pipeline.sources.class_folders import ClassFolders
from data_pipeline.sources.coco import CocoCaptions
from data_pipeline.sources.table import CaptionTable
from data_pipeline.sources.tars import WebDatasetTars
from ifvit.errors import UserError

SOURCES: dict[str, Callable[[str, str | None], Source]] = {
    "coco": CocoCaptions,
    "folder": ClassFolders,
    "webdataset": WebDatasetTars,
    "table": CaptionTable,
}


def open_source(config: EncodeConfig) -> Source:
    """Open the image set of a recipe.

    Raises UserError when the source is neither built in nor importable as `module:Class`.
    """
    return _find_class(config.source)(config.images, config.captions)


def _find_class(name: str) -> Callable[[str, str | None], Source]:
    if name in SOURCES:
        return SOURCES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(SOURCES)
        raise UserError(f"source: {name}; expected one of {known}, or package.module:Class")
    try:
        found: Callable[[str, str | None], Source] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"source: {name}: {error}; is its folder in PYTHONPATH?") from None
    return found
