"""Source `webdataset`: tars of images with captions as img2dataset writes them, local or `s3://`."""

import fnmatch
import hashlib
import json
import os
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from data_pipeline.sources.base import CaptionedImage, Unit, shard_name
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES

REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Tar:
    """One input tar; `num_samples` comes from NNNNN_stats.json and is None without that file."""

    url: str
    num_bytes: int
    num_samples: int | None


class WebDatasetTars:
    """Captioned images in tars. Every tar becomes one shard; `samples_per_shard` has no effect.

    `images` is a folder or prefix, a pattern `FOLDER/*.tar`, or `FOLDER/{00000..00331}.tar`.
    A sample is `KEY.jpg` (or jpeg, png, webp) with its caption in `KEY.txt`, or under "caption" in
    `KEY.json`. Raises UserError when a tar is missing, and when `captions` is set.
    """

    classes = ()

    def __init__(self, images: str, captions: str | None) -> None:
        if captions is not None:
            raise UserError(f"captions: {captions} is set, but tars contain their captions")
        self._images = images
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            self._tars = list(pool.map(_describe_tar, _find_tars(images)))

    @property
    def sha256(self) -> str:
        """Hash of the names and sizes of the tars, because reading their content takes too long."""
        digest = hashlib.sha256()
        for tar in self._tars:
            digest.update(json.dumps([Path(tar.url).name, tar.num_bytes]).encode())
        return digest.hexdigest()

    def report(self) -> str:
        """Describe the numbers of tars and bytes, and of samples if there are statistics."""
        gigabytes = sum(tar.num_bytes for tar in self._tars) / 1e9
        counts = [tar.num_samples for tar in self._tars if tar.num_samples is not None]
        text = f"{self._images}: {len(self._tars):,} tars, {gigabytes:,.2f} GB"
        if counts:
            text += f"; {sum(counts):,} samples in the {len(counts):,} tars with statistics"
        return text

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Return one unit per tar, sorted by name; opening a unit downloads a remote tar."""
        return [
            Unit(
                name=shard_name(number),
                open=partial(open_tar, tar.url),
                num_images=tar.num_samples,
                is_listed=False,
            )
            for number, tar in enumerate(self._tars)
        ]


def _find_tars(images: str) -> list[str]:
    """Find the tars and sort their URLs. Raises UserError when a named tar is missing."""
    try:
        patterns = list(braceexpand(images))
    except ValueError as error:
        raise UserError(f"{images}: {error}") from None
    list_names = lru_cache(storage.list_names)
    urls: list[str] = []
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        if not name.endswith(".tar"):
            folder, name = pattern.rstrip("/"), "*.tar"
        found = fnmatch.filter(list_names(folder or "."), name)
        if not found:
            raise UserError(f"{pattern}: no such tar; give a folder of tars or a pattern of tars")
        urls += [f"{folder}/{tar}" if folder else tar for tar in found]
    return sorted(urls)


def _describe_tar(url: str) -> Tar:
    num_bytes, statistics = storage.file_size(url), url.removesuffix(".tar") + "_stats.json"
    assert num_bytes is not None, url
    content = storage.read_json(statistics) if storage.exists(statistics) else {}
    return Tar(url=url, num_bytes=num_bytes, num_samples=content.get("successes"))


def open_tar(url: str) -> list[CaptionedImage]:
    """List the images of a tar in order. Raises UserError if the tar is cut off or malformed."""
    file = _open_local(url)
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                members = samples.setdefault(folder + slash + stem, {})
                if suffix.lower() in members:
                    raise UserError(f"{url}: contains {member.name} twice")
                members[suffix.lower()] = member
            # tarfile accepts a tar that is cut off between two members. A complete tar ends with
            # a block of zeros.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            if end != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{url}: not a complete tar ({error}); download it again") from None
    images = [_build_image(key, members, file, url) for key, members in samples.items()]
    if len({image.key for image in images}) < len(images):
        raise UserError(f"{url}: two keys differ only by / and _; rename one")
    return images


def _open_local(url: str) -> IO[bytes]:
    """Open the tar or, if it is remote, a copy whose disk space is freed when it is closed."""
    if not storage.is_remote(url):
        return Path(url).open("rb")
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        copy = Path(folder, "input.tar")
        storage.download(url, copy)
        return copy.open("rb")


def _build_image(
    key: str, members: dict[str, tarfile.TarInfo], file: IO[bytes], url: str
) -> CaptionedImage:
    suffix = next((s.lstrip(".") for s in IMAGE_SUFFIXES if s.lstrip(".") in members), None)
    caption = _find_caption(key, members, file, url)
    if suffix is None or caption is None:
        missing = "image (jpg, png, webp)" if suffix is None else "caption (txt, or in json)"
        read = partial(_fail, f"the tar contains no {missing} for this key")
    else:
        read = partial(_read_member, file, members[suffix])
    return CaptionedImage(
        key=key.replace("/", "_"),
        image_id=key,
        name=f"{Path(url).name}/{key}",
        read=read,
        captions=(caption or "",),
    )


def _find_caption(
    key: str, members: dict[str, tarfile.TarInfo], file: IO[bytes], url: str
) -> str | None:
    try:
        if "txt" in members:
            return _read_member(file, members["txt"]).decode()
        if "json" in members:
            content = json.loads(_read_member(file, members["json"]))
            caption = content.get("caption")
            return caption if isinstance(caption, str) else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{url}: {key}: malformed caption ({error})") from None
    return None


def _read_member(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    # pread takes the offset as an argument, so threads can share the open file.
    return os.pread(file.fileno(), member.size, member.offset_data)


def _fail(reason: str) -> bytes:
    raise ValueError(reason)
