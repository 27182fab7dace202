"""Checks that all images of a unit pass before they are encoded, whatever their source.

Keys become safe and unique, texts valid Unicode, captions bounded. What changed is remarked.
"""

from collections import Counter
from dataclasses import replace

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import MAX_CAPTION, CaptionedImage, Unit

CUT = f"captions of more than {MAX_CAPTION:,} characters were cut"
REPLACED = "captions had characters that are no Unicode; these were replaced"
NO_CHARACTER = "\ufffd"
"""What sources and this module write in place of bytes or escapes that are no Unicode."""
BLANK = "blank captions beside others were left out"
MAX_CAPTIONS = 1000
"""Largest number of captions of an image; all are encoded in one batch."""
_MAX_KEY_BYTES = 150


def open_unit(unit: Unit, config: EncodeConfig) -> list[CaptionedImage]:
    """Open a unit and prepare its images."""
    uses: Counter[str] = Counter()
    keys: set[str] = set()
    images = []
    for image in unit.open():
        key = safe_key(image.key)
        while key in keys:
            uses[image.key] += 1
            key = f"{safe_key(image.key)}-{uses[image.key]}"
        keys.add(key)
        images.append(_prepare(image, key, config))
    return images


def safe_key(wish: str) -> str:
    """Replace what WebDataset or a file system would misread in a key, and shorten it."""
    safe = "".join(char if char.isprintable() and char not in "./\\:" else "_" for char in wish)
    return safe.encode()[:_MAX_KEY_BYTES].decode(errors="ignore").strip() or "_"


def _prepare(image: CaptionedImage, key: str, config: EncodeConfig) -> CaptionedImage:
    valid = [_valid(caption) for caption in image.captions]
    captions = [caption[:MAX_CAPTION] for caption in valid]
    kept = [caption for caption in captions if caption.strip()]
    problem = image.problem
    if captions and not kept:
        kept = captions[:1]
        if not config.allow_blank_captions:
            problem = problem or "all its captions are blank; --allow_blank_captions allows this"
    if len(kept) > MAX_CAPTIONS:
        problem = f"it has {len(kept):,} captions, more than {MAX_CAPTIONS:,}"
    remarks = {
        REPLACED: any(NO_CHARACTER in caption for caption in valid),
        CUT: captions != valid,
        BLANK: len(kept) < len(captions),
    }
    return replace(
        image,
        key=key,
        image_id=image.image_id if isinstance(image.image_id, int) else _valid(image.image_id),
        name=_valid(image.name),
        captions=tuple(kept),
        problem=problem,
        remarks=(*image.remarks, *(remark for remark, applies in remarks.items() if applies)),
    )


def _valid(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
