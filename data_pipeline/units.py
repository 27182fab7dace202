"""Units as the encode job opens them: prepared images, their identity, and what has changed.

All images are prepared, whatever their source: keys become safe and unique, texts valid Unicode,
captions bounded. What changed is remarked. The identity of a unit in its completion marker decides
whether its shard is up to date.
"""

import errno
import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from tqdm import tqdm

from data_pipeline.completion import CompletionMarker, Failure, UnitIdentity
from data_pipeline.config import SIZE_FLAGS, EncodeConfig
from data_pipeline.sources.base import MAX_CAPTION, CaptionedImage, Unit
from ifvit import connections, storage
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.images import DecodedImage, ImageSizeError, read_square
from ifvit.records import shorten

_NO_FAULT_OF_THE_UNIT = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
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


def read_or_fail(image: CaptionedImage, config: EncodeConfig) -> DecodedImage | Failure:
    """Read an image as a square, or return the reason why it is unreadable.

    Raises StoreError when the object store fails, which is not the fault of the image.
    """
    reason = image.problem
    try:
        if not reason:
            found = read_square(
                image.read(), config.image_size, config.image_rules, config.max_megapixels
            )
            reason = config.size_limits.refuse(found.width, found.height)
            if not reason:
                return found
    except StoreError:
        raise
    except (ImageSizeError, storage.TooLargeError) as error:
        reason = f"{_reason(error)}; --max_megapixels allows more"
    except Exception as error:  # sources of users raise all kinds of errors
        reason = _reason(error)
    return Failure(
        image_id=image.image_id,
        file=image.name,
        reason=shorten(reason, 200),
        num_images=image.num_images if image.problem else 1,
    )


def _reason(error: Exception) -> str:
    """Describe an error without folders or memory addresses, so that markers are reproducible."""
    text = str(error) or type(error).__name__
    return text.rpartition(": ")[2] if isinstance(error, UserError) else text


def safe_key(wish: str) -> str:
    """Replace what WebDataset or a file system would misread in a key, and shorten it."""
    safe = "".join(char if char.isprintable() and char not in "./\\:" else "_" for char in wish)
    return safe.encode()[:_MAX_KEY_BYTES].decode(errors="ignore").strip() or "_"


def _prepare(image: CaptionedImage, key: str, config: EncodeConfig) -> CaptionedImage:
    valid = [_valid(caption) for caption in image.captions]
    captions = [caption[:MAX_CAPTION] for caption in valid]
    kept = [number for number, caption in enumerate(captions) if caption.strip()]
    problem = image.problem
    if captions and not kept:
        kept = [0]
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
        captions=tuple(captions[number] for number in kept),
        sources=tuple(image.sources[number] for number in kept) if image.sources else (),
        problem=problem,
        remarks=(*image.remarks, *(remark for remark, applies in remarks.items() if applies)),
    )


def _valid(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class FileStates:
    """Sizes and modification times, or ETags, of input files.

    Each folder of a store is listed once. If a file changes after that, its stored state is old, so
    that the next run compares the contents.
    """

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, storage.FileState | None]] = {}
        self._lock = threading.Lock()

    def find(self, url: str) -> str:
        """State of a file; "" when it is absent or may not be read."""
        if not connections.is_remote(url):
            try:
                found = Path(url).stat()
            except (OSError, ValueError):
                return ""
            return f"{found.st_size} {found.st_mtime_ns}" if os.access(url, os.R_OK) else ""
        folder, _, name = url.rpartition("/")
        with self._lock:
            if folder not in self._listed:
                self._listed[folder] = storage.list_states(folder)
        state = self._listed[folder].get(name)
        return f"{state.num_bytes} {state.version}" if state else ""

    def sha256(self, urls: Iterable[str]) -> str:
        """Hash of the states of some files, which does not depend on their names."""
        return _hash([self.find(url) for url in urls])


