"""WebDataset tars of images with captions, as img2dataset writes them, local or `s3://`."""

import fnmatch
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from data_pipeline.sources.base import CaptionedImage, shard_name
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES

REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Tar:
    """One input tar; `num_samples` is what its NNNNN_stats.json says, None without one."""

    url: str
    num_bytes: int
    num_samples: int | None


class WebDatasetTars:
    """Every tar is one unit and becomes one shard, so `samples_per_shard` has no say.

    `images` is a folder or prefix, a pattern `FOLDER/*.tar`, or `FOLDER/{00000..00331}.tar`.
    A sample is `KEY.jpg` (or jpeg, png, webp) with its caption in `KEY.txt`, or under "caption" in
    `KEY.json`. Raises UserError when there is no such tar, or when captions are named apart.
    """

    classes = ()

    def __init__(self, images: str, captions: str | None) -> None:
        if captions is not None:
            raise UserError(f"captions: {captions} is set, but tars hold their captions themselves")
        self._images = images
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            self._tars = list(pool.map(_look_at, _find_tars(images)))

    @property
    def sha256(self) -> str:
        """Hash of the tars' names and sizes; their content is too much to read for it."""
        digest = hashlib.sha256()
        for tar in self._tars:
            digest.update(json.dumps([Path(tar.url).name, tar.num_bytes]).encode())
        return digest.hexdigest()

    def report(self) -> str:
        """Tars, bytes, and the number of samples where img2dataset's statistics tell it."""
        gigabytes = sum(tar.num_bytes for tar in self._tars) / 1e9
        counts = [tar.num_samples for tar in self._tars if tar.num_samples is not None]
        text = f"{self._images}: {len(self._tars):,} tars, {gigabytes:,.2f} GB"
        if counts:
            text += f"; {sum(counts):,} samples in the {len(counts):,} that have statistics"
        return text

    def units(self, samples_per_shard: int) -> list["TarUnit"]:
        """One unit a tar, sorted by name."""
        return [TarUnit(name=shard_name(n), tar=tar) for n, tar in enumerate(self._tars)]


@dataclass(frozen=True, kw_only=True)
class TarUnit:
    """One tar, downloaded as a whole when it is remote."""

    name: str
    tar: Tar
    is_listed: bool = False

    @property
    def num_images(self) -> int | None:
        """How many images img2dataset counted, if it did."""
        return self.tar.num_samples

    def open(self) -> Sequence[CaptionedImage]:
        """The images in the tar's order. Raises UserError for a tar that is cut or malformed."""
        file = _open_local(self.tar.url)
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        _add_member(samples, member, self.tar.url)
                # tarfile takes a cut between two members for the end; a real end is a zero block.
                end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
                if end != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
        except tarfile.TarError as error:
            raise UserError(f"{self.tar.url}: not a whole tar ({error}); get it again") from None
        images = [_build_image(key, held, file, self.tar.url) for key, held in samples.items()]
        if len({image.key for image in images}) < len(images):
            raise UserError(f"{self.tar.url}: keys that differ only by / and _; rename one")
        return images


def _find_tars(images: str) -> list[str]:
    """URLs of the tars, sorted. Raises UserError when one that is named is missing."""
    try:
        patterns = list(braceexpand(images))
    except ValueError as error:
        raise UserError(f"{images}: {error}") from None
    listings: dict[str, list[str]] = {}
    urls: list[str] = []
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        if not name.endswith(".tar"):
            folder, name = pattern.rstrip("/"), "*.tar"
        if folder not in listings:
            listings[folder] = storage.list_names(folder or ".")
        found = fnmatch.filter(listings[folder], name)
        if not found:
            raise UserError(
                f"{pattern}: no such tar; name a folder of tars, or a pattern of theirs"
            )
        urls += [f"{folder}/{tar}" if folder else tar for tar in found]
    return sorted(urls)


def _look_at(url: str) -> Tar:
    num_bytes, statistics = storage.file_size(url), url.removesuffix(".tar") + "_stats.json"
    assert num_bytes is not None, url
    content = storage.read_json(statistics) if storage.exists(statistics) else {}
    return Tar(url=url, num_bytes=num_bytes, num_samples=content.get("successes"))


def _open_local(url: str) -> IO[bytes]:
    """The tar, or a copy of it that vanishes when nobody holds the file any longer."""
    if not storage.is_remote(url):
        return Path(url).open("rb")
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        copy = Path(folder, "input.tar")
        storage.download(url, copy)
        return copy.open("rb")


def _add_member(
    samples: dict[str, dict[str, tarfile.TarInfo]], member: tarfile.TarInfo, url: str
) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    members = samples.setdefault(folder + slash + stem, {})
    if suffix.lower() in members:
        raise UserError(f"{url}: {member.name} is in it twice")
    members[suffix.lower()] = member


def _build_image(
    key: str, members: dict[str, tarfile.TarInfo], file: IO[bytes], url: str
) -> CaptionedImage:
    suffix = next((s.lstrip(".") for s in IMAGE_SUFFIXES if s.lstrip(".") in members), None)
    caption = _find_caption(key, members, file, url)
    if suffix is None or caption is None:
        missing = "image (jpg, png, webp)" if suffix is None else "caption (txt, or in json)"
        read = partial(_fail, f"the tar holds no {missing} of this key")
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
    # Not by seek and read: many threads share the file.
    return os.pread(file.fileno(), member.size, member.offset_data)


def _fail(reason: str) -> bytes:
    raise ValueError(reason)