@dataclass(frozen=True, kw_only=True)
class OpenUnit:
    """The images of a unit, or the problem why it could not be opened.

    `digests` are the hashes of the images that were read so far, by key.
    """

    name: str
    files_sha256: str
    images: Sequence[CaptionedImage] = ()
    problem: Failure | None = None
    digests: dict[str, str] = field(default_factory=dict)

    @cached_property
    def repeated(self) -> frozenset[str]:
        """The captions that occur more than once."""
        counts = Counter(caption for image in self.images for caption in image.captions)
        return frozenset(caption for caption, count in counts.items() if count > 1)

    @cached_property
    def texts_sha256(self) -> str:
        """Hash of everything that is known of the images before they are read."""
        rows = [[i.key, i.image_id, i.captions, i.sources, i.label, i.problem] for i in self.images]
        return _hash([rows, self.problem.reason if self.problem else None])

    def identity(self) -> UnitIdentity:
        """Identity of the unit, once all its images were read."""
        return UnitIdentity(
            files_sha256=self.files_sha256,
            images_sha256=_hash([[i.key, self.digests.get(i.key)] for i in self.images]),
            texts_sha256=self.texts_sha256,
        )


def open_with_identity(unit: Unit, config: EncodeConfig, states: FileStates) -> OpenUnit:
    """Open a unit. One that cannot be opened has a problem; other units are not concerned.

    Raises StoreError when the object store fails, and OSError when this machine lacks space.
    """
    files_sha256 = states.sha256(unit.files)  # before the files are read
    opened = OpenUnit(name=unit.name, files_sha256=files_sha256)
    try:
        images = open_unit(unit, config)
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # sources of users raise all kinds of errors
        if isinstance(error, OSError) and error.errno in _NO_FAULT_OF_THE_UNIT:
            raise
        return replace(opened, problem=_describe(unit, error))
    hashing = [
        replace(image, read=partial(_read_hashed, image, opened.digests)) for image in images
    ]
    return replace(opened, images=hashing)


def _describe(unit: Unit, error: Exception) -> Failure:
    file = unit.files[0] if len(unit.files) == 1 else unit.name
    reason = shorten(str(error).removeprefix(f"{file}: ") or type(error).__name__, 200)
    num_images = unit.count_images()
    count = f"all its {num_images:,} images are missing" if num_images else "counts as one"
    return Failure(
        image_id=unit.name,
        file=file.rpartition("/")[2],
        reason=f"{reason}; {count}",
        num_images=num_images or 1,
    )


def _read_hashed(image: CaptionedImage, digests: dict[str, str]) -> bytes:
    data = image.read()
    digests[image.key] = hashlib.sha256(data).hexdigest()
    return data


def identify(
    unit: Unit, marker: CompletionMarker, config: EncodeConfig, states: FileStates
) -> UnitIdentity | None:
    """Return the identity of a unit with a marker; None if an image left out can be read now.

    A unit that is costly to open is opened again only if its files have changed or if a flag may
    admit an image that was left out. All images are read only when a file has another size or time
    than before, and if none is gone that the shard holds. Raises UserError when texts have changed
    and such an image is gone.
    """
    before = marker.unit
    is_unchanged = states.sha256(unit.files) == before.files_sha256
    if is_unchanged and not unit.is_listed and not _may_be_admitted(marker, config):
        return before
    opened = open_with_identity(unit, config, states)
    left_out = [image for image in opened.images if image.image_id in marker.left_out]
    if any(isinstance(read_or_fail(image, config), DecodedImage) for image in left_out):
        return None
    if is_unchanged:
        return replace(before, texts_sha256=opened.texts_sha256)
    kept = [i for i in opened.images if i.file and i.image_id not in marker.left_out]
    is_there = [bool(states.find(image.file)) for image in kept]
    if not all(is_there):
        gone = f"{unit.name}: {is_there.count(False):,} of its image files are gone"
        if opened.texts_sha256 != before.texts_sha256:
            raise UserError(f"{gone}, so its new captions cannot be encoded; restore the images")
        if any(is_there):
            tqdm.write(f"warning: {gone}, so the others are not compared", file=sys.stderr)
        return before
    with ThreadPoolExecutor(config.num_workers) as pool:
        list(pool.map(_try_to_read, opened.images))
    return opened.identity()


def _may_be_admitted(marker: CompletionMarker, config: EncodeConfig) -> bool:
    """Whether a flag may admit an image that was left out, because the reason names the flag."""
    reasons = [failure.reason for failure in marker.failures]
    if not marker.size_limits.leave_out_more_than(config.size_limits):  # no flag has raised them
        reasons = [r for r in reasons if not any(flag in r for flag in SIZE_FLAGS)]
    return any("--" in reason for reason in reasons)


def _try_to_read(image: CaptionedImage) -> None:
    try:
        if not image.problem:
            image.read()
    except StoreError:
        raise
    except Exception:  # it has no digest then
        pass


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
